//! Failed attempts, and the calls for the dead letters that they end in.

use sanjay_proto::edge::v1::{FailedAttempt, FailureKind, Rewritten};

use super::*;

fn failed(seq: u64, delivery: u32, kind: FailureKind) -> FailedAttempt {
    FailedAttempt { seq, delivery, kind: kind.into(), ..FailedAttempt::default() }
}

impl Node {
    async fn report(&self, acks: Vec<UserAck>) -> Result<Vec<UserAckResult>, Status> {
        let response = self.inbox().ack(AckRequest { acks, edge: "edge-1".into() }).await?;
        Ok(response.into_inner().results)
    }

    /// An edge reports failed attempts.
    async fn fail(&self, user: &str, epoch: u64, failed: Vec<FailedAttempt>) {
        let written = failed.iter().map(|failed| failed.seq).max().unwrap_or_default();
        let session = vec![7; 16].into();
        let ack = UserAck { user: user.into(), epoch, written, failed, session, ..UserAck::default() };
        assert_eq!(self.report(vec![ack]).await.unwrap()[0].error, None);
    }

    /// Sends to a user, and has a client give the message up.
    async fn kill(&self, user: &str, body: &str) -> String {
        let results = self.api().send(send(&[user], body, "")).await.unwrap().into_inner().results;
        let Accepted { message_id, seq, .. } = accepted(&results[0]).clone();
        let epoch = self.read(user).await.epoch;
        let term = FailedAttempt { reason: "kaputt".into(), ..failed(seq, 1, FailureKind::Term) };
        self.fail(user, epoch, vec![term]).await;
        message_id
    }

    async fn list(&self, filter: DeadLetterFilter) -> Vec<DeadLetter> {
        let request = ListDeadLettersRequest { filter: Some(filter), ..ListDeadLettersRequest::default() };
        self.api().list_dead_letters(request).await.unwrap().into_inner().dead_letters
    }

    async fn redrive(
        &self,
        request: RedriveDeadLettersRequest,
    ) -> Result<RedriveDeadLettersResponse, Status> {
        let answers: Vec<_> = self.api().redrive_dead_letters(request).await?.into_inner().collect().await;
        let last = answers.into_iter().next_back().unwrap()?;
        assert!(last.done);
        Ok(last)
    }

    async fn purge(&self, request: PurgeDeadLettersRequest) -> Result<PurgeDeadLettersResponse, Status> {
        self.api().purge_dead_letters(request).await.map(Response::into_inner)
    }
}

fn of_user(user: &str) -> DeadLetterFilter {
    DeadLetterFilter { user: user.into(), ..DeadLetterFilter::default() }
}

fn again(filter: DeadLetterFilter) -> RedriveDeadLettersRequest {
    RedriveDeadLettersRequest { filter: Some(filter), ..RedriveDeadLettersRequest::default() }
}

