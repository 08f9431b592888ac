mod fake;

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use sanjay_client::{
    Backend, BackendError, BackendOptions, Jitter, PublishOptions,
    protocol::{ErrorCode, Payload},
};
use sanjay_proto::delivery::v1::{
    DeadLetterFilter, JoinResponse, LeaveResponse, ListDeliveriesRequest, PurgeDeadLettersRequest,
    PurgeDeadLettersResponse, ReceiptsRequest, RedriveDeadLettersRequest, RedriveDeadLettersResponse,
    WatchDeliveriesRequest, delivery_server::DeliveryServer, watch_deliveries_response,
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, Request, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use self::fake::{Answer, Fake};
use crate::soon;

async fn serve(fake: Fake, listener: TcpListener) -> tokio::task::JoinHandle<()> {
    let checked = DeliveryServer::with_interceptor(fake, |request: Request<()>| {
        match request.metadata().get("authorization").map(|key| key.as_bytes()) {
            Some(b"Bearer right") => Ok(request),
            _ => Err(Status::unauthenticated("unknown API key")),
        }
    });
    tokio::spawn(async move {
        let router = tonic::transport::Server::builder().add_service(checked);
        router.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
    })
}

fn options(address: SocketAddr, key: &str) -> BackendOptions {
    BackendOptions {
        jitter: Jitter::from_source(|| 0.01),
        ..BackendOptions::new(format!("http://{address}"), key)
    }
}

async fn start() -> (Fake, Backend) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let fake = Fake::default();
    serve(fake.clone(), listener).await;
    (fake, soon(Backend::connect(options(address, "right"))).await.unwrap())
}

fn hi() -> Payload {
    Payload::Text("hi".into())
}

fn away() -> Answer {
    Answer::Fail(Status::unavailable("the store is away"))
}

#[tokio::test]
async fn a_key_makes_a_call_repeatable() {
    let (fake, backend) = start().await;
    fake.next([away(), Answer::Fail(Status::deadline_exceeded("late"))]);
    let sent = soon(backend.send(&["bob"], hi(), "key")).await.unwrap();
    assert_eq!(sent[0].result.as_ref().unwrap().message_id, "id of bob");
    assert_eq!(fake.asked().len(), 3);

    fake.next([away()]);
    let unknown = soon(backend.send(&["bob"], hi(), "")).await;
    assert!(matches!(&unknown, Err(BackendError::Broken(_))), "{unknown:?}");
    fake.next([away()]);
    assert!(soon(backend.publish("news", hi(), "")).await.is_err());
    assert_eq!(fake.asked().len(), 2, "without a key nothing is repeated");

    fake.next([away()]);
    assert_eq!(soon(backend.publish("news", hi(), "key")).await.unwrap().offset, 1);
    fake.asked();
    fake.next([Answer::Fail(Status::already_exists("the key was used"))]);
    let refused = soon(backend.send(&["bob"], hi(), "key")).await;
    assert!(matches!(refused, Err(BackendError::Refused(e)) if e.code == ErrorCode::AlreadyExists));
    assert_eq!(fake.asked().len(), 1, "what is refused is not repeated");
}

#[tokio::test]
async fn a_call_is_not_repeated_before_the_server_wants_it() {
    let (fake, backend) = start().await;
    let after = Duration::from_millis(400);
    let details = ErrorDetails::with_retry_info(Some(after));
    fake.next([Answer::Fail(Status::with_error_details(Code::Unavailable, "the store is away", details))]);
    let began = Instant::now();
    soon(backend.publish("news", hi(), "key")).await.unwrap();
    assert!(began.elapsed() >= after, "{:?}", began.elapsed());
    assert_eq!(fake.asked().len(), 2);
}

#[tokio::test]
async fn only_users_who_have_not_accepted_are_asked_again() {
    let (fake, backend) = start().await;
    fake.next([Answer::AllBut(&["b", "c"]), away(), Answer::AllBut(&["c"])]);
    let sent = soon(backend.send(&["a", "b", "c"], hi(), "key")).await.unwrap();
    let users: Vec<&str> = sent.iter().map(|result| result.user.as_str()).collect();
    assert_eq!(users, ["a", "b", "c"]);
    assert!(sent.iter().all(|result| result.result.is_ok()));
    assert_eq!(fake.asked(), [vec!["a", "b", "c"], vec!["b", "c"], vec!["b", "c"], vec!["c"]]);

    fake.next([Answer::AllBut(&["b"])]);
    let sent = soon(backend.send(&["a", "b"], hi(), "")).await.unwrap();
    assert!(sent[0].result.is_ok());
    assert_eq!(sent[1].result.as_ref().unwrap_err().code, ErrorCode::Unavailable);
    assert_eq!(fake.asked().len(), 1);
}

