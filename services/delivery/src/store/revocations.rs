//! What is known of tokens and sessions that back ends have revoked.

use uuid::Uuid;

/// Most revocations of one page.
pub const MAX_REVOCATIONS_PAGE: usize = 1_000;

/// What is revoked. In this order, and then by their names, they are listed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    /// One token, by its `jti`.
    Jti(String),
    /// One session.
    Session(Uuid),
    /// A user's tokens that were made before a time.
    User(String),
}

impl Subject {
    /// As text that sorts like it, for keys and page tokens.
    #[must_use]
    pub fn key(&self) -> String {
        match self {
            Subject::Jti(jti) => format!("j/{jti}"),
            Subject::Session(session) => format!("s/{session}"),
            Subject::User(user) => format!("u/{user}"),
        }
    }

    /// The opposite of [`Subject::key`].
    #[must_use]
    pub fn from_key(key: &str) -> Option<Self> {
        match key.split_once('/')? {
            ("j", jti) => Some(Subject::Jti(jti.to_owned())),
            ("s", session) => Uuid::try_parse(session).ok().map(Subject::Session),
            ("u", user) => Some(Subject::User(user.to_owned())),
            _ => None,
        }
    }
}

/// That something is revoked, or is not any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revocation {
    /// What.
    pub subject: Subject,
    /// Of a user: tokens that were made before this Unix second; 0 of others.
    pub before_s: u64,
    /// Unix time in microseconds.
    pub revoked_us: u64,
    /// From when on no token can be good any more that it concerns; Unix time in microseconds.
    pub expires_us: u64,
    /// Why, for a person; may be empty.
    pub reason: String,
    /// The back end that said so last.
    pub caller: String,
    /// It was taken back.
    pub lifted: bool,
    /// When it was written, Unix time in microseconds.
    pub changed_us: u64,
}

/// The part of the port that a test's store has no business with.
#[cfg(test)]
macro_rules! revokes_nothing {
    () => {
        fn revoke(
            &self,
            _: $crate::store::Revocation,
        ) -> ::futures::future::BoxFuture<'static, Result<(), $crate::store::StoreError>> {
            unreachable!("nothing is revoked here")
        }

        fn revocations(
            &self,
            _: Option<$crate::store::Subject>,
            _: usize,
        ) -> ::futures::future::BoxFuture<
            'static,
            Result<Vec<$crate::store::Revocation>, $crate::store::StoreError>,
        > {
            unreachable!("nothing is revoked here")
        }

        fn revocations_changed(
            &self,
            _: u64,
            _: usize,
        ) -> ::futures::future::BoxFuture<
            'static,
            Result<Vec<$crate::store::Revocation>, $crate::store::StoreError>,
        > {
            unreachable!("nothing is revoked here")
        }
    };
}
#[cfg(test)]
pub(crate) use revokes_nothing;
