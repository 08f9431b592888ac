//! The opening handshake: HTTP/1.1 by hyper on one accepted stream, until the stream is a WebSocket or answered.

use base64::Engine;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode, Version};
use http_body_util::{Empty, Full};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};

/// Room for the request line and headers with a token of several kilobytes; hyper answers 431 beyond it.
const MAX_HEAD_BYTES: usize = 16 * 1024;

/// `Sec-WebSocket-Key` values: some clients leave the unused bits of the last character set.
const KEY_BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_allow_trailing_bits(true),
);

/// The random bytes in a `Sec-WebSocket-Key` (RFC 6455, section 4.1).
const KEY_BYTES: usize = 16;

/// Why a request does not become a WebSocket.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum UpgradeRefused {
    /// Another method than GET.
    #[error("the WebSocket handshake is a GET request")]
    Method,
    /// Another version than HTTP/1.1.
    #[error("the WebSocket handshake needs HTTP/1.1")]
    HttpVersion,
    /// No `Upgrade: websocket` with `Connection: upgrade`.
    #[error("this address speaks WebSocket: send `Connection: upgrade` and `Upgrade: websocket`")]
    NotAnUpgrade,
    /// No `Sec-WebSocket-Version`, or another one than 13.
    #[error("the only supported WebSocket version is 13: send `Sec-WebSocket-Version: 13`")]
    WebSocketVersion,
    /// Not exactly one well-formed `Sec-WebSocket-Key`.
    #[error("`Sec-WebSocket-Key` must be given once, as 16 bytes in base64")]
    Key,
    /// The answer would select a subprotocol that the client did not offer, which clients take for a failure.
    #[error("the subprotocol must be one that the client offered in `Sec-WebSocket-Protocol`")]
    SubprotocolNotOffered,
}

impl UpgradeRefused {
    /// The HTTP status of the answer.
    pub const fn status(&self) -> StatusCode {
        match self {
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::HttpVersion => StatusCode::HTTP_VERSION_NOT_SUPPORTED,
            Self::NotAnUpgrade | Self::WebSocketVersion => StatusCode::UPGRADE_REQUIRED,
            Self::Key | Self::SubprotocolNotOffered => StatusCode::BAD_REQUEST,
        }
    }
}

/// The answer: the status, what is wrong as plain text, and the headers that say what would be right.
impl From<UpgradeRefused> for Response<Full<Bytes>> {
    fn from(refused: UpgradeRefused) -> Self {
        let mut response = Self::new(Full::from(format!("{refused}\n")));
        *response.status_mut() = refused.status();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        let hint: &[(HeaderName, &'static str)] = match refused {
            UpgradeRefused::Method => &[(header::ALLOW, "GET")],
            UpgradeRefused::NotAnUpgrade => {
                &[(header::CONNECTION, "upgrade"), (header::UPGRADE, "websocket")]
            }
            UpgradeRefused::WebSocketVersion => &[
                (header::CONNECTION, "upgrade"),
                (header::UPGRADE, "websocket"),
                (header::SEC_WEBSOCKET_VERSION, "13"),
            ],
            UpgradeRefused::HttpVersion | UpgradeRefused::Key | UpgradeRefused::SubprotocolNotOffered => &[],
        };
        for (name, value) in hint {
            headers.insert(name, HeaderValue::from_static(value));
        }
        response
    }
}

/// The answer 101 to a valid handshake, which selects `subprotocol` if one is given.
pub fn upgrade_response<B>(
    request: &Request<B>,
    subprotocol: Option<&str>,
) -> Result<Response<Empty<Bytes>>, UpgradeRefused> {
    let headers = request.headers();
    if request.method() != Method::GET {
        return Err(UpgradeRefused::Method);
    }
    if request.version() != Version::HTTP_11 {
        return Err(UpgradeRefused::HttpVersion);
    }
    if !has_token(headers, &header::CONNECTION, "upgrade")
        || !has_token(headers, &header::UPGRADE, "websocket")
    {
        return Err(UpgradeRefused::NotAnUpgrade);
    }
    if headers.get(header::SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        return Err(UpgradeRefused::WebSocketVersion);
    }
    let accept = tungstenite::handshake::derive_accept_key(key(headers)?);
    let mut response = Response::new(Empty::new());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let answer = response.headers_mut();
    answer.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    answer.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    answer.insert(
        header::SEC_WEBSOCKET_ACCEPT,
        HeaderValue::try_from(accept).map_err(|_| UpgradeRefused::Key)?,
    );
    if let Some(subprotocol) = subprotocol {
        let value = offered_subprotocols(headers)
            .find(|offered| *offered == subprotocol)
            .and_then(|offered| HeaderValue::from_str(offered).ok())
            .ok_or(UpgradeRefused::SubprotocolNotOffered)?;
        answer.insert(header::SEC_WEBSOCKET_PROTOCOL, value);
    }
    Ok(response)
}

/// The subprotocols that a client offers, the preferred one first.
pub fn offered_subprotocols(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    list(headers, &header::SEC_WEBSOCKET_PROTOCOL)
}

/// The elements of a header that is a comma-separated list, in all its lines.
fn list<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> + use<'a> {
    let lines = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(str::trim).filter(|element| !element.is_empty())
}

fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    list(headers, name).any(|element| element.eq_ignore_ascii_case(token))
}

fn key(headers: &HeaderMap) -> Result<&[u8], UpgradeRefused> {
    let mut values = headers.get_all(header::SEC_WEBSOCKET_KEY).iter();
    let (Some(key), None) = (values.next(), values.next()) else { return Err(UpgradeRefused::Key) };
    let mut decoded = [0; KEY_BYTES + 2];
    match KEY_BASE64.decode_slice(key, &mut decoded) {
        Ok(KEY_BYTES) => Ok(key.as_bytes()),
        _ => Err(UpgradeRefused::Key),
    }
}

/// A stream after a successful handshake.
#[derive(Debug)]
pub struct Accepted<T, X> {
    /// The stream that was accepted; hyper holds nothing of it any more.
    pub io: T,
    /// Bytes that arrived behind the request. They are the first input of the decoder.
    pub leftover: Bytes,
    /// What `decide` learnt from the request.
    pub context: X,
}

/// Serves HTTP/1.1 on one accepted stream until its first request has been upgraded or answered.
///
/// `decide` sees the request and either accepts, with the response of [`upgrade_response`] (to which it may add
/// headers) and whatever the connection needs to remember, or refuses with an error that makes a response. None
/// means that the stream was answered, closed, silent for `header_timeout` or not HTTP, and is finished.
///
/// It spawns nothing, so it runs on any Tokio runtime. The time-out covers the head of the request only: the caller
/// bounds the whole, since a peer may also refuse to read the response.
pub async fn serve_upgrade<T, X, E, D>(
    stream: T,
    header_timeout: Duration,
    decide: D,
) -> Option<Accepted<T, X>>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    E: Into<Response<Full<Bytes>>>,
    D: Fn(&Request<Incoming>) -> Result<(Response<Empty<Bytes>>, X), E>,
{
    let pending: Mutex<Option<(OnUpgrade, X)>> = Mutex::new(None);
    let service = hyper::service::service_fn(|mut request: Request<Incoming>| {
        let mut response = match decide(&request) {
            Ok((response, context)) => {
                let mut pending = pending.lock().unwrap_or_else(PoisonError::into_inner);
                *pending = Some((hyper::upgrade::on(&mut request), context));
                response.map(|_| Full::default())
            }
            Err(refusal) => refusal.into(),
        };
        // Without keep-alive hyper would add `close` to the upgrade as well, and some clients refuse that.
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            response.headers_mut().append(header::CONNECTION, HeaderValue::from_static("close"));
        }
        std::future::ready(Ok::<_, Infallible>(response))
    });
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await
        .ok()?;
    let (upgrade, context) = pending.into_inner().unwrap_or_else(PoisonError::into_inner)?;
    let parts = upgrade.await.ok()?.downcast::<TokioIo<T>>().ok()?;
    // A copy, because a slice would keep hyper's whole read buffer alive.
    let leftover = Bytes::copy_from_slice(&parts.read_buf);
    Some(Accepted { io: parts.io.into_inner(), leftover, context })
}
