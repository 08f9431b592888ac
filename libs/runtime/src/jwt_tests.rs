use std::process::Command;

use sanjay_protocol::token::{Action, Capabilities};
use serde_json::json;

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
        jti: None,
        caps: Capabilities::from_iter([("chat:*".to_owned(), vec![Action::Subscribe])]),
        channel: None,
    }
}

/// A token of any header and claims, signed with `key`.
fn token(header: &Value, claims: &Value, key: &SigningKey) -> String {
    let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let message = format!("{}.{}", encode(header), encode(claims));
    let signature = URL_SAFE_NO_PAD.encode(key.sign(message.as_bytes()));
    format!("{message}.{signature}")
}

fn shared(algorithm: Algorithm) -> SigningKey {
    SigningKey::from_secret(algorithm, &secret()).unwrap()
}

fn hs256(claims: &Value) -> String {
    token(&json!({"alg": "HS256", "typ": "JWT"}), claims, &shared(Algorithm::Hs256))
}

fn key(kid: Option<&str>, key: VerifyingKey) -> Key {
    Key { kid: kid.map(str::to_owned), key }
}

fn own_keys() -> KeySet {
    KeySet::new(vec![key(None, VerifyingKey::from_secret(Algorithm::Hs256, &secret()).unwrap())])
}

fn match_of(keys: &KeySet, token: &str) -> Match {
    keys.check(&Unverified::parse(token).unwrap())
}

fn verify_at(token: &str, now_s: u64) -> Result<Claims, TokenError> {
    let token = Unverified::parse(token)?;
    match own_keys().check(&token) {
        Match::Signed => token.claims(&Rules::default(), now_s),
        Match::BadSignature => Err(TokenError::BadSignature),
        Match::UnknownKey | Match::WrongAlgorithm => {
            Err(TokenError::WrongAlgorithm { accepted: "HS256".into() })
        }
    }
}

fn verify(token: &str) -> Result<Claims, TokenError> {
    verify_at(token, NOW)
}

/// A private key as openssl makes it, and its public half in PEM.
fn generate(arguments: &[&str]) -> (SigningKey, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("key.pem");
    let run = |arguments: &[&str]| {
        let made = Command::new("openssl").args(arguments).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        String::from_utf8(made.stdout).unwrap()
    };
    let out = path.display().to_string();
    run(&[&["genpkey", "-out", &out][..], arguments].concat());
    let public = run(&["pkey", "-in", &out, "-pubout"]);
    (SigningKey::from_pem(&Secret::new(std::fs::read_to_string(path).unwrap())).unwrap(), public)
}

fn rsa() -> (SigningKey, String) {
    generate(&["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"])
}

fn p256() -> (SigningKey, String) {
    generate(&["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"])
}

fn ed25519() -> (SigningKey, String) {
    generate(&["-algorithm", "ED25519"])
}

#[test]
fn what_was_signed_is_read() {
    assert_eq!(verify(&sign(&claims(), &secret())), Ok(claims()));
    // A token of another signer, with claims that concern others.
    let minimal = verify(&hs256(&json!({"sub": "u1", "exp": NOW + 1, "aud": "other", "iss": 5}))).unwrap();
    assert_eq!((minimal.sub.as_str(), minimal.exp, minimal.nbf), ("u1", NOW + 1, None));
    assert!(!minimal.caps.allow(Action::Subscribe, "chat:1"));
}

/// RFC 7515, appendices A.2 and A.3, and RFC 8037, appendix A.4: signatures that others made.
#[test]
fn the_examples_of_the_standards_are_right() {
    let bytes = |text: &str| URL_SAFE_NO_PAD.decode(text).unwrap();
    let body =
        "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ";
    let x = bytes("f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU");
    let y = bytes("x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0");
    let point = VerifyingKey::from_point(&[&[4], &x[..], &y[..]].concat()).unwrap();
    let signature =
        bytes("DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q");
    assert!(point.is_by(format!("eyJhbGciOiJFUzI1NiJ9.{body}").as_bytes(), &signature));
    let ed = VerifyingKey::from_ed25519(&bytes("11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo")).unwrap();
    let signature =
        bytes("hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg");
    assert!(ed.is_by(b"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc", &signature));
    assert!(!ed.is_by(b"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmd", &signature));
}

