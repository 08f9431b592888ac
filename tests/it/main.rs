//! Black-box tests: the real binary, over its sockets, one module for each behaviour.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a failure is a failed test, and its output is for whoever looks into it"
)]

mod acks_wait;
mod admin;
mod attempts;
mod bad_input;
mod bad_input_grpc;
mod bad_tokens;
mod balancer;
mod balancer_grpc;
mod balancer_newer;
mod balancer_strangers;
mod bench;
mod cli;
mod control;
mod cut_off;
mod dead_letters;
mod demo;
mod devices;
mod endings;
mod failover;
mod fanout;
mod graceful;
mod heartbeat;
mod hops;
mod inbox;
mod limits;
mod live;
mod many_dead_letters;
mod many_nodes;
mod metrics;
mod namespaces;
mod offline;
mod processes;
mod python;
mod receipts;
mod recovery;
mod revocations;
mod store_away;
mod stores;
mod tokens;
mod trace;
mod trace_cluster;
