//! Keys that sign and check tokens. A key knows its algorithm; a token cannot choose another one for it.

use std::fmt;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::{
    hmac,
    rand::SystemRandom,
    signature::{
        self, ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, ED25519, EcdsaKeyPair,
        Ed25519KeyPair, KeyPair as _, RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_SHA256, RsaKeyPair,
        RsaPublicKeyComponents, UnparsedPublicKey,
    },
};
use rustls_pki_types::{PrivateKeyDer, SubjectPublicKeyInfoDer, pem::PemObject as _};
use serde_json::{Value, json};
use thiserror::Error;

use super::{Algorithm, der};
use crate::secret::Secret;

/// Bounds of an RSA modulus in bytes: 2,048 to 8,192 bits.
const RSA_BYTES: std::ops::RangeInclusive<usize> = 256..=1024;

/// Why something is no key. The text is a predicate: "is …".
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum KeyError {
    /// No PEM, or of another kind.
    #[error(
        "is no PEM of a public key; it begins with `-----BEGIN PUBLIC KEY-----`, as `openssl pkey -pubout` writes it"
    )]
    NotPublic,
    /// No PEM of a private key.
    #[error(
        "is no PEM of a private key; it begins with `-----BEGIN PRIVATE KEY-----`, as `openssl genpkey` writes it"
    )]
    NotPrivate,
    /// A key of a kind that no algorithm uses, or damaged.
    #[error(
        "is damaged, or of a kind that is not supported; RSA of 2,048 to 8,192 bits, P-256 and Ed25519 are"
    )]
    Unsupported,
    /// The algorithm does not fit the key.
    #[error("is for {found}, not for {wanted}")]
    WrongAlgorithm {
        /// What was asked for.
        wanted: Algorithm,
        /// What the key is for.
        found: Algorithm,
    },
}

/// A key that checks tokens of one algorithm.
#[derive(Clone)]
pub struct VerifyingKey(Checks);

#[derive(Clone)]
enum Checks {
    Secret(Algorithm, hmac::Key),
    Rsa {
        n: Vec<u8>,
        e: Vec<u8>,
    },
    /// An uncompressed point.
    P256(Vec<u8>),
    Ed25519(Vec<u8>),
}

impl VerifyingKey {
    /// A shared secret. `None` when the algorithm has no such keys.
    #[must_use]
    pub fn from_secret(algorithm: Algorithm, secret: &Secret) -> Option<Self> {
        let key = hmac::Key::new(hash(algorithm)?, secret.expose().as_bytes());
        Some(Self(Checks::Secret(algorithm, key)))
    }

    /// A public key in PEM (`PUBLIC KEY`), for this algorithm.
    ///
    /// # Errors
    /// When it is no public key, or one for another algorithm.
    pub fn from_pem(algorithm: Algorithm, pem: &str) -> Result<Self, KeyError> {
        let spki =
            SubjectPublicKeyInfoDer::from_pem_slice(pem.as_bytes()).map_err(|_| KeyError::NotPublic)?;
        let key = match der::public_key(&spki).ok_or(KeyError::Unsupported)? {
            der::PublicKey::Rsa { n, e } => Self::from_rsa(n, e),
            der::PublicKey::P256(point) => Self::from_point(point),
            der::PublicKey::Ed25519(key) => Self::from_ed25519(key),
        };
        let key = key.ok_or(KeyError::Unsupported)?;
        match key.algorithm() {
            found if found == algorithm => Ok(key),
            found => Err(KeyError::WrongAlgorithm { wanted: algorithm, found }),
        }
    }

    /// From an RSA modulus and exponent, big-endian.
    #[must_use]
    pub fn from_rsa(n: &[u8], e: &[u8]) -> Option<Self> {
        let strip = |number: &[u8]| -> Vec<u8> { number.iter().skip_while(|&&b| b == 0).copied().collect() };
        let (n, e) = (strip(n), strip(e));
        let fits = RSA_BYTES.contains(&n.len()) && (1..=5).contains(&e.len());
        fits.then_some(Self(Checks::Rsa { n, e }))
    }

    /// From an uncompressed point of P-256.
    #[must_use]
    pub fn from_point(point: &[u8]) -> Option<Self> {
        (point.len() == 65 && point[0] == 4).then(|| Self(Checks::P256(point.to_vec())))
    }

    /// From an Ed25519 public key.
    #[must_use]
    pub fn from_ed25519(key: &[u8]) -> Option<Self> {
        (key.len() == 32).then(|| Self(Checks::Ed25519(key.to_vec())))
    }

    /// What it checks.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        match &self.0 {
            Checks::Secret(algorithm, _) => *algorithm,
            Checks::Rsa { .. } => Algorithm::Rs256,
            Checks::P256(_) => Algorithm::Es256,
            Checks::Ed25519(_) => Algorithm::EdDsa,
        }
    }

    /// Whether this key's owner signed `message`.
    #[must_use]
    pub fn is_by(&self, message: &[u8], signature: &[u8]) -> bool {
        match &self.0 {
            Checks::Secret(_, key) => hmac::verify(key, message, signature).is_ok(),
            Checks::Rsa { n, e } => {
                let key = RsaPublicKeyComponents { n, e };
                key.verify(&RSA_PKCS1_2048_8192_SHA256, message, signature).is_ok()
            }
            Checks::P256(point) => is_good(&ECDSA_P256_SHA256_FIXED, point, message, signature),
            Checks::Ed25519(key) => is_good(&ED25519, key, message, signature),
        }
    }
}

