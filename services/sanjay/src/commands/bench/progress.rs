//! How far a run is, on standard error when that is a terminal.

use std::{io::IsTerminal as _, pin::pin, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::{MissedTickBehavior, interval};

/// How often the bar moves.
const TICK: Duration = Duration::from_millis(200);

/// Waits for `work` and shows how far it is: `count` of `total`.
pub(super) async fn show<T>(
    label: &'static str,
    total: u64,
    count: impl Fn() -> u64,
    work: impl Future<Output = T>,
) -> T {
    let mut work = pin!(work);
    if !std::io::stderr().is_terminal() {
        return work.await;
    }
    let style = ProgressStyle::with_template("{msg:>10} {wide_bar} {pos}/{len} {elapsed}");
    let bar = ProgressBar::new(total).with_message(label);
    bar.set_style(style.expect("the template is a constant"));
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let done = loop {
        tokio::select! {
            done = &mut work => break done,
            _ = tick.tick() => bar.set_position(count()),
        }
    };
    bar.finish_and_clear();
    done
}
