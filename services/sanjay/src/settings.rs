//! Where a client command finds its server: flags, then the environment, then what the server in the data
//! directory wrote down.

mod given;
mod signer;

use std::path::PathBuf;

use anyhow::{anyhow, bail};
use clap::Args;
use sanjay_client::{Backend, BackendError, BackendOptions};
use sanjay_runtime::Secret;

pub(crate) use given::{API_KEY, TOKEN, TOKEN_SECRET};
pub(crate) use signer::{SecretArgs, Signer};

use crate::serve::{
    ready::{self, Ready},
    secrets::{self, Secrets},
    standalone::DATA_DIR,
};

/// The data directory of a server on this machine.
#[derive(Debug, Clone, Args)]
pub(crate) struct DataDir {
    /// Where a standalone server keeps its files; what no flag or variable says is taken from there
    #[arg(long, value_name = "DIR", default_value = DATA_DIR)]
    data_dir: PathBuf,
}

impl DataDir {
    /// The value that was given, or else the one that the server wrote down.
    ///
    /// # Errors
    /// When there is neither; the text names the flag and the variable.
    pub(crate) fn resolve(
        &self,
        given: Option<String>,
        flag: &str,
        variable: &str,
        field: impl FnOnce(Ready) -> Option<String>,
    ) -> anyhow::Result<String> {
        match given {
            Some(given) => Ok(given),
            None => Ready::read(&self.data_dir)?.and_then(field).ok_or_else(|| {
                anyhow!(
                    "no server is known here: start one with `sanjay standalone`, or give {flag} or {variable} (there is no {})",
                    self.data_dir.join(ready::FILE).display()
                )
            }),
        }
    }

    /// The admin address.
    ///
    /// # Errors
    /// When none is known.
    pub(crate) fn admin(&self, given: Option<String>) -> anyhow::Result<String> {
        self.resolve(given, "--admin", "SANJAY_ADMIN", |ready| {
            Some(ready.admin).filter(|admin| !admin.is_empty())
        })
    }

    /// The secret that tokens are signed with: the one that was given, or else the server's own.
    ///
    /// # Errors
    /// When the given one is empty, or there is none.
    pub(crate) fn token_secret(&self, given: Option<&str>) -> anyhow::Result<Secret> {
        if let Some(given) = given {
            if given.is_empty() {
                bail!("the token secret is empty; give the edge's `token_secret`");
            }
            return Ok(Secret::new(given));
        }
        let secrets = Secrets::read(&self.data_dir)?.ok_or_else(|| {
            anyhow!(
                "no token secret is known here: start a server with `sanjay standalone`, or give --token-secret or SANJAY_EDGE__TOKEN_SECRET (there is no {})",
                self.data_dir.join(secrets::FILE).display()
            )
        })?;
        Ok(Secret::new(secrets.token_secret))
    }
}

/// The address of the gRPC API for back ends, and a key of it.
#[derive(Args)]
pub(crate) struct ServerArgs {
    /// The API's address, such as http://127.0.0.1:8082
    #[arg(long, env = "SANJAY_SERVER", value_name = "URL")]
    server: Option<String>,
    /// A key of that server
    #[arg(long, env = "SANJAY_API_KEY", value_name = "KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// A file that holds the key
    #[arg(long, env = "SANJAY_API_KEY_FILE", value_name = "PATH")]
    api_key_file: Option<PathBuf>,
}

impl std::fmt::Debug for ServerArgs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerArgs").field("server", &self.server).finish_non_exhaustive()
    }
}

impl ServerArgs {
    /// Where the API is and what it asks for: what was given, or else what a server wrote down in `data_dir`.
    ///
    /// # Errors
    /// Says what to start or to set.
    pub(crate) fn options(&self, data_dir: &DataDir) -> anyhow::Result<BackendOptions> {
        let server =
            data_dir.resolve(self.server.clone(), "--server", "SANJAY_SERVER", |ready| ready.server)?;
        let api_key = API_KEY.of(self.api_key.clone(), self.api_key_file.clone())?;
        let api_key = data_dir.resolve(api_key, API_KEY.flag, API_KEY.variable, |ready| ready.api_key)?;
        Ok(BackendOptions::new(server, api_key))
    }
}

