//! Who may open a WebSocket: path, origin, subprotocol and the token that a handshake may carry.

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, header};
use http_body_util::{Empty, Full};
use sanjay_protocol::{PATH, SUBPROTOCOL_JSON, limits::MAX_TOKEN_BYTES};
use sanjay_websocket::{UpgradeRefused, offered_subprotocols, upgrade_response};

/// Why a request does not become a connection. The text is the answer's body.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Not a WebSocket handshake.
    #[error(transparent)]
    Handshake(#[from] UpgradeRefused),
    /// Another path.
    #[error("nothing is here; clients connect to {PATH}")]
    NotFound,
    /// A browser's page that may not connect.
    #[error("origin {0} may not connect; add it to edge.allowed_origins")]
    Origin(String),
    /// None of the offered subprotocols is spoken.
    #[error("offer the subprotocol {SUBPROTOCOL_JSON}, or none")]
    Subprotocol,
    /// Larger than any good token.
    #[error("the token is larger than {MAX_TOKEN_BYTES} bytes")]
    TokenTooLarge,
    /// No room.
    #[error("this edge has no room; try again in a few seconds")]
    Full,
}

impl Refusal {
    /// The HTTP status of the answer.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        match self {
            Refusal::Handshake(refused) => refused.status(),
            Refusal::NotFound => StatusCode::NOT_FOUND,
            Refusal::Origin(_) => StatusCode::FORBIDDEN,
            Refusal::Subprotocol => StatusCode::BAD_REQUEST,
            Refusal::TokenTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Refusal::Full => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

impl From<Refusal> for Response<Full<Bytes>> {
    fn from(refusal: Refusal) -> Self {
        if let Refusal::Handshake(refused) = refusal {
            return refused.into();
        }
        let mut response = Response::new(Full::from(format!("{refusal}\n")));
        *response.status_mut() = refusal.status();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain; charset=utf-8"));
        if matches!(refusal, Refusal::Full) {
            headers.insert(header::RETRY_AFTER, header::HeaderValue::from_static("5"));
        }
        response
    }
}

/// What the edge learnt from a handshake.
#[derive(Debug)]
pub struct Handshake {
    /// From the `Authorization` header or the `token` query parameter.
    pub token: Option<String>,
}

/// Decides on a request. `has_room`: whether the edge can take another connection.
///
/// # Errors
/// The refusal to answer with.
pub fn decide<B>(
    request: &Request<B>,
    origins: &[String],
    has_room: bool,
) -> Result<(Response<Empty<Bytes>>, Handshake), Refusal> {
    if request.uri().path() != PATH {
        return Err(Refusal::NotFound);
    }
    check_origin(request.headers(), origins)?;
    let subprotocol = choose_subprotocol(request.headers())?;
    let response = upgrade_response(request, subprotocol)?;
    if !has_room {
        return Err(Refusal::Full);
    }
    Ok((response, Handshake { token: token(request)? }))
}

fn check_origin(headers: &HeaderMap, allowed: &[String]) -> Result<(), Refusal> {
    let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
    let text = origin.to_str().unwrap_or_default();
    if !text.is_empty() && allowed.iter().any(|pattern| origin_matches(pattern, text)) {
        return Ok(());
    }
    Err(Refusal::Origin(text.chars().filter(|c| !c.is_control()).take(200).collect()))
}

/// Whether an origin is what a pattern names. One `*` stands for any text without `/`, so that
/// `https://*.example.com` does not let `https://evil.example/x.example.com` in.
fn origin_matches(pattern: &str, origin: &str) -> bool {
    if pattern == "*" || pattern.eq_ignore_ascii_case(origin) {
        return true;
    }
    let Some((before, after)) = pattern.split_once('*') else { return false };
    let (pattern_length, origin) = (before.len() + after.len(), origin.to_ascii_lowercase());
    origin.len() > pattern_length
        && origin.starts_with(&before.to_ascii_lowercase())
        && origin.ends_with(&after.to_ascii_lowercase())
        && !origin[before.len()..origin.len() - after.len()].contains(['/', '@'])
}

fn choose_subprotocol(headers: &HeaderMap) -> Result<Option<&'static str>, Refusal> {
    let mut offered = offered_subprotocols(headers).peekable();
    if offered.peek().is_none() {
        return Ok(None);
    }
    if offered.any(|name| name == SUBPROTOCOL_JSON) {
        Ok(Some(SUBPROTOCOL_JSON))
    } else {
        Err(Refusal::Subprotocol)
    }
}

