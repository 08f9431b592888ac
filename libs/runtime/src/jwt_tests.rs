use sanjay_protocol::token::{Action, Capabilities};
use serde_json::{Value, json};

use super::*;

const NOW: u64 = 1_700_000_000;

fn secret() -> Secret {
    Secret::new("a secret of at least thirty-two bytes")
}

fn claims() -> Claims {
    Claims {
        sub: "u1".to_owned(),
        exp: NOW + 60,
        iat: Some(NOW),
        nbf: Some(NOW),
        caps: Capabilities::from_iter([("chat:*".to_owned(), vec![Action::Subscribe])]),
    }
}

/// A token of any header and claims, rightly signed with HMAC-SHA256.
fn token(header: &Value, claims: &Value) -> String {
    let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let message = format!("{}.{}", encode(header), encode(claims));
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret().expose().as_bytes());
    let signature = URL_SAFE_NO_PAD.encode(hmac::sign(&key, message.as_bytes()));
    format!("{message}.{signature}")
}

fn hs256(claims: &Value) -> String {
    token(&json!({"alg": "HS256", "typ": "JWT"}), claims)
}

fn verify(token: &str) -> Result<Claims, TokenError> {
    verify_hs256(token, &secret(), NOW)
}

#[test]
fn what_was_signed_is_read() {
    assert_eq!(verify(&sign(&claims(), &secret())), Ok(claims()));
    // A token of another signer, with claims that concern others.
    let minimal = verify(&hs256(&json!({"sub": "u1", "exp": NOW + 1, "aud": "other", "iss": 5}))).unwrap();
    assert_eq!((minimal.sub.as_str(), minimal.exp, minimal.nbf), ("u1", NOW + 1, None));
    assert!(!minimal.caps.allow(Action::Subscribe, "chat:1"));
}

#[test]
fn time_is_the_callers_and_has_no_leeway() {
    let token = sign(&claims(), &secret());
    assert!(verify_hs256(&token, &secret(), NOW + 59).is_ok());
    let expired = verify_hs256(&token, &secret(), NOW + 60).unwrap_err();
    assert_eq!(expired, TokenError::Expired { expired_s: NOW + 60, now_s: NOW + 60 });
    let early = verify_hs256(&token, &secret(), NOW - 1).unwrap_err();
    assert_eq!(early, TokenError::NotYetValid { not_before_s: NOW, now_s: NOW - 1 });
    assert!(early.to_string().contains("in 1 s; check the clock"), "{early}");
    // Long past by the clock of the machine that runs this test, valid by the one that is given.
    let old = sign(&Claims { exp: 100, iat: None, nbf: None, ..claims() }, &secret());
    assert!(verify_hs256(&old, &secret(), 99).is_ok());
}

#[test]
fn only_hs256_is_accepted() {
    let claims = json!({"sub": "u1", "exp": NOW + 60});
    for algorithm in ["HS384", "HS512", "RS256", "ES256", "EdDSA"] {
        let forged = token(&json!({"alg": algorithm, "typ": "JWT"}), &claims);
        assert_eq!(verify(&forged), Err(TokenError::WrongAlgorithm), "{algorithm}");
    }
    for none in ["none", "None", "NONE", "hs256", ""] {
        let forged = token(&json!({"alg": none, "typ": "JWT"}), &claims);
        let unsigned = format!("{}.", forged.rsplit_once('.').unwrap().0);
        assert_eq!(verify(&forged), Err(TokenError::WrongAlgorithm), "{none}");
        assert_eq!(verify(&unsigned), Err(TokenError::WrongAlgorithm), "{none}, unsigned");
    }
}

#[test]
fn a_wrong_secret_and_every_changed_character_are_noticed() {
    let token = sign(&claims(), &secret());
    let other = verify_hs256(&token, &Secret::new("another"), NOW);
    assert_eq!(other, Err(TokenError::BadSignature));
    let unsigned = format!("{}.", token.rsplit_once('.').unwrap().0);
    assert_eq!(verify(&unsigned), Err(TokenError::BadSignature));
    for at in 0..token.len() {
        let mut changed = token.clone().into_bytes();
        changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
        let changed = String::from_utf8(changed).unwrap();
        assert!(verify(&changed).is_err(), "changed at {at}");
    }
    let claims = URL_SAFE_NO_PAD.encode(json!({"sub": "root", "exp": NOW + 60}).to_string());
    let parts: Vec<_> = token.split('.').collect();
    assert_eq!(verify(&format!("{}.{claims}.{}", parts[0], parts[2])), Err(TokenError::BadSignature));
}

#[test]
fn claims_that_are_missing_or_odd_are_named() {
    assert_eq!(verify(&hs256(&json!({"exp": NOW + 60}))), Err(TokenError::MissingClaim("sub")));
    assert_eq!(verify(&hs256(&json!({"sub": "", "exp": NOW + 60}))), Err(TokenError::MissingClaim("sub")));
    assert_eq!(verify(&hs256(&json!({"sub": "u1"}))), Err(TokenError::MissingClaim("exp")));
    for odd in [json!({"sub": 5, "exp": NOW + 60}), json!({"sub": "u1", "exp": "soon"}), json!([1])] {
        assert!(
            matches!(verify(&hs256(&odd)), Err(TokenError::Malformed | TokenError::MissingClaim(_))),
            "{odd}"
        );
    }
}

#[test]
fn nonsense_is_malformed() {
    for nonsense in ["", "a", "a.b", "a.b.c", "a.b.c.d", "..", "🦀.🦀.🦀", &"x".repeat(100_000)] {
        assert_eq!(verify(nonsense), Err(TokenError::Malformed), "{nonsense:.20}");
    }
}