#[tokio::test]
async fn a_message_that_fails_is_relayed_with_the_next_number_until_it_is_dead() {
    let mut node = Node::start().await;
    let results = node.api().send(send(&["bob"], "hi", "")).await.unwrap().into_inner().results;
    let message_id = accepted(&results[0]).message_id.clone();
    let epoch = node.read("bob").await.epoch;
    let deliveries = |router: &FakeRouter| {
        let hints = router.0.hints.lock();
        hints.iter().filter_map(|hint| Some(hint.message.as_ref()?.delivery)).max().unwrap_or_default()
    };
    for delivery in 1..=8_u32 {
        let nak = FailedAttempt { delay_ms: 1, ..failed(1, delivery, FailureKind::Nak) };
        node.fail("bob", epoch, vec![nak.clone()]).await;
        // Reported again, as after an answer that was lost: it counts once.
        node.fail("bob", epoch, vec![nak]).await;
        if delivery == 8 {
            break;
        }
        let (router, clock) = (node.router.clone(), node.clock.clone());
        assert_eq!(node.read("bob").await.messages, [], "it waits for its attempt");
        eventually("the next delivery", || {
            clock.advance(Duration::from_millis(500));
            deliveries(&router) == delivery + 1
        })
        .await;
        let rewritten = vec![Rewritten { seq: 1, delivery: delivery + 1 }];
        let ack = UserAck { user: "bob".into(), epoch, rewritten, ..UserAck::default() };
        node.report(vec![ack]).await.unwrap();
    }
    let letters = node.list(of_user("bob")).await;
    let [letter] = &letters[..] else { panic!("{letters:?}") };
    assert_eq!((letter.message_id.clone(), letter.reason()), (message_id.clone(), DeadReason::MaxAttempts));
    assert_eq!((letter.caller.as_str(), letter.seq, letter.payload.clone()), ("shop", 1, None));
    let deliveries: Vec<u32> = letter.failures.iter().map(|failure| failure.delivery).collect();
    assert_eq!(deliveries, (1..=8).collect::<Vec<_>>());
    let failure = &letter.failures[7];
    assert_eq!((failure.kind.as_str(), failure.edge.as_str()), ("nak", "edge-1"));
    assert_eq!(failure.session, "07070707-0707-0707-0707-070707070707");
    let page = node.read("bob").await;
    assert_eq!((page.mark, page.messages.len()), (1, 0));
    let ask = GetDeliveryRequest { user: "bob".into(), message_id: message_id.clone() };
    assert_eq!(node.api().get_delivery(ask).await.unwrap().into_inner().state(), DeliveryState::Dead);

    // The way of it, from memory and, after a restart, from the store, once somebody names the user.
    for _ in 0..2 {
        let ask = GetTraceRequest { message_id: message_id.clone() };
        let milestones = node.api().get_trace(ask).await.unwrap().into_inner().milestones;
        let of = |stage: &str| milestones.iter().filter(|milestone| milestone.stage == stage).count();
        assert_eq!((of("failed"), of("dead")), (8, 1), "{milestones:?}");
        node.stop().await;
        node.restart().await;
        assert_eq!(node.list(of_user("bob")).await, letters);
    }
    node.stop().await;
}

#[tokio::test]
async fn an_attempt_of_a_user_who_is_offline_waits_for_the_next_reader() {
    let mut node = Node::start().await;
    node.api().send(send(&["bob"], "hi", "")).await.unwrap();
    let epoch = node.read("bob").await.epoch;
    node.fail("bob", epoch, vec![failed(1, 1, FailureKind::Nak)]).await;
    node.router.0.outcome.store(router::RelayOutcome::Offline as i32, Ordering::Relaxed);
    let deliveries = |router: &FakeRouter| {
        let hints = router.0.hints.lock();
        hints
            .iter()
            .filter_map(|hint| Some(hint.message.as_ref()?.delivery))
            .filter(|n| *n > 1)
            .collect::<Vec<_>>()
    };
    let (router, clock) = (node.router.clone(), node.clock.clone());
    eventually("told that bob is offline", || {
        clock.advance(Duration::from_millis(500));
        !deliveries(&router).is_empty()
    })
    .await;
    // When a later message of somebody else was relayed for redelivery, the scan has passed bob once more.
    node.api().send(send(&["eve"], "hi", "")).await.unwrap();
    eventually("eve's hint", || router.seqs("eve").len() == 1).await;
    node.clock.advance(Duration::from_secs(100));
    eventually("eve's hint again", || router.seqs("eve").len() == 2).await;
    assert_eq!(deliveries(&router), [2]);
    let page = node.read("bob").await;
    let got: Vec<_> = page.messages.iter().map(|message| (message.seq, message.delivery)).collect();
    assert_eq!(got, [(1, 2)]);
    // The number is spent: the next attempt is the third.
    node.fail("bob", epoch, vec![failed(1, 2, FailureKind::Deadline)]).await;
    node.router.0.outcome.store(router::RelayOutcome::Relayed as i32, Ordering::Relaxed);
    eventually("the third delivery", || {
        clock.advance(Duration::from_millis(500));
        deliveries(&router).contains(&3)
    })
    .await;
    assert_eq!(node.ack("bob", epoch, &[(1, 1)], 1).await.mark, 1);
    node.stop().await;
}

