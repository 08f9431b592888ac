//! Keeps what the bus delivers equal to what edges hold, and starts each subscription at a known offset.

use std::sync::Arc;

use sanjay_proto::edge::v1::{LinkError, Subscribed, router_event::Event};
use tokio::sync::Mutex;

use crate::{
    bus::{Bus, BusError},
    downlink::Downlink,
    errors::link_error,
    fanout::Fanout,
    outage::Outage,
    registry::{Registry, RegistryError},
};

/// Subscribes edges to channels.
pub(crate) struct Subscriptions {
    fanout: Arc<Fanout>,
    bus: Arc<dyn Bus>,
    registry: Arc<dyn Registry>,
    /// Held while a change of interest is carried to the bus, so that the bus sees changes of a channel in
    /// the order in which they were decided.
    membership: Mutex<()>,
    unsubscribing: Outage,
}

/// Why a subscription failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SubscribeError {
    /// The bus would not deliver the channel.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The registry would not say where the channel stands.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

impl Subscriptions {
    pub(crate) fn new(fanout: Arc<Fanout>, bus: Arc<dyn Bus>, registry: Arc<dyn Registry>) -> Self {
        Self { fanout, bus, registry, membership: Mutex::new(()), unsubscribing: Outage::default() }
    }

    /// Subscribes the edge to channels, each named once, and sends it one answer for each. Returns those
    /// that failed.
    ///
    /// The bus is asked first, and the top read only then; what arrives in between is kept by the fan-out.
    /// So nothing above the top is missed and nothing at or below it is sent.
    pub(crate) async fn subscribe(&self, link: &Arc<Downlink>, channels: Vec<Arc<str>>) -> Vec<Arc<str>> {
        let mut failed = Vec::new();
        let joined = self.join(link, channels, &mut failed).await;
        let tops = self.registry.tops(&joined).await;
        for (channel, top) in joined.into_iter().zip(tops) {
            match top {
                Ok(top) => self.fanout.go_live(&channel, link, top),
                Err(error) => failed.push((channel, error.into())),
            }
        }
        for (channel, error) in &failed {
            let error = Some(link_error(error));
            link.reply(refusal(channel, error));
        }
        let failed: Vec<_> = failed.into_iter().map(|(channel, _)| channel).collect();
        self.unsubscribe(link, &failed).await;
        failed
    }

    /// Ends the edge's subscription of channels.
    pub(crate) async fn unsubscribe(&self, link: &Arc<Downlink>, channels: &[Arc<str>]) {
        let _order = self.membership.lock().await;
        let leave = |channel: &&Arc<str>| self.fanout.leave(channel, link);
        let unused: Vec<_> = channels.iter().filter(leave).cloned().collect();
        if unused.is_empty() {
            return;
        }
        match self.bus.unsubscribe(&unused).await {
            Ok(()) => {
                if self.unsubscribing.ends() {
                    tracing::info!("unsubscribing on the bus works again");
                }
            }
            // What still comes is dropped for want of interest.
            Err(error) => {
                if self.unsubscribing.begins() {
                    tracing::warn!(%error, "could not unsubscribe on the bus");
                }
            }
        }
    }

    /// Adds the edge to channels and sees to it that the bus delivers them.
    async fn join(
        &self,
        link: &Arc<Downlink>,
        channels: Vec<Arc<str>>,
        failed: &mut Vec<(Arc<str>, SubscribeError)>,
    ) -> Vec<Arc<str>> {
        let _order = self.membership.lock().await;
        let (new, mut joined): (Vec<_>, Vec<_>) =
            channels.into_iter().partition(|channel| self.fanout.join(channel, link));
        if new.is_empty() {
            return joined;
        }
        let answers = self.bus.subscribe(&new).await;
        for (channel, answer) in new.into_iter().zip(answers) {
            match answer {
                Ok(()) => {
                    self.fanout.set_on_bus(&channel);
                    joined.push(channel);
                }
                Err(error) => failed.push((channel, error.into())),
            }
        }
        joined
    }
}

/// The answer to a subscription that failed.
pub(crate) fn refusal(channel: &str, error: Option<LinkError>) -> Event {
    Event::Subscribed(Subscribed { channel: channel.to_owned(), error, ..Subscribed::default() })
}
