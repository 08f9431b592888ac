//! Asks one peer whether it serves, for as long as somebody holds it.
//!
//! The watch has a connection of its own, so that a stalled bulk stream fails no check. A stopped process, or a
//! machine that is gone, ends no stream: HTTP/2 pings on that connection find them.

use std::{sync::Weak, time::Duration};

use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, transport::Endpoint};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{
    Shared,
    peer::{Peer, Rank},
};
use crate::grpc::failure::plain;

/// How long a peer has to accept the connection, to answer the first question, and to answer each ping.
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);

/// How often a quiet peer is pinged, and one that has not served for long is asked again.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// Within this a peer that is asked has answered or is known not to: a pause, the connection, and the answer.
pub(super) const ANSWER_TIME: Duration = Duration::from_secs(3);

/// How long after its failure a peer is asked again. The pause doubles up to [`CHECK_EVERY`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The tuning of the watch's connection.
pub(super) fn tune(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(CHECK_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(CHECK_EVERY)
        .keep_alive_timeout(CHECK_TIMEOUT)
        .keep_alive_while_idle(true)
}

/// Follows a peer's health until `stop`.
pub(super) async fn watch(
    shared: Weak<Shared>,
    peer: Weak<Peer>,
    endpoint: Endpoint,
    stop: CancellationToken,
) {
    let mut pause = FIRST_PAUSE;
    loop {
        let Some(asked_for) = recheck(&peer) else { return };
        let asked = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            asked = follow(&shared, &peer, &endpoint) => Some(asked),
            () = asked_for => None,
        };
        // What broke a call, or answered one, may serve at once.
        let served = asked.is_none() || peer.upgrade().is_none_or(|peer| peer.rank() == Rank::Serving);
        pause = if served { FIRST_PAUSE } else { (pause * 2).min(CHECK_EVERY) };
        if let Some(problem) = asked {
            note(&shared, &peer, Rank::Down, &problem);
        }
        let Some(asked_for) = recheck(&peer) else { return };
        let pausing = async {
            sleep(FIRST_PAUSE).await;
            tokio::select! {
                () = sleep(pause - FIRST_PAUSE) => {}
                () = asked_for => {}
            }
        };
        if stop.run_until_cancelled(pausing).await.is_none() {
            return;
        }
    }
}

/// Ends when a call of the peer broke or gave a reason to ask, without holding the peer meanwhile; `None` when nobody holds it.
fn recheck(peer: &Weak<Peer>) -> Option<impl Future<Output = ()> + use<>> {
    let recheck = std::sync::Arc::clone(&peer.upgrade()?.recheck);
    Some(async move { recheck.notified().await })
}

/// Watches on one connection; says why that ended.
async fn follow(shared: &Weak<Shared>, peer: &Weak<Peer>, endpoint: &Endpoint) -> String {
    let Some((service, key)) = shared.upgrade().map(|shared| (shared.service, shared.key.clone())) else {
        return String::new();
    };
    let late = || format!("no answer to a health check within {CHECK_TIMEOUT:?}");
    let channel = match timeout(CHECK_TIMEOUT, endpoint.connect()).await {
        Ok(Ok(channel)) => channel,
        Ok(Err(error)) => return crate::grpc::failure::deepest(&error),
        Err(_) => return format!("cannot be connected to within {CHECK_TIMEOUT:?}"),
    };
    let request = || key.with_health(HealthCheckRequest { service: service.to_owned() });
    let mut client = HealthClient::new(channel);
    let mut answers = match timeout(CHECK_TIMEOUT, client.watch(request())).await {
        Ok(Ok(answers)) => answers.into_inner(),
        // A process without the health service says nothing against itself by that (gRPC A17).
        Ok(Err(status)) if status.code() == Code::Unimplemented => {
            note(shared, peer, Rank::Serving, "");
            return poll(client, &request).await;
        }
        Ok(Err(status)) => return refused(&status, service),
        Err(_) => return late(),
    };
    let mut next = timeout(CHECK_TIMEOUT, answers.message()).await.map_err(|_| late());
    loop {
        match next {
            Ok(Ok(Some(answer))) if answer.status() == ServingStatus::Serving => {
                note(shared, peer, Rank::Serving, "");
            }
            Ok(Ok(Some(_))) => note(shared, peer, Rank::Down, "it says that it does not serve"),
            Ok(Ok(None)) => return "it ended its health stream".to_owned(),
            Ok(Err(status)) => return refused(&status, service),
            Err(late) => return late,
        }
        next = Ok(answers.message().await);
    }
}

/// Asks a peer that has no health service again and again: only its silence counts.
async fn poll(
    mut client: HealthClient<tonic::transport::Channel>,
    request: &impl Fn() -> Request<HealthCheckRequest>,
) -> String {
    loop {
        sleep(CHECK_EVERY).await;
        match timeout(CHECK_TIMEOUT, client.check(request())).await {
            Ok(Err(status)) if status.code() != Code::Unimplemented => return plain(&status),
            Ok(_) => {}
            Err(_) => return format!("no answer to a health check within {CHECK_TIMEOUT:?}"),
        }
    }
}

fn refused(status: &tonic::Status, service: &str) -> String {
    match status.code() {
        Code::NotFound => format!("it does not serve {service}: another role listens there"),
        _ => plain(status),
    }
}

fn note(shared: &Weak<Shared>, peer: &Weak<Peer>, rank: Rank, problem: &str) {
    if let (Some(shared), Some(peer)) = (shared.upgrade(), peer.upgrade()) {
        shared.note(&peer, rank, problem);
    }
}