impl fmt::Debug for VerifyingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VerifyingKey({})", self.algorithm())
    }
}

fn is_good(
    algorithm: &'static dyn signature::VerificationAlgorithm,
    key: &[u8],
    message: &[u8],
    signature: &[u8],
) -> bool {
    UnparsedPublicKey::new(algorithm, key).verify(message, signature).is_ok()
}

fn hash(algorithm: Algorithm) -> Option<hmac::Algorithm> {
    match algorithm {
        Algorithm::Hs256 => Some(hmac::HMAC_SHA256),
        Algorithm::Hs384 => Some(hmac::HMAC_SHA384),
        Algorithm::Hs512 => Some(hmac::HMAC_SHA512),
        Algorithm::Rs256 | Algorithm::Es256 | Algorithm::EdDsa => None,
    }
}

/// A key that signs tokens with one algorithm.
pub struct SigningKey(Signs);

enum Signs {
    Secret(Algorithm, hmac::Key),
    Rsa(Box<RsaKeyPair>),
    P256(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

impl SigningKey {
    /// A shared secret. `None` when the algorithm has no such keys.
    #[must_use]
    pub fn from_secret(algorithm: Algorithm, secret: &Secret) -> Option<Self> {
        let key = hmac::Key::new(hash(algorithm)?, secret.expose().as_bytes());
        Some(Self(Signs::Secret(algorithm, key)))
    }

    /// A private key in PEM (PKCS #8, or PKCS #1 for RSA); its kind decides on the algorithm.
    ///
    /// # Errors
    /// When it is no private key, or one of another kind.
    pub fn from_pem(pem: &Secret) -> Result<Self, KeyError> {
        let key = PrivateKeyDer::from_pem_slice(pem.expose().as_bytes()).map_err(|_| KeyError::NotPrivate)?;
        let signs = match &key {
            PrivateKeyDer::Pkcs1(key) => {
                RsaKeyPair::from_der(key.secret_pkcs1_der()).ok().map(|pair| Signs::Rsa(Box::new(pair)))
            }
            PrivateKeyDer::Pkcs8(key) => {
                let der = key.secret_pkcs8_der();
                let rsa = || RsaKeyPair::from_pkcs8(der).ok().map(|pair| Signs::Rsa(Box::new(pair)));
                let p256 = || {
                    let random = SystemRandom::new();
                    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der, &random);
                    pair.ok().map(Signs::P256)
                };
                // Without its public half, as openssl writes it.
                let ed25519 = || Ed25519KeyPair::from_pkcs8_maybe_unchecked(der).ok().map(Signs::Ed25519);
                rsa().or_else(p256).or_else(ed25519)
            }
            _ => None,
        };
        signs.map(Self).ok_or(KeyError::Unsupported)
    }

    /// What it signs.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        match &self.0 {
            Signs::Secret(algorithm, _) => *algorithm,
            Signs::Rsa(_) => Algorithm::Rs256,
            Signs::P256(_) => Algorithm::Es256,
            Signs::Ed25519(_) => Algorithm::EdDsa,
        }
    }

    /// The signature of `message`.
    ///
    /// # Panics
    /// When the system has no randomness to give.
    #[must_use]
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match &self.0 {
            Signs::Secret(_, key) => hmac::sign(key, message).as_ref().to_vec(),
            Signs::Rsa(pair) => {
                let mut signature = vec![0; pair.public().modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature)
                    .expect("the buffer has the modulus's length");
                signature
            }
            Signs::P256(pair) => {
                pair.sign(&random, message).expect("the system has randomness").as_ref().to_vec()
            }
            Signs::Ed25519(pair) => pair.sign(message).as_ref().to_vec(),
        }
    }

    /// The public half as an entry of a JWKS document; `None` for a shared secret, which has none.
    #[must_use]
    pub fn jwk(&self, kid: &str) -> Option<Value> {
        let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let mut jwk = match &self.0 {
            Signs::Secret(..) => return None,
            Signs::Rsa(pair) => {
                let public: RsaPublicKeyComponents<Vec<u8>> = pair.public().into();
                json!({ "kty": "RSA", "n": text(&public.n), "e": text(&public.e) })
            }
            Signs::P256(pair) => {
                let (x, y) = pair.public_key().as_ref()[1..].split_at(32);
                json!({ "kty": "EC", "crv": "P-256", "x": text(x), "y": text(y) })
            }
            Signs::Ed25519(pair) => {
                json!({ "kty": "OKP", "crv": "Ed25519", "x": text(pair.public_key().as_ref()) })
            }
        };
        jwk["kid"] = kid.into();
        jwk["use"] = "sig".into();
        jwk["alg"] = self.algorithm().name().into();
        Some(jwk)
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({})", self.algorithm())
    }
}
