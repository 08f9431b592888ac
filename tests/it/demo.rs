//! The demos: small products that run by themselves on a server, and keep books about what arrives.

use std::{collections::BTreeMap, time::Duration};

use sanjay_testkit::{Finished, Sanjay, Standalone, TOKEN_SECRET, eventually, within};

const PATIENCE: Duration = Duration::from_secs(20);

/// A demo that finds its server through variables, as in a container.
fn demo(server: &Standalone, arguments: &[&str]) -> Sanjay {
    server.cli([&["demo"], arguments].concat()).env("SANJAY_EDGE__TOKEN_SECRET", TOKEN_SECRET)
}

/// The figures of a line such as `chat: …, sent=3 received=9 lost=0`.
fn figures(line: &str) -> BTreeMap<String, u64> {
    let pairs = line.split_whitespace().filter_map(|word| word.split_once('='));
    pairs.map(|(name, value)| (name.to_owned(), value.parse().unwrap_or_else(|_| panic!("{line}")))).collect()
}

/// The figures of the last line of a demo that went well.
fn ended(finished: Finished, what: &str) -> BTreeMap<String, u64> {
    let printed = finished.succeeded();
    let last = printed.lines().last().unwrap_or_default();
    assert!(last.starts_with(&format!("{what} ended: ")), "{printed}");
    let figures = figures(last);
    assert_eq!((figures["lost"], figures["failed"]), (0, 0), "{printed}");
    figures
}

#[tokio::test]
async fn people_talk_and_hear_each_other() {
    within(60, "the chat demo", async {
        let server = Standalone::start().await;
        let chat = ["chat", "--people", "6", "--rooms", "2", "--rate", "20", "--for", "3s"];
        let figures = ended(demo(&server, &chat).run().await, "chat");
        assert!(figures["sent"] > 10, "{figures:?}");
        assert_eq!(figures["missed"], 0, "{figures:?}");
        // Three people are in each room, and hear themselves too. Who is not in yet hears nothing.
        assert!(figures["received"] > figures["sent"], "{figures:?}");
        assert!(figures["received"] <= 3 * figures["sent"], "{figures:?}");
    })
    .await;
}

#[tokio::test]
async fn notifications_reach_users_who_come_and_go() {
    within(60, "the notifications demo", async {
        let server = Standalone::start().await;
        let notifications = ["notifications", "--users", "4", "--rate", "20", "--for", "7s"];
        let figures = ended(demo(&server, &notifications).run().await, "notifications");
        // Every second user goes away after 4 s, and what was sent to them then waits until the end.
        assert!(figures["sent"] > 50, "{figures:?}");
        assert_eq!((figures["received"], figures["waiting"]), (figures["sent"], 0), "{figures:?}");
        assert_eq!(figures["repeated"], 0, "{figures:?}");
    })
    .await;
}

#[tokio::test]
async fn demos_survive_a_restart_and_end_on_a_signal() {
    within(120, "demos over a restart", async {
        let mut server = Standalone::start().await;
        let mut chat = demo(&server, &["chat", "--rate", "20"]).spawn();
        let mut notifications = demo(&server, &["notifications", "--rate", "20"]).spawn();
        let line = |text: &str| text.lines().last().map(figures).unwrap_or_default();
        eventually("both demos report", PATIENCE, async || {
            let reports = [line(&chat.stdout()), line(&notifications.stdout())];
            reports.iter().all(|figures| figures.get("sent").is_some_and(|sent| *sent > 0)).then_some(())
        })
        .await;
        let before = line(&notifications.stdout())["received"];
        server.restart().await;
        eventually("both demos go on", PATIENCE, async || {
            let chatting = chat.stdout().lines().count() > 2;
            let sent = line(&notifications.stdout())["received"];
            (chatting && sent > before + 20).then_some(())
        })
        .await;
        for demo in [&mut chat, &mut notifications] {
            let status = demo.terminate(PATIENCE).await;
            assert_eq!(status.code(), Some(0), "{}\n{}", demo.stdout(), demo.stderr());
            assert!(
                demo.stdout().contains(" ended: ") && demo.stdout().contains("lost=0"),
                "{}",
                demo.stdout()
            );
        }
        // The channel's epoch ended with the process, and everybody was told.
        let last = line(&chat.stdout());
        assert_eq!(last["lost"], 0, "{last:?}");
    })
    .await;
}

#[tokio::test]
async fn what_is_wrong_with_a_demos_options_is_said() {
    within(60, "demos with wrong options", async {
        let server = Standalone::start().await;
        for kind in ["chat", "notifications"] {
            let wrong = demo(&server, &[kind]).env("SANJAY_EDGE__TOKEN_SECRET", "x".repeat(40));
            wrong.run().await.failed_with(&["4401", "SANJAY_EDGE__TOKEN_SECRET"]);
            Sanjay::new(["demo", kind]).run().await.failed_with(&["sanjay standalone", "SANJAY_URL"]);
            for (flag, value) in [("--rate", "0"), ("--rate", "101"), ("--for", "1d")] {
                let finished = Sanjay::new(["demo", kind, flag, value]).run().await;
                assert_eq!(finished.code, Some(2), "{finished:?}");
                finished.failed_with(&[flag]);
            }
        }
        let key = demo(&server, &["notifications"]).env("SANJAY_API_KEY", "another key");
        key.run().await.failed_with(&["refused the API key", "--api-key"]);
    })
    .await;
}
