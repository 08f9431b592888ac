//! A data message that did not arrive in one piece: its parts joined, its text checked as it comes.

use crate::error::ProtocolError;
use crate::utf8::{InvalidUtf8, TextBuffer};

/// The parts so far. Compression would add its own kind here: parts kept as they came, inflated at the end.
#[derive(Debug)]
pub(crate) enum Message {
    Text(TextBuffer),
    Binary(Vec<u8>),
}

impl Message {
    /// Bytes held.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Binary(bytes) => bytes.len(),
        }
    }

    /// Adds a part; `most` bounds what the message can still come to, this part included.
    pub(crate) fn push(&mut self, part: &[u8], most: usize) -> Result<(), ProtocolError> {
        let len = self.len();
        match self {
            Self::Text(text) => {
                let storage = text.storage();
                storage.reserve_exact(growth(len, storage.capacity(), part.len(), most));
                text.push(part)?;
            }
            Self::Binary(bytes) => {
                bytes.reserve_exact(growth(len, bytes.capacity(), part.len(), most));
                bytes.extend_from_slice(part);
            }
        }
        Ok(())
    }
}

/// How many bytes to reserve before `add` bytes join `len`: nothing while they fit, else as much again as there is
/// (so that many small parts are not copied over and over), but never beyond `most` more.
///
/// Memory therefore follows what has arrived, at most twice over, and not what a header promised.
fn growth(len: usize, capacity: usize, add: usize, most: usize) -> usize {
    if capacity.saturating_sub(len) >= add { add } else { len.min(most).max(add) }
}

impl From<InvalidUtf8> for ProtocolError {
    fn from(_: InvalidUtf8) -> Self {
        Self::InvalidUtf8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_small_parts_are_moved_rarely_and_memory_follows_arrival() {
        let mut message = Message::Binary(Vec::new());
        let mut moves = 0;
        let mut capacity = 0;
        for done in 0..100_000 {
            message.push(&[1], 1_000_000 - done).unwrap();
            let Message::Binary(bytes) = &message else { unreachable!() };
            assert!(bytes.capacity() <= 2 * bytes.len());
            moves += usize::from(bytes.capacity() != capacity);
            capacity = bytes.capacity();
        }
        assert!(moves < 25, "{moves} moves");
    }

    #[test]
    fn a_known_end_is_not_overshot() {
        let mut message = Message::Binary(Vec::new());
        message.push(&[1; 60], 100).unwrap();
        message.push(&[1; 10], 40).unwrap();
        message.push(&[1; 30], 30).unwrap();
        let Message::Binary(bytes) = &message else { unreachable!() };
        assert_eq!(bytes.capacity(), 100);
    }
}