#[tokio::test]
async fn dead_letters_are_listed_shown_sent_again_once_and_purged() {
    let mut node = Node::start().await;
    let mut ids = Vec::new();
    for n in 0..5 {
        node.clock.advance(Duration::from_secs(1));
        ids.push(node.kill("bob", &n.to_string()).await);
    }
    let eve = node.kill("eve", "eve's").await;

    // Two pages and a half, the newest first.
    let (mut token, mut listed) = (String::new(), Vec::new());
    loop {
        let request = ListDeadLettersRequest { filter: None, page_size: 4, page_token: token };
        let page = node.api().list_dead_letters(request).await.unwrap().into_inner();
        listed.extend(page.dead_letters.into_iter().map(|letter| letter.message_id));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    let mut all: Vec<String> = ids.iter().cloned().chain([eve.clone()]).collect();
    listed.sort();
    all.sort();
    assert_eq!(listed, all);
    let terminated = DeadLetterFilter { reason: DeadReason::Terminated.into(), ..of_user("eve") };
    assert_eq!(node.list(terminated).await.len(), 1);
    let attempts = DeadLetterFilter { reason: DeadReason::MaxAttempts.into(), ..of_user("eve") };
    assert_eq!(node.list(attempts).await.len(), 0);
    let show = |user: &str| GetDeadLetterRequest { user: user.into(), message_id: eve.clone() };
    let shown = node.api().get_dead_letter(show("eve")).await.unwrap().into_inner();
    assert_eq!((shown.payload, shown.failures[0].reason.as_str()), (text("eve's"), "kaputt"));
    let missing = node.api().get_dead_letter(show("bob")).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);

    let dry =
        node.redrive(RedriveDeadLettersRequest { dry_run: true, ..again(of_user("bob")) }).await.unwrap();
    assert_eq!((dry.total, dry.examined, dry.redriven), (5, 5, 0));
    assert_eq!(node.read("bob").await.head, 5);
    let sent = node.redrive(again(of_user("bob"))).await.unwrap();
    assert_eq!((sent.total, sent.examined, sent.redriven, sent.failed), (5, 5, 5, 0));
    // In the order in which they died, as new messages of the same sender.
    let page = node.read("bob").await;
    let bodies: Vec<_> = page.messages.iter().map(|message| message.payload.clone()).collect();
    assert_eq!(bodies, (0..5).map(|n| text(n.to_string())).collect::<Vec<_>>());
    assert_eq!((page.head, page.messages[0].delivery), (10, 1));
    assert_eq!(node.redrive(again(of_user("bob"))).await.unwrap().total, 0);
    assert_eq!(node.list(of_user("bob")).await, []);
    let noted = node.list(DeadLetterFilter { redriven: true, ..of_user("bob") }).await;
    let sent_as: Vec<String> = noted.iter().rev().map(|letter| letter.redriven_as.clone()).collect();
    let new: Vec<String> =
        page.messages.iter().map(|m| uuid::Uuid::from_slice(&m.message_id).unwrap().to_string()).collect();
    assert_eq!(sent_as, new);
    // One that was sent is not sent again by its name either.
    let one = RedriveDeadLettersRequest { message_id: ids[0].clone(), ..again(of_user("bob")) };
    let answer = node.redrive(one).await.unwrap();
    assert_eq!((answer.examined, answer.redriven), (1, 0));
    assert!(answer.problem.contains(&new[0]), "{}", answer.problem);
    let epoch = page.epoch;
    assert_eq!(node.ack("bob", epoch, &[(6, 10)], 10).await.mark, 10);

    purges(&node, &ids, &eve).await;
    node.stop().await;
}

