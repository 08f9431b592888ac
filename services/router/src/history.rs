//! What channels keep, for edges and delivery nodes: checks a question and has the registry answer it.

use std::sync::Arc;

use sanjay_proto::router::v1::{HistoryRequest, HistoryResponse};
use sanjay_protocol::{
    limits::{MAX_HISTORY_BYTES, MAX_HISTORY_LIMIT},
    names::{self, NameError},
};
use sanjay_runtime::{SharedNamespaces, metrics::Timer, namespaces::name_of};

use crate::{
    metrics::Metrics,
    registry::{HistoryPage, HistoryQuery, Registry, RegistryError, Top},
};

/// Reads histories.
pub(crate) struct Histories {
    registry: Arc<dyn Registry>,
    namespaces: SharedNamespaces,
    metrics: Metrics,
}

/// Why a history was not read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HistoryError {
    /// The channel has a bad name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Out of bounds.
    #[error("limit is {0}; 1 to {MAX_HISTORY_LIMIT} are allowed")]
    Limit(u32),
    /// The channel keeps none.
    #[error("channels of the namespace \"{0}\" keep no history; set namespaces.{0}.history_size")]
    Off(String),
    /// The registry would not.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

impl Histories {
    pub(crate) fn new(registry: Arc<dyn Registry>, namespaces: SharedNamespaces, metrics: Metrics) -> Self {
        Self { registry, namespaces, metrics }
    }

    /// Reads a part of a channel's history.
    pub(crate) async fn read(&self, request: HistoryRequest) -> Result<HistoryResponse, HistoryError> {
        names::check("channel", &request.channel)?;
        if request.limit == 0 || request.limit as usize > MAX_HISTORY_LIMIT {
            return Err(HistoryError::Limit(request.limit));
        }
        if self.namespaces.of(&request.channel).history_size == 0 {
            return Err(HistoryError::Off(name_of(&request.channel).to_owned()));
        }
        let _timer = Timer::start(&self.metrics.history_seconds);
        let HistoryRequest { channel, epoch, offset, limit } = request;
        let query = HistoryQuery {
            channel: channel.into(),
            since: (!epoch.is_empty()).then(|| Top { epoch: epoch.into(), offset }),
            limit: limit as usize,
            bytes: MAX_HISTORY_BYTES,
        };
        let HistoryPage { top, publications, lost, more } = self.registry.history(&query).await?;
        if lost {
            self.metrics.lost_positions.inc();
        }
        Ok(HistoryResponse {
            epoch: top.epoch.to_string(),
            offset: top.offset,
            publications: publications.into_iter().map(Arc::unwrap_or_clone).collect(),
            lost,
            more,
            error: None,
        })
    }
}
