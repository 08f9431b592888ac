//! Which tokens an edge takes: keys, where more are published, and what claims have to say.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use sanjay_runtime::{
    ConfigError,
    config::read_value,
    fetch::{Source, SourceError},
    jwt::{Algorithm, Key, KeySet, MAX_KEYS, Rules, SigningKey, VerifyingKey},
};
use serde::Deserialize;

use super::Config;
use crate::verifier::jwks::Pace;

/// A public key of whoever signs tokens.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenKey {
    /// What tokens of this key have as `kid`; empty: it is tried for every token of its algorithm.
    pub kid: String,
    /// What it is for: `RS256`, `ES256` or `EdDSA`.
    pub algorithm: Option<Algorithm>,
    /// The key in PEM.
    pub public_key: String,
    /// A file that holds the key in PEM.
    pub file: PathBuf,
}

impl TokenKey {
    /// The key; `place` names it in errors.
    fn load(&self, place: &str) -> Result<Key, ConfigError> {
        let wrong = |field: &str, problem: String, fix: &str| {
            Err(ConfigError::new(format!("{place}.{field}"), problem, fix))
        };
        let algorithm = match self.algorithm {
            Some(algorithm) if algorithm.least_secret().is_none() => algorithm,
            Some(algorithm) => {
                let fix = "set RS256, ES256 or EdDSA here, and a shared secret in edge.token_secret";
                return wrong("algorithm", format!("is {algorithm}, which has no public keys"), fix);
            }
            None => return wrong("algorithm", "is missing".to_owned(), "set it to RS256, ES256 or EdDSA"),
        };
        let (field, pem) = match (self.public_key.as_str(), self.file.as_os_str().is_empty()) {
            ("", true) => {
                return wrong("public_key", "is missing, and so is file".to_owned(), "set one of the two");
            }
            ("", false) => ("file", read_value(&format!("{place}.file"), &self.file)?),
            (pem, true) => ("public_key", pem.to_owned()),
            (_, false) => {
                return wrong("public_key", "is set, and so is file".to_owned(), "set one of the two");
            }
        };
        match VerifyingKey::from_pem(algorithm, &pem) {
            Ok(key) => Ok(Key { kid: (!self.kid.is_empty()).then(|| self.kid.clone()), key }),
            Err(error) => wrong(field, error.to_string(), "give the public key of that algorithm in PEM"),
        }
    }
}

impl Config {
    /// The configured keys.
    ///
    /// # Errors
    /// The first one that cannot be used, or that there is neither a key nor a place to fetch some.
    pub fn own_keys(&self) -> Result<KeySet, ConfigError> {
        let mut keys = Vec::new();
        let secret = self.token_secret.expose().len();
        let algorithm = self.token_algorithm;
        let Some(least) = algorithm.least_secret() else {
            let problem = format!("is {algorithm}, which has no shared secrets");
            let fix = "set it to HS256, HS384 or HS512, and list public keys in edge.token_keys";
            return Err(ConfigError::new("edge.token_algorithm", problem, fix));
        };
        let has_others = !self.token_keys.is_empty() || !self.token_jwks_url.is_empty();
        if secret > 0 || !has_others {
            if secret < least {
                let problem = format!("has {secret} bytes");
                let fix = format!("set it to at least {least} random bytes");
                return Err(ConfigError::new("edge.token_secret", problem, fix));
            }
            let key = VerifyingKey::from_secret(algorithm, &self.token_secret);
            keys.extend(key.map(|key| Key { kid: None, key }));
        }
        if self.token_keys.len() > MAX_KEYS {
            let problem = format!("has {} keys", self.token_keys.len());
            return Err(ConfigError::new("edge.token_keys", problem, format!("list at most {MAX_KEYS}")));
        }
        for (at, key) in self.token_keys.iter().enumerate() {
            keys.push(key.load(&format!("edge.token_keys[{at}]"))?);
        }
        Ok(KeySet::new(keys))
    }

    /// What signs tokens that this edge takes: its shared secret, when it has one.
    #[must_use]
    pub fn signing_key(&self) -> Option<SigningKey> {
        if self.token_secret.is_empty() {
            return None;
        }
        SigningKey::from_secret(self.token_algorithm, &self.token_secret)
    }

    /// Where more keys are published; `None` when nowhere.
    ///
    /// # Errors
    /// When the address, or the certificates for it, cannot be used.
    pub fn published_keys(&self) -> Result<Option<Source>, ConfigError> {
        if self.token_jwks_url.is_empty() {
            return Ok(None);
        }
        let authorities = match self.token_jwks_ca.as_str() {
            "" => None,
            pem if pem.contains("-----BEGIN") => Some(pem.to_owned()),
            path => Some(read_value("edge.token_jwks_ca", Path::new(path))?),
        };
        match Source::new(&self.token_jwks_url, authorities.as_deref()) {
            Ok(source) => Ok(Some(source)),
            Err(error) => {
                let key = match error {
                    SourceError::NoCertificates => "edge.token_jwks_ca",
                    SourceError::NotAUrl | SourceError::Credentials => "edge.token_jwks_url",
                };
                Err(ConfigError::new(key, error.to_string(), "correct it, or leave it out"))
            }
        }
    }

