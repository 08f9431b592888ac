//! How many sockets this process may hold.

use anyhow::Context as _;
use rlimit::Resource;

/// Most sockets of a run: common hard limits of open files are 20,000 and above, and one source address has about
/// 28,000 ports for one destination.
pub(super) const MAX_SOCKETS: u64 = 19_000;

/// Open files beside the sockets: standard streams, the runtime's, the connection to the API, and connections of a
/// warm-up that are about to close.
const OTHER_FILES: u64 = 512;

/// Makes room for so many sockets: raises the soft limit of open files as far as they need.
///
/// # Errors
/// When they are too many for one process, or for this system's hard limit.
pub(super) fn make_room(sockets: u64) -> anyhow::Result<()> {
    anyhow::ensure!(
        sockets <= MAX_SOCKETS,
        "{sockets} sockets are more than the {MAX_SOCKETS} that one process gets here: each is an open file, which \
         systems limit to little more; run several benches at once, from several machines"
    );
    let needed = sockets + OTHER_FILES;
    let (soft, hard) = rlimit::getrlimit(Resource::NOFILE).context("cannot read the limit of open files")?;
    anyhow::ensure!(
        hard >= needed,
        "{sockets} sockets need {needed} open files, and this system's hard limit is {hard} (`ulimit -Hn`); ask for \
         fewer, or raise the limit"
    );
    if soft < needed {
        rlimit::setrlimit(Resource::NOFILE, needed, hard).context("cannot raise the limit of open files")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_sockets_are_refused_with_the_reason() {
        let refused = make_room(MAX_SOCKETS + 1).unwrap_err().to_string();
        assert!(refused.contains("19001") && refused.contains("open file"), "{refused}");
        make_room(10).unwrap();
    }
}