/// The gRPC API for back ends.
#[derive(Debug, Args)]
pub(crate) struct ApiArgs {
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    data_dir: DataDir,
}

impl ApiArgs {
    /// Connects to the API.
    ///
    /// # Errors
    /// Says what to start or to set.
    pub(crate) async fn connect(self) -> anyhow::Result<Backend> {
        Backend::connect(self.server.options(&self.data_dir)?).await.map_err(explain)
    }
}

/// Adds what a user of the command line can do.
pub(crate) fn explain(error: BackendError) -> anyhow::Error {
    match error {
        BackendError::Unreachable { .. } => {
            anyhow!("{error}; start one with `sanjay standalone`, or give its address with --server")
        }
        BackendError::WrongKey { .. } => {
            anyhow!("{error} with --api-key or SANJAY_API_KEY; `sanjay standalone` prints its own")
        }
        other => other.into(),
    }
}

/// The WebSocket endpoint, and who connects.
#[derive(Args)]
pub(crate) struct SocketArgs {
    /// The edge's address, such as ws://127.0.0.1:8080/v1/ws
    #[arg(long, env = "SANJAY_URL", value_name = "URL")]
    url: Option<String>,
    /// The token to connect with
    #[arg(long, env = "SANJAY_TOKEN", value_name = "TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// A file that holds the token
    #[arg(long, env = "SANJAY_TOKEN_FILE", value_name = "PATH")]
    token_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) secret: SecretArgs,
}

impl std::fmt::Debug for SocketArgs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SocketArgs").field("url", &self.url).finish_non_exhaustive()
    }
}

impl SocketArgs {
    /// The address and the token; the token is made by `mint` where a user was named.
    ///
    /// # Errors
    /// Says what to start or to set.
    pub(crate) fn resolve(
        self,
        mint: Option<impl FnOnce(Signer) -> String>,
    ) -> anyhow::Result<(String, String)> {
        let data_dir = &self.secret.data_dir;
        let url = data_dir.resolve(self.url, "--url", "SANJAY_URL", |ready| ready.url)?;
        let token = match mint {
            Some(mint) => mint(self.secret.signer()?),
            None => {
                let token = TOKEN.of(self.token, self.token_file)?;
                data_dir.resolve(token, TOKEN.flag, TOKEN.variable, |ready| ready.token)?
            }
        };
        Ok((url, token))
    }
}

/// An edge, for a command that makes tokens for its users itself.
#[derive(Debug, Args)]
pub(crate) struct AccessArgs {
    /// The edge's address, such as ws://127.0.0.1:8080/v1/ws
    #[arg(long, env = "SANJAY_URL", value_name = "URL")]
    url: Option<String>,
    #[command(flatten)]
    pub(crate) secret: SecretArgs,
}

impl AccessArgs {
    /// The address, and what to make tokens with.
    ///
    /// # Errors
    /// Says what to start or to set.
    pub(crate) fn resolve(&self) -> anyhow::Result<(String, Signer)> {
        let data_dir = &self.secret.data_dir;
        let url = data_dir.resolve(self.url.clone(), "--url", "SANJAY_URL", |ready| ready.url)?;
        Ok((url, self.secret.signer()?))
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    fn data_dir(path: &Path) -> DataDir {
        DataDir { data_dir: path.to_owned() }
    }

    #[test]
    fn what_is_given_comes_before_what_the_server_wrote_down() {
        let directory = tempfile::tempdir().unwrap();
        let data_dir = data_dir(directory.path());
        let unknown = data_dir.admin(None).unwrap_err().to_string();
        for text in ["`sanjay standalone`", "--admin", "SANJAY_ADMIN", "ready.json"] {
            assert!(unknown.contains(text), "{unknown}");
        }
        fs::write(directory.path().join("ready.json"), r#"{"admin":"http://there","more":1}"#).unwrap();
        assert_eq!(data_dir.admin(None).unwrap(), "http://there");
        assert_eq!(data_dir.admin(Some("http://here".into())).unwrap(), "http://here");
        fs::write(directory.path().join("ready.json"), "{").unwrap();
        assert!(data_dir.admin(None).unwrap_err().to_string().contains("is damaged"));
    }
}
