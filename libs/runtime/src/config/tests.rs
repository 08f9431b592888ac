use std::path::Path;

use serde::Deserialize;

use super::*;
use crate::{Secret, telemetry::LogFormat};

#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Settings {
    edge: Edge,
    delivery: Delivery,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Edge {
    listen: String,
    heartbeat_ms: u64,
    share: f64,
    compress: bool,
    format: LogFormat,
    allowed_origins: Vec<String>,
    token_secret: Secret,
    node: Option<String>,
}

impl Default for Edge {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8080".to_owned(),
            heartbeat_ms: 25_000,
            share: 0.5,
            compress: true,
            format: LogFormat::Json,
            allowed_origins: Vec::new(),
            token_secret: Secret::default(),
            node: None,
        }
    }
}

#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Delivery {
    api_keys: Vec<ApiKey>,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct ApiKey {
    name: String,
    sha256: String,
}

impl Validate for Settings {
    fn validate(&self) -> Result<(), ConfigError> {
        if self.edge.heartbeat_ms < 1_000 {
            let problem = format!("is {}, below the minimum of 1000", self.edge.heartbeat_ms);
            return Err(ConfigError::new("edge.heartbeat_ms", problem, "set it between 1000 and 60000"));
        }
        Ok(())
    }
}

fn variables<const N: usize>(variables: [(&str, &str); N]) -> Layers {
    Layers::new().variables(variables.map(|(name, value)| (name.to_owned(), value.to_owned())))
}

fn written(toml: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sanjay.toml");
    std::fs::write(&path, toml).unwrap();
    (dir, path)
}

fn refused(layers: &Layers) -> String {
    layers.load::<Settings>().unwrap_err().to_string()
}

fn refused_file(toml: &str) -> String {
    let (_dir, path) = written(toml);
    let text = refused(&Layers::new().file(&path));
    assert!(text.contains(&format!("file `{}`", path.display())), "{text}");
    text
}

#[test]
fn each_layer_overrides_the_one_before() {
    let (_dir, path) =
        written("[edge]\nlisten = 'file:1'\nheartbeat_ms = 2000\nshare = 1\ncompress = false\n");
    let layers = variables([("SANJAY_EDGE__LISTEN", "env:1"), ("SANJAY_EDGE__HEARTBEAT_MS", "3000")])
        .file(&path)
        .flag("--listen", "edge.listen", Some("[::1]:8080"))
        .flag("--node", "edge.node", None::<String>);
    let settings: Settings = layers.load().unwrap();
    let expected = Edge {
        listen: "[::1]:8080".into(),
        heartbeat_ms: 3_000,
        share: 1.0,
        compress: false,
        ..Edge::default()
    };
    assert_eq!(settings.edge, expected);
    assert_eq!(Layers::new().load::<Settings>().unwrap(), Settings::default());
}

