//! The addresses under which a role finds another: one `http://host:port`, or several.

use std::{fmt, net::IpAddr};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{SeqAccess, Visitor},
};
use tonic::transport::Uri;

use crate::config::ConfigError;

/// Most endpoints of one setting. A host name may stand for several processes.
const MAX_ENDPOINTS: usize = 64;

/// What an endpoint must look like, as a demand.
const FIX: &str = "set it to http://host:port, or to several of them: as a list, or as one text with commas \
                   between them";

/// One or several endpoints: a list of texts, or one text with commas, so that a variable or a flag can hold
/// them too. What it holds is checked by [`Endpoints::validate`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Endpoints(Vec<String>);

impl Endpoints {
    /// Checks each endpoint; `key` is the setting that the error names.
    ///
    /// # Errors
    /// When there is none, or too many, or one is not `http://host:port`.
    pub fn validate(&self, key: &str) -> Result<(), ConfigError> {
        self.targets(key).map(drop)
    }

    /// The endpoints as they were given.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    /// What is to be connected to; an endpoint that was given twice stands there once.
    pub(super) fn targets(&self, key: &str) -> Result<Vec<Target>, ConfigError> {
        if self.0.is_empty() {
            return Err(ConfigError::new(key, "names nobody", FIX));
        }
        if self.0.len() > MAX_ENDPOINTS {
            let problem = format!("has {} endpoints", self.0.len());
            let fix =
                format!("give at most {MAX_ENDPOINTS}; a host name may stand for more processes than one");
            return Err(ConfigError::new(key, problem, fix));
        }
        let mut targets: Vec<Target> = Vec::with_capacity(self.0.len());
        for text in &self.0 {
            let target = Target::parse(text).map_err(|problem| {
                let problem = if problem == Problem::Credentials {
                    format!("has an endpoint that {problem}")
                } else {
                    format!("has the endpoint `{text}`, which {problem}")
                };
                ConfigError::new(key, problem, FIX)
            })?;
            if targets.iter().all(|other| other.name != target.name) {
                targets.push(target);
            }
        }
        Ok(targets)
    }
}

impl From<&str> for Endpoints {
    /// Splits at commas.
    fn from(text: &str) -> Self {
        let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
        Self(items.map(str::to_owned).collect())
    }
}

impl From<String> for Endpoints {
    fn from(text: String) -> Self {
        text.as_str().into()
    }
}

impl FromIterator<String> for Endpoints {
    fn from_iter<I: IntoIterator<Item = String>>(items: I) -> Self {
        Self(items.into_iter().collect())
    }
}

impl fmt::Display for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(","))
    }
}

impl<'de> Deserialize<'de> for Endpoints {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrMany;

        impl<'de> Visitor<'de> for OneOrMany {
            type Value = Endpoints;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string with http://host:port, or a list of such strings")
            }

            fn visit_str<E>(self, text: &str) -> Result<Endpoints, E> {
                Ok(text.into())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Endpoints, A::Error> {
                let mut all = Vec::new();
                while let Some(item) = items.next_element::<String>()? {
                    all.push(item);
                }
                Ok(Endpoints(all))
            }
        }

        deserializer.deserialize_any(OneOrMany)
    }
}

/// What is wrong with an endpoint, as a predicate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Problem {
    #[error("does not begin with http://")]
    Scheme,
    #[error("asks for TLS, which the processes of a cluster do not speak among themselves; use http://")]
    Tls,
    #[error("is not a URL")]
    NotUrl,
    #[error("holds a user or a password; processes show each other `cluster.key` instead")]
    Credentials,
    #[error("names no host")]
    Host,
    #[error("names no port from 1 to 65535")]
    Port,
    #[error("goes on behind the port")]
    Path,
}

/// One endpoint, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// `http://host:port`, for texts and for the `:authority` of calls.
    pub(super) name: String,
    /// A name to resolve, or an address without brackets.
    pub(super) host: String,
    pub(super) port: u16,
}

