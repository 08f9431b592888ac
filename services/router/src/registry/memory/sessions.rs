//! Sessions by user and by edge, and which edge is attached.
//!
//! Invariant: a session is in `users` exactly once for each edge that holds it; one that is also in
//! `leftovers` belongs to an earlier incarnation and is no longer seen.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use crate::registry::{Attachment, EdgeRef, Location, RegistryError, SessionId, UserSession};

#[derive(Default)]
pub(super) struct Sessions {
    users: HashMap<Arc<str>, Vec<Record>>,
    edges: HashMap<Arc<str>, Edge>,
    /// Sessions of earlier incarnations whose records are still to be removed, with the edge and the newest
    /// attachment under which they can have been opened.
    leftovers: VecDeque<(Arc<str>, u64, UsersBySession)>,
    attachments: u64,
}

type UsersBySession = HashMap<SessionId, Arc<str>>;

struct Record {
    session: SessionId,
    edge: Arc<str>,
    /// The attachment under which it was announced last.
    number: u64,
    inbox: bool,
}

struct Edge {
    incarnation: u64,
    router: Arc<str>,
    attached: bool,
    /// Of the latest attachment.
    number: u64,
    /// Of the first attachment of this incarnation; records below it are leftovers.
    since: u64,
    /// Announced under the latest attachment.
    announced: UsersBySession,
    /// Announced under an earlier one.
    waiting: UsersBySession,
}

impl Sessions {
    pub(super) fn attach(&mut self, edge: &EdgeRef, router: &Arc<str>) -> Attachment {
        self.attachments += 1;
        let number = self.attachments;
        let fresh = || Edge {
            incarnation: edge.incarnation,
            router: Arc::clone(router),
            attached: true,
            number,
            since: number,
            announced: HashMap::new(),
            waiting: HashMap::new(),
        };
        let held = self.edges.entry(Arc::clone(&edge.id)).or_insert_with(fresh);
        if held.incarnation == edge.incarnation {
            held.move_to_waiting();
            held.router = Arc::clone(router);
            held.attached = true;
            held.number = number;
        } else {
            let older = std::mem::replace(held, fresh());
            for sessions in [older.announced, older.waiting] {
                self.leftovers.push_back((Arc::clone(&edge.id), older.number, sessions));
            }
        }
        Attachment { edge: edge.clone(), router: Arc::clone(router), number }
    }

    pub(super) fn detach(&mut self, attachment: &Attachment) {
        if let Some(edge) = self.edges.get_mut(&attachment.edge.id)
            && edge.number == attachment.number
        {
            edge.attached = false;
        }
    }

    /// An attachment here lasts until it is ended: its router cannot vanish without this process.
    pub(super) fn renew(&self, attachment: &Attachment) -> Result<(), RegistryError> {
        let held = self.edges.get(&attachment.edge.id);
        match held.filter(|edge| edge.attached && edge.number == attachment.number) {
            Some(_) => Ok(()),
            None => Err(RegistryError::Superseded { edge: Arc::clone(&attachment.edge.id) }),
        }
    }

    /// Removes at most `limit` sessions; fewer removed means that none is left to remove.
    pub(super) fn sweep(&mut self, attachment: &Attachment, limit: usize) -> usize {
        let id = &attachment.edge.id;
        let Some(edge) = self.edges.get_mut(id).filter(|edge| edge.number == attachment.number) else {
            return 0;
        };
        if !edge.attached {
            edge.move_to_waiting();
        }
        let removed = take_some(&mut edge.waiting, limit);
        if !edge.attached && edge.waiting.is_empty() {
            self.edges.remove(id);
        }
        for (session, user) in &removed {
            self.remove_record(user, id, session, u64::MAX);
        }
        removed.len()
    }

    /// Removes at most `limit` records of earlier incarnations; true when more are left.
    pub(super) fn collect(&mut self, limit: usize) -> bool {
        let Some((id, number, mut sessions)) = self.leftovers.pop_front() else { return false };
        for (session, user) in take_some(&mut sessions, limit) {
            self.remove_record(&user, &id, &session, number);
        }
        if !sessions.is_empty() {
            self.leftovers.push_front((id, number, sessions));
        }
        !self.leftovers.is_empty()
    }

    pub(super) fn open(&mut self, attachment: &Attachment, new: &UserSession) -> Result<(), RegistryError> {
        let id = &attachment.edge.id;
        let current = |edge: &&mut Edge| edge.attached && edge.number == attachment.number;
        let Some(edge) = self.edges.get_mut(id).filter(current) else {
            return Err(RegistryError::Superseded { edge: Arc::clone(id) });
        };
        let waiting = edge.waiting.remove(&new.session);
        let known = edge.announced.insert(new.session, Arc::clone(&new.user)).or(waiting);
        if let Some(user) = known {
            if user == new.user {
                self.announce_again(attachment, new);
                return Ok(());
            }
            self.remove_record(&user, id, &new.session, u64::MAX);
        }
        let record = Record {
            session: new.session,
            edge: Arc::clone(id),
            number: attachment.number,
            inbox: new.inbox,
        };
        self.users.entry(Arc::clone(&new.user)).or_default().push(record);
        Ok(())
    }

    pub(super) fn close(&mut self, attachment: &Attachment, old: &UserSession) {
        let id = &attachment.edge.id;
        let current = |edge: &&mut Edge| edge.attached && edge.number == attachment.number;
        let Some(edge) = self.edges.get_mut(id).filter(current) else { return };
        let announced = edge.announced.remove(&old.session);
        if let Some(user) = edge.waiting.remove(&old.session).or(announced) {
            self.remove_record(&user, id, &old.session, u64::MAX);
        }
    }

    pub(super) fn locate(&self, user: &str) -> Vec<Location> {
        let records = self.users.get(user).map_or(&[][..], Vec::as_slice);
        let seen = |record: &Record| {
            let edge = self.edges.get(&record.edge).filter(|edge| record.number >= edge.since)?;
            Some(Location {
                session: record.session,
                edge: EdgeRef { id: Arc::clone(&record.edge), incarnation: edge.incarnation },
                router: Arc::clone(&edge.router),
                attached: edge.attached,
                inbox: record.inbox,
            })
        };
        records.iter().filter_map(seen).collect()
    }

    /// Whether no session is recorded, leftovers included.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.users.is_empty()
    }

    fn announce_again(&mut self, attachment: &Attachment, session: &UserSession) {
        let records = self.users.get_mut(&session.user).into_iter().flatten();
        for record in records {
            if record.session == session.session && record.edge == attachment.edge.id {
                record.number = record.number.max(attachment.number);
                record.inbox = session.inbox;
            }
        }
    }

    /// Removes the session's record when it was announced last under attachment `newest` or an earlier one.
    fn remove_record(&mut self, user: &Arc<str>, edge: &Arc<str>, session: &SessionId, newest: u64) {
        let Some(records) = self.users.get_mut(user) else { return };
        records.retain(|record| record.session != *session || record.edge != *edge || record.number > newest);
        if records.is_empty() {
            self.users.remove(user);
        }
    }
}

impl Edge {
    fn move_to_waiting(&mut self) {
        if self.waiting.is_empty() {
            std::mem::swap(&mut self.waiting, &mut self.announced);
        } else {
            self.waiting.extend(self.announced.drain());
        }
    }
}

fn take_some(sessions: &mut UsersBySession, limit: usize) -> Vec<(SessionId, Arc<str>)> {
    let some: Vec<_> = sessions.keys().take(limit).copied().collect();
    some.into_iter().filter_map(|session| sessions.remove_entry(&session)).collect()
}