#[tokio::test]
async fn streams_answer_in_order() {
    let (fake, backend) = start().await;
    let mut publishes = backend.publish_stream();
    let mut pending = Vec::new();
    for number in 0..3_000 {
        let channel = if number == 7 { "bad".to_owned() } else { format!("channel {number}") };
        pending.push(soon(publishes.publish(&channel, hi(), "")).await.unwrap());
    }
    drop(publishes);
    for (number, reply) in pending.into_iter().enumerate() {
        match soon(reply.wait()).await {
            Ok(published) => assert_eq!(published.message_id, format!("channel {number}")),
            Err(error) => {
                assert!(number == 7 && matches!(error, BackendError::Refused(_)), "{number}: {error}")
            }
        }
    }

    let mut sends = backend.send_stream();
    let first = soon(sends.send(&["bob"], hi(), "")).await.unwrap();
    assert!(soon(first.wait()).await.unwrap()[0].result.is_ok());
    fake.next([Answer::Fail(Status::unauthenticated("the key was revoked"))]);
    let second = soon(sends.send(&["bob"], hi(), "")).await.unwrap();
    let ended = soon(second.wait()).await;
    assert!(matches!(&ended, Err(BackendError::WrongKey { .. })), "{ended:?}");
}

#[tokio::test]
async fn lookups_say_what_is_there() {
    let (_fake, backend) = start().await;
    assert_eq!(soon(backend.get_delivery("bob", "id")).await.unwrap(), None);
    assert_eq!(soon(backend.get_trace("id")).await.unwrap().missing, ["router"]);
}

#[tokio::test]
async fn calls_for_dead_letters_are_repeated_and_go_on_to_the_end() {
    let (fake, backend) = start().await;
    let filter = DeadLetterFilter { user: "bob".into(), ..DeadLetterFilter::default() };
    fake.next([away()]);
    let page = soon(backend.list_dead_letters(&filter, 7, "token")).await.unwrap();
    assert_eq!(page.next_page_token, "token and 7");
    assert_eq!(fake.asked().len(), 2);
    assert_eq!(soon(backend.get_dead_letter("bob", "id")).await.unwrap(), None);
    let purge = PurgeDeadLettersRequest { filter: Some(filter), ..PurgeDeadLettersRequest::default() };
    let counted = PurgeDeadLettersRequest { dry_run: true, ..purge.clone() };
    let counted = soon(backend.purge_dead_letters(counted)).await.unwrap();
    assert_eq!(counted, PurgeDeadLettersResponse { purged: 2, more: true });
    fake.asked();
    let purged = soon(backend.purge_dead_letters(purge)).await.unwrap();
    assert_eq!(purged, PurgeDeadLettersResponse { purged: 6, more: false });
    assert_eq!(fake.asked(), [["bob"]; 3]);
}

#[tokio::test]
async fn members_join_again_and_durable_publishes_are_repeated_with_a_key_alone() {
    let (fake, backend) = start().await;
    let away = || Answer::Fail(Status::unavailable("away"));
    fake.next([away()]);
    let joined = soon(backend.join("news", &["bob", "eve"])).await.unwrap();
    assert_eq!(joined, JoinResponse { joined: 2, members: 7 });
    assert_eq!(fake.asked(), [["news", "bob", "eve"]; 2]);
    fake.next([away()]);
    let left = soon(backend.leave("news", &["bob"])).await.unwrap();
    assert_eq!(left, LeaveResponse { left: 1, members: 5 });
    assert_eq!(fake.asked().len(), 2);
    let page = soon(backend.list_members("news", 7, "token")).await.unwrap();
    assert_eq!((page.users, page.next_page_token.as_str()), (vec!["news".to_owned()], "token and 7"));
    fake.next([away()]);
    let text = || Payload::Text("x".to_owned());
    let options = PublishOptions { dedupe_key: "key".to_owned(), ..PublishOptions::default() };
    let published = soon(backend.publish_durable("news", text(), &options)).await.unwrap();
    assert_eq!((published.publication, published.members, published.duplicate), (3, 7, true));
    assert_eq!(fake.asked().len(), 2);
    fake.next([Answer::Fail(Status::unavailable("half-way"))]);
    let lost = soon(backend.publish_durable("news", text(), &PublishOptions::default())).await;
    assert!(lost.is_err(), "{lost:?}");
    assert_eq!(fake.asked().len(), 1);
}

