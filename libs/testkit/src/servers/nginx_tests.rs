use std::os::unix::fs::{MetadataExt, chown};

use super::*;

/// Whoever may do nothing.
const NOBODY: u32 = 65534;

fn rendered(options: NginxOptions) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let ports = LISTENERS.map(|_| free_port());
    let three = [21, 22, 23].map(local);
    render(directory.path(), options, &three, &three[..2], &ports);
    make_certificate(directory.path());
    directory
}

fn take_ownership(path: &Path) {
    chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    if path.is_dir() {
        fs::read_dir(path).unwrap().for_each(|entry| take_ownership(&entry.unwrap().path()));
    }
}

#[tokio::test]
async fn the_configuration_and_its_variant_for_many_sources_are_good() {
    let several = NginxOptions::default().copy("variants/source_addresses.conf", "upstreams/sources.conf");
    for options in [NginxOptions::default(), several] {
        let directory = rendered(options);
        let finished = test(&program(), directory.path(), directory.path(), None).await;
        assert_eq!(finished.code, Some(0), "{finished:#?}");
        // Of the system's limits, and of nothing else.
        let about_limits =
            |line: &str| line.contains("open file resource limit") || line.contains("nginx: the ");
        let others: Vec<_> =
            finished.stderr.lines().filter(|line| line.contains("[") && !about_limits(line)).collect();
        assert!(others.is_empty(), "{others:?}");
    }
}

#[tokio::test]
async fn it_needs_no_privileges() {
    let directory = rendered(NginxOptions::default());
    let logs = directory.path().join("logs");
    fs::create_dir(&logs).unwrap();
    // Whose standard output it is, may open it.
    for kind in ["out", "err"] {
        fs::write(logs.join(format!("test.{kind}")), "").unwrap();
    }
    let user = (fs::metadata("/proc/self").unwrap().uid() == 0).then_some(NOBODY);
    if user.is_some() {
        take_ownership(directory.path());
    }
    let finished = test(&program(), directory.path(), &logs, user).await;
    assert_eq!(finished.code, Some(0), "{finished:#?}");
}

#[tokio::test]
async fn a_broken_configuration_is_told() {
    let directory = rendered(NginxOptions::default().edit("nginx.conf", "worker_processes", "workers"));
    test(&program(), directory.path(), directory.path(), None)
        .await
        .failed_with(&["unknown directive \"workers\"", "nginx.conf"]);
}

#[test]
fn only_the_servers_of_an_upstream_are_replaced() {
    let directory = rendered(NginxOptions::default());
    let edges = fs::read_to_string(directory.path().join("upstreams/edges.conf")).unwrap();
    for port in [21, 22, 23] {
        assert!(edges.contains(&format!("    server 127.0.0.1:{port} max_fails=0;\n")), "{edges}");
    }
    assert!(!edges.contains("edge-") && edges.contains("hash $sticky_key consistent;"), "{edges}");
    let deliveries = fs::read_to_string(directory.path().join("upstreams/deliveries.conf")).unwrap();
    assert_eq!(deliveries.matches("server 127.0.0.1:").count(), 2, "{deliveries}");
}

#[tokio::test]
async fn it_is_up_with_its_workers_and_gone_with_them() {
    let mut nginx = Nginx::start(&[], &[]).await;
    let health = format!("{}/healthz", nginx.status());
    let (first, master) = (nginx.workers(), nginx.process.id());
    assert_eq!(first.len(), WORKERS);
    nginx.reload().await;
    assert!(nginx.workers().is_disjoint(&first));
    assert_eq!(Wire::get(&health).await.body, "ok\n");
    let workers = nginx.workers();
    drop(nginx);
    eventually("nobody is left", PATIENCE, async || {
        let lives = |id: &u32| title(*id).is_some_and(|title| title.starts_with("nginx: "));
        (!workers.iter().chain([&master]).any(lives)).then_some(())
    })
    .await;
    assert_eq!(Wire::get(&health).await.status, 0);
}

#[tokio::test]
async fn its_workers_die_with_the_test_process() {
    // This test's binary runs itself, as a parent that starts nginx and is killed.
    const ROLE: &str = "TESTKIT_NGINX_PARENT";
    if std::env::var_os(ROLE).is_some() {
        let nginx = Nginx::start(&[], &[]).await;
        let ids: Vec<_> = nginx.workers().iter().map(u32::to_string).collect();
        eprintln!("workers {}", ids.join(" "));
        std::future::pending::<()>().await;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "servers::nginx::tests::its_workers_die_with_the_test_process", "--nocapture"]);
    command.env(ROLE, "").stdout(Stdio::null()).stderr(Stdio::piped());
    let mut parent = crate::spawn::spawn(command).unwrap();
    let lines = io::BufRead::lines(io::BufReader::new(parent.stderr.take().unwrap()));
    let ids = lines.map_while(Result::ok).find_map(|line| line.strip_prefix("workers ").map(str::to_owned));
    let ids: Vec<u32> = ids.unwrap().split(' ').map(|id| id.parse().unwrap()).collect();
    assert!(ids.len() == WORKERS && ids.iter().all(|id| title(*id).is_some()), "{ids:?}");
    parent.kill().unwrap();
    parent.wait().unwrap();
    let gone = async || ids.iter().all(|id| title(*id).is_none_or(|title| title.is_empty())).then_some(());
    eventually("the workers are gone", PATIENCE, gone).await;
}