#[test]
fn every_algorithm_signs_and_checks_by_pem_and_by_jwks() {
    let values = json!({"sub": "u1", "exp": NOW + 60});
    for algorithm in [Algorithm::Hs256, Algorithm::Hs384, Algorithm::Hs512] {
        let keys = KeySet::new(vec![key(None, VerifyingKey::from_secret(algorithm, &secret()).unwrap())]);
        assert_eq!(match_of(&keys, &sign_with(&values, &shared(algorithm), None)), Match::Signed);
        assert!(shared(algorithm).jwk("k").is_none(), "a shared secret is never published");
    }
    let cases = [(Algorithm::Rs256, rsa()), (Algorithm::Es256, p256()), (Algorithm::EdDsa, ed25519())];
    for (algorithm, (private, public)) in &cases {
        assert_eq!(private.algorithm(), *algorithm);
        let keys = KeySet::new(vec![key(None, VerifyingKey::from_pem(*algorithm, public).unwrap())]);
        let token = sign_with(&values, private, Some("k"));
        assert_eq!(match_of(&keys, &token), Match::Signed, "{algorithm}");
        let document = json!({ "keys": [private.jwk("k").unwrap()] }).to_string();
        let published = parse_jwks(document.as_bytes()).unwrap();
        assert_eq!(match_of(&published, &token), Match::Signed, "{algorithm}");
        let changed = format!("{}A", &token[..token.len() - 1]);
        if let Ok(changed) = Unverified::parse(&changed)
            && !token.ends_with('A')
        {
            assert_eq!(published.check(&changed), Match::BadSignature, "{algorithm}");
        }
        for (other, _) in cases.iter().filter(|(other, _)| other != algorithm) {
            let wrong = VerifyingKey::from_pem(*other, public).unwrap_err();
            assert_eq!(wrong, KeyError::WrongAlgorithm { wanted: *other, found: *algorithm });
        }
    }
}

#[test]
fn a_public_key_is_no_shared_secret() {
    let (private, public) = rsa();
    let keys = KeySet::new(vec![key(Some("k"), VerifyingKey::from_pem(Algorithm::Rs256, &public).unwrap())]);
    let values = json!({"sub": "root", "exp": NOW + 60});
    // The classic: the public key's text as the secret of an HMAC.
    for algorithm in [Algorithm::Hs256, Algorithm::Hs384, Algorithm::Hs512] {
        let forger = SigningKey::from_secret(algorithm, &Secret::new(public.clone())).unwrap();
        for kid in [None, Some("k")] {
            assert_eq!(match_of(&keys, &sign_with(&values, &forger, kid)), Match::WrongAlgorithm);
        }
    }
    assert_eq!(match_of(&keys, &sign_with(&values, &private, Some("k"))), Match::Signed);
}

#[test]
fn a_kid_selects_its_key_and_no_algorithm() {
    let ((first, _), (second, _), (other, _)) = (p256(), p256(), ed25519());
    let jwks =
        json!({ "keys": [first.jwk("a").unwrap(), second.jwk("b").unwrap(), other.jwk("c").unwrap()] });
    let keys = parse_jwks(jwks.to_string().as_bytes()).unwrap();
    let values = json!({"sub": "u1", "exp": NOW + 60});
    assert_eq!(match_of(&keys, &sign_with(&values, &second, Some("b"))), Match::Signed);
    assert_eq!(match_of(&keys, &sign_with(&values, &second, Some("a"))), Match::BadSignature);
    assert_eq!(match_of(&keys, &sign_with(&values, &second, Some("c"))), Match::WrongAlgorithm);
    assert_eq!(match_of(&keys, &sign_with(&values, &second, Some("d"))), Match::UnknownKey);
    assert_eq!(match_of(&keys, &sign_with(&values, &second, None)), Match::Signed, "each is tried");
    assert_eq!(match_of(&keys, &hs256(&values)), Match::WrongAlgorithm);
    assert_eq!(keys.algorithms().collect::<Vec<_>>(), [Algorithm::Es256, Algorithm::EdDsa]);
}