#[test]
fn text_becomes_what_the_setting_wants() {
    let settings: Settings = variables([
        ("SANJAY_EDGE__TOKEN_SECRET", "0123"),
        ("SANJAY_EDGE__NODE", "7"),
        ("SANJAY_EDGE__ALLOWED_ORIGINS", "https://a.example, https://b.example"),
        ("SANJAY_EDGE__FORMAT", "text"),
        ("SANJAY_EDGE__COMPRESS", "false"),
        ("SANJAY_EDGE__SHARE", "1"),
        ("SANJAY_DELIVERY__API_KEYS", r#"[{name="shop", sha256="ab"}]"#),
    ])
    .load()
    .unwrap();
    assert!(settings.edge.token_secret.matches(b"0123"));
    assert_eq!(settings.edge.node.as_deref(), Some("7"));
    assert_eq!(settings.edge.allowed_origins, ["https://a.example", "https://b.example"]);
    assert_eq!((settings.edge.format, settings.edge.compress), (LogFormat::Text, false));
    assert_eq!(settings.delivery.api_keys[0].name, "shop");
    let one: Settings = variables([("SANJAY_EDGE__ALLOWED_ORIGINS", "5")]).load().unwrap();
    assert_eq!(one.edge.allowed_origins, ["5"]);
}

#[test]
fn variables_of_others_are_left_alone() {
    let layers = variables([
        ("SANJAY_URL", "ws://x"),
        ("SANJAY_TOKEN", "t"),
        ("SANJAY_SERVER", "s"),
        ("SANJAY_API_KEY", "k"),
        // What Kubernetes adds for a service named `sanjay-edge`.
        ("SANJAY_EDGE_PORT_8080_TCP_ADDR", "10.0.0.1"),
        ("OTHER_EDGE__LISTEN", "x"),
    ]);
    assert_eq!(layers.load::<Settings>().unwrap(), Settings::default());
}

#[test]
fn a_variable_without_a_section_is_refused() {
    for name in ["SANJAY_EGDE__LISTEN", "SANJAY___LISTEN", "SANJAY_EDGE__", "SANJAY_EDGE____LISTEN"] {
        let text = refused(&variables([(name, "x")]));
        assert!(
            text.contains(&format!("`{name}`")) && text.contains("EDGE, ROUTER, DELIVERY, NAMESPACES"),
            "{text}"
        );
    }
}

#[test]
fn unknown_keys_are_refused_by_name() {
    let text = refused_file("[edge]\nlisten = 'x:1'\nheartbeet_ms = 5\n");
    assert!(text.starts_with("`edge.heartbeet_ms` (file ") && text.contains("heartbeat_ms"), "{text}");
    let text = refused_file("[egde]\nlisten = 'x:1'\n");
    assert!(text.starts_with("`egde` (file ") && text.contains("known here: edge, delivery"), "{text}");
    let text = refused_file("[[delivery.api_keys]]\nname = 'a'\nsha256 = 'b'\nhash = 'c'\n");
    assert!(text.starts_with("`delivery.api_keys.0.hash` (file "), "{text}");
    // The name comes from the layer that has it, not from another one with the same section.
    let (_dir, path) = written("[edge]\nlisten = 'x:1'\n");
    let text = refused(&variables([("SANJAY_EDGE__PORT", "1")]).file(&path));
    assert!(text.starts_with("`edge.port` (environment variable `SANJAY_EDGE__PORT`) is not"), "{text}");
    let text = refused(&Layers::new().flag("--port", "edge.port", Some(1)));
    assert!(text.starts_with("`edge.port` (flag `--port`) is not a setting"), "{text}");
}

#[test]
fn wrong_types_say_what_would_be_right() {
    let cases = [
        (
            "SANJAY_EDGE__HEARTBEAT_MS",
            "soon",
            "`edge.heartbeat_ms`",
            "the text \"soon\", expected a whole number",
        ),
        ("SANJAY_EDGE__HEARTBEAT_MS", "-5", "`edge.heartbeat_ms`", "the number -5, expected a whole number"),
        (
            "SANJAY_EDGE__HEARTBEAT_MS",
            "1.5",
            "`edge.heartbeat_ms`",
            "the number 1.5, expected a whole number",
        ),
        ("SANJAY_EDGE__SHARE", "half", "`edge.share`", "the text \"half\", expected a number"),
        ("SANJAY_EDGE__COMPRESS", "yes", "`edge.compress`", "the text \"yes\", expected true or false"),
        ("SANJAY_EDGE__FORMAT", "xml", "`edge.format`", "found `xml`, expected one of json, text"),
    ];
    for (name, value, key, problem) in cases {
        let text = refused(&variables([(name, value)]));
        let expected = format!("{key} (environment variable `{name}`): ");
        assert!(text.starts_with(&expected) && text.contains(problem), "{text}");
    }
    let text = refused(&Layers::new().flag("--heartbeat", "edge.heartbeat_ms", Some("soon")));
    assert!(text.starts_with("`edge.heartbeat_ms` (flag `--heartbeat`): "), "{text}");

    let text = refused_file("[edge]\nlisten = 8080\n");
    assert!(
        text.contains("`edge.listen`") && text.contains("the number 8080, expected text in quotes"),
        "{text}"
    );
    let text = refused_file("edge = 5\n");
    assert!(text.contains("`edge`") && text.contains("a section with keys of its own"), "{text}");
    let text = refused_file("[edge]\nallowed_origins = 'https://a.example'\n");
    assert!(text.contains("`edge.allowed_origins`") && text.contains("a list, such as"), "{text}");
    let text = refused_file("[[delivery.api_keys]]\nname = 'a'\n");
    assert!(text.contains("`delivery.api_keys.0`") && text.contains("`sha256` is missing"), "{text}");
}

#[test]
fn a_secret_is_not_shown() {
    let text = refused_file("[edge]\ntoken_secret = 271828\n");
    assert!(text.contains("`edge.token_secret`") && text.contains("a string in quotes"), "{text}");
    assert!(!text.contains("2718"), "{text}");
    let text = refused_file("[edge]\ntoken_secret = \"2718\n");
    assert!(text.contains("line 2") && !text.contains("2718"), "{text}");
}

#[test]
fn bounds_are_checked_and_the_source_is_named() {
    let text = refused(&variables([("SANJAY_EDGE__HEARTBEAT_MS", "5")]));
    assert_eq!(
        text,
        "`edge.heartbeat_ms` is 5, below the minimum of 1000; set it between 1000 and 60000 (now: environment \
         variable `SANJAY_EDGE__HEARTBEAT_MS`)"
    );
}

#[test]
fn a_file_must_be_there_and_be_toml() {
    let text = refused(&Layers::new().file(Path::new("/nonexistent/sanjay.toml")));
    assert!(text.contains("file `/nonexistent/sanjay.toml`"), "{text}");
    let text = refused_file("[edge]\n\nlisten == 1\n");
    assert!(text.contains("is not valid TOML at line 3"), "{text}");
}

/// A variable that names a file with this content.
fn from_file(name: &str, content: impl AsRef<[u8]>) -> (tempfile::TempDir, PathBuf, Layers) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("value");
    std::fs::write(&path, content).unwrap();
    let layers = variables([(name, path.to_str().unwrap())]);
    (dir, path, layers)
}