    /// What claims have to say.
    #[must_use]
    pub fn token_rules(&self) -> Rules {
        let set = |text: &String| (!text.is_empty()).then(|| text.clone());
        Rules { audience: set(&self.token_audience), issuer: set(&self.token_issuer) }
    }

    /// How often published keys are fetched.
    pub(crate) fn jwks_pace(&self) -> Pace {
        Pace {
            interval: Duration::from_millis(self.token_jwks_interval_ms),
            refresh: Duration::from_millis(self.token_jwks_refresh_ms),
        }
    }

    pub(super) fn validate_tokens(&self) -> Result<(), ConfigError> {
        self.own_keys()?;
        self.published_keys()?;
        if self.token_jwks_refresh_ms < self.token_jwks_interval_ms {
            let problem = format!("is {}, less than edge.token_jwks_interval_ms", self.token_jwks_refresh_ms);
            let fix = format!("set it to at least {}", self.token_jwks_interval_ms);
            return Err(ConfigError::new("edge.token_jwks_refresh_ms", problem, fix));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use sanjay_runtime::{Secret, Validate};

    use super::*;

    /// RFC 8410, section 10.1.
    const ED25519: &str = "-----BEGIN PUBLIC KEY-----\n\
                           MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n\
                           -----END PUBLIC KEY-----\n";

    fn config(change: impl FnOnce(&mut Config)) -> Result<(), String> {
        let mut config = Config { token_secret: Secret::new("x".repeat(32)), ..Config::default() };
        change(&mut config);
        config.validate().map_err(|error| error.to_string())
    }

    fn key(change: impl FnOnce(&mut TokenKey)) -> Result<(), String> {
        let mut key = TokenKey {
            algorithm: Some(Algorithm::EdDsa),
            public_key: ED25519.to_owned(),
            ..TokenKey::default()
        };
        change(&mut key);
        config(|config| config.token_keys = vec![key])
    }

    #[test]
    fn wrong_settings_are_named_with_what_would_be_right() {
        let cases: Vec<(Result<(), String>, &[&str])> = vec![
            (config(|c| c.token_secret = Secret::default()), &["`edge.token_secret`", "32 random bytes"]),
            (config(|c| c.token_algorithm = Algorithm::Hs512), &["`edge.token_secret`", "at least 64"]),
            (
                config(|c| c.token_algorithm = Algorithm::Es256),
                &["`edge.token_algorithm`", "edge.token_keys"],
            ),
            (key(|key| key.algorithm = None), &["`edge.token_keys[0].algorithm` is missing", "ES256"]),
            (key(|key| key.algorithm = Some(Algorithm::Hs256)), &["no public keys", "edge.token_secret"]),
            (key(|key| key.algorithm = Some(Algorithm::Rs256)), &["public_key` is for EdDSA, not for RS256"]),
            (key(|key| key.public_key = "secret text".into()), &["BEGIN PUBLIC KEY"]),
            (key(|key| key.public_key.clear()), &["is missing, and so is file"]),
            (key(|key| key.file = "key.pem".into()), &["is set, and so is file"]),
            (
                key(|key| (key.public_key, key.file) = (String::new(), "/nowhere/key.pem".into())),
                &["`edge.token_keys[0].file`", "/nowhere/key.pem"],
            ),
            (config(|c| c.token_jwks_url = "issuer/keys".into()), &["`edge.token_jwks_url`", "https://"]),
            (config(|c| c.token_jwks_url = "https://me:secret@issuer.example/".into()), &["credentials"]),
            (
                config(|c| {
                    c.token_jwks_url = "https://issuer.example/".into();
                    c.token_jwks_ca = "/nowhere/ca.pem".into();
                }),
                &["`edge.token_jwks_ca`", "/nowhere/ca.pem"],
            ),
            (config(|c| c.token_jwks_interval_ms = 600_000), &["`edge.token_jwks_refresh_ms`", "600000"]),
        ];
        for (result, parts) in cases {
            let text = result.expect_err(parts[0]);
            assert!(parts.iter().all(|part| text.contains(part)), "{parts:?}: {text}");
            assert!(!text.contains("secret text") && !text.contains("me:secret"), "{text}");
        }
    }

    #[test]
    fn one_source_of_keys_is_enough() {
        assert_eq!(config(|_| ()), Ok(()));
        assert_eq!(key(|_| ()), Ok(()));
        let url = "https://issuer.example/.well-known/jwks.json";
        assert_eq!(config(|c| (c.token_secret, c.token_jwks_url) = (Secret::default(), url.into())), Ok(()));
        let keys = Config { token_jwks_url: url.into(), ..Config::default() };
        assert!(keys.own_keys().unwrap().is_empty() && keys.published_keys().unwrap().is_some());
        assert!(keys.signing_key().is_none());
    }
}
