//! Keeps a pool's addresses up to date: names are resolved again and again.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Weak},
    time::Duration,
};

use futures::future::join_all;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::Shared;
use crate::grpc::{endpoints::Target, resolve::Resolve};

/// How often names are resolved.
const RESOLVE_EVERY: Duration = Duration::from_secs(5);

/// Least time between two resolutions, however many calls fail.
const RESOLVE_PAUSE: Duration = Duration::from_secs(1);

/// Most addresses of one pool.
const MAX_ADDRESSES: usize = 256;

/// An address with the endpoint that it belongs to.
pub(super) type Found = (Arc<str>, SocketAddr);

/// The addresses that need no resolver.
pub(super) fn literals(targets: &[Target]) -> Vec<Found> {
    let literal = |target: &Target| {
        Some((target.name.as_str().into(), SocketAddr::new(target.literal()?, target.port)))
    };
    targets.iter().filter_map(literal).collect()
}

/// Resolves until `stop` or until the pool is gone.
pub(super) async fn refresh(
    shared: Weak<Shared>,
    targets: Vec<Target>,
    resolver: Arc<dyn Resolve>,
    stop: CancellationToken,
) {
    let mut known: HashMap<String, Vec<SocketAddr>> = HashMap::new();
    let mut failing = false;
    loop {
        let named = targets.iter().filter(|target| target.literal().is_none());
        let looks = named.map(async |target| (target, resolver.resolve(&target.host, target.port).await));
        let Some(looks) = stop.run_until_cancelled(join_all(looks)).await else { return };
        let mut problems = Vec::new();
        for (target, look) in looks {
            match look {
                Ok(found) if !found.is_empty() => drop(known.insert(target.name.clone(), found)),
                Ok(_) => problems.push(format!("{} has no address", target.host)),
                Err(error) => problems.push(format!("{} cannot be resolved: {error}", target.host)),
            }
        }
        let problem = problems.join("; ");
        let found = in_order(&targets, &known);
        let asked = {
            let Some(shared) = shared.upgrade() else { return };
            if problem.is_empty() && failing {
                tracing::info!(peer = shared.kind, "names are resolved again");
            } else if !problem.is_empty() && !failing {
                let (peer, setting) = (shared.kind, shared.setting);
                tracing::warn!(peer, setting, problem, "the addresses of a peer stay as they are");
            }
            failing = !problem.is_empty();
            shared.update(found, problem);
            Arc::clone(&shared.resolve)
        };
        let pause = async {
            sleep(RESOLVE_PAUSE).await;
            tokio::select! {
                () = sleep(RESOLVE_EVERY - RESOLVE_PAUSE) => {}
                () = asked.notified() => {}
            }
        };
        if stop.run_until_cancelled(pause).await.is_none() {
            return;
        }
    }
}

/// Every address once, in the order of the setting and then of the numbers, so that the same answer in another
/// order changes nothing.
fn in_order(targets: &[Target], known: &HashMap<String, Vec<SocketAddr>>) -> Vec<Found> {
    let mut found: Vec<Found> = Vec::new();
    for target in targets {
        let mut addresses = match target.literal() {
            Some(ip) => vec![SocketAddr::new(ip, target.port)],
            None => known.get(&target.name).cloned().unwrap_or_default(),
        };
        addresses.sort_unstable();
        let name: Arc<str> = target.name.as_str().into();
        for address in addresses {
            if found.len() < MAX_ADDRESSES && found.iter().all(|(_, other)| *other != address) {
                found.push((Arc::clone(&name), address));
            }
        }
    }
    found
}
