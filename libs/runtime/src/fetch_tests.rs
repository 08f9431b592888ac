use std::{path::Path, process::Command};

use rustls::{ServerConfig, pki_types::PrivateKeyDer};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;

use super::*;

/// Serves one answer to everybody; gives the port.
async fn serve(answer: impl Into<Vec<u8>>, tls: Option<TlsAcceptor>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let answer = answer.into();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            match &tls {
                None => reply(stream, &answer).await,
                // A client that does not trust the certificate hangs up here.
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        reply(stream, &answer).await;
                    }
                }
            }
        }
    });
    port
}

async fn reply(mut stream: impl AsyncRead + AsyncWrite + Unpin, answer: &[u8]) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    assert!(head.starts_with(b"GET /keys?a=b HTTP/1.1\r\n"), "{}", String::from_utf8_lossy(&head));
    let _ = stream.write_all(answer).await;
    let _ = stream.shutdown().await;
}

async fn fetch(answer: impl Into<Vec<u8>>) -> Result<Document, FetchError> {
    let port = serve(answer, None).await;
    Source::new(&format!("http://127.0.0.1:{port}/keys?a=b"), None).unwrap().fetch().await
}

/// A certificate of `localhost` that vouches for itself, with its key.
fn certificate(directory: &Path) -> (String, String) {
    let path = |name: &str| directory.join(name).display().to_string();
    let config = "[req]\ndistinguished_name=dn\nx509_extensions=ext\n[dn]\n[ext]\n\
                  subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n";
    std::fs::write(directory.join("openssl.conf"), config).unwrap();
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"])
        .args(["-days", "2", "-subj", "/CN=localhost", "-config", &path("openssl.conf")])
        .args(["-keyout", &path("key.pem"), "-out", &path("certificate.pem")])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let read = |name: &str| std::fs::read_to_string(directory.join(name)).unwrap();
    (read("certificate.pem"), read("key.pem"))
}

#[tokio::test]
async fn a_document_comes_with_how_long_it_may_be_kept() {
    let document = |body: &[u8], seconds: Option<u64>| {
        let max_age = seconds.map(Duration::from_secs);
        Ok(Document { body: Bytes::copy_from_slice(body), max_age })
    };
    let sized = |headers: &str| format!("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n{headers}\r\nhi");
    assert_eq!(fetch(sized("")).await, document(b"hi", None));
    assert_eq!(fetch(sized("Cache-Control: public, max-age=60\r\n")).await, document(b"hi", Some(60)));
    assert_eq!(fetch(sized("Cache-Control: no-store, max-age=60\r\n")).await, document(b"hi", Some(0)));
    assert_eq!(fetch(sized("Cache-Control: max-age=soon\r\n")).await, document(b"hi", None));
    assert_eq!(fetch("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhi").await, document(b"hi", None));
}

#[tokio::test]
async fn what_is_no_good_answer_is_named() {
    assert_eq!(
        fetch("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").await,
        Err(FetchError::Status(StatusCode::NOT_FOUND))
    );
    let moved = fetch("HTTP/1.1 302 Found\r\nlocation: /x\r\ncontent-length: 0\r\n\r\n").await.unwrap_err();
    assert!(moved.to_string().contains("redirects to"), "{moved}");
    let mut large = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n".to_vec();
    large.resize(large.len() + SIZE_LIMIT + 1, b'x');
    assert_eq!(fetch(large).await, Err(FetchError::TooLarge));
    for broken in ["", "nonsense\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhi"] {
        assert!(matches!(fetch(broken).await, Err(FetchError::Unreachable(_))), "{broken}");
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let source = Source::new(&format!("http://127.0.0.1:{port}"), None).unwrap();
    assert!(matches!(source.fetch().await, Err(FetchError::Unreachable(_))));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_says_nothing_is_left() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let source = Source::new(&format!("http://{}/", listener.local_addr().unwrap()), None).unwrap();
    assert_eq!(source.fetch().await, Err(FetchError::Late));
}

#[tokio::test]
async fn https_asks_for_a_certificate_that_somebody_vouches_for() {
    let directory = tempfile::tempdir().unwrap();
    let (certificate, key) = certificate(directory.path());
    let chain =
        CertificateDer::pem_slice_iter(certificate.as_bytes()).collect::<Result<Vec<_>, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let tls = TlsAcceptor::from(Arc::new(config));
    let port = serve("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi", Some(tls)).await;
    let url = format!("https://localhost:{port}/keys?a=b");
    let trusted = Source::new(&url, Some(&certificate)).unwrap();
    assert_eq!(trusted.fetch().await.unwrap().body, "hi");
    assert_eq!(trusted.to_string(), format!("https://localhost:{port}/keys"));
    let stranger = Source::new(&url, None).unwrap().fetch().await;
    assert!(matches!(&stranger, Err(FetchError::Tls(why)) if why.contains("certificate")), "{stranger:?}");
    let renamed = Source::new(&url.replace("localhost", "127.0.0.1"), Some(&certificate)).unwrap();
    assert!(matches!(renamed.fetch().await, Err(FetchError::Tls(_))), "the certificate is another host's");
}

#[test]
fn addresses_that_are_none_are_refused() {
    for wrong in ["", "keys.json", "/keys", "ftp://a/b", "http://", "https:///x", "http://a b/"] {
        assert_eq!(Source::new(wrong, None).err(), Some(SourceError::NotAUrl), "{wrong}");
    }
    assert_eq!(Source::new("https://u:p@a.example/", None).err(), Some(SourceError::Credentials));
    for wrong in ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        let refused = Source::new("https://a.example/", Some(wrong)).err();
        assert_eq!(refused, Some(SourceError::NoCertificates), "{wrong}");
    }
    let source = Source::new("http://[::1]:8080/keys?secret=1", None).unwrap();
    assert_eq!((source.to_string().as_str(), source.is_encrypted()), ("http://[::1]:8080/keys", false));
    assert!(!format!("{source:?}").contains("secret"));
}
