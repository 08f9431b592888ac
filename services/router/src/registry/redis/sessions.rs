//! Attachments and sessions: every change is one script, so that who is attached is compared where it is changed.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use redis::{FromRedisValue, Pipeline, Value, from_redis_value};
use tokio::time::Instant;

use super::{
    pool::{Pool, Script},
    record::{EdgeRecord, UserSessionRecord},
    server::Known,
    watch::Watch,
};
use crate::registry::{Attachment, EdgeRef, Location, RegistryError, UserSession};

/// Sessions of one script: it holds up everybody else for about a millisecond.
pub(super) const STEP: usize = 256;

/// Users of one round trip.
const LOCATE: usize = 512;

/// How often a session that another user has is taken from that user before it is given up: it takes another
/// router that moves it to and fro to need more than one.
const MOVES: usize = 3;

pub(super) struct Sessions {
    pub(super) pool: Pool,
    pub(super) known: Arc<Known>,
    pub(super) watch: Watch,
    /// The attachments of this router, by their number.
    held: Mutex<HashMap<u64, Held>>,
    /// Attachments that this router ended because nobody renewed them, until their sessions are removed.
    pub(super) abandoned: Mutex<Vec<Attachment>>,
    pub(super) scripts: Scripts,
}

/// An attachment that this router made.
struct Held {
    renewed: Instant,
    /// Of the server, when it was made.
    replacements: u64,
}

pub(super) struct Scripts {
    number: Script,
    attach: Script,
    detach: Script,
    renew: Script,
    open: Script,
    close: Script,
    pub(super) expire: Script,
    pub(super) sweep: Script,
    pub(super) collect: Script,
}

macro_rules! edge_script {
    ($name:literal) => {
        Script::new(
            $name,
            concat!(include_str!("scripts/edge.lua"), include_str!(concat!("scripts/", $name, ".lua")))
                .into(),
        )
    };
}

impl Scripts {
    fn new() -> Self {
        Self {
            number: Script::new("number", include_str!("scripts/number.lua").into()),
            attach: edge_script!("attach"),
            detach: edge_script!("detach"),
            renew: edge_script!("renew"),
            expire: edge_script!("expire"),
            open: edge_script!("open"),
            close: edge_script!("close"),
            sweep: edge_script!("sweep"),
            collect: Script::new("collect", include_str!("scripts/collect.lua").into()),
        }
    }
}

/// The answer about a session of [`Sessions::open`] or [`Sessions::close`].
enum Done {
    Yes,
    /// Another user has it.
    HeldBy(Arc<str>),
}

impl Sessions {
    pub(super) fn new(pool: Pool, known: Arc<Known>) -> Self {
        let watch = Watch::new(known.lease);
        Self {
            pool,
            known,
            watch,
            held: Mutex::default(),
            abandoned: Mutex::default(),
            scripts: Scripts::new(),
        }
    }

    pub(super) async fn attach(
        &self,
        edge: &EdgeRef,
        router: &Arc<str>,
    ) -> Result<Attachment, RegistryError> {
        let keys = &self.known.keys;
        let held = Held { renewed: Instant::now(), replacements: self.known.replacements() };
        let script = &self.scripts.number;
        let number: u64 = self.pool.eval(script, &script.call(&[keys.attachments()])).await?;
        let names = [keys.edges(), keys.edge_sessions(&edge.id), keys.left(), keys.left_sessions(number)];
        let script = &self.scripts.attach;
        let mut call = script.call(&names);
        call.arg(&*edge.id).arg(edge.incarnation).arg(number).arg(&**router);
        if self.pool.eval(script, &call).await? {
            self.held.lock().insert(number, held);
            Ok(Attachment { edge: edge.clone(), router: Arc::clone(router), number })
        } else {
            Err(superseded(&edge.id))
        }
    }

    pub(super) async fn detach(&self, attachment: &Attachment) -> Result<(), RegistryError> {
        self.held.lock().remove(&attachment.number);
        let script = &self.scripts.detach;
        let mut call = script.call(&[self.known.keys.edges()]);
        call.arg(&*attachment.edge.id).arg(attachment.number);
        self.pool.eval(script, &call).await
    }

