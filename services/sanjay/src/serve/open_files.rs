//! How many files a server may have open: each client is one.

/// Open files beside clients: listeners, streams to peers, the log, the store.
const OTHER_FILES: u64 = 256;

/// Raises the soft limit of open files to the hard one, and says so when clients will meet the hard one first.
pub(crate) fn raise_limit(max_connections: usize) {
    let needed = (max_connections as u64).saturating_add(OTHER_FILES);
    let limit = rlimit::increase_nofile_limit(u64::MAX);
    if let Some(advice) = advice(needed, limit.as_ref().ok().copied()) {
        tracing::warn!(max_connections, advice, "open files are few");
    }
}

/// What to do when `limit` files (`None`: unknown) are too few for the `needed` ones.
fn advice(needed: u64, limit: Option<u64>) -> Option<String> {
    match limit {
        Some(limit) if limit >= needed => None,
        Some(limit) => Some(format!(
            "the hard limit of open files is {limit}, so about {} clients can connect; raise it to {needed} (`ulimit \
             -Hn`, LimitNOFILE= of systemd, `ulimits` of compose), or lower edge.max_connections",
            limit.saturating_sub(OTHER_FILES)
        )),
        None => Some(format!("the limit of open files cannot be read; let it be at least {needed}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_few_files_are_named_with_what_they_allow() {
        assert_eq!(advice(100_256, Some(1_048_576)), None);
        assert_eq!(advice(100_256, Some(100_256)), None);
        let few = advice(100_256, Some(20_000)).unwrap();
        assert!(few.contains("about 19744 clients") && few.contains("100256"), "{few}");
        assert!(advice(1, None).is_some());
    }

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        raise_limit(1);
        let (soft, hard) = rlimit::getrlimit(rlimit::Resource::NOFILE).unwrap();
        assert_eq!(soft, hard);
    }
}
