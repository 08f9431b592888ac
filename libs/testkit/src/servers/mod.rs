//! Servers of others that tests run against: Redis, MongoDB or what speaks its protocol, and nginx. Each is a process
//! of its own on free ports of 127.0.0.1, with its data in a directory that goes away with it.

mod mongo;
mod nginx;
mod redis;
mod resp;

use std::{
    env,
    path::{Path, PathBuf},
};

pub use bson;
pub use mongo::{Mongo, MongoOptions};
pub use nginx::{Nginx, NginxOptions};
pub use redis::{Redis, RedisOptions, Snapshot};
pub use resp::Reply;

/// Where a program is, by the `PATH`.
fn on_path(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|folder| folder.join(name)).find(|path| is_program(path))
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}
