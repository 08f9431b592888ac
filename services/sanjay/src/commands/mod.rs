//! The subcommands, one file each: its arguments, and what it does.

pub(crate) mod admin;
pub(crate) mod bench;
pub(crate) mod check_config;
pub(crate) mod control;
pub(crate) mod deliveries;
pub(crate) mod demo;
pub(crate) mod dlq;
pub(crate) mod health;
pub(crate) mod history;
pub(crate) mod members;
pub(crate) mod publish;
pub(crate) mod receipts;
pub(crate) mod revoke;
pub(crate) mod send;
pub(crate) mod sub;
pub(crate) mod tail;
pub(crate) mod token;
pub(crate) mod trace;
mod when;