    pub(super) async fn renew(&self, attachments: &[Attachment]) -> Vec<Result<(), RegistryError>> {
        let mut answers = Vec::with_capacity(attachments.len());
        for step in attachments.chunks(STEP) {
            answers.extend(self.renew_step(step).await);
        }
        answers
    }

    async fn renew_step(&self, attachments: &[Attachment]) -> Vec<Result<(), RegistryError>> {
        let script = &self.scripts.renew;
        let mut call = script.call(&[self.known.keys.edges()]);
        for attachment in attachments {
            call.arg(&*attachment.edge.id).arg(attachment.number);
        }
        let began = Instant::now();
        let lasting = match self.pool.eval::<Vec<bool>>(script, &call).await {
            Ok(lasting) => lasting,
            Err(error) => return attachments.iter().map(|_| Err(error.clone())).collect(),
        };
        let mut held = self.held.lock();
        let answers = attachments.iter().zip(lasting).map(|(attachment, lasts)| {
            let complete = held.get_mut(&attachment.number).is_none_or(|held| self.renew_held(held, began));
            if lasts && complete { Ok(()) } else { Err(superseded(&attachment.edge.id)) }
        });
        answers.collect()
    }

    /// Whether what was announced under the attachment can still be relied on. Not when others counted the edge as
    /// away meanwhile and may have told so; nor when another process answers, which may know the attachment and
    /// yet have lost sessions that came after it.
    fn renew_held(&self, held: &mut Held, began: Instant) -> bool {
        let in_time = began - held.renewed <= self.known.lease;
        held.renewed = began;
        in_time && held.replacements == self.known.replacements()
    }

    pub(super) async fn open(
        &self,
        attachment: &Attachment,
        sessions: &[UserSession],
    ) -> Vec<Result<(), RegistryError>> {
        let mut answers = Vec::with_capacity(sessions.len());
        for step in sessions.chunks(STEP) {
            match self.try_open(attachment, step).await {
                Ok(done) => {
                    for (at, done) in done.into_iter().enumerate() {
                        answers.push(match done {
                            Done::Yes => Ok(()),
                            Done::HeldBy(user) => self.take_over(attachment, &step[at..], user).await,
                        });
                    }
                }
                Err(error) => answers.extend(step.iter().map(|_| Err(error.clone()))),
            }
        }
        answers
    }

    /// Moves a session, the first of those given, from the user that has it; nothing when a later one moves it
    /// again.
    async fn take_over(
        &self,
        attachment: &Attachment,
        sessions: &[UserSession],
        mut from: Arc<str>,
    ) -> Result<(), RegistryError> {
        let Some((session, later)) = sessions.split_first() else { return Ok(()) };
        if later.iter().any(|later| later.session == session.session) {
            return Ok(());
        }
        for _ in 0..MOVES {
            let held = UserSession { user: from, ..session.clone() };
            self.close(attachment, std::slice::from_ref(&held)).await?;
            match self.try_open(attachment, std::slice::from_ref(session)).await?.pop() {
                Some(Done::HeldBy(user)) => from = user,
                _ => return Ok(()),
            }
        }
        Err(self.known.unavailable("a session moves to and fro between users"))
    }

    async fn try_open(
        &self,
        attachment: &Attachment,
        sessions: &[UserSession],
    ) -> Result<Vec<Done>, RegistryError> {
        let keys = &self.known.keys;
        let edge = &attachment.edge.id;
        let mut names = vec![keys.edges(), keys.edge_sessions(edge), keys.opened()];
        names.extend(sessions.iter().map(|session| keys.user_sessions(&session.user)));
        let script = &self.scripts.open;
        let mut call = script.call(&names);
        call.arg(&**edge).arg(attachment.number);
        for session in sessions {
            call.arg(&session.session).arg(&*session.user).arg(u8::from(session.inbox));
        }
        let answers: Vec<Value> = self.pool.eval(script, &call).await?;
        self.done(edge, sessions, answers)
    }

    pub(super) async fn close(
        &self,
        attachment: &Attachment,
        sessions: &[UserSession],
    ) -> Result<(), RegistryError> {
        for step in sessions.chunks(STEP) {
            let mut left = step.to_vec();
            for _ in 0..MOVES {
                let done = match self.try_close(attachment, &left).await {
                    Err(RegistryError::Superseded { .. }) => return Ok(()),
                    done => done?,
                };
                let held_by_others = left.into_iter().zip(done).filter_map(|(session, done)| match done {
                    Done::Yes => None,
                    Done::HeldBy(user) => Some(UserSession { user, ..session }),
                });
                left = held_by_others.collect();
                if left.is_empty() {
                    break;
                }
            }
        }
        Ok(())
    }

