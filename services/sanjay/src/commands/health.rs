//! `sanjay health`: asks a server whether it accepts work, for scripts and container health checks.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, Uri, body::Bytes, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

use crate::{
    output,
    serve::settings::{AdminSettings, layers},
    settings::DataDir,
};

const TIMEOUT: Duration = Duration::from_secs(5);
const MAX_BODY_BYTES: usize = 64 * 1024;

/// The variable with which a server is told where its admin pages are.
const LISTEN: &str = "SANJAY_ADMIN__LISTEN";

/// Ask a server whether it accepts work: exit code 0 if so, else 1
///
/// In a server's own container no address is needed: it is where the server's configuration, or
/// SANJAY_ADMIN__LISTEN, has it listen. The answer comes within 5 s.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The server's admin address, such as http://127.0.0.1:8081
    #[arg(long, env = "SANJAY_ADMIN", value_name = "URL")]
    admin: Option<String>,
    /// The server's configuration file, to ask where `admin.listen` says
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    data_dir: DataDir,
}

impl Args {
    /// Prints the server's answer.
    ///
    /// # Errors
    /// When it is not ready or does not answer.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let admin = match self.admin {
            None if self.config.is_some() || std::env::var_os(LISTEN).is_some() => {
                let AdminSettings { admin, .. } = layers(self.config.as_deref())?.load()?;
                format!("http://{}", reachable(&admin.listen))
            }
            given => self.data_dir.admin(given)?,
        };
        let answer = timeout(TIMEOUT, Box::pin(get(&admin))).await;
        let (status, body) = answer.map_err(|_| anyhow!("{admin} gave no answer within 5 s"))??;
        match status {
            StatusCode::OK => output::line(body.trim_end()),
            StatusCode::SERVICE_UNAVAILABLE => bail!("{admin} is not ready: {}", body.trim_end()),
            other => bail!("{admin} answered with HTTP status {}; is it the admin address?", other.as_u16()),
        }
    }
}

/// Where to call a server of this machine that listens here: one that listens on every address is called on the
/// loopback.
fn reachable(listen: &str) -> String {
    let Ok(mut address) = listen.parse::<SocketAddr>() else { return listen.to_owned() };
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    address.to_string()
}

async fn get(admin: &str) -> anyhow::Result<(StatusCode, String)> {
    let uri: Uri = admin.parse().with_context(|| format!("{admin:?} is no address"))?;
    let (Some("http"), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        bail!("{admin:?} is no admin address; one looks like http://127.0.0.1:8081");
    };
    let address = (uri.host().unwrap_or_default().trim_matches(['[', ']']), uri.port_u16().unwrap_or(80));
    let stream = TcpStream::connect(address).await.with_context(|| {
        format!("no server answers at {admin}; start one with `sanjay standalone`, or give its address with --admin")
    })?;
    let handshake = http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.with_context(|| format!("{admin} does not speak HTTP"))?;
    let request = Request::get("/readyz").header(HOST, authority.as_str()).body(Empty::<Bytes>::new())?;
    let exchange = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_BODY_BYTES).collect().await;
        let body = body.map_err(|error| anyhow!("the answer could not be read: {error}"))?.to_bytes();
        anyhow::Ok((status, String::from_utf8_lossy(&body).into_owned()))
    };
    tokio::pin!(exchange, connection);
    tokio::select! {
        answer = &mut exchange => answer,
        // The connection ends first only when it breaks; what it delivered counts.
        _ = &mut connection => exchange.await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_listens_everywhere_is_called_on_the_loopback() {
        for (listen, called) in [
            ("0.0.0.0:8081", "127.0.0.1:8081"),
            ("[::]:8081", "[::1]:8081"),
            ("10.0.0.1:1", "10.0.0.1:1"),
            ("localhost:8081", "localhost:8081"),
        ] {
            assert_eq!(reachable(listen), called);
        }
    }
}
