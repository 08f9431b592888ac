//! Starting child processes that cannot outlive the test that started them.

use std::{
    io,
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        mpsc::{self, Sender},
    },
};

type Order = (Command, Sender<io::Result<Child>>);

/// Starts a process that the kernel kills when this one ends, however it ends.
///
/// # Errors
/// When it cannot be started.
pub(crate) fn spawn(command: Command) -> io::Result<Child> {
    let (answer, answered) = mpsc::channel();
    spawner().send((command, answer)).map_err(io::Error::other)?;
    answered.recv().map_err(io::Error::other)?
}

/// The thread that starts all of them. The kernel takes the end of the starting *thread* for the parent's death, and
/// tests' threads end before what they share does; this one lasts as long as the process.
fn spawner() -> &'static Sender<Order> {
    static SPAWNER: OnceLock<Sender<Order>> = OnceLock::new();
    SPAWNER.get_or_init(|| {
        let (orders, received) = mpsc::channel::<Order>();
        let run = move || {
            for (command, answer) in received {
                // Who asked has gone only if its test has panicked; the child then is dropped, and dies with us.
                let _ = answer.send(spawn_bound(command));
            }
        };
        std::thread::Builder::new().name("spawner".to_owned()).spawn(run).expect("a thread can be started");
        orders
    })
}

#[expect(unsafe_code, reason = "there is no safe call that binds a child's life to its parent's")]
fn spawn_bound(mut command: Command) -> io::Result<Child> {
    let parent = libc::pid_t::try_from(std::process::id()).expect("a process id fits");
    let bind = move || {
        // SAFETY: both calls take numbers, allocate nothing and are allowed between fork and exec.
        let (bound, now) =
            unsafe { (libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong), libc::getppid()) };
        if bound != 0 {
            return Err(io::Error::last_os_error());
        }
        // The parent may have died before the kernel knew what to do then.
        if now == parent { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    };
    // SAFETY: `bind` makes two system calls and builds errors that need no memory.
    unsafe { command.pre_exec(bind) };
    command.spawn()
}

/// Removes a directory once this process has ended, however it ends: for what lasts as long as the process, which
/// drops nothing at its end.
///
/// # Panics
/// When there is no shell.
#[expect(clippy::zombie_processes, reason = "it ends after us")]
pub(crate) fn remove_at_exit(directory: &Path) {
    // Its input ends when we do. What it removes may still be written to while the writer dies, hence the repeats.
    const SCRIPT: &str = r#"trap '' INT; read -r _; for _ in 1 2 3 4 5; do rm -rf -- "$0" && break; done"#;
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(SCRIPT).arg(directory);
    shell.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut shell = shell.spawn().expect("there is a shell");
    std::mem::forget(shell.stdin.take());
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::wait::eventually;

    /// Whether a process runs; one that ended and was not waited for does not.
    fn lives(id: u32) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
    }

    #[test]
    fn a_child_outlives_the_thread_that_asked_for_it() {
        let mut sleep = Command::new("sleep");
        sleep.arg("60");
        let mut child = std::thread::spawn(|| spawn(sleep).unwrap()).join().unwrap();
        assert!(lives(child.id()) && child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[tokio::test]
    async fn a_child_dies_with_the_process() {
        // This test's binary runs itself, as a parent that starts a child and is killed.
        const ROLE: &str = "TESTKIT_SPAWN_PARENT";
        if std::env::var_os(ROLE).is_some() {
            let mut sleep = Command::new("sleep");
            sleep.arg("60");
            eprintln!("child {}", spawn(sleep).unwrap().id());
            std::thread::park();
        }
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "spawn::tests::a_child_dies_with_the_process", "--nocapture"]);
        command.env(ROLE, "").stdout(Stdio::null()).stderr(Stdio::piped());
        let mut parent = spawn(command).unwrap();
        let lines = io::BufRead::lines(io::BufReader::new(parent.stderr.take().unwrap()));
        let child = lines.map_while(Result::ok).find_map(|line| line.strip_prefix("child ")?.parse().ok());
        let child: u32 = child.expect("the parent says which child it has");
        assert!(lives(child));
        parent.kill().unwrap();
        parent.wait().unwrap();
        eventually("the child is gone", Duration::from_secs(10), async || (!lives(child)).then_some(()))
            .await;
    }
}
