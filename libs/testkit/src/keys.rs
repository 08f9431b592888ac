//! Key pairs that are made for a test, and an issuer's server that publishes some of them.

use std::{
    process::Command,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use sanjay_runtime::{
    Secret,
    jwt::{Algorithm, SigningKey},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

/// A key pair, made by openssl.
#[derive(Debug, Clone)]
pub struct KeyPair {
    /// The private half in PEM.
    pub private: String,
    /// The public half in PEM.
    pub public: String,
    key: Arc<SigningKey>,
}

impl KeyPair {
    /// A new one for `RS256`, `ES256` or `EdDSA`.
    ///
    /// # Panics
    /// When openssl does not make it.
    #[must_use]
    pub fn generate(algorithm: &str) -> Self {
        let kind: &[&str] = match algorithm {
            "RS256" => &["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
            "ES256" => &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
            "EdDSA" => &["-algorithm", "ED25519"],
            other => panic!("{other} has no key pairs"),
        };
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let path = directory.path().join("key.pem").display().to_string();
        openssl(&[&["genpkey", "-out", &path][..], kind].concat());
        let private = std::fs::read_to_string(&path).expect("openssl wrote the key");
        let public = openssl(&["pkey", "-in", &path, "-pubout"]);
        let key = SigningKey::from_pem(&Secret::new(private.clone())).expect("openssl wrote a private key");
        assert_eq!(Algorithm::from_name(algorithm), Some(key.algorithm()));
        Self { private, public, key: Arc::new(key) }
    }

    /// Its entry in a JWKS document.
    ///
    /// # Panics
    /// Never: a key pair has a public half.
    #[must_use]
    pub fn jwk(&self, kid: &str) -> Value {
        self.key.jwk(kid).expect("a key pair has a public half")
    }

    pub(crate) fn key(&self) -> &SigningKey {
        &self.key
    }
}

fn openssl(arguments: &[&str]) -> String {
    let made = Command::new("openssl").args(arguments).output().expect("openssl is installed");
    assert!(made.status.success(), "openssl {arguments:?}: {}", String::from_utf8_lossy(&made.stderr));
    String::from_utf8(made.stdout).expect("openssl writes text")
}

/// An issuer's HTTP server with a JWKS document. It counts how often it is asked.
#[derive(Debug)]
pub struct KeyServer {
    url: String,
    answer: Arc<Mutex<Answer>>,
    fetches: Arc<AtomicUsize>,
    serving: JoinHandle<()>,
}

#[derive(Debug, Clone)]
struct Answer {
    status: u16,
    body: String,
}

impl KeyServer {
    /// Serves these keys.
    ///
    /// # Panics
    /// When it cannot listen.
    pub async fn start(keys: &[Value]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("a listener has an address");
        let answer = Arc::new(Mutex::new(Answer { status: 200, body: document(keys) }));
        let fetches = Arc::new(AtomicUsize::new(0));
        let (told, counted) = (Arc::clone(&answer), Arc::clone(&fetches));
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::Relaxed);
                let answer = told.lock().unwrap_or_else(PoisonError::into_inner).clone();
                tokio::spawn(reply(stream, answer));
            }
        });
        Self { url: format!("http://{address}/keys"), answer, fetches, serving }
    }

    /// Where the document is.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// How often it was asked for.
    #[must_use]
    pub fn fetches(&self) -> usize {
        self.fetches.load(Ordering::Relaxed)
    }

    /// Serves these keys from now on.
    pub fn publish(&self, keys: &[Value]) {
        self.set(200, document(keys));
    }

    /// Answers with this from now on.
    pub fn fail(&self, status: u16, body: &str) {
        self.set(status, body.to_owned());
    }

    fn set(&self, status: u16, body: String) {
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = Answer { status, body };
    }
}

impl Drop for KeyServer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn document(keys: &[Value]) -> String {
    json!({ "keys": keys }).to_string()
}

async fn reply(mut stream: TcpStream, Answer { status, body }: Answer) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let answer = format!("HTTP/1.1 {status} Told\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let _ = stream.write_all(answer.as_bytes()).await;
    let _ = stream.shutdown().await;
}