fn token<B>(request: &Request<B>) -> Result<Option<String>, Refusal> {
    let header = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let bearer =
        header.and_then(|value| value.strip_prefix("Bearer ").or_else(|| value.strip_prefix("bearer ")));
    // A token is base64url and dots, so that it needs no decoding in a query.
    let query = request.uri().query().unwrap_or_default();
    let token = bearer.or_else(|| query.split('&').find_map(|pair| pair.strip_prefix("token=")));
    match token.map(str::trim) {
        Some(token) if token.len() > MAX_TOKEN_BYTES => Err(Refusal::TokenTooLarge),
        Some("") | None => Ok(None),
        Some(token) => Ok(Some(token.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(uri: &str, headers: &[(&str, &str)]) -> Request<()> {
        let mut builder = Request::builder()
            .uri(uri)
            .header("connection", "Upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-version", "13")
            .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder.body(()).expect("a good request")
    }

    fn status(request: &Request<()>, origins: &[&str]) -> u16 {
        let origins: Vec<String> = origins.iter().map(ToString::to_string).collect();
        match decide(request, &origins, true) {
            Ok((response, _)) => response.status().as_u16(),
            Err(refusal) => refusal.status().as_u16(),
        }
    }

    #[test]
    fn only_the_path_of_the_protocol_is_served() {
        assert_eq!(status(&request("/v1/ws", &[]), &[]), 101);
        assert_eq!(status(&request("/", &[]), &[]), 404);
        assert_eq!(status(&request("/v1/ws/", &[]), &[]), 404);
    }

    #[test]
    fn browsers_come_from_allowed_origins() {
        let from = |origin| request("/v1/ws", &[("origin", origin)]);
        assert_eq!(status(&from("https://a.example"), &[]), 403);
        assert_eq!(status(&from("https://a.example"), &["https://a.example"]), 101);
        assert_eq!(status(&from("https://A.example"), &["https://a.example"]), 101);
        assert_eq!(status(&from("http://a.example"), &["https://a.example"]), 403);
        assert_eq!(status(&from("http://localhost:5173"), &["http://localhost:*"]), 101);
        assert_eq!(status(&from("http://localhost.evil:1"), &["http://localhost:*"]), 403);
        assert_eq!(status(&from("https://x.example.com"), &["https://*.example.com"]), 101);
        assert_eq!(status(&from("https://example.com"), &["https://*.example.com"]), 403);
        assert_eq!(status(&from("https://evil.test/.example.com"), &["https://*.example.com"]), 403);
        assert_eq!(status(&from("null"), &["https://a.example"]), 403);
        assert_eq!(status(&from("https://any.test"), &["*"]), 101);
    }

    #[test]
    fn a_subprotocol_is_chosen_from_what_is_offered() {
        let offering = |names| request("/v1/ws", &[("sec-websocket-protocol", names)]);
        let (response, _) = decide(&offering("x, sanjay.v1.json"), &[], true).expect("offered");
        assert_eq!(response.headers()["sec-websocket-protocol"], "sanjay.v1.json");
        assert_eq!(status(&offering("x, y"), &[]), 400);
        let (response, _) = decide(&request("/v1/ws", &[]), &[], true).expect("the default");
        assert!(!response.headers().contains_key("sec-websocket-protocol"));
    }

    #[test]
    fn a_token_comes_in_the_header_or_the_query() {
        let token = |uri, headers: &[_]| decide(&request(uri, headers), &[], true).expect("taken").1.token;
        assert_eq!(token("/v1/ws", &[]), None);
        assert_eq!(token("/v1/ws", &[("authorization", "Bearer abc")]).as_deref(), Some("abc"));
        assert_eq!(token("/v1/ws?a=1&token=x.y.z", &[]).as_deref(), Some("x.y.z"));
        let large = format!("/v1/ws?token={}", "x".repeat(5_000));
        assert_eq!(status(&request(&large, &[]), &[]), 431);
    }

    #[test]
    fn a_full_edge_says_when_to_come_back() {
        let refusal = decide(&request("/v1/ws", &[]), &[], false).expect_err("no room");
        let response = Response::<Full<Bytes>>::from(refusal);
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()["retry-after"], "5");
    }
}
