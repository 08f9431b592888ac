//! Calls to something that may be away: what is refused at once, what is given up, and when it is tried again.
//!
//! A [`Policy`] stands before one dependency. Its [`Breaker`] refuses calls while the dependency fails, its
//! [`Bulkhead`] bounds how many are under way and how many wait, and each call has a deadline. It repeats nothing:
//! that is for the one layer that knows what is harmless to repeat, which gets the time after which it is of use.

mod breaker;
#[cfg(test)]
mod breaker_tests;
mod bulkhead;
mod metrics;
mod policy;
#[cfg(test)]
mod policy_tests;

pub use breaker::{Breaker, Outcome, Pass, Rules, State};
pub use bulkhead::{Bulkhead, Full, Permit};
pub use metrics::{Breakers, DependencyMetrics};
pub use policy::{CallError, Policy, Probes, Refused, Settings, keep_probing};
