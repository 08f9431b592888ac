//! Publishing: check, continue the trace, have the registry assign an offset, note the milestone.

use std::sync::Arc;

use sanjay_proto::{
    client::v1::{Payload, payload::Kind},
    router::v1::NewPublication,
};
use sanjay_protocol::{
    limits::MAX_PAYLOAD_BYTES,
    names::{self, NameError},
};
use sanjay_runtime::{
    MilestoneRing, Namespaces, SharedNamespaces,
    metrics::Timer,
    namespaces::{Publishers, name_of},
};
use tracing::Span;

use crate::{
    metrics::Metrics,
    registry::{Assigned, Registry, RegistryError},
    spans,
};

/// Publishes for edges and delivery nodes.
pub(crate) struct Publisher {
    registry: Arc<dyn Registry>,
    namespaces: SharedNamespaces,
    milestones: Arc<MilestoneRing>,
    metrics: Metrics,
}

/// Why a publication was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PublishError {
    /// The channel, publisher or dedupe key has a bad name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Nothing to publish.
    #[error("payload is missing; give one of text, json or bytes")]
    NoPayload,
    /// More than [`MAX_PAYLOAD_BYTES`].
    #[error("payload has {0} bytes; at most {MAX_PAYLOAD_BYTES} are allowed")]
    TooLarge(usize),
    /// More than the channel's namespace allows.
    #[error("payload has {size} bytes; at most {most} are allowed in the namespace \"{namespace}\"")]
    TooLargeHere {
        /// The payload's bytes.
        size: usize,
        /// The bound.
        most: usize,
        /// The namespace that the channel names.
        namespace: String,
    },
    /// A client published where only back ends do.
    #[error("only back ends publish to channels of the namespace \"{0}\"")]
    BackendsOnly(String),
    /// Not a UUID.
    #[error("message_id has {0} bytes; it needs the 16 bytes of a UUID")]
    MessageId(usize),
    /// The registry would not.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

impl Publisher {
    pub(crate) fn new(registry: Arc<dyn Registry>, milestones: Arc<MilestoneRing>, metrics: Metrics) -> Self {
        Self { registry, namespaces: SharedNamespaces::default(), milestones, metrics }
    }

    /// With settings of channels, which may change.
    pub(crate) fn with_namespaces(self, namespaces: SharedNamespaces) -> Self {
        Self { namespaces, ..self }
    }

    /// Publishes in the order given; a refused one does not hold up the others. Answers stand in the same
    /// order.
    pub(crate) async fn publish(
        &self,
        publications: Vec<NewPublication>,
    ) -> Vec<Result<Assigned, PublishError>> {
        let _timer = Timer::start(&self.metrics.publish_seconds);
        let namespaces = self.namespaces.current();
        let mut answers: Vec<_> = publications.iter().map(|new| check(new, &namespaces)).collect();
        let mut good: Vec<_> = publications
            .into_iter()
            .zip(&answers)
            .filter(|(_, check)| check.is_ok())
            .map(|(new, _)| new)
            .collect();
        // The spans last until the registry has answered.
        let spans: Vec<Span> = good.iter_mut().map(spans::publish).collect();
        let mut assigned = self.registry.publish(good).await.into_iter();
        for (answer, span) in answers.iter_mut().filter(|answer| answer.is_ok()).zip(spans) {
            let lost = || Err(RegistryError::Unavailable("it gave too few answers".into()));
            *answer = assigned.next().unwrap_or_else(lost).map(Some).map_err(PublishError::from);
            spans::assigned(&span, answer.as_ref());
        }
        answers
            .into_iter()
            .map(|answer| self.note(answer.map(|assigned| assigned.expect("set above"))))
            .collect()
    }

    fn note(&self, answer: Result<Assigned, PublishError>) -> Result<Assigned, PublishError> {
        let assigned = answer?;
        if assigned.repeated {
            self.metrics.repeats.inc();
        } else {
            self.metrics.publications.inc();
            let detail = format!("offset {}", assigned.at.offset);
            self.milestones.record(&assigned.message_id, "assigned", detail);
        }
        Ok(assigned)
    }
}

fn check(new: &NewPublication, namespaces: &Namespaces) -> Result<Option<Assigned>, PublishError> {
    names::check("channel", &new.channel)?;
    names::check_optional("publisher", &new.publisher)?;
    names::check_optional("dedupe_key", &new.dedupe_key)?;
    let size = payload_size(new.payload.as_ref()).ok_or(PublishError::NoPayload)?;
    if size > MAX_PAYLOAD_BYTES {
        return Err(PublishError::TooLarge(size));
    }
    let namespace = namespaces.of(&new.channel);
    let name = || name_of(&new.channel).to_owned();
    if size > namespace.max_payload_bytes {
        let most = namespace.max_payload_bytes;
        return Err(PublishError::TooLargeHere { size, most, namespace: name() });
    }
    // The edge has refused it before, unless it has other settings.
    if namespace.publish == Publishers::Backends && !new.publisher.is_empty() {
        return Err(PublishError::BackendsOnly(name()));
    }
    if new.message_id.len() != 16 {
        return Err(PublishError::MessageId(new.message_id.len()));
    }
    Ok(None)
}

fn payload_size(payload: Option<&Payload>) -> Option<usize> {
    Some(match payload?.kind.as_ref()? {
        Kind::Text(text) | Kind::Json(text) => text.len(),
        Kind::Bytes(bytes) => bytes.len(),
    })
}
