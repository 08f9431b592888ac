//! Publishes through the back ends' API, one message at a time.

use anyhow::Context as _;
use sanjay_proto::{
    client::v1::{Payload, payload::Kind},
    delivery::v1::{PublishRequest, delivery_client::DeliveryClient},
};
use tokio::runtime::{Builder, Runtime};
use tonic::{Request, metadata::AsciiMetadataValue, transport::Channel};

/// A back end.
pub(crate) struct Publisher {
    runtime: Runtime,
    client: DeliveryClient<Channel>,
    key: AsciiMetadataValue,
}

impl Publisher {
    /// Connects to a delivery node.
    pub(crate) fn connect(server: &str, api_key: &str) -> anyhow::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let client = runtime
            .block_on(DeliveryClient::connect(server.to_owned()))
            .with_context(|| format!("connecting to {server}"))?;
        Ok(Self { runtime, client, key: format!("Bearer {api_key}").parse()? })
    }

    /// Publishes text and returns once its offset is assigned.
    pub(crate) fn publish(&mut self, channel: &str, text: String) -> anyhow::Result<()> {
        let mut request = Request::new(PublishRequest {
            channel: channel.to_owned(),
            payload: Some(Payload { kind: Some(Kind::Text(text)) }),
            ..PublishRequest::default()
        });
        request.metadata_mut().insert("authorization", self.key.clone());
        self.runtime.block_on(self.client.publish(request)).context("publish")?;
        Ok(())
    }
}
