use super::*;
use crate::config::Layers;

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Settings {
    namespaces: Namespaces,
}

impl Validate for Settings {
    fn validate(&self) -> Result<(), ConfigError> {
        self.namespaces.validate()
    }
}

fn load(toml: &str, variables: &[(&str, &str)]) -> Result<Namespaces, String> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sanjay.toml");
    std::fs::write(&path, toml).unwrap();
    let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let layers = Layers::new().file(path).variables(variables);
    layers.load::<Settings>().map(|settings| settings.namespaces).map_err(|error| error.to_string())
}

fn sizes(namespaces: &Namespaces, channels: &[&str]) -> Vec<u32> {
    channels.iter().map(|channel| namespaces.of(channel).history_size).collect()
}

#[test]
fn a_channel_belongs_to_what_stands_before_its_first_colon() {
    for (channel, name) in
        [("chat:1", "chat"), ("chat:1:2", "chat"), ("news", "default"), (":x", ""), ("a:", "a")]
    {
        assert_eq!(name_of(channel), name, "{channel}");
    }
    let file = "[namespaces.default]\nhistory_size = 1\n[namespaces.chat]\nhistory_size = 2\n[namespaces.\"räume\"]\nhistory_size = 3";
    let namespaces = load(file, &[]).unwrap();
    let channels = ["chat:1", "chat", "news", "other:1", "räume:1", "default:1", ":1"];
    assert_eq!(sizes(&namespaces, &channels), [2, 1, 1, 1, 3, 1, 1]);
    let without = load("[namespaces.chat]\nhistory_size = 2", &[]).unwrap();
    assert_eq!(sizes(&without, &["chat:1", "news"]), [2, 0]);
    assert_eq!(Namespaces::default().of("chat:1"), Namespace::default());
}

#[test]
fn settings_that_are_left_out_are_the_usual_ones() {
    let chat =
        load("[namespaces.default]\nprivate = true\n[namespaces.chat]\npublish = \"backends\"", &[]).unwrap();
    let usual = Namespace::default();
    assert_eq!(chat.of("chat:1"), Namespace { publish: Publishers::Backends, ..usual });
    assert_eq!(chat.of("news"), Namespace { private: true, ..usual });
    assert_eq!((usual.history_size, usual.history_ttl_s, usual.max_subscribers), (0, 300, 0));
    assert_eq!((usual.publish, usual.private, usual.max_payload_bytes), (Publishers::Clients, false, 65_536));
}

#[test]
fn a_variable_sets_one_key_of_a_namespace() {
    let variables =
        [("SANJAY_NAMESPACES__CHAT__HISTORY_SIZE", "7"), ("SANJAY_NAMESPACES__CHAT__PUBLISH", "backends")];
    let namespaces = load("[namespaces.chat]\nhistory_size = 2\nhistory_ttl_s = 9", &variables).unwrap();
    let expected = Namespace {
        history_size: 7,
        history_ttl_s: 9,
        publish: Publishers::Backends,
        ..Namespace::default()
    };
    assert_eq!(namespaces.of("chat:1"), expected);
}

#[test]
fn what_is_wrong_is_named_with_what_would_be_right() {
    let cases = [
        (
            "[namespaces.chat]\nhistory_size = 10001",
            "`namespaces.chat.history_size` is 10001; set it from 0 to 10000",
        ),
        (
            "[namespaces.chat]\nhistory_ttl_s = 0",
            "`namespaces.chat.history_ttl_s` is 0; set it from 1 to 604800",
        ),
        (
            "[namespaces.chat]\nmax_payload_bytes = 65537",
            "`namespaces.chat.max_payload_bytes` is 65537; set it from 1 to 65536",
        ),
        ("[namespaces.chat]\nmax_payload_bytes = 0", "set it from 1 to 65536"),
        ("[namespaces.chat]\npublish = \"nobody\"", "found `nobody`, expected one of clients, backends"),
        ("[namespaces.chat]\nhistory = 5", "`namespaces.chat.history` (file"),
        ("[namespaces.chat]\nhistory = 5", "known here: history_size, history_ttl_s, publish, private"),
        ("[namespaces.chat]\nprivate = 1", "expected true or false"),
        (
            "[namespaces.\"chat:x\"]",
            "has a `:` in its name, so no channel is in it; name it by what stands before",
        ),
        ("[namespaces.\"\"]", "has a wrong name: it is empty"),
        ("[namespaces]\nhistory_size = 5", "expected a section with keys of its own"),
    ];
    for (toml, text) in cases {
        let refused = load(toml, &[]).unwrap_err();
        assert!(refused.contains(text), "{toml}: {refused}");
    }
    let many: Namespaces = (0..1_001).map(|at| (format!("n{at}"), Namespace::default())).collect();
    assert!(many.validate().unwrap_err().to_string().contains("has 1001 namespaces; use at most 1000"));
}

#[test]
fn a_replacement_says_what_it_changes_and_counts_for_whoever_asks_next() {
    let of = |entries: &[(&str, u32)]| -> Namespaces {
        let settings = |history_size| Namespace { history_size, ..Namespace::default() };
        entries.iter().map(|(name, size)| ((*name).to_owned(), settings(*size))).collect()
    };
    let shared = SharedNamespaces::new(of(&[("a", 1), ("b", 2), ("c", 3)]));
    let (other, before) = (shared.clone(), shared.current());
    let changes = ["-a", "~b", "+d"].map(str::to_owned).to_vec();
    assert_eq!(shared.replace(of(&[("b", 5), ("c", 3), ("d", 4)])), Change::Some(changes));
    assert_eq!((other.of("a:1").history_size, other.of("b:1").history_size), (0, 5));
    assert_eq!(before.of("a:1").history_size, 1, "who looked before keeps what it saw");
    assert_eq!(shared.replace(of(&[("b", 5), ("c", 3), ("d", 4)])), Change::None);
}