    async fn try_close(
        &self,
        attachment: &Attachment,
        sessions: &[UserSession],
    ) -> Result<Vec<Done>, RegistryError> {
        let keys = &self.known.keys;
        let edge = &attachment.edge.id;
        let mut names = vec![keys.edges(), keys.edge_sessions(edge)];
        names.extend(sessions.iter().map(|session| keys.user_sessions(&session.user)));
        let script = &self.scripts.close;
        let mut call = script.call(&names);
        call.arg(&**edge).arg(attachment.number);
        for session in sessions {
            call.arg(&session.session).arg(&*session.user);
        }
        let answers: Vec<Value> = self.pool.eval(script, &call).await?;
        self.done(edge, sessions, answers)
    }

    fn done(
        &self,
        edge: &Arc<str>,
        sessions: &[UserSession],
        answers: Vec<Value>,
    ) -> Result<Vec<Done>, RegistryError> {
        if answers.is_empty() {
            return Err(superseded(edge));
        }
        if answers.len() != sessions.len() {
            return Err(self.known.unavailable("it gave too few answers"));
        }
        let done = answers.into_iter().map(|answer| match answer {
            Value::Int(_) => Ok(Done::Yes),
            other => Ok(Done::HeldBy(self.read::<String>(other)?.into())),
        });
        done.collect()
    }

    pub(super) async fn locate(&self, users: &[Arc<str>]) -> Result<Vec<Vec<Location>>, RegistryError> {
        let mut located = Vec::with_capacity(users.len());
        for users in users.chunks(LOCATE) {
            let mut pipeline = Pipeline::with_capacity(users.len() + 1);
            for user in users {
                pipeline.cmd("HGETALL").arg(self.known.keys.user_sessions(user));
            }
            // Last, so that no session is judged by an attachment that was replaced before it was read.
            pipeline.cmd("HGETALL").arg(self.known.keys.edges());
            let mut values = self.pool.send("locate", &pipeline).await?;
            let edges: HashMap<String, String> = self.read(values.pop().unwrap_or(Value::Nil))?;
            let edges: HashMap<_, _> = edges.iter().filter_map(|(id, text)| self.edge(id, text)).collect();
            for value in values {
                let sessions: Vec<(Vec<u8>, String)> = self.read(value)?;
                located.push(locations(&sessions, &edges));
            }
        }
        Ok(located)
    }

    fn edge<'a>(&self, id: &'a str, text: &str) -> Option<(&'a str, EdgeRecord)> {
        let mut record = EdgeRecord::parse(text)?;
        record.attached &= self.watch.is_fresh(id, text);
        Some((id, record))
    }

    pub(super) fn read<T: FromRedisValue>(&self, value: Value) -> Result<T, RegistryError> {
        from_redis_value(value).map_err(|_| self.known.unavailable("it gave an answer that cannot be read"))
    }
}

/// The sessions of one user that are seen, in the order in which they were opened.
fn locations(sessions: &[(Vec<u8>, String)], edges: &HashMap<&str, EdgeRecord>) -> Vec<Location> {
    let records = sessions.iter().filter_map(|(field, text)| UserSessionRecord::parse(field, text));
    let seen = |record: UserSessionRecord| {
        let edge = edges.get(&*record.edge).filter(|edge| record.number >= edge.since)?;
        let location = Location {
            session: record.session,
            edge: EdgeRef { id: record.edge, incarnation: edge.incarnation },
            router: Arc::clone(&edge.router),
            attached: edge.attached,
            inbox: record.inbox,
        };
        Some((record.opened, location))
    };
    let mut found: Vec<_> = records.filter_map(seen).collect();
    found.sort_by_key(|(opened, _)| *opened);
    found.into_iter().map(|(_, location)| location).collect()
}

fn superseded(edge: &Arc<str>) -> RegistryError {
    RegistryError::Superseded { edge: Arc::clone(edge) }
}
