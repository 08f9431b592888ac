//! Which tokens and sessions back ends have revoked, as delivery nodes tell: one set for all shards, looked at when a
//! client says hello and whenever it changes.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use parking_lot::RwLock;
use sanjay_proto::edge::v1::{Revoked as Told, revoked};
use uuid::Uuid;

/// What is looked at of a client.
#[derive(Debug, Clone, Copy)]
pub struct Held<'a> {
    /// The user of its token.
    pub user: &'a str,
    /// When the token was made, in Unix seconds; `None` when it does not say, which counts as long ago.
    pub issued_s: Option<u64>,
    /// The token's `jti`; may be empty.
    pub jti: &'a str,
    /// Its session; nil before there is one.
    pub session: Uuid,
}

/// What is revoked. Keys are shared with nobody, and a set is never changed in place once shards see it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Set {
    /// User to the Unix second: tokens that were made before it are refused.
    users: HashMap<Box<str>, u64>,
    sessions: HashSet<Uuid>,
    tokens: HashSet<Box<str>>,
}

impl Set {
    /// Takes in what a delivery node tells; true when that may concern a connection: nobody is closed for what was taken
    /// back. What this build does not know is ignored.
    pub fn apply(&mut self, told: &Told) -> bool {
        let Some(subject) = &told.subject else { return false };
        match (subject, told.lifted) {
            (revoked::Subject::User(user), false) => {
                self.users.insert(user.as_str().into(), told.before_s);
            }
            (revoked::Subject::User(user), true) => drop(self.users.remove(user.as_str())),
            (revoked::Subject::Session(session), lifted) => {
                let Ok(session) = Uuid::from_slice(session) else { return false };
                if lifted {
                    self.sessions.remove(&session);
                } else {
                    self.sessions.insert(session);
                }
            }
            (revoked::Subject::Jti(jti), false) => {
                self.tokens.insert(jti.as_str().into());
            }
            (revoked::Subject::Jti(jti), true) => {
                self.tokens.remove(jti.as_str());
            }
        }
        !told.lifted
    }

    /// Why a client is to be refused, if it is.
    #[must_use]
    pub fn refuses(&self, held: &Held<'_>) -> Option<&'static str> {
        if self.users.get(held.user).is_some_and(|before_s| held.issued_s.unwrap_or(0) < *before_s) {
            Some("the tokens of this user that were made until now are revoked; get a new one")
        } else if !held.jti.is_empty() && self.tokens.contains(held.jti) {
            Some("this token is revoked; get a new one")
        } else if self.sessions.contains(&held.session) {
            Some("this session is revoked; get a new token")
        } else {
            None
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.users.len() + self.sessions.len() + self.tokens.len()
    }

    /// Whether nothing is revoked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The set, as all shards see it. Empty until the first delivery node has told.
#[derive(Debug, Default)]
pub struct Revocations(RwLock<Arc<Set>>);

impl Revocations {
    /// Why a client is to be refused, if it is.
    #[must_use]
    pub fn refuses(&self, held: &Held<'_>) -> Option<&'static str> {
        self.0.read().refuses(held)
    }

    /// The set as it is now.
    #[must_use]
    pub fn now(&self) -> Arc<Set> {
        Arc::clone(&self.0.read())
    }

    /// Another set takes its place.
    pub fn replace(&self, set: Set) {
        *self.0.write() = Arc::new(set);
    }

    /// Takes in changes; true when they may concern a connection.
    pub fn apply(&self, told: &[Told]) -> bool {
        let mut set = self.0.write();
        // Shards hold it for the length of a look-up alone, so that this seldom copies.
        let set = Arc::make_mut(&mut set);
        told.iter().fold(false, |concerns, told| set.apply(told) | concerns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(subject: revoked::Subject, before_s: u64, lifted: bool) -> Told {
        Told { subject: Some(subject), before_s, lifted }
    }

    fn user(name: &str, before_s: u64) -> Told {
        told(revoked::Subject::User(name.into()), before_s, false)
    }

    const BOB: Held<'static> = Held { user: "bob", issued_s: Some(100), jti: "t1", session: Uuid::nil() };

    #[test]
    fn a_user_is_refused_with_older_tokens_alone() {
        let revocations = Revocations::default();
        assert_eq!(revocations.refuses(&BOB), None);
        assert!(revocations.apply(&[user("bob", 101)]));
        assert!(revocations.refuses(&BOB).unwrap().contains("user"));
        assert_eq!(revocations.refuses(&Held { issued_s: Some(101), ..BOB }), None);
        assert!(revocations.refuses(&Held { issued_s: None, ..BOB }).is_some(), "a token without iat is old");
        assert_eq!(revocations.refuses(&Held { user: "ann", ..BOB }), None);
        let lifted = told(revoked::Subject::User("bob".into()), 0, true);
        assert!(!revocations.apply(&[lifted]), "nobody is closed for it");
        assert_eq!((revocations.refuses(&BOB), revocations.now().len()), (None, 0));
    }

    #[test]
    fn tokens_and_sessions_are_refused_by_their_ids() {
        let mut set = Set::default();
        let session = Uuid::from_u128(7);
        assert!(set.apply(&told(revoked::Subject::Jti("t1".into()), 0, false)));
        assert!(set.apply(&told(revoked::Subject::Session(session.as_bytes().to_vec().into()), 0, false)));
        assert!(!set.apply(&told(revoked::Subject::Session(vec![1].into()), 0, false)), "no UUID");
        assert_eq!(set.len(), 2);
        assert!(set.refuses(&BOB).unwrap().contains("token"));
        assert_eq!(set.refuses(&Held { jti: "", ..BOB }), None, "most tokens have no id");
        assert!(set.refuses(&Held { jti: "", session, ..BOB }).unwrap().contains("session"));
    }
}