#[test]
fn a_file_may_hold_the_value() {
    for (content, secret) in [
        ("0123\n", "0123"),
        ("0123\r\n", "0123"),
        ("0123", "0123"),
        ("a b\n\n", "a b\n"),
        ("\"a\" ", "\"a\" "),
    ] {
        let (_dir, _, layers) = from_file("SANJAY_EDGE__TOKEN_SECRET_FILE", content);
        let settings: Settings = layers.load().unwrap();
        assert!(settings.edge.token_secret.matches(secret.as_bytes()), "{content:?}");
    }
    let (_dir, _, layers) = from_file("SANJAY_EDGE__HEARTBEAT_MS_FILE", "5000\n");
    assert_eq!(layers.load::<Settings>().unwrap().edge.heartbeat_ms, 5_000);
    let (_dir, _, layers) =
        from_file("SANJAY_EDGE__ALLOWED_ORIGINS_FILE", "https://a.example,https://b.example");
    let settings: Settings = layers.load().unwrap();
    assert_eq!(settings.edge.allowed_origins, ["https://a.example", "https://b.example"]);
    for keys in [
        "[{name=\"shop\", sha256=\"ab\"}, {name=\"mail\", sha256=\"cd\"}]\n",
        "[\n  { name = \"shop\", sha256 = \"ab\" },\n  { name = \"mail\", sha256 = \"cd\" }\n]\n",
    ] {
        let (_dir, _, layers) = from_file("SANJAY_DELIVERY__API_KEYS_FILE", keys);
        let settings: Settings = layers.load().unwrap();
        let names: Vec<_> = settings.delivery.api_keys.iter().map(|key| key.name.as_str()).collect();
        assert_eq!(names, ["shop", "mail"]);
    }
}

