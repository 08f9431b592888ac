//! Publishing: whatever is ready goes out together, and each channel keeps its order.
//!
//! Invariant: a channel belongs to one lane, and a lane has one batch under way. So nothing that happens to a
//! batch, neither a lost connection nor a script to load, lets a publication overtake an earlier one of its
//! channel that was answered well. One whose outcome is unknown is not sent again.

use std::{collections::HashSet, mem::take, sync::Arc};

use prost::{
    Message as _,
    encoding::{WireType, encode_key, encode_varint},
};
use redis::{ErrorKind, Pipeline, RedisError, RedisResult, ServerErrorKind, Value, from_redis_value};
use sanjay_proto::router::v1::NewPublication;
use sanjay_runtime::{SharedNamespaces, clock::SharedClock, random::SharedRandom};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    task::JoinSet,
    time::{Instant, timeout_at},
};

use super::{
    line::{Line, Open},
    pool::is_no_script,
    server::{Known, describe},
};
use crate::{
    bus::redis::envelope::encode_publication,
    redis::keys::partition,
    registry::{Assigned, RegistryError, Top, history::Keep},
};

/// While one lane waits for its answers, the others send.
const LANES: usize = 8;

/// Publications that wait for a lane; who brings more waits.
const WAITING: usize = 1_024;

/// Bytes of publications that wait or are under way; who brings more waits.
const WAITING_BYTES: usize = 32 * 1024 * 1024;

/// Most publications of one batch.
const BATCH: usize = 256;

/// A batch is closed at this size in bytes: others get their turn on the connection.
const BATCH_BYTES: usize = 1024 * 1024;

/// Field `time_us` of `sanjay.router.v1.Stamp`.
const TIME_FIELD: u32 = 3;

/// Publishes through Redis. The lanes' tasks end with it.
pub(super) struct Lanes {
    lanes: Vec<mpsc::Sender<Item>>,
    room: Arc<Semaphore>,
    known: Arc<Known>,
    _tasks: JoinSet<()>,
}

/// One publication on its way.
struct Item {
    channel: String,
    message_id: prost::bytes::Bytes,
    dedupe_key: String,
    /// Encoded, without its stamp.
    envelope: Vec<u8>,
    /// Who asked has gone by then.
    deadline: Instant,
    answer: oneshot::Sender<Answer>,
    /// Of [`Lanes::room`], given back with the answer.
    _room: OwnedSemaphorePermit,
}

type Answer = Result<Assigned, RegistryError>;

struct Lane {
    line: Arc<Line>,
    known: Arc<Known>,
    clock: SharedClock,
    random: SharedRandom,
    namespaces: SharedNamespaces,
}

impl Lanes {
    pub(super) fn start(
        line: &Arc<Line>,
        known: &Arc<Known>,
        clock: &SharedClock,
        random: &SharedRandom,
        namespaces: &SharedNamespaces,
    ) -> Self {
        let mut tasks = JoinSet::new();
        let lanes = (0..LANES).map(|_| {
            let (sender, receiver) = mpsc::channel(WAITING);
            let lane = Lane {
                line: Arc::clone(line),
                known: Arc::clone(known),
                clock: Arc::clone(clock),
                random: Arc::clone(random),
                namespaces: namespaces.clone(),
            };
            tasks.spawn(lane.run(receiver));
            sender
        });
        Self {
            lanes: lanes.collect(),
            room: Arc::new(Semaphore::new(WAITING_BYTES)),
            known: Arc::clone(known),
            _tasks: tasks,
        }
    }

    /// Publishes, in the order given; answers within the time-out.
    pub(super) async fn publish(&self, publications: Vec<NewPublication>) -> Vec<Answer> {
        let deadline = Instant::now() + self.known.config.timeout;
        let mut waiting = Vec::with_capacity(publications.len());
        for new in publications {
            waiting.push(timeout_at(deadline, self.send(new, deadline)).await.ok().flatten());
        }
        let mut answers = Vec::with_capacity(waiting.len());
        for answered in waiting {
            answers.push(match answered {
                Some(answered) => match timeout_at(deadline, answered).await {
                    Ok(Ok(answer)) => answer,
                    Ok(Err(_)) => Err(self.known.unavailable("this router shuts down")),
                    Err(_) => Err(self.known.unavailable("no answer in time")),
                },
                None => Err(self.known.unavailable("too many publications wait for it")),
            });
        }
        answers
    }

