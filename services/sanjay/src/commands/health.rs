//! `sanjay health`: asks a server whether it accepts work, for scripts and container health checks.

use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, Uri, body::Bytes, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

use crate::{output, settings::DataDir};

const TIMEOUT: Duration = Duration::from_secs(5);
const MAX_BODY_BYTES: usize = 64 * 1024;

/// Ask a server whether it accepts work: exit code 0 if so, else 1
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The server's admin address, such as http://127.0.0.1:8081
    #[arg(long, env = "SANJAY_ADMIN", value_name = "URL")]
    admin: Option<String>,
    #[command(flatten)]
    data_dir: DataDir,
}

impl Args {
    /// Prints the server's answer.
    ///
    /// # Errors
    /// When it is not ready or does not answer.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let admin = self.data_dir.admin(self.admin)?;
        let answer = timeout(TIMEOUT, Box::pin(get(&admin))).await;
        let (status, body) = answer.map_err(|_| anyhow!("{admin} gave no answer within 5 s"))??;
        match status {
            StatusCode::OK => output::line(body.trim_end()),
            StatusCode::SERVICE_UNAVAILABLE => bail!("{admin} is not ready: {}", body.trim_end()),
            other => bail!("{admin} answered with HTTP status {}; is it the admin address?", other.as_u16()),
        }
    }
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
