//! Fetches one small document over HTTP or HTTPS, within bounds of time and size.

use std::{sync::Arc, time::Duration};

use http::{
    Request, StatusCode, Uri,
    header::{ACCEPT, CACHE_CONTROL, HOST, USER_AGENT},
};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{
    body::{Bytes, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;

/// Longest that a fetch may take, from the name's resolution to the last byte.
pub const TIME_LIMIT: Duration = Duration::from_secs(3);

/// Largest document in bytes.
pub const SIZE_LIMIT: usize = 256 * 1024;

/// Why a URL, or the certificates for it, cannot be used. The text is a predicate: "is …".
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SourceError {
    /// Not `http://…` or `https://…`.
    #[error("is no address of a document; it looks like https://issuer.example/.well-known/jwks.json")]
    NotAUrl,
    /// With a user or password in it.
    #[error("holds credentials, which would be shown in logs; give an address that needs none")]
    Credentials,
    /// No certificate in the PEM.
    #[error("holds no certificate in PEM; it begins with `-----BEGIN CERTIFICATE-----`")]
    NoCertificates,
}

/// Why a document could not be had.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FetchError {
    /// No connection, or it broke.
    #[error("cannot reach the server: {0}")]
    Unreachable(String),
    /// The server's certificate was not accepted, or there was no TLS at all.
    #[error("no TLS with the server: {0}")]
    Tls(String),
    /// It took longer than [`TIME_LIMIT`].
    #[error("no answer within {} s", TIME_LIMIT.as_secs())]
    Late,
    /// Another status than 200.
    #[error("the server answered {0}{hint}", hint = if _0.is_redirection() { "; give the address that it redirects to" } else { "" })]
    Status(StatusCode),
    /// Larger than [`SIZE_LIMIT`].
    #[error("the answer has more than {SIZE_LIMIT} bytes")]
    TooLarge,
}

/// A document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Its content.
    pub body: Bytes,
    /// How long it may be kept, when the server said so (`Cache-Control: max-age`, 0 for `no-cache` and `no-store`).
    pub max_age: Option<Duration>,
}

/// Where a document is.
#[derive(Clone)]
pub struct Source {
    host: String,
    port: u16,
    /// Path and query.
    path: String,
    tls: Option<(TlsConnector, ServerName<'static>)>,
}

impl Source {
    /// The document at `url`. `authorities`: PEM of the certificates that vouch for the server, in place of the usual
    /// public ones.
    ///
    /// # Errors
    /// When they cannot be used.
    pub fn new(url: &str, authorities: Option<&str>) -> Result<Self, SourceError> {
        let uri: Uri = url.parse().map_err(|_| SourceError::NotAUrl)?;
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return Err(SourceError::NotAUrl);
        };
        if authority.as_str().contains('@') {
            return Err(SourceError::Credentials);
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if host.is_empty() {
            return Err(SourceError::NotAUrl);
        }
        let (tls, usual_port) = match scheme {
            "http" => (None, 80),
            "https" => {
                let name = ServerName::try_from(host.clone()).map_err(|_| SourceError::NotAUrl)?;
                (Some((connector(authorities)?, name)), 443)
            }
            _ => return Err(SourceError::NotAUrl),
        };
        let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        Ok(Self { host, port: authority.port_u16().unwrap_or(usual_port), path, tls })
    }

    /// Whether the document is fetched over TLS.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// Fetches the document.
    ///
    /// # Errors
    /// Says what went wrong. Redirects are not followed.
    pub async fn fetch(&self) -> Result<Document, FetchError> {
        timeout(TIME_LIMIT, Box::pin(self.exchange())).await.unwrap_or(Err(FetchError::Late))
    }

    async fn exchange(&self) -> Result<Document, FetchError> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await.map_err(unreachable)?;
        match &self.tls {
            None => self.request(stream).await,
            Some((connector, name)) => {
                let stream = connector.connect(name.clone(), stream).await;
                self.request(stream.map_err(|error| FetchError::Tls(error.to_string()))?).await
            }
        }
    }

    async fn request<S>(&self, stream: S) -> Result<Document, FetchError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(unreachable)?;
        let request = Request::get(&self.path)
            .header(HOST, self.host_header())
            .header(ACCEPT, "application/jwk-set+json, application/json")
            .header(USER_AGENT, concat!("sanjay/", env!("CARGO_PKG_VERSION")))
            .body(Empty::<Bytes>::new())
            .map_err(unreachable)?;
        let answer = async {
            let response = sender.send_request(request).await.map_err(unreachable)?;
            if response.status() != StatusCode::OK {
                return Err(FetchError::Status(response.status()));
            }
            let max_age = max_age(&response);
            let body = Limited::new(response.into_body(), SIZE_LIMIT).collect().await;
            let body = body.map_err(|error| match error.downcast::<hyper::Error>() {
                Ok(error) => unreachable(error),
                Err(_) => FetchError::TooLarge,
            })?;
            Ok(Document { body: body.to_bytes(), max_age })
        };
        tokio::pin!(answer);
        // The connection moves the bytes; it ends with this function.
        tokio::select! {
            answer = &mut answer => answer,
            ended = connection => match ended {
                Ok(()) => answer.await,
                Err(error) => Err(unreachable(error)),
            },
        }
    }

    fn host_header(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        format!("{host}:{}", self.port)
    }
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// The address without its query, which may hold a key.
impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let scheme = if self.is_encrypted() { "https" } else { "http" };
        let path = self.path.split('?').next().unwrap_or_default();
        write!(f, "{scheme}://{}{path}", self.host_header())
    }
}

fn unreachable(error: impl std::fmt::Display) -> FetchError {
    FetchError::Unreachable(error.to_string())
}

/// TLS on ring, whatever other provider the process may have.
fn connector(authorities: Option<&str>) -> Result<TlsConnector, SourceError> {
    let mut roots = RootCertStore::empty();
    match authorities {
        None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
        Some(pem) => {
            for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
                let certificate = certificate.map_err(|_| SourceError::NoCertificates)?;
                roots.add(certificate).map_err(|_| SourceError::NoCertificates)?;
            }
            if roots.is_empty() {
                return Err(SourceError::NoCertificates);
            }
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring speaks TLS 1.2 and 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

fn max_age(response: &http::Response<Incoming>) -> Option<Duration> {
    let mut found = None;
    for value in response.headers().get_all(CACHE_CONTROL) {
        for directive in value.to_str().unwrap_or_default().split(',') {
            let directive = directive.trim().to_ascii_lowercase();
            if directive == "no-cache" || directive == "no-store" {
                return Some(Duration::ZERO);
            }
            let seconds = directive.strip_prefix("max-age=").map(|text| text.trim_matches('"'));
            if let Some(seconds) = seconds.and_then(|text| text.parse().ok()) {
                found = Some(Duration::from_secs(seconds));
            }
        }
    }
    found
}

#[cfg(test)]
#[path = "fetch_tests.rs"]
mod tests;