    /// Gives a publication to its lane when there is room; nothing when the lane is gone.
    async fn send(&self, new: NewPublication, deadline: Instant) -> Option<oneshot::Receiver<Answer>> {
        let size = u32::try_from(new.encoded_len().min(WAITING_BYTES)).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.room).acquire_many_owned(size).await.ok()?;
        let lane = &self.lanes[usize::from(partition(&new.channel)) % LANES];
        let (item, answered) = Item::new(new, deadline, room);
        lane.send(item).await.ok()?;
        Some(answered)
    }
}

impl Item {
    fn new(
        new: NewPublication,
        deadline: Instant,
        room: OwnedSemaphorePermit,
    ) -> (Self, oneshot::Receiver<Answer>) {
        let (answer, answered) = oneshot::channel();
        let (channel, message_id) = (new.channel.clone(), new.message_id.clone());
        let dedupe_key = new.dedupe_key.clone();
        let envelope = encode_publication(new);
        (Self { channel, message_id, dedupe_key, envelope, deadline, answer, _room: room }, answered)
    }

    fn answer(self, answer: Answer) {
        // Who asked may have gone.
        let _ = self.answer.send(answer);
    }
}

impl Lane {
    async fn run(self, mut receiver: mpsc::Receiver<Item>) {
        let mut taken = Vec::new();
        while receiver.recv_many(&mut taken, BATCH).await > 0 {
            let (mut batch, mut bytes) = (Vec::new(), 0);
            for item in taken.drain(..) {
                if bytes >= BATCH_BYTES {
                    self.send(take(&mut batch)).await;
                    bytes = 0;
                }
                bytes += item.envelope.len();
                batch.push(item);
            }
            self.send(batch).await;
        }
    }

    async fn send(&self, mut batch: Vec<Item>) {
        let now = Instant::now();
        batch.retain(|item| item.deadline > now && !item.answer.is_closed());
        if batch.is_empty() {
            return;
        }
        let open = match self.line.open().await {
            Ok(open) => open,
            Err(error) => return refuse(batch, &error),
        };
        let again = self.send_on(&open, batch).await;
        if again.is_empty() {
            return;
        }
        if let Err(error) = self.load(&open).await {
            return refuse(again, &error);
        }
        let never = self.send_on(&open, again).await;
        if !never.is_empty() {
            refuse(never, &self.known.failed("it forgets its scripts at once"));
        }
    }

    /// Sends a batch and answers it, but for what is to be sent again because the server did not know the
    /// script.
    async fn send_on(&self, open: &Open, batch: Vec<Item>) -> Vec<Item> {
        let time_us = self.clock.now_us();
        let mut pipeline = Pipeline::with_capacity(batch.len());
        for item in &batch {
            pipeline.add_command(self.call(open, item, time_us));
        }
        let values = match self.line.send(open, "publish", &pipeline).await {
            Ok(values) => values,
            Err(error) => {
                refuse(batch, &error);
                return Vec::new();
            }
        };
        let mut answers: Vec<_> = values.into_iter().map(|value| value.extract_error()).collect();
        answers.resize_with(batch.len(), || Err(missing()));
        let again = to_repeat(&batch, &answers);
        let mut repeated = Vec::new();
        for ((item, answer), again) in batch.into_iter().zip(answers).zip(again) {
            if again {
                repeated.push(item);
            } else {
                let answer = self.read(open, &item, answer, time_us);
                item.answer(answer);
            }
        }
        repeated
    }

    fn call(&self, open: &Open, item: &Item, time_us: u64) -> redis::Cmd {
        let keys = &self.known.keys;
        let channel = &*item.channel;
        let names =
            [keys.channel(channel), keys.dedupe(channel), keys.publications(channel), keys.history(channel)];
        let keep = Keep::from(self.namespaces.of(channel));
        let mut time_field = Vec::with_capacity(11);
        encode_key(TIME_FIELD, WireType::Varint, &mut time_field);
        encode_varint(time_us, &mut time_field);
        let mut remembered = Vec::new();
        if !item.dedupe_key.is_empty() {
            remembered.extend_from_slice(format!("{time_us} ").as_bytes());
            remembered.extend_from_slice(&item.message_id);
        }
        let mut call = open.publish.call(&names);
        call.arg(new_epoch(&self.random))
            .arg(&item.envelope)
            .arg(time_field)
            .arg(&item.dedupe_key)
            .arg(remembered)
            .arg(keep.size)
            .arg(keep.ttl_ms());
        call
    }

