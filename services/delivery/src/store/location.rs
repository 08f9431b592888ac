//! Where a store is, as configured.

use std::{path::PathBuf, str::FromStr};

use mongodb::options::ConnectionString;
use sanjay_runtime::Secret;

/// Options of a MongoDB URI that hold something secret.
const SECRET_OPTIONS: [&str; 3] = ["password", "authmechanismproperties", "token"];

/// Where a store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// `redb:PATH`: a file on this machine.
    Redb(PathBuf),
    /// `mongodb://…` or `mongodb+srv://…`: a database that nodes share.
    Mongodb(Database),
}

/// A database of a MongoDB deployment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Database {
    /// The connection string, without credentials.
    pub uri: String,
    /// The database's name.
    pub name: String,
    /// User name; empty to connect without credentials.
    pub username: String,
    /// The user's password.
    pub password: Secret,
}

/// A store's location does not have a known form. The text never shows what may be a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LocationError {
    /// Neither of the known forms.
    #[error(
        "{0:?} is not the location of a store; write redb:PATH, for example redb:/var/lib/sanjay/inbox.redb, or \
         mongodb://HOST:PORT/DATABASE, for example mongodb://mongo-0:27017,mongo-1:27017/sanjay?replicaSet=rs0"
    )]
    Unknown(String),
    /// Credentials in a URI, which would end up in logs.
    #[error(
        "it holds credentials; take them out and set delivery.mongodb_username and delivery.mongodb_password"
    )]
    Credentials,
    /// A URI without a database.
    #[error("it names no database; append one, for example mongodb://mongo-0:27017/sanjay?replicaSet=rs0")]
    NoDatabase,
    /// The driver does not understand the URI.
    #[error("it is no connection string of MongoDB: {0}")]
    Uri(String),
}

impl Location {
    /// Adds credentials; a location that needs none ignores them.
    #[must_use]
    pub fn with_credentials(mut self, username: &str, password: &Secret) -> Self {
        if let Location::Mongodb(database) = &mut self {
            username.clone_into(&mut database.username);
            database.password = password.clone();
        }
        self
    }
}

impl FromStr for Location {
    type Err = LocationError;

    fn from_str(text: &str) -> Result<Self, LocationError> {
        if let Some(("mongodb" | "mongodb+srv", rest)) = text.split_once("://") {
            return database(text, rest).map(Location::Mongodb);
        }
        match text.split_once(':') {
            Some(("redb", path)) if !path.is_empty() => Ok(Location::Redb(path.into())),
            _ => Err(LocationError::Unknown(text.to_owned())),
        }
    }
}

fn database(text: &str, rest: &str) -> Result<Database, LocationError> {
    let (place, options) = rest.split_once('?').unwrap_or((rest, ""));
    // Looked for anywhere: a password that holds a slash must be found too.
    let secret = |option: &str| {
        let name = option.split('=').next().unwrap_or_default().to_lowercase();
        SECRET_OPTIONS.iter().any(|secret| name.contains(secret))
    };
    if rest.contains('@') || options.split(['&', ';']).any(secret) {
        return Err(LocationError::Credentials);
    }
    let name = place.split_once('/').map_or("", |(_, name)| name);
    if name.is_empty() {
        return Err(LocationError::NoDatabase);
    }
    ConnectionString::parse(text).map_err(|error| LocationError::Uri(error.to_string()))?;
    Ok(Database {
        uri: text.to_owned(),
        name: name.to_owned(),
        username: String::new(),
        password: Secret::default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        text.parse::<Location>().map(|_| ()).expect_err(text).to_string()
    }

    #[test]
    fn known_forms_are_read() {
        assert_eq!("redb:a/b".parse(), Ok(Location::Redb("a/b".into())));
        for uri in ["mongodb://a:1,b:2/inboxes?replicaSet=rs0", "mongodb+srv://cluster.example/inboxes"] {
            let Ok(Location::Mongodb(database)) = uri.parse() else { panic!("{uri}") };
            assert_eq!((database.uri.as_str(), database.name.as_str()), (uri, "inboxes"));
        }
    }

    #[test]
    fn errors_teach_and_show_no_password() {
        assert!(error("mongo").contains("redb:PATH"));
        assert!(error("redb:").contains("mongodb://HOST:PORT/DATABASE"));
        assert!(error("mongodb://a:1").contains("names no database"));
        assert!(error("mongodb://a:1/?replicaSet=x").contains("names no database"));
        assert!(error("mongodb://a:1/db?retryWrites=perhaps").contains("connection string"));
        for secret in [
            "mongodb://bob:hunter2@a:1/db",
            "mongodb://bob:hun/ter2@a:1/db",
            "mongodb://a:1/db?tlsCertificateKeyFilePassword=hunter2",
            "mongodb://a:1/db?authMechanismProperties=AWS_SESSION_TOKEN:hunter2",
        ] {
            assert!(error(secret).contains("delivery.mongodb_password"), "{}", error(secret));
            assert!(!error(secret).contains("hunter"), "{}", error(secret));
        }
    }

    #[test]
    fn a_password_is_not_printed() {
        let location: Location = "mongodb://a:1/db".parse().expect("a good one");
        let shown = format!("{:?}", location.with_credentials("bob", &Secret::new("hunter2")));
        assert!(shown.contains("bob") && !shown.contains("hunter2"), "{shown}");
    }
}
