//! Clients that are not ours: Python's `websockets`, and `grpcio` through reflection without generated code.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use sanjay_testkit::{API_KEY, Cluster, Process, Standalone, Token, within};

pub(crate) fn python() -> PathBuf {
    let path = match env::var_os("SANJAY_PYTHON") {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python"),
    };
    assert!(path.is_file(), "no {}: run tests/run once: it makes tests/.venv", path.display());
    path
}

/// Starts a script of `tests/python` against a server.
fn script(name: &str, url: &str, server: &str, logs: &Path) -> Process {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("python").join(name);
    let mut command = Command::new(python());
    command.arg("-B").arg(path).env("PYTHONUNBUFFERED", "1");
    command.env("SANJAY_URL", url).env("SANJAY_SERVER", server).env("SANJAY_API_KEY", API_KEY);
    for user in ["ann", "bob"] {
        command.env(format!("TOKEN_{}", user.to_uppercase()), Token::of(user).sign());
    }
    Process::spawn(name, command, logs)
}

async fn succeeds(mut script: Process) {
    let status = script.wait(Duration::from_secs(60)).await;
    assert_eq!(status.code(), Some(0), "{}\n{}", script.stdout(), script.stderr());
    assert!(script.stdout().ends_with("done\n"), "{}", script.stdout());
}

#[tokio::test]
async fn python_does_the_tour() {
    within(90, "the tour in Python", async {
        let mut server = Standalone::start().await;
        let logs = server.data_dir();
        succeeds(script("live.py", server.url(), server.server(), &logs)).await;
        succeeds(script("send_offline.py", server.url(), server.server(), &logs)).await;
        server.restart().await;
        succeeds(script("receive_once.py", server.url(), server.server(), &logs)).await;
    })
    .await;
}

#[tokio::test]
async fn python_does_the_tour_with_three_processes() {
    within(90, "the tour in Python over three processes", async {
        let mut cluster = Cluster::start().await;
        let logs = cluster.directory().to_owned();
        let (url, server) = (cluster.url(), cluster.server());
        succeeds(script("live.py", &url, &server, &logs)).await;
        succeeds(script("send_offline.py", &url, &server, &logs)).await;
        cluster.restart(sanjay_testkit::Role::Delivery).await;
        succeeds(script("receive_once.py", &url, &server, &logs)).await;
    })
    .await;
}
