//! The work that the gate counts. `--list` prints a line for each case, its name and how many operations it does;
//! the name of a case does its work. Every input is made here, from constants.
//!
//! A case repeats its work so often that what the first rounds do once (an allocator's first page, a table's first
//! growth) does not show.

mod codec;
mod fanout;
mod inbox;
mod messages;

/// The hub of an edge's shard. It and the four below are included as files: built as their crates, they would bring
/// store drivers and telemetry along, which takes minutes to build with optimisation and is in none of these paths.
#[path = "../../../../services/edge/src/shard/hub.rs"]
#[expect(dead_code, unreachable_pub, reason = "it is written for a crate that uses all of it")]
mod edge_hub;

/// What the hub counts bounded channels with; under the name by which it knows it.
#[path = "../../../../services/edge/src/shard/subscribers.rs"]
#[expect(unreachable_pub, reason = "it is written for a crate that uses all of it")]
mod subscribers;

/// The cursor of a connection's inbox on the edge.
#[path = "../../../../services/edge/src/inbox.rs"]
#[expect(dead_code, unreachable_pub, reason = "it is written for a crate that uses all of it")]
mod edge_inbox;

/// What of an inbox is in flight on a connection; under the name by which the cursor knows it.
#[path = "../../../../services/edge/src/in_flight.rs"]
#[expect(unreachable_pub, reason = "it is written for a crate that uses all of it")]
mod in_flight;

/// What of an inbox is settled.
#[path = "../../../../services/delivery/src/store/settled.rs"]
#[expect(dead_code, unreachable_pub, reason = "it is written for a crate that uses all of it")]
mod delivery_settled;

/// Where the included file looks for it, with the value that it has there.
const MAX_SETTLED_RANGES: usize = 256;

/// Likewise: the unit of deadlines on an edge.
mod shard {
    pub(crate) mod wheel {
        pub(crate) type Tick = u32;
    }
}

use std::{env, process::ExitCode};

/// The server's allocator: what an allocation costs belongs to the path that makes it.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// One piece of work.
struct Case {
    /// As in the baseline.
    name: &'static str,
    /// How many operations it does.
    operations: u64,
    /// Prepares it and does it.
    work: fn(),
}

/// Runs `work` and, under callgrind, counts it: counting is switched on when this function is entered and off when
/// it is left. One function for all cases, so that the gate needs to know one name.
#[inline(never)]
fn counted_region(work: &mut dyn FnMut()) {
    work();
}

fn main() -> ExitCode {
    let cases = [codec::CASES, fanout::CASES, inbox::CASES];
    let mut cases = cases.iter().copied().flatten();
    match env::args().nth(1).as_deref() {
        Some("--list") => {
            cases.for_each(|case| print(&format!("{} {}", case.name, case.operations)));
            ExitCode::SUCCESS
        }
        name => match cases.find(|case| Some(case.name) == name) {
            Some(case) => {
                (case.work)();
                ExitCode::SUCCESS
            }
            None => ExitCode::FAILURE,
        },
    }
}

#[expect(clippy::print_stdout, reason = "the list is for the gate")]
fn print(line: &str) {
    println!("{line}");
}
