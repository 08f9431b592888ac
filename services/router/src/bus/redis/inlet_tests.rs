//! A lane that is full marks what it drops, and tells of it once there is room.

use prost::Message as _;
use sanjay_proto::{
    client::v1::Publication,
    router::v1::{NewPublication, Stamp},
};

use super::*;
use crate::bus::{EdgeHint, redis::envelope::encode_publication};

#[derive(Default)]
struct Log(Mutex<Vec<String>>);

impl Sink for Log {
    fn publication(&self, publication: &Arc<Publication>) {
        self.0.lock().push(format!("{} {}", publication.channel, publication.offset));
    }

    fn hint(&self, hint: EdgeHint) {
        self.0.lock().push(format!("hint {}", hint.hint.user));
    }

    fn missed(&self, what: Missed<'_>) {
        self.0.lock().push(format!("{what:?}"));
    }
}

struct Lanes {
    inlet: Inlet,
    workers: Vec<Worker>,
    log: Arc<Log>,
    metrics: BusMetrics,
}

const OWN: &str = "sanjay:r:r1";

fn lanes(messages: usize, bytes: usize) -> Lanes {
    let (log, metrics) = (Arc::new(Log::default()), BusMetrics::default());
    let sink = Arc::clone(&log) as Arc<dyn Sink>;
    let (inlet, workers) = Inlet::new(OWN, &Keys::new(0), LaneLimits { messages, bytes }, &sink, &metrics);
    Lanes { inlet, workers, log, metrics }
}

impl Lanes {
    fn publish(&self, channel: &str, offset: u64) {
        let new = NewPublication { channel: channel.into(), ..NewPublication::default() };
        let stamp = Stamp { epoch: "a".into(), offset, time_us: 1 }.encode_to_vec();
        let mut bytes = encode_publication(new);
        bytes.extend([0x2a, stamp.len() as u8]);
        bytes.extend(stamp);
        self.inlet.take(Keys::new(0).publications(channel), bytes);
    }

    /// Lets the workers run until nothing waits.
    async fn drain(&mut self) -> Vec<String> {
        let workers = std::mem::take(&mut self.workers);
        let tasks: Vec<_> = workers.into_iter().map(|worker| tokio::spawn(worker.run())).collect();
        while self
            .inlet
            .lanes
            .iter()
            .any(|lane| !lane.sender.is_empty() || lane.bytes.load(Ordering::Relaxed) > 0)
        {
            tokio::task::yield_now().await;
        }
        tasks.iter().for_each(tokio::task::JoinHandle::abort);
        std::mem::take(&mut *self.log.0.lock())
    }
}

#[tokio::test]
async fn a_full_lane_marks_each_channel_once() {
    let mut lanes = lanes(3, 1_000_000);
    (1..=6).for_each(|offset| lanes.publish("a", offset));
    assert_eq!(lanes.drain().await, ["a 1", "a 2", "a 3", r#"Channel("a")"#]);
    assert_eq!(lanes.metrics.overflows.get(), 3);
}

#[tokio::test]
async fn bytes_are_bounded_too_but_one_message_always_fits() {
    let mut lanes = lanes(1_000, 10);
    lanes.publish("a", 1);
    lanes.publish("a", 2);
    assert_eq!(lanes.drain().await, ["a 1", r#"Channel("a")"#]);
}

#[tokio::test]
async fn too_many_marks_become_one_for_all() {
    let mut lanes = lanes(1, 1_000_000);
    for at in 0..(MAX_MARKS * LANES * 2) {
        lanes.publish(&format!("c{at}"), 1);
    }
    let told = lanes.drain().await;
    for lane in &lanes.inlet.lanes {
        assert!(!lane.marked.load(Ordering::Relaxed));
    }
    assert_eq!(told.iter().filter(|text| *text == "Channels").count(), LANES);
    assert_eq!(told.iter().filter(|text| *text == "Hints").count(), LANES);
    assert!(told.len() < LANES * (MAX_MARKS + 4));
}

#[tokio::test]
async fn what_is_not_understood_counts_as_lost() {
    let mut lanes = lanes(100, 1_000_000);
    lanes.inlet.take(Keys::new(0).publications("a"), b"\xff".to_vec());
    lanes.inlet.take(OWN.into(), b"\xff".to_vec());
    // A publication that came on the name of another channel.
    let new = NewPublication { channel: "b".into(), ..NewPublication::default() };
    let mut bytes = encode_publication(new);
    bytes.extend([0x2a, 5, 0x0a, 1, b'a', 0x10, 1]);
    lanes.inlet.take(Keys::new(0).publications("c"), bytes);
    let mut told = lanes.drain().await;
    told.sort();
    assert_eq!(told, [r#"Channel("a")"#, r#"Channel("c")"#, "Hints"]);
    assert_eq!(lanes.metrics.undecodable.get(), 3);
}