impl Target {
    pub(super) fn parse(text: &str) -> Result<Self, Problem> {
        if text.starts_with("https://") {
            return Err(Problem::Tls);
        }
        if !text.starts_with("http://") {
            return Err(Problem::Scheme);
        }
        let rest = &text["http://".len()..];
        if rest.split('/').next().is_some_and(|authority| authority.contains('@')) {
            return Err(Problem::Credentials);
        }
        if rest.is_empty() || rest.starts_with(':') || rest.starts_with('/') {
            return Err(Problem::Host);
        }
        let uri: Uri = text.parse().map_err(|_| Problem::NotUrl)?;
        let host = uri.host().filter(|host| !host.is_empty()).ok_or(Problem::Host)?;
        let port = uri.port_u16().filter(|port| *port > 0).ok_or(Problem::Port)?;
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(Problem::Path);
        }
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        Ok(Self { name: format!("http://{host}:{port}"), host: bare.to_owned(), port })
    }

    /// The address when the host is one and there is nothing to resolve.
    pub(super) fn literal(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Layers, config::Validate};

    #[derive(Debug, Deserialize)]
    struct Settings {
        edge: Edge,
    }

    #[derive(Debug, Deserialize)]
    struct Edge {
        router: Endpoints,
    }

    impl Validate for Settings {
        fn validate(&self) -> Result<(), ConfigError> {
            self.edge.router.validate("edge.router")
        }
    }

    fn file(router: &str) -> Result<Vec<String>, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sanjay.toml");
        std::fs::write(&path, format!("[edge]\nrouter = {router}\n")).unwrap();
        let settings = Layers::new().file(&path).load::<Settings>();
        settings.map(|settings| settings.edge.router.0).map_err(|error| error.to_string())
    }

    fn variable(router: &str) -> Result<Vec<String>, String> {
        let variable = ("SANJAY_EDGE__ROUTER".to_owned(), router.to_owned());
        let settings = Layers::new().variables([variable]).load::<Settings>();
        settings.map(|settings| settings.edge.router.0).map_err(|error| error.to_string())
    }

    #[test]
    fn a_list_and_a_text_with_commas_say_the_same() {
        let both = ["http://a:1", "http://b:2"].map(str::to_owned);
        assert_eq!(file(r#"["http://a:1", "http://b:2"]"#).unwrap(), both);
        assert_eq!(file(r#""http://a:1,http://b:2""#).unwrap(), both);
        assert_eq!(variable("http://a:1, http://b:2").unwrap(), both);
        assert_eq!(variable(r#"["http://a:1", "http://b:2"]"#).unwrap(), both);
        assert_eq!(variable("http://a:1").unwrap(), both[..1]);
        let flag = Layers::new().flag("--router", "edge.router", Some("http://a:1,http://b:2"));
        assert_eq!(flag.load::<Settings>().unwrap().edge.router.to_string(), "http://a:1,http://b:2");
    }

    #[test]
    fn what_is_no_endpoint_is_explained() {
        for (text, part) in [
            ("localhost:8083", "does not begin with http://"),
            ("https://a:1", "TLS"),
            ("http://", "no host"),
            ("http://:8083", "no host"),
            ("http://router", "no port"),
            ("http://router:0", "no port"),
            ("http://router:99999", "no port"),
            ("http://router:1/path", "behind the port"),
            ("http://router:1?q=1", "behind the port"),
            ("http://a b:1", "not a URL"),
        ] {
            let error = variable(&format!("http://good:1,{text}")).unwrap_err();
            assert!(error.starts_with("`edge.router` has the endpoint"), "{error}");
            assert!(error.contains(text) && error.contains(part), "{text}: {error}");
            assert!(error.contains("set it to http://host:port"), "{error}");
        }
        let error = variable("http://user:hunter2@a:1").unwrap_err();
        assert!(error.contains("cluster.key") && !error.contains("hunter2"), "{error}");
        assert!(variable(",").unwrap_err().contains("names nobody"));
        assert!(file("[]").unwrap_err().contains("names nobody"));
        let error = file("5").unwrap_err();
        assert!(error.contains("the number 5") && error.contains("http://host:port"), "{error}");
        let many = (1..=65).map(|port| format!("http://a:{port}")).collect::<Vec<_>>().join(",");
        assert!(variable(&many).unwrap_err().contains("at most 64"));
    }

    #[test]
    fn an_endpoint_is_taken_apart() {
        let target = |text| Target::parse(text).unwrap();
        assert_eq!(target("http://router:8083/").name, "http://router:8083");
        assert_eq!(target("http://127.0.0.1:1").literal(), Some([127, 0, 0, 1].into()));
        let v6 = target("http://[::1]:1");
        assert_eq!((v6.name.as_str(), v6.host.as_str()), ("http://[::1]:1", "::1"));
        assert!(v6.literal().is_some_and(|ip| ip.is_ipv6()) && target("http://router:1").literal().is_none());
        let twice = Endpoints::from("http://a:1,http://a:1/,http://b:1");
        assert_eq!(twice.targets("k").unwrap().len(), 2);
    }
}
