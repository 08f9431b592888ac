//! The servers of a [`Backend`](super::Backend): calls stay with one while it answers, and go on with the next.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use futures::{StreamExt, stream::FuturesUnordered};
use sanjay_proto::delivery::v1::{control_client::ControlClient, delivery_client::DeliveryClient};
use tokio::time::sleep;
use tonic::transport::{Channel, Endpoint};

use super::{
    BackendOptions,
    error::{BackendError, deepest},
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long after one server the next is tried, while the first has not answered (after RFC 8305, section 5).
const STAGGER: Duration = Duration::from_millis(250);

/// How often a server with calls under way is asked whether it still lives, and how long it has to answer: alone,
/// it is waited for; with others, calls are to go elsewhere soon.
const PING_ALONE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));
const PING_AMONG: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(2));

/// One server.
pub(super) struct Server {
    pub(super) endpoint: String,
    pub(super) client: DeliveryClient<Channel>,
    pub(super) control: ControlClient<Channel>,
}

/// At least one server, of which one is used.
pub(super) struct Servers {
    all: Vec<Server>,
    current: AtomicUsize,
}

impl Servers {
    /// Connects to the first that answers, beginning anywhere; to the others at the first call of each.
    pub(super) async fn connect(options: &BackendOptions) -> Result<Self, BackendError> {
        let names: Vec<&str> = options
            .endpoints
            .iter()
            .flat_map(|text| text.split(','))
            .map(str::trim)
            .filter(|name| !name.is_empty())
            .collect();
        let count = names.len();
        let ping = if count > 1 { PING_AMONG } else { PING_ALONE };
        let endpoints = names.iter().map(|name| endpoint(name, ping)).collect::<Result<Vec<_>, _>>()?;
        if count == 0 {
            return Err(BackendError::Option(
                "no address of the API is given; one looks like http://127.0.0.1:8082".into(),
            ));
        }
        let first = (options.jitter.fraction() * count as f64) as usize % count;
        let mut connecting: FuturesUnordered<_> = (0..count)
            .map(|nth| (nth, (first + nth) % count))
            .map(|(nth, index)| {
                let endpoint = &endpoints[index];
                async move {
                    sleep(STAGGER * nth as u32).await;
                    (index, endpoint.connect().await)
                }
            })
            .collect();
        let mut reasons = Vec::new();
        while let Some((index, connected)) = connecting.next().await {
            match connected {
                Ok(channel) => return Ok(Self::new(&names, &endpoints, index, &channel)),
                Err(error) => reasons.push((index, deepest(&error))),
            }
        }
        reasons.sort();
        let reasons: Vec<_> = reasons.into_iter().map(|(_, reason)| reason).collect();
        Err(BackendError::Unreachable { endpoint: names.join(", "), reason: reasons.join("; ") })
    }

    fn new(names: &[&str], endpoints: &[Endpoint], connected: usize, channel: &Channel) -> Self {
        let server = |(index, (name, endpoint)): (usize, (&&str, &Endpoint))| {
            let channel = if index == connected { channel.clone() } else { endpoint.connect_lazy() };
            Server {
                endpoint: (*name).to_owned(),
                client: DeliveryClient::new(channel.clone()),
                control: ControlClient::new(channel),
            }
        };
        let all = names.iter().zip(endpoints).enumerate().map(server).collect();
        Self { all, current: AtomicUsize::new(connected) }
    }

    pub(super) fn count(&self) -> u32 {
        u32::try_from(self.all.len()).unwrap_or(u32::MAX)
    }

    /// The one that is used now.
    pub(super) fn current(&self) -> (usize, &Server) {
        let index = self.current.load(Ordering::Relaxed);
        (index, &self.all[index])
    }

    /// A call of this one failed: the next is used, unless another call has moved on already.
    pub(super) fn leave(&self, index: usize) {
        let next = (index + 1) % self.all.len();
        let _ = self.current.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

fn endpoint(address: &str, (ping, pong): (Duration, Duration)) -> Result<Endpoint, BackendError> {
    let bad = |reason: &str| {
        BackendError::Option(format!(
            "{address:?} is no address of the API: {reason}; one looks like http://127.0.0.1:8082"
        ))
    };
    if address.starts_with("https://") {
        return Err(bad("this client does not speak TLS yet"));
    }
    if !address.starts_with("http://") {
        return Err(bad("it does not begin with http://"));
    }
    let endpoint = Endpoint::from_shared(address.to_owned()).map_err(|error| bad(&deepest(&error)))?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(ping)
        .keep_alive_timeout(pong))
}