#[test]
fn a_jwks_document_is_read_as_far_as_it_can_be_used() {
    let (private, _) = p256();
    let good = private.jwk("good").unwrap();
    let but = |name: &str, value: Value| {
        let mut jwk = good.clone();
        jwk[name] = value;
        jwk
    };
    let odd = [
        but("use", "enc".into()),
        but("key_ops", json!(["sign"])),
        but("alg", "ES384".into()),
        but("alg", "HS256".into()),
        but("crv", "P-384".into()),
        but("kty", "oct".into()),
        but("x", "short".into()),
        but("x", 5.into()),
        but("kid", 5.into()),
        json!({"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"}),
        json!({"kty": "RSA", "n": "AQAB", "e": "AQAB"}),
        json!([]),
    ];
    for jwk in &odd {
        let alone = parse_jwks(json!({ "keys": [jwk] }).to_string().as_bytes());
        assert_eq!(alone.map(|keys| keys.len()), Err(JwksError::NoKeys(1)), "{jwk}");
    }
    let all: Vec<_> = odd.iter().chain([&good]).collect();
    let keys = parse_jwks(json!({ "keys": all, "more": 1 }).to_string().as_bytes()).unwrap();
    assert!(keys.has("good") && keys.len() == 1);
    let many = vec![good; MAX_KEYS + 1];
    let many = parse_jwks(json!({ "keys": many }).to_string().as_bytes());
    assert_eq!(many.map(|keys| keys.len()), Err(JwksError::TooMany(MAX_KEYS + 1)));
    for nonsense in ["", "{}", "[]", "<html>", "{\"keys\":{}}", "{\"keys\":1}"] {
        let refused = parse_jwks(nonsense.as_bytes());
        assert!(matches!(refused, Err(JwksError::Malformed(_))), "{nonsense}");
    }
}

#[test]
fn what_is_no_key_is_named() {
    let (_, public) = ed25519();
    let pem = |text: &str| VerifyingKey::from_pem(Algorithm::EdDsa, text).unwrap_err();
    for wrong in ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        assert_eq!(pem(wrong), KeyError::NotPublic, "{wrong}");
    }
    assert_eq!(pem("-----BEGIN PUBLIC KEY-----\nMAA=\n-----END PUBLIC KEY-----\n"), KeyError::Unsupported);
    assert_eq!(SigningKey::from_pem(&Secret::new(public)).unwrap_err(), KeyError::NotPrivate);
    let (_, small) = generate(&["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"]);
    assert!(VerifyingKey::from_pem(Algorithm::Es256, &small).is_ok());
    assert!(VerifyingKey::from_secret(Algorithm::Rs256, &secret()).is_none());
}

#[test]
fn audience_and_issuer_are_checked_where_they_are_set() {
    let rules = Rules { audience: Some("chat".into()), issuer: Some("shop".into()) };
    let check = |aud: Value, iss: Value| {
        let mut values = json!({"sub": "u1", "exp": NOW + 60});
        for (name, value) in [("aud", aud), ("iss", iss)] {
            if !value.is_null() {
                values[name] = value;
            }
        }
        let token = hs256(&values);
        Unverified::parse(&token).unwrap().claims(&rules, NOW).map(|claims| claims.sub)
    };
    let shop = || Value::from("shop");
    assert_eq!(check("chat".into(), shop()), Ok("u1".into()));
    assert_eq!(check(json!(["mail", "chat"]), shop()), Ok("u1".into()));
    assert_eq!(check(Value::Null, shop()), Err(TokenError::MissingClaim("aud")));
    assert_eq!(check("chat".into(), Value::Null), Err(TokenError::MissingClaim("iss")));
    for wrong in [json!("mail"), json!(["mail"]), json!([]), json!(5), json!({"chat": 1}), json!("chat ")] {
        assert_eq!(check(wrong.clone(), shop()), Err(TokenError::WrongAudience), "{wrong}");
    }
    for wrong in [json!("shop2"), json!(["shop"]), json!(5)] {
        assert_eq!(check("chat".into(), wrong.clone()), Err(TokenError::WrongIssuer), "{wrong}");
    }
}