#[tokio::test]
async fn a_redrive_that_was_cut_off_is_told_from_one_that_is_done() {
    let (fake, backend) = start().await;
    let far = |redriven, done| {
        Ok(RedriveDeadLettersResponse { redriven, done, ..RedriveDeadLettersResponse::default() })
    };
    let cases = [
        (vec![far(1, false), far(2, true)], Ok(())),
        (vec![far(1, false)], Err("the server ended the redrive early")),
        (vec![far(1, false), Err(Status::unavailable("the store is away"))], Err("the store is away")),
    ];
    for (answers, expected) in cases {
        let count = answers.iter().filter(|answer| answer.is_ok()).count() as u64;
        *fake.redrive.lock().unwrap() = answers;
        let request = RedriveDeadLettersRequest::default();
        let mut redrive = soon(backend.redrive_dead_letters(request)).await.unwrap();
        for redriven in 1..=count {
            assert_eq!(soon(redrive.next()).await.unwrap().unwrap().redriven, redriven);
        }
        match (soon(redrive.next()).await, expected) {
            (None, Ok(())) => {}
            (Some(Err(error)), Err(text)) => {
                assert!(matches!(error, BackendError::CutOff(_)), "{error:?}");
                let error = error.to_string();
                assert!(error.contains(text) && error.contains("repeat the redrive"), "{error}");
            }
            (other, _) => panic!("{other:?}"),
        }
        assert_eq!(soon(redrive.next()).await, None);
    }
}

#[tokio::test]
async fn a_stream_of_receipts_that_broke_goes_on_from_its_cursor() {
    let (fake, backend) = start().await;
    let request = ReceiptsRequest { cursor: "0".into(), ..ReceiptsRequest::default() };
    let mut whole = soon(backend.receipts(request.clone())).await.unwrap();
    assert_eq!(whole.cursor(), "0");
    for expected in ["01", "02"] {
        assert_eq!(soon(whole.next()).await.unwrap().unwrap().cursor, expected);
        assert_eq!(whole.cursor(), expected);
    }
    assert_eq!(soon(whole.next()).await, None);
    let mut followed = soon(backend.receipts(ReceiptsRequest { follow: true, ..request })).await.unwrap();
    for _ in 1..=2 {
        assert!(soon(followed.next()).await.unwrap().is_ok());
    }
    let broken = soon(followed.next()).await.unwrap().unwrap_err();
    assert!(matches!(broken, BackendError::StreamEnded(_)), "{broken:?}");
    assert!(broken.to_string().contains("shuts down; open the stream again"), "{broken}");
    assert_eq!((soon(followed.next()).await, followed.cursor()), (None, "02"));
    let old = ReceiptsRequest { cursor: "old".into(), ..ReceiptsRequest::default() };
    let refused = soon(backend.receipts(old)).await.unwrap_err();
    assert_eq!(refused.to_string(), "receipts behind it are gone");

    fake.next([Answer::Fail(Status::unavailable("away"))]);
    let request = ListDeliveriesRequest { user: "bob".into(), page_token: "1".into(), ..Default::default() };
    let page = soon(backend.list_deliveries(request)).await.unwrap();
    assert_eq!(page.next_page_token, "1 and more");
    assert_eq!(fake.asked(), [["bob"], ["bob"]], "it is repeated");
    let mut events = soon(backend.watch_deliveries(WatchDeliveriesRequest::default())).await.unwrap();
    let told = soon(events.next()).await.unwrap().unwrap();
    assert!(matches!(told, watch_deliveries_response::Result::Event(event) if event.user == "bob"));
    let told = soon(events.next()).await.unwrap().unwrap();
    assert_eq!(told, watch_deliveries_response::Result::Missed(3));
    assert_eq!(soon(events.next()).await, None);
}

#[tokio::test]
async fn errors_name_what_to_do() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let closed = soon(Backend::connect(options(address, "right"))).await.unwrap_err();
    assert!(closed.to_string().starts_with(&format!("no server answers at http://{address}: ")), "{closed}");

    let listener = TcpListener::bind(address).await.unwrap();
    serve(Fake::default(), listener).await;
    let backend = soon(Backend::connect(options(address, "wrong"))).await.unwrap();
    let refused = soon(backend.publish("news", hi(), "")).await.unwrap_err();
    assert!(matches!(&refused, BackendError::WrongKey { .. }), "{refused}");

    for (endpoint, text) in [("127.0.0.1:8082", "does not begin with http://"), ("https://here", "TLS")] {
        let error = Backend::connect(BackendOptions::new(endpoint, "key")).await.unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
    }
    let error = Backend::connect(BackendOptions::new("http://here", "k\n")).await.unwrap_err();
    assert!(error.to_string().contains("API key"), "{error}");
}