async fn purges(node: &Node, ids: &[String], eve: &str) {
    let purge = |filter: DeadLetterFilter, message_id: &str, dry_run| PurgeDeadLettersRequest {
        filter: Some(filter),
        message_id: message_id.into(),
        dry_run,
    };
    let counted = |purged, more| PurgeDeadLettersResponse { purged, more };
    assert_eq!(node.purge(purge(of_user("eve"), eve, true)).await.unwrap(), counted(1, false));
    // Those that were sent again stay unless they are asked for.
    assert_eq!(node.purge(purge(of_user("bob"), "", false)).await.unwrap(), counted(0, false));
    let redriven = DeadLetterFilter { redriven: true, ..of_user("bob") };
    assert_eq!(node.purge(purge(redriven.clone(), "", true)).await.unwrap(), counted(5, false));
    assert_eq!(node.purge(purge(of_user("bob"), &ids[0], false)).await.unwrap(), counted(1, false));
    assert_eq!(node.purge(purge(redriven.clone(), "", false)).await.unwrap(), counted(4, false));
    assert_eq!(node.list(redriven).await, []);
    let refused = node.purge(purge(DeadLetterFilter::default(), "", false)).await.unwrap_err();
    assert!(refused.message().contains("filter is empty"), "{}", refused.message());
    assert_eq!(node.list(of_user("eve")).await.len(), 1);
}

#[tokio::test]
async fn a_redrive_says_what_it_could_not_send() {
    let mut node = Node::start().await;
    let id = node.kill("bob", "hi").await;
    let many: Vec<SendRequest> = (0..2_000).map(|n| send(&["bob"], &n.to_string(), "")).collect();
    let _: Vec<_> = node.api().send_stream(requests(many)).await.unwrap().into_inner().collect().await;
    let full = node.redrive(again(of_user("bob"))).await.unwrap();
    assert_eq!((full.examined, full.redriven, full.failed), (1, 0, 1));
    assert!(full.problem.contains("which is its limit"), "{}", full.problem);
    let page = node.read("bob").await;
    node.ack("bob", page.epoch, &[(2, 2)], 2).await;
    let one = RedriveDeadLettersRequest { message_id: id, ..again(of_user("bob")) };
    assert_eq!(node.redrive(one).await.unwrap().redriven, 1);
    let unknown =
        RedriveDeadLettersRequest { message_id: uuid::Uuid::nil().to_string(), ..again(of_user("bob")) };
    assert_eq!(node.redrive(unknown).await.unwrap_err().code(), Code::NotFound);
    node.stop().await;
}

#[tokio::test]
async fn a_redrive_ends_with_the_server_and_goes_on_after_it() {
    let mut node = Node::start().await;
    for n in 0..4 {
        node.kill("bob", &n.to_string()).await;
    }
    let slow = RedriveDeadLettersRequest { rate: 1, ..again(of_user("bob")) };
    let mut answers = node.api().redrive_dead_letters(slow).await.unwrap().into_inner();
    let first = answers.message().await.unwrap().unwrap();
    assert!(!first.done && first.total == 4 && first.redriven < 4, "{first:?}");
    node.stop().await;
    let end = answers.collect::<Vec<_>>().await.pop().unwrap().unwrap_err();
    assert_eq!(end.code(), Code::Unavailable);
    assert!(end.message().contains("shuts down before the redrive is done"), "{}", end.message());
    node.restart().await;
    let rest = node.redrive(again(of_user("bob"))).await.unwrap();
    assert!(rest.redriven >= 1 && rest.redriven == rest.total, "{rest:?}");
    assert_eq!(node.read("bob").await.head, 8, "each was sent once");
    node.stop().await;
}

