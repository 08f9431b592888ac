//! What client commands sign tokens with: a shared secret or a private key, and what goes into every token.

use std::{fmt, path::PathBuf, sync::Arc};

use anyhow::{Context as _, anyhow, bail};
use clap::Args;
use sanjay_client::protocol::token::Claims;
use sanjay_runtime::{
    Secret, config,
    jwt::{self, Algorithm, SigningKey},
};

use super::{DataDir, TOKEN_SECRET};

/// Makes tokens that the edge takes. Clones share the key.
#[derive(Clone)]
pub(crate) struct Signer {
    key: Arc<SigningKey>,
    kid: Option<String>,
    audience: Option<String>,
    issuer: Option<String>,
}

impl Signer {
    /// Signs with this key, and says nothing of audience and issuer.
    pub(crate) fn new(key: SigningKey) -> Self {
        Self { key: Arc::new(key), kid: None, audience: None, issuer: None }
    }

    /// Puts `aud` and `iss` into every token, where they are not empty.
    pub(crate) fn for_whom(mut self, audience: &str, issuer: &str) -> Self {
        let set = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        (self.audience, self.issuer) = (set(audience), set(issuer));
        self
    }

    /// The token of these claims.
    pub(crate) fn sign(&self, claims: &Claims) -> String {
        let mut values = serde_json::to_value(claims).expect("claims are a map with text keys");
        for (claim, value) in [("aud", &self.audience), ("iss", &self.issuer)] {
            if let Some(value) = value {
                values[claim] = value.as_str().into();
            }
        }
        jwt::sign_with(&values, &self.key, self.kid.as_deref())
    }
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer").field("key", &self.key).finish_non_exhaustive()
    }
}

/// What tokens are signed with.
#[derive(Args)]
pub(crate) struct SecretArgs {
    /// The edge's token secret, to make a token with
    #[arg(long, env = "SANJAY_EDGE__TOKEN_SECRET", value_name = "SECRET", hide_env_values = true)]
    token_secret: Option<String>,
    /// A file that holds the token secret
    #[arg(long, env = "SANJAY_EDGE__TOKEN_SECRET_FILE", value_name = "PATH")]
    token_secret_file: Option<PathBuf>,
    /// What the secret is for: HS256, HS384 or HS512
    #[arg(long, env = "SANJAY_EDGE__TOKEN_ALGORITHM", value_name = "ALGORITHM", default_value = "HS256", value_parser = parse_algorithm)]
    token_algorithm: Algorithm,
    /// Sign with the private key in this PEM file instead: RSA (RS256), P-256 (ES256) or Ed25519 (EdDSA)
    #[arg(long, value_name = "PATH")]
    token_key: Option<PathBuf>,
    /// The name of the key, in the token's header
    #[arg(long, value_name = "KID")]
    token_kid: Option<String>,
    /// The token's audience
    #[arg(long, env = "SANJAY_EDGE__TOKEN_AUDIENCE", value_name = "AUD")]
    token_audience: Option<String>,
    /// The token's issuer
    #[arg(long, env = "SANJAY_EDGE__TOKEN_ISSUER", value_name = "ISS")]
    token_issuer: Option<String>,
    #[command(flatten)]
    pub(crate) data_dir: DataDir,
}

impl fmt::Debug for SecretArgs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretArgs").field("data_dir", &self.data_dir).finish_non_exhaustive()
    }
}

impl SecretArgs {
    /// What signs.
    ///
    /// # Errors
    /// Says what to start or to set.
    pub(crate) fn signer(&self) -> anyhow::Result<Signer> {
        let (audience, issuer) = (self.token_audience.as_deref(), self.token_issuer.as_deref());
        let signer =
            Signer::new(self.key()?).for_whom(audience.unwrap_or_default(), issuer.unwrap_or_default());
        Ok(Signer { kid: self.token_kid.clone(), ..signer })
    }

    fn key(&self) -> anyhow::Result<SigningKey> {
        if let Some(path) = &self.token_key {
            let pem = Secret::new(config::read_value("--token-key", path)?);
            return SigningKey::from_pem(&pem)
                .map_err(|error| anyhow!("the key in `{}` {error}", path.display()));
        }
        let given = TOKEN_SECRET.of(self.token_secret.clone(), self.token_secret_file.clone())?;
        let secret = self.data_dir.token_secret(given.as_deref())?;
        match SigningKey::from_secret(self.token_algorithm, &secret) {
            Some(key) => Ok(key),
            None => bail!(
                "{} signs with a private key: give its file with --token-key, which says the algorithm too",
                self.token_algorithm
            ),
        }
    }
}

fn parse_algorithm(text: &str) -> anyhow::Result<Algorithm> {
    let names = Algorithm::ALL.map(Algorithm::name).join(", ");
    Algorithm::from_name(text).with_context(|| format!("there are {names}"))
}
