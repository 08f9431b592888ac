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
            return Err(Status::unauthenticated(
                "the cluster key is wrong; set `cluster.key` (SANJAY_CLUSTER__KEY) of the calling process to \
                 that of this one",
            ));
        }
        Ok(request)
    }
}

/// The client's side of the cluster key: an interceptor that adds it to every call.
#[derive(Debug, Clone)]
pub struct ClusterKey {
    header: MetadataValue<Ascii>,
}

impl ClusterKey {
    /// # Errors
    /// When the key has characters that cannot travel in a header.
    pub fn new(key: &Secret) -> anyhow::Result<Self> {
        let mut header: MetadataValue<Ascii> = format!("{SCHEME}{}", key.expose()).parse().map_err(|_| {
            anyhow::anyhow!("`cluster.key` has characters that cannot be sent; use visible ASCII only")
        })?;
        header.set_sensitive(true);
        Ok(Self { header })
    }
}

impl Interceptor for ClusterKey {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert(AUTHORIZATION, self.header.clone());
        Ok(request)
    }
}