/// A server with its address, and the task that serves.
async fn server() -> (Fake, SocketAddr, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let fake = Fake::default();
    let serving = serve(fake.clone(), listener).await;
    (fake, address, serving)
}

#[tokio::test]
async fn calls_go_on_with_the_next_server_without_a_pause() {
    let (one, address_one, _serving_one) = server().await;
    let (two, address_two, _serving_two) = server().await;
    let options = BackendOptions {
        // Whoever is named first is used first, and a pause would outlast the test.
        jitter: Jitter::from_source(|| 0.0),
        ..BackendOptions::new(format!("http://{address_one}, http://{address_two}"), "right")
    };
    let backend = soon(Backend::connect(options)).await.unwrap();
    soon(backend.send(&["bob"], hi(), "")).await.unwrap();
    assert_eq!((one.asked().len(), two.asked().len()), (1, 0));

    // Without a key what may have been done is not repeated, but the next call goes elsewhere.
    one.next([away()]);
    assert!(matches!(soon(backend.send(&["bob"], hi(), "")).await, Err(BackendError::Broken(_))));
    soon(backend.send(&["bob"], hi(), "")).await.unwrap();
    assert_eq!((one.asked().len(), two.asked().len()), (1, 1));
    two.next([away()]);
    soon(backend.send(&["bob"], hi(), "key")).await.unwrap();
    assert_eq!((one.asked().len(), two.asked().len()), (1, 1), "with a key it is repeated there");

    let mut sends = backend.send_stream();
    let reply = soon(sends.send(&["bob"], hi(), "")).await.unwrap();
    soon(reply.wait()).await.unwrap();
    assert_eq!(one.asked().len(), 1);
    one.next([away()]);
    let reply = soon(sends.send(&["bob"], hi(), "")).await.unwrap();
    assert!(soon(reply.wait()).await.is_err());
    assert!(soon(sends.send(&["bob"], hi(), "")).await.is_err(), "a stream stays with its server");
    assert_eq!((one.asked().len(), two.asked().len()), (1, 0));
    let mut sends = backend.send_stream();
    let reply = soon(sends.send(&["bob"], hi(), "")).await.unwrap();
    soon(reply.wait()).await.unwrap();
    soon(backend.publish("news", hi(), "")).await.unwrap();
    assert_eq!((one.asked().len(), two.asked().len()), (0, 2));
}

#[tokio::test]
async fn one_server_that_answers_is_enough_to_connect() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gone = listener.local_addr().unwrap();
    drop(listener);
    let (fake, address, _serving) = server().await;
    let list = format!("http://{gone},http://{address}");
    let options =
        BackendOptions { jitter: Jitter::from_source(|| 0.0), ..BackendOptions::new(list, "right") };
    let backend = soon(Backend::connect(options)).await.unwrap();
    soon(backend.send(&["bob"], hi(), "")).await.unwrap();
    assert_eq!(fake.asked().len(), 1);

    let error =
        soon(Backend::connect(BackendOptions::new(format!("http://{gone},http://{gone}"), "right"))).await;
    let text = error.unwrap_err().to_string();
    assert!(text.starts_with(&format!("no server answers at http://{gone}, http://{gone}: ")), "{text}");
    let none = soon(Backend::connect(BackendOptions::new(" ,", "right"))).await.unwrap_err();
    assert!(none.to_string().contains("no address"), "{none}");
}

#[tokio::test]
async fn a_request_that_was_not_sent_is_repeated_without_a_key() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let first = serve(Fake::default(), listener).await;
    let options = BackendOptions { timeout: Duration::from_secs(5), ..options(address, "right") };
    let backend = soon(Backend::connect(options)).await.unwrap();
    soon(backend.publish("news", hi(), "")).await.unwrap();
    first.abort();
    let _ = first.await;
    let again = tokio::spawn(async move {
        // The lost connection itself may surface once; a refused connect never does.
        match backend.publish("news", hi(), "").await {
            Err(BackendError::Broken(_)) => backend.publish("news", hi(), "").await,
            other => other,
        }
    });
    let listener = soon(async {
        loop {
            match TcpListener::bind(address).await {
                Ok(listener) => break listener,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    })
    .await;
    serve(Fake::default(), listener).await;
    soon(again).await.unwrap().unwrap();
}
