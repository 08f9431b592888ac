//! What stands in the values of hashes: text, so that whoever looks with `redis-cli` can read it.

use std::sync::Arc;

use crate::registry::SessionId;

/// An edge's attachment; see [`Keys::edges`](crate::redis::keys::Keys::edges).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct EdgeRecord {
    pub(super) incarnation: u64,
    pub(super) number: u64,
    pub(super) since: u64,
    pub(super) attached: bool,
    pub(super) router: Arc<str>,
}

impl EdgeRecord {
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(6, ' ');
        let mut number = || parts.next()?.parse().ok();
        let (incarnation, number, since, attached, _beat): (_, _, _, u64, u64) =
            (number()?, number()?, number()?, number()?, number()?);
        Some(Self { incarnation, number, since, attached: attached == 1, router: parts.next()?.into() })
    }
}

/// A session among those of its edge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct EdgeSession {
    pub(super) session: SessionId,
    pub(super) user: Arc<str>,
    /// Of the attachment under which it was announced last.
    pub(super) number: u64,
    /// The value as it stands there.
    pub(super) text: String,
}

impl EdgeSession {
    pub(super) fn parse(field: &[u8], text: String) -> Option<Self> {
        let (number, user) = text.split_once(' ')?;
        let (number, user) = (number.parse().ok()?, user.into());
        Some(Self { session: field.try_into().ok()?, user, number, text })
    }
}

/// A session among those of its user.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct UserSessionRecord {
    pub(super) session: SessionId,
    pub(super) edge: Arc<str>,
    pub(super) number: u64,
    /// Orders the sessions of a user.
    pub(super) opened: u64,
    pub(super) inbox: bool,
}

impl UserSessionRecord {
    pub(super) fn parse(field: &[u8], text: &str) -> Option<Self> {
        let (session, edge) = field.split_first_chunk()?;
        let mut parts = text.splitn(3, ' ').map(|part| part.parse().ok());
        Some(Self {
            session: *session,
            edge: std::str::from_utf8(edge).ok()?.into(),
            number: parts.next()??,
            opened: parts.next()??,
            inbox: parts.next()?? == 1,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read() {
        let edge = EdgeRecord::parse(&format!("{} 9 7 1 3 r 1", u64::MAX)).unwrap();
        assert_eq!((edge.incarnation, edge.number, edge.since), (u64::MAX, 9, 7));
        assert_eq!((edge.attached, &*edge.router), (true, "r 1"));
        let session = EdgeSession::parse(&[1; 16], "9 bob b".into()).unwrap();
        assert_eq!((session.number, &*session.user), (9, "bob b"));
        let field = [[1; 16].as_slice(), b"e1"].concat();
        let session = UserSessionRecord::parse(&field, "9 4 0").unwrap();
        assert_eq!((&*session.edge, session.number, session.opened, session.inbox), ("e1", 9, 4, false));
        for damaged in ["", "1", "1 2 3 4", "a 2 3 1 0 r"] {
            assert_eq!(EdgeRecord::parse(damaged), None);
        }
        assert_eq!(EdgeSession::parse(&[1; 15], "9 bob".into()), None);
        assert_eq!(UserSessionRecord::parse(&field, "9 4"), None);
    }
}
