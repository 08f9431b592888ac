//! Names the sequence of an inbox, the same way in every adapter.

/// Epoch of a user's inbox: fixed from the store's identity, so that an inbox has its epoch before its first
/// message and reading needs no write; another store gives other epochs. Never 0.
pub(super) fn epoch(store_id: u64, user: &str) -> u64 {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    context.update(&store_id.to_be_bytes());
    context.update(user.as_bytes());
    let digest = context.finish();
    let first = digest.as_ref().first_chunk::<8>().expect("SHA-256 has 32 bytes");
    u64::from_be_bytes(*first).max(1)
}