#[tokio::test]
async fn bad_calls_for_dead_letters_are_told_what_is_right() {
    let mut node = Node::start().await;
    let list = |filter: DeadLetterFilter, page_size, page_token: &str| ListDeadLettersRequest {
        filter: Some(filter),
        page_size,
        page_token: page_token.into(),
    };
    let times = |from_us, to_us| DeadLetterFilter { from_us, to_us, ..DeadLetterFilter::default() };
    let lists = [
        (list(DeadLetterFilter::default(), 257, ""), "page_size is 257; 1 to 256 are allowed, and 0 is 100"),
        (list(DeadLetterFilter::default(), 0, "7"), "page_token is not one that this server gave"),
        (list(of_user("a\tb"), 0, ""), "filter.user contains the control character U+0009"),
        (list(DeadLetterFilter { reason: 9, ..of_user("") }, 0, ""), "filter.reason is 9; 1 (max_attempts)"),
        (list(times(7, 7), 0, ""), "filter.from_us is 7 and filter.to_us is 7, which no time is between"),
    ];
    let check = |status: Status, expected: &str| {
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(expected), "{}", status.message());
    };
    for (request, expected) in lists {
        check(node.api().list_dead_letters(request).await.unwrap_err(), expected);
    }
    let id = uuid::Uuid::nil().to_string();
    let redrives = [
        (
            RedriveDeadLettersRequest { rate: 10_001, ..again(of_user("a")) },
            "rate is 10001 messages a second",
        ),
        (RedriveDeadLettersRequest { message_id: "7".into(), ..again(of_user("a")) }, "is not a UUID"),
        (RedriveDeadLettersRequest { message_id: id.clone(), ..again(of_user("")) }, "filter.user is not"),
        (
            RedriveDeadLettersRequest {
                message_id: id,
                ..again(DeadLetterFilter { from_us: 1, ..of_user("a") })
            },
            "leave reason, from_us and to_us of the filter unset",
        ),
    ];
    for (request, expected) in redrives {
        check(node.api().redrive_dead_letters(request).await.unwrap_err(), expected);
    }
    let no_key =
        DeliveryClient::new(node.channel()).list_dead_letters(ListDeadLettersRequest::default()).await;
    assert_eq!(no_key.unwrap_err().code(), Code::Unauthenticated);
    bad_reports_are_refused(&node, check).await;
    node.stop().await;
}

async fn bad_reports_are_refused(node: &Node, check: impl Fn(Status, &str)) {
    let ack = |failed: Vec<FailedAttempt>| UserAck { user: "bob".into(), failed, ..UserAck::default() };
    let nak = || failed(1, 1, FailureKind::Nak);
    let rewritten =
        |seq, delivery, count| UserAck { rewritten: vec![Rewritten { seq, delivery }; count], ..ack(vec![]) };
    let cases = [
        (ack(vec![nak(); 257]), "failed has 257 entries; at most 256"),
        (rewritten(1, 1, 257), "rewritten has 257 entries; at most 256"),
        (rewritten(0, 1, 1), "rewritten has seq 0, delivery 1; both count from 1"),
        (ack(vec![failed(1, 0, FailureKind::Nak)]), "failed has seq 1, delivery 0; both count from 1"),
        (ack(vec![failed(1, 1, FailureKind::Unspecified)]), "failed has no kind that is known here"),
        (ack(vec![FailedAttempt { kind: 9, ..nak() }]), "failed has no kind that is known here"),
        (ack(vec![FailedAttempt { delay_ms: 86_400_001, ..nak() }]), "delay_ms 86400001; at most 86400000"),
        (ack(vec![FailedAttempt { reason: "x".repeat(201), ..nak() }]), "a reason of 201 bytes; at most 200"),
        (ack(vec![FailedAttempt { reason: "\n".into(), ..nak() }]), "without control characters"),
        (
            UserAck { session: vec![1; 3].into(), ..ack(vec![]) },
            "session has 3 bytes; it is the 16 bytes of a UUID",
        ),
    ];
    for (ack, expected) in cases {
        check(node.report(vec![ack]).await.unwrap_err(), expected);
    }
    let edge = AckRequest { acks: vec![], edge: "e".repeat(201) };
    check(node.inbox().ack(edge).await.unwrap_err(), "edge has 201 bytes");
}