    fn read(&self, open: &Open, item: &Item, answer: RedisResult<Value>, time_us: u64) -> Answer {
        let answer = answer.and_then(|value| Ok(from_redis_value(value)?));
        let (repeated, epoch, offset, rest): (bool, String, u64, Value) = match answer {
            Ok(answer) => answer,
            Err(error) if is_no_script(&error) => {
                return Err(self.known.unavailable("its scripts were being loaded; nothing was published"));
            }
            Err(error) => {
                // A replica stays one for this connection.
                if error.kind() == ErrorKind::Server(ServerErrorKind::ReadOnly) {
                    open.give_up();
                }
                return Err(self.known.refused(&describe(&error)));
            }
        };
        self.known.accepted();
        let at = Top { epoch: epoch.into(), offset };
        if !repeated {
            if rest == Value::Int(1) {
                self.known.metrics.epochs.inc();
            }
            return Ok(Assigned { at, message_id: item.message_id.clone(), time_us, repeated });
        }
        let first = match &rest {
            Value::BulkString(bytes) => read_first(bytes),
            _ => None,
        };
        let Some((time_us, message_id)) = first else {
            return Err(self.known.unavailable("what it remembers of a dedupe key cannot be read"));
        };
        Ok(Assigned { at, message_id, time_us, repeated })
    }

    async fn load(&self, open: &Open) -> Result<(), RegistryError> {
        open.load().await.map_err(|error| {
            open.give_up();
            self.known.failed(&describe(&error))
        })
    }
}

fn refuse(items: Vec<Item>, error: &RegistryError) {
    items.into_iter().for_each(|item| item.answer(Err(error.clone())));
}

/// Which publications were not carried out and still may be: not those that a later one of their channel
/// overtook, because somebody else loaded the script in between.
fn to_repeat(batch: &[Item], answers: &[RedisResult<Value>]) -> Vec<bool> {
    let undone = |answer: &RedisResult<Value>| matches!(answer, Err(error) if is_no_script(error));
    let mut again = vec![false; batch.len()];
    if !answers.iter().any(undone) {
        return again;
    }
    let mut done = HashSet::new();
    for ((item, answer), again) in batch.iter().zip(answers).zip(&mut again).rev() {
        if undone(answer) {
            *again = !done.contains(&item.channel);
        } else {
            done.insert(&item.channel);
        }
    }
    again
}

/// What is remembered under a dedupe key: time and message id of the first publication.
fn read_first(bytes: &[u8]) -> Option<(u64, prost::bytes::Bytes)> {
    let space = bytes.iter().position(|byte| *byte == b' ')?;
    let time_us = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
    Some((time_us, prost::bytes::Bytes::copy_from_slice(&bytes[space + 1..])))
}

fn missing() -> RedisError {
    RedisError::from((ErrorKind::UnexpectedReturnType, "it gave too few answers"))
}

/// A name for a new epoch: 16 hexadecimal digits.
pub(super) fn new_epoch(random: &SharedRandom) -> String {
    format!("{:016x}", random.next_u64())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn item(channel: &str) -> Item {
        let new = NewPublication { channel: channel.into(), ..NewPublication::default() };
        let room = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        Item::new(new, Instant::now() + Duration::from_secs(1), room).0
    }

    #[test]
    fn a_publication_that_was_overtaken_is_not_sent_again() {
        let no_script = || Err(RedisError::from((ErrorKind::Server(ServerErrorKind::NoScript), "gone")));
        let batch = [item("a"), item("b"), item("a"), item("c")];
        let all = [no_script(), no_script(), no_script(), no_script()];
        assert_eq!(to_repeat(&batch, &all), [true; 4]);
        let some = [no_script(), no_script(), Ok(Value::Okay), no_script()];
        assert_eq!(to_repeat(&batch, &some), [false, true, false, true]);
    }

    #[test]
    fn what_is_remembered_is_read_back() {
        let id = [b' '; 16];
        let bytes = [b"17 ".as_slice(), &id].concat();
        assert_eq!(read_first(&bytes), Some((17, prost::bytes::Bytes::copy_from_slice(&id))));
        assert_eq!(read_first(b"x"), None);
    }
}
