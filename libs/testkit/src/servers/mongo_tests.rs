//! A real server, started, killed and stopped.

use super::*;

#[test]
fn a_uri_is_taken_apart() {
    let address = |hosts: &str, options: &str| Address { hosts: hosts.into(), options: options.into() };
    assert_eq!(split("mongodb://h:1"), (address("mongodb://h:1", ""), None));
    let (uri, login) = split("mongodb+srv://a%40b:p%3Aq@x,y/admin?tls=true");
    assert_eq!(uri, address("mongodb+srv://x,y", "?tls=true"));
    assert_eq!(login, Some(("a@b".to_owned(), "p:q".to_owned())));
}

#[tokio::test]
async fn a_killed_server_has_what_it_answered_when_it_is_back() {
    let mut mongo = Mongo::start_with(MongoOptions::default().sync_on_commit()).await;
    let insert =
        doc! { "insert": "c", "documents": [{ "_id": 7 }], "writeConcern": { "w": "majority", "j": true } };
    assert_eq!(number(&mongo.command("d", insert).await, "n"), Some(1));
    mongo.kill();
    mongo.restart().await;
    let found = mongo.command("d", doc! { "count": "c" }).await;
    assert_eq!(number(&found, "n"), Some(1), "{found}");
}

#[tokio::test]
async fn a_stopped_server_is_silent_until_it_goes_on() {
    let mut mongo = Mongo::start().await;
    mongo.stop();
    let mut answer = Box::pin(call(mongo.port(), "admin", doc! { "ping": 1 }));
    assert!(timeout(Duration::from_millis(200), &mut answer).await.is_err());
    mongo.cont();
    assert!(is_ok(&answer.await.unwrap()));
}

#[tokio::test]
async fn a_fail_point_fails_one_command() {
    let mongo = Mongo::start_with(MongoOptions::default().test_commands()).await;
    let data = doc! { "failCommands": ["ping"], "errorCode": 91 };
    let arm = doc! { "configureFailPoint": "failCommand", "mode": { "times": 1 }, "data": data };
    mongo.command("admin", arm).await;
    let failed = call(mongo.port(), "admin", doc! { "ping": 1 }).await.unwrap();
    assert_eq!(number(&failed, "code"), Some(91), "{failed}");
    mongo.command("admin", doc! { "ping": 1 }).await;
}

#[tokio::test]
async fn tests_share_a_server_and_no_database() {
    let (one, two) = tokio::join!(Mongo::shared(), Mongo::shared());
    assert!(std::ptr::eq(one, two));
    let (a, b) = (one.database(), two.database());
    assert_ne!(a, b);
    assert!(one.uri(&a).contains(&a), "{}", one.uri(&a));
}