#[test]
fn a_file_stands_where_its_variable_stands() {
    let (_dir, path) = written("[edge]\nnode = 'file'\n");
    let (_other, _, layers) = from_file("SANJAY_EDGE__NODE_FILE", "variable");
    let layers = layers.file(&path);
    assert_eq!(layers.load::<Settings>().unwrap().edge.node.as_deref(), Some("variable"));
    let layers = layers.flag("--node", "edge.node", Some("flag"));
    assert_eq!(layers.load::<Settings>().unwrap().edge.node.as_deref(), Some("flag"));
    let (_dir, _, layers) = from_file("SANJAY_EDGE__PORT_FILE", "1");
    let text = refused(&layers);
    assert!(text.starts_with("`edge.port` (environment variable `SANJAY_EDGE__PORT_FILE`) is not"), "{text}");
    let text = refused(&variables([("SANJAY_EDGE___FILE", "/nonexistent")]));
    assert!(text.contains("`SANJAY_EDGE___FILE` names no setting"), "{text}");
}

#[test]
fn a_value_and_a_file_together_are_refused() {
    let (_dir, path, _) = from_file("SANJAY_EDGE__NODE_FILE", "b");
    let (by_value, by_file) =
        (("SANJAY_EDGE__NODE", "a"), ("SANJAY_EDGE__NODE_FILE", path.to_str().unwrap()));
    for both in [[by_value, by_file], [by_file, by_value]] {
        let text = refused(&variables(both));
        let expected = "`SANJAY_EDGE__NODE` is set, and so is `SANJAY_EDGE__NODE_FILE`; unset one of the two";
        assert_eq!(text, expected);
    }
}

#[test]
fn a_file_that_holds_no_value_is_refused() {
    let name = "SANJAY_EDGE__TOKEN_SECRET_FILE";
    let refused_with = |text: &str, path: &Path, problem: &str| {
        let begin = format!("`{name}` names `{}`, which ", path.display());
        assert!(text.starts_with(&begin) && text.contains(problem) && text.contains("; "), "{text}");
        assert!(!text.contains("hunter"), "{text}");
    };
    let (dir, path, layers) = from_file(name, "hunter2".repeat(10_000));
    refused_with(&refused(&layers), &path, "holds more than 65536 bytes");
    std::fs::write(&path, b"hunter2\xff").unwrap();
    refused_with(&refused(&layers), &path, "is not valid UTF-8");
    let missing = dir.path().join("missing");
    let layers = variables([(name, missing.to_str().unwrap())]);
    refused_with(&refused(&layers), &missing, "cannot be read (No such file");
    let layers = variables([(name, dir.path().to_str().unwrap())]);
    refused_with(&refused(&layers), dir.path(), "cannot be read (Is a directory");
    let text = refused(&variables([(name, "")]));
    assert_eq!(text, format!("`{name}` is empty; give the path of a file, or unset it"));
}

#[test]
fn what_a_file_holds_is_in_no_error() {
    let content = "[{name=\"hunter2\"}]";
    let cases = [
        ("SANJAY_EDGE__HEARTBEAT_MS_FILE", "hunter2", "expected a whole number"),
        ("SANJAY_EDGE__FORMAT_FILE", "hunter2", "expected one of json, text"),
        ("SANJAY_DELIVERY__API_KEYS_FILE", "hunter2", "expected a"),
        ("SANJAY_DELIVERY__API_KEYS_FILE", content, "`sha256` is missing"),
        ("SANJAY_DELIVERY__API_KEYS_FILE", "[{name=[\"hunter2\"], sha256=\"x\"}]", "expected"),
    ];
    for (name, content, problem) in cases {
        let (_dir, _, layers) = from_file(name, content);
        let text = refused(&layers);
        assert!(text.contains(&format!("environment variable `{name}`")) && text.contains(problem), "{text}");
        assert!(!text.contains("hunter2"), "{text}");
    }
}