#[test]
fn time_is_the_callers_and_has_no_leeway() {
    let token = sign(&claims(), &secret());
    assert!(verify_at(&token, NOW + 59).is_ok());
    let expired = verify_at(&token, NOW + 60).unwrap_err();
    assert_eq!(expired, TokenError::Expired { expired_s: NOW + 60, now_s: NOW + 60 });
    let early = verify_at(&token, NOW - 1).unwrap_err();
    assert_eq!(early, TokenError::NotYetValid { not_before_s: NOW, now_s: NOW - 1 });
    assert!(early.to_string().contains("in 1 s; check the clock"), "{early}");
    // Long past by the clock of the machine that runs this test, valid by the one that is given.
    let old = sign(&Claims { exp: 100, iat: None, nbf: None, ..claims() }, &secret());
    assert!(verify_at(&old, 99).is_ok());
}

#[test]
fn none_and_other_algorithms_are_refused() {
    let claims = json!({"sub": "u1", "exp": NOW + 60});
    let wrong = Err(TokenError::WrongAlgorithm { accepted: "HS256".into() });
    for algorithm in ["HS384", "HS512", "RS256", "ES256", "EdDSA", "PS256", "ES384"] {
        let forged = token(&json!({"alg": algorithm, "typ": "JWT"}), &claims, &shared(Algorithm::Hs256));
        assert_eq!(verify(&forged), wrong, "{algorithm}");
    }
    for none in ["none", "None", "NONE", "hs256", ""] {
        for kid in [json!({"alg": none}), json!({"alg": none, "kid": "k"})] {
            let forged = token(&kid, &claims, &shared(Algorithm::Hs256));
            let unsigned = format!("{}.", forged.rsplit_once('.').unwrap().0);
            assert_eq!(verify(&forged), wrong, "{none}");
            assert_eq!(verify(&unsigned), wrong, "{none}, unsigned");
        }
    }
}

#[test]
fn a_wrong_secret_and_every_changed_character_are_noticed() {
    let token = sign(&claims(), &secret());
    let other = sign(&claims(), &Secret::new("another"));
    assert_eq!(verify(&other), Err(TokenError::BadSignature));
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
    let header =
        |header: Value| token(&header, &json!({"sub": "u1", "exp": NOW + 60}), &shared(Algorithm::Hs256));
    for nonsense in ["", "a", "a.b", "a.b.c", "a.b.c.d", "..", "🦀.🦀.🦀", &"x".repeat(100_000)] {
        assert_eq!(verify(nonsense), Err(TokenError::Malformed), "{nonsense:.20}");
    }
    for odd in [json!({}), json!({"alg": 5}), json!({"alg": "HS256", "kid": 5}), json!("HS256")] {
        assert_eq!(verify(&header(odd.clone())), Err(TokenError::Malformed), "{odd}");
    }
    assert_eq!(verify(&header(json!({"alg": "HS256", "crit": ["exp"]}))), Err(TokenError::Critical));
    let unnamed = header(json!({"alg": "ES256", "kid": "x\n".repeat(100)}));
    let unnamed = Unverified::parse(&unnamed).unwrap().unknown_key();
    assert!(unnamed.to_string().len() < 200 && !unnamed.to_string().contains('\n'), "{unnamed}");
}
