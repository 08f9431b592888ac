//! The key that the processes of a cluster show each other.

use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::Interceptor,
};

use crate::secret::Secret;

const AUTHORIZATION: &str = "authorization";
const SCHEME: &str = "Bearer ";

/// Lets only calls through that carry the cluster key. With an empty key nothing passes.
#[must_use]
pub fn cluster_auth(key: &Secret) -> ClusterAuth {
    ClusterAuth { key: key.clone() }
}

/// The server's side of the cluster key: an interceptor.
#[derive(Debug, Clone)]
pub struct ClusterAuth {
    key: Secret,
}

/// Where a health check shows the cluster key: `authorization` may be what a back end has for its own calls.
const HEALTH_KEY: &str = "sanjay-cluster-key";

fn wrong() -> Status {
    Status::unauthenticated(
        "the cluster key is wrong; set `cluster.key` (SANJAY_CLUSTER__KEY) of the calling process to that of this one",
    )
}

/// Answers health checks of anybody, but of a process of another cluster only that it is one: else it would take this
/// one for healthy and be refused with every call.
#[derive(Debug, Clone)]
pub(super) struct HealthAuth(pub(super) ClusterAuth);

impl Interceptor for HealthAuth {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        match request.metadata().get(HEALTH_KEY) {
            Some(shown) if !self.0.key.matches(shown.as_encoded_bytes()) => Err(wrong()),
            _ => Ok(request),
        }
    }
}

impl Interceptor for ClusterAuth {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let Some(header) = request.metadata().get(AUTHORIZATION) else {
            return Err(Status::unauthenticated(
                "the call carries no cluster key; send `authorization: Bearer <cluster.key>`, which is the same \
                 in every process of the cluster",
            ));
        };
        let shown = header.as_encoded_bytes().strip_prefix(SCHEME.as_bytes()).unwrap_or_default();
        if self.key.is_empty() || !self.key.matches(shown) {
            return Err(wrong());
        }
        Ok(request)
    }
}

/// The client's side of the cluster key: an interceptor that adds it to every call.
#[derive(Debug, Clone)]
pub struct ClusterKey {
    header: MetadataValue<Ascii>,
    /// The key alone.
    bare: MetadataValue<Ascii>,
}

impl ClusterKey {
    /// # Errors
    /// When the key has characters that cannot travel in a header.
    pub fn new(key: &Secret) -> anyhow::Result<Self> {
        let value = |text: String| -> anyhow::Result<MetadataValue<Ascii>> {
            let mut value: MetadataValue<Ascii> = text.parse().map_err(|_| {
                anyhow::anyhow!("`cluster.key` has characters that cannot be sent; use visible ASCII only")
            })?;
            value.set_sensitive(true);
            Ok(value)
        };
        Ok(Self {
            header: value(format!("{SCHEME}{}", key.expose()))?,
            bare: value(key.expose().to_owned())?,
        })
    }

    /// A health check that shows the key.
    pub(super) fn with_health<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert(HEALTH_KEY, self.bare.clone());
        request
    }
}

impl Interceptor for ClusterKey {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert(AUTHORIZATION, self.header.clone());
        Ok(request)
    }
}
