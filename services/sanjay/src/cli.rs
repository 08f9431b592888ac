//! The command line: one subcommand for each thing that the binary does.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::{
    commands::{
        admin, bench, check_config, control, deliveries, demo, dlq, health, history, members, publish,
        receipts, revoke, send, sub, tail, token, trace,
    },
    output,
    serve::{
        roles::{DeliveryArgs, EdgeArgs, RouterArgs},
        standalone::StandaloneArgs,
    },
};

/// A self-hosted real-time platform: back ends publish over gRPC, clients receive over WebSocket, and a message
/// that was accepted for a user is not lost.
#[derive(Debug, Parser)]
#[command(name = "sanjay", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Standalone(StandaloneArgs),
    Edge(EdgeArgs),
    Router(RouterArgs),
    Delivery(DeliveryArgs),
    CheckConfig(check_config::Args),
    Pub(publish::Args),
    Send(send::Args),
    Sub(sub::Args),
    Trace(trace::Args),
    Dlq(dlq::Args),
    Deliveries(deliveries::Args),
    Receipts(receipts::Args),
    Tail(tail::Args),
    Members(members::Args),
    History(history::Args),
    Nodes(control::NodesArgs),
    Connections(control::ConnectionsArgs),
    Channels(control::ChannelsArgs),
    Disconnect(control::DisconnectArgs),
    Revoke(revoke::Args),
    Token(token::Args),
    Admin(admin::Args),
    Health(health::Args),
    Bench(bench::Args),
    Demo(demo::Args),
}

/// Runs the command of the process's arguments. Exit codes: 0 done, 1 failed, 2 wrong usage.
pub(crate) fn run() -> ExitCode {
    match Cli::parse().command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_closed(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::status(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

impl Command {
    fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Standalone(args) => serve(args.run()),
            Self::Edge(args) => serve(args.run()),
            Self::Router(args) => serve(args.run()),
            Self::Delivery(args) => serve(args.run()),
            Self::CheckConfig(args) => args.run(),
            Self::Pub(args) => block_on(args.run()),
            Self::Send(args) => block_on(args.run()),
            Self::Sub(args) => block_on(args.run()),
            Self::Trace(args) => block_on(args.run()),
            Self::Dlq(args) => block_on(args.run()),
            Self::Deliveries(args) => block_on(args.run()),
            Self::Receipts(args) => block_on(args.run()),
            Self::Tail(args) => block_on(args.run()),
            Self::Members(args) => block_on(args.run()),
            Self::History(args) => block_on(args.run()),
            Self::Nodes(args) => block_on(args.run()),
            Self::Connections(args) => block_on(args.run()),
            Self::Channels(args) => block_on(args.run()),
            Self::Disconnect(args) => block_on(args.run()),
            Self::Revoke(args) => block_on(args.run()),
            Self::Token(args) => args.run(),
            Self::Admin(args) => block_on(args.run()),
            Self::Health(args) => block_on(args.run()),
            Self::Bench(args) => serve(args.run()),
            Self::Demo(args) => block_on(args.run()),
        }
    }
}

/// Runs a server command, or one that loads a server, on a thread for each core; an edge has threads of its own
/// beside them.
fn serve(command: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(command)
}

/// Runs a client command, for which one thread is enough.
fn block_on(command: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(command)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
