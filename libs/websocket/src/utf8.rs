//! Collects text that arrives in pieces and refuses it at the first byte that cannot be UTF-8.

/// The bytes so far cannot be the beginning of any UTF-8 text, or end inside a character.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct InvalidUtf8;

/// Checks a whole text.
pub(crate) fn check(bytes: &[u8]) -> Result<&str, InvalidUtf8> {
    simdutf8::basic::from_utf8(bytes).map_err(|_| InvalidUtf8)
}

/// Text whose pieces may be cut inside a character.
#[derive(Debug, Default)]
pub(crate) struct TextBuffer {
    text: String,
    /// The beginning of a character whose end has not arrived; the fourth place is for joining it.
    tail: [u8; 4],
    tail_len: u8,
}

impl TextBuffer {
    /// Bytes held.
    pub(crate) fn len(&self) -> usize {
        self.text.len() + usize::from(self.tail_len)
    }

    /// The text's own storage, for growth.
    pub(crate) fn storage(&mut self) -> &mut String {
        &mut self.text
    }

    /// Adds a piece. Every byte is looked at once, apart from the at most three that wait for their character.
    pub(crate) fn push(&mut self, mut piece: &[u8]) -> Result<(), InvalidUtf8> {
        while self.tail_len > 0 {
            let Some((&byte, rest)) = piece.split_first() else { return Ok(()) };
            piece = rest;
            self.join(byte)?;
        }
        let (whole, tail) = piece.split_at(piece.len() - incomplete_suffix(piece));
        self.text.push_str(check(whole)?);
        if !tail.is_empty() {
            check_prefix(tail)?;
            self.tail[..tail.len()].copy_from_slice(tail);
            self.tail_len = tail.len() as u8;
        }
        Ok(())
    }

    /// The whole text, unless it ends inside a character.
    pub(crate) fn finish(&self) -> Result<&str, InvalidUtf8> {
        if self.tail_len == 0 { Ok(&self.text) } else { Err(InvalidUtf8) }
    }

    /// Adds one byte to the character that waits. Four bytes are a character or an error, so `tail` never overflows.
    fn join(&mut self, byte: u8) -> Result<(), InvalidUtf8> {
        let len = usize::from(self.tail_len);
        self.tail[len] = byte;
        let bytes = &self.tail[..=len];
        match std::str::from_utf8(bytes) {
            Ok(character) => {
                self.text.push_str(character);
                self.tail_len = 0;
            }
            Err(error) if error.error_len().is_none() => self.tail_len += 1,
            Err(_) => return Err(InvalidUtf8),
        }
        Ok(())
    }
}

/// How many bytes at the end begin a character that needs more bytes: 0 to 3.
fn incomplete_suffix(bytes: &[u8]) -> usize {
    for (behind, &byte) in bytes.iter().rev().take(3).enumerate() {
        let needed = match byte {
            0x80..=0xBF => continue,
            0xC2..=0xDF => 2,
            0xE0..=0xEF => 3,
            0xF0..=0xF4 => 4,
            _ => 1,
        };
        return if needed > behind + 1 { behind + 1 } else { 0 };
    }
    0
}

/// Accepts only bytes that some continuation makes one character: `F4 90` is already wrong, for example.
fn check_prefix(tail: &[u8]) -> Result<(), InvalidUtf8> {
    match std::str::from_utf8(tail) {
        Err(error) if error.valid_up_to() == 0 && error.error_len().is_none() => Ok(()),
        _ => Err(InvalidUtf8),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes that often are, or nearly are, multi-byte characters.
    fn nearly_utf8() -> impl Strategy<Value = Vec<u8>> {
        let part = prop_oneof![
            8 => any::<char>().prop_map(|c| c.to_string().into_bytes()),
            1 => any::<char>().prop_map(|c| { let mut b = c.to_string().into_bytes(); b.pop(); b }),
            1 => prop::sample::select(vec![0x80u8, 0xBF, 0xC0, 0xC2, 0xE0, 0xED, 0xA0, 0xF0, 0xF4, 0x90, 0xF5, 0xFF])
                .prop_map(|b| vec![b]),
        ];
        prop::collection::vec(part, 0..24).prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn agrees_with_the_standard_library_at_every_cut(
            bytes in nearly_utf8(),
            cuts in prop::collection::vec(0usize..20, 0..12),
        ) {
            let mut buffer = TextBuffer::default();
            let mut end = 0usize;
            for cut in cuts.into_iter().chain([usize::MAX]) {
                let start = end;
                end = start.saturating_add(cut).min(bytes.len());
                let expected = match std::str::from_utf8(&bytes[..end]) {
                    Err(error) if error.error_len().is_some() => Err(InvalidUtf8),
                    _ => Ok(()),
                };
                prop_assert_eq!(buffer.push(&bytes[start..end]), expected);
                if expected.is_err() {
                    return Ok(());
                }
                prop_assert_eq!(buffer.len(), end);
            }
            prop_assert_eq!(buffer.finish().ok(), std::str::from_utf8(&bytes).ok());
        }
    }
}
