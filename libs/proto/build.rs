//! Generates the code of `proto/` without `protoc`, and the descriptor set that reflection serves.

use std::{env, fs, path::PathBuf};

use prost::Message;

const FILES: [&str; 8] = [
    "sanjay/client/v1/payload.proto",
    "sanjay/edge/v1/control.proto",
    "sanjay/edge/v1/link.proto",
    "sanjay/edge/v1/inbox.proto",
    "sanjay/router/v1/router.proto",
    "sanjay/router/v1/bus.proto",
    "sanjay/delivery/v1/delivery.proto",
    "sanjay/delivery/v1/control.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    println!("cargo:rerun-if-changed={}", root.display());
    let descriptors = protox::compile(FILES, [&root])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
