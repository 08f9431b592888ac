//! Generated gRPC code of every service; the sources with their documentation are in `proto/`.
#![allow(
    missing_docs,
    clippy::allow_attributes,
    reason = "the documentation is in proto/, where the generator reads it"
)]
#![allow(unreachable_pub, unused_qualifications, clippy::large_futures, reason = "generated")]

/// `sanjay.client.v1`: what clients and back ends exchange.
pub mod client {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("sanjay.client.v1");
    }
}

/// `sanjay.edge.v1`: what edges ask of routers and delivery nodes.
pub mod edge {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("sanjay.edge.v1");
    }
}

/// `sanjay.router.v1`: what delivery nodes ask of routers, and what routers say to each other over the bus.
pub mod router {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("sanjay.router.v1");
    }
}

/// `sanjay.delivery.v1`: what product back ends ask of delivery nodes.
pub mod delivery {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("sanjay.delivery.v1");
    }
}

/// The encoded `FileDescriptorSet` of every package, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Version of the edge ↔ router stream that this build speaks.
pub const LINK_VERSION: u32 = 1;

/// Version of the envelopes on the bus between routers that this build writes, and the only one that it reads.
pub const BUS_VERSION: u32 = 1;
