//! Binding of listeners, with errors that say what to do.

use std::io;

use anyhow::Context as _;
use tokio::net::TcpListener;

/// Listens on `addr` (`host:port`) for `what`, which `flag` configures.
///
/// # Errors
/// When the address cannot be had; the text names the flag and the way out.
pub async fn bind(what: &str, flag: &str, addr: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(addr)
        .await
        .map_err(|error| {
            let advice = advice(error.kind(), addr);
            anyhow::Error::new(error).context(advice)
        })
        .with_context(|| format!("cannot listen on {addr} for {what} ({flag})"))
}

fn advice(kind: io::ErrorKind, addr: &str) -> String {
    let port = addr.rsplit(':').next().unwrap_or_default();
    match kind {
        io::ErrorKind::AddrInUse => format!(
            "another process listens there: find it with `ss -ltnp 'sport = :{port}'`, choose another port, or \
             port 0 for any free one"
        ),
        io::ErrorKind::PermissionDenied => {
            "ports below 1024 need a privilege: choose a higher one".to_owned()
        }
        io::ErrorKind::AddrNotAvailable => {
            "this machine has no such address: choose one of its own, or 0.0.0.0 for all".to_owned()
        }
        _ => "the address must look like `host:port`, such as `127.0.0.1:8080`".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_taken_port_is_explained() {
        let first = bind("the edge", "--edge-listen", "127.0.0.1:0").await.unwrap();
        let addr = first.local_addr().unwrap();
        let error = bind("the edge", "--edge-listen", &addr.to_string()).await.unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("--edge-listen") && text.contains(&format!("sport = :{}", addr.port())),
            "{text}"
        );
        assert!(text.contains("port 0"), "{text}");
    }

    #[tokio::test]
    async fn nonsense_is_explained() {
        let error = bind("the router", "--router-listen", "127.0.0.1").await.unwrap_err();
        assert!(format!("{error:#}").contains("`host:port`"), "{error:#}");
    }
}
