use prometheus_client::registry::Registry;
use sanjay_protocol::token::Capabilities;
use sanjay_runtime::{
    Secret,
    jwt::{Algorithm, Key, SigningKey, VerifyingKey, parse_jwks, sign, sign_with},
};
use serde_json::json;

use super::*;

const NOW: u64 = 1_000;

fn claims() -> Claims {
    let caps = Capabilities::everything();
    Claims { sub: "bob".into(), exp: NOW + 60, iat: None, nbf: None, jti: None, caps, channel: None }
}

fn secret() -> Secret {
    Secret::new("x".repeat(32))
}

/// A private key that is the same for each run.
fn private(seed: u8) -> SigningKey {
    let mut pkcs8 = b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20".to_vec();
    pkcs8.extend_from_slice(&[seed; 32]);
    let body = base64(&pkcs8);
    SigningKey::from_pem(&Secret::new(format!(
        "-----BEGIN PRIVATE KEY-----\n{body}\n-----END PRIVATE KEY-----\n"
    )))
    .unwrap()
}

fn base64(bytes: &[u8]) -> String {
    let payload = sanjay_protocol::Payload::Bytes(bytes.to_vec().into());
    let text = serde_json::to_value(&payload).unwrap();
    text["bytes"].as_str().unwrap().to_owned()
}

fn document(keys: &[(&str, u8)]) -> KeySet {
    let keys: Vec<_> = keys.iter().map(|(kid, seed)| private(*seed).jwk(kid).unwrap()).collect();
    parse_jwks(json!({ "keys": keys }).to_string().as_bytes()).unwrap()
}

fn token(kid: &str, seed: u8) -> String {
    sign_with(&claims(), &private(seed), Some(kid))
}

fn ring(own: KeySet) -> (Keyring, Arc<Published>) {
    let published = Arc::new(Published::default());
    let metrics = TokenMetrics::register(&mut Registry::default());
    (Keyring::new(own, Some(Arc::clone(&published)), Rules::default(), metrics), published)
}

fn with_secret() -> KeySet {
    let key = VerifyingKey::from_secret(Algorithm::Hs256, &secret()).unwrap();
    KeySet::new(vec![Key { kid: None, key }])
}

fn is_unavailable(result: &Result<Claims, VerifyError>) -> bool {
    matches!(result, Err(VerifyError::Unavailable(_)))
}

fn is_refused(result: &Result<Claims, VerifyError>, part: &str) -> bool {
    matches!(result, Err(VerifyError::Refused(why)) if why.contains(part))
}

#[test]
fn before_the_first_document_everything_that_may_be_in_it_waits() {
    let (ring, published) = ring(with_secret());
    assert_eq!(ring.verify(&token("a", 1), NOW), Err(VerifyError::LookingUp));
    let nameless = sign_with(&claims(), &private(1), None);
    assert_eq!(ring.verify(&nameless, NOW), Err(VerifyError::LookingUp));
    assert!(ring.verify(&sign(&claims(), &secret()), NOW).is_ok(), "the configured key needs no document");
    let wrong = sign(&claims(), &Secret::new("y".repeat(32)));
    assert!(is_refused(&ring.verify(&wrong, NOW), "signature"), "a shared secret is never published");
    published.end(None);
    assert!(is_unavailable(&ring.verify_looked_up(&token("a", 1), NOW)));
    assert!(is_unavailable(&ring.verify(&token("a", 1), NOW)));
    published.end(Some(document(&[("a", 1)])));
    assert!(ring.verify_looked_up(&token("a", 1), NOW).is_ok());
    assert!(ring.verify(&nameless, NOW).is_ok());
}

#[tokio::test]
async fn an_unknown_key_is_looked_up_once_at_a_time() {
    let (ring, published) = ring(KeySet::default());
    published.end(Some(document(&[("a", 1)])));
    assert!(is_unavailable(&ring.verify(&token("b", 2), NOW)), "keys were fetched just now");
    let mut asked = Box::pin(published.asked());
    assert!(futures::poll!(&mut asked).is_pending());
    assert!(ring.verify(&token("a", 1), NOW).is_ok());
    assert!(futures::poll!(&mut asked).is_pending(), "a known key asks for nothing");
    for _ in 0..1_000 {
        assert_eq!(ring.verify(&token("b", 2), NOW), Err(VerifyError::LookingUp));
    }
    asked.await;
    published.begin();
    assert_eq!(ring.verify(&token("b", 2), NOW), Err(VerifyError::LookingUp));
    published.end(Some(document(&[("a", 1)])));
    assert!(is_refused(&ring.verify_looked_up(&token("b", 2), NOW), "kid \"b\""));
    let mut again = Box::pin(published.asked());
    assert!(futures::poll!(&mut again).is_pending(), "what was asked for is done, so nothing is left over");
}

#[test]
fn the_last_good_keys_stay_when_a_fetch_fails_and_go_when_they_are_rotated_out() {
    let (ring, published) = ring(KeySet::default());
    published.end(Some(document(&[("a", 1)])));
    published.end(None);
    assert!(ring.verify(&token("a", 1), NOW).is_ok());
    published.end(Some(document(&[("a", 1), ("b", 2)])));
    assert!(ring.verify(&token("a", 1), NOW).is_ok() && ring.verify(&token("b", 2), NOW).is_ok());
    published.end(Some(document(&[("b", 2)])));
    assert!(is_refused(&ring.verify_looked_up(&token("a", 1), NOW), "kid \"a\""));
    assert!(ring.verify(&token("b", 2), NOW).is_ok());
    assert!(is_refused(&ring.verify(&token("b", 1), NOW), "signature"), "the kid of another key");
}

#[test]
fn a_configured_key_is_not_looked_up() {
    let jwks = document(&[("mine", 1)]);
    let (ring, published) = ring(jwks);
    published.end(Some(document(&[("theirs", 2)])));
    assert!(ring.verify(&token("mine", 1), NOW).is_ok() && ring.verify(&token("theirs", 2), NOW).is_ok());
    assert!(is_refused(&ring.verify(&token("mine", 2), NOW), "signature"));
    let secret = sign(&claims(), &secret());
    assert!(is_refused(&ring.verify(&secret, NOW), "sign it with EdDSA"), "HS256 is not accepted here");
}
