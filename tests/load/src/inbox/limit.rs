//! What the disk alone allows: the limit of whoever makes each commit durable.

use std::{
    fs::File,
    io::{Seek as _, SeekFrom, Write as _},
    time::{Duration, Instant},
};

/// Bytes of one write.
const PAGE: usize = 4096;

/// Writes a page and syncs it, again and again, in the directory of temporary files. Gives how often a second.
pub(super) fn syncs_per_second(length: Duration) -> anyhow::Result<f64> {
    let mut file: File = tempfile::tempfile()?;
    let page = [7_u8; PAGE];
    let (began, mut count) = (Instant::now(), 0_u32);
    while began.elapsed() < length {
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&page)?;
        file.sync_data()?;
        count += 1;
    }
    Ok(f64::from(count) / began.elapsed().as_secs_f64())
}
