//! What a channel, user, device or dedupe key may be called, and what else a short text may hold.

use crate::limits::MAX_NAME_BYTES;

/// Why a name, or another short text, is refused. The text names the field, what was wrong and what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Empty.
    #[error("{field} is empty; it needs 1 to {MAX_NAME_BYTES} bytes")]
    Empty {
        /// The field's name.
        field: &'static str,
    },
    /// More bytes than are allowed.
    #[error("{field} has {length} bytes; at most {most} are allowed")]
    TooLong {
        /// The field's name.
        field: &'static str,
        /// Its length in bytes.
        length: usize,
        /// How many it may have.
        most: usize,
    },
    /// Contains a control character.
    #[error("{field} contains the control character U+{:04X} at byte {at}; use printable characters", *.character as u32)]
    Control {
        /// The field's name.
        field: &'static str,
        /// The offending character.
        character: char,
        /// Where it stands, in bytes.
        at: usize,
    },
}

/// Checks a name of 1 to [`MAX_NAME_BYTES`] bytes without control characters.
///
/// # Errors
/// Says what is wrong with `name`, calling it `field`.
pub fn check(field: &'static str, name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty { field });
    }
    check_optional(field, name)
}

/// Like [`check`], but a name may be empty.
///
/// # Errors
/// Says what is wrong with `name`, calling it `field`.
pub fn check_optional(field: &'static str, name: &str) -> Result<(), NameError> {
    check_text(field, name, MAX_NAME_BYTES)
}

/// Checks a text of at most `most` bytes without control characters.
///
/// # Errors
/// Says what is wrong with `text`, calling it `field`.
pub fn check_text(field: &'static str, text: &str, most: usize) -> Result<(), NameError> {
    if text.len() > most {
        return Err(NameError::TooLong { field, length: text.len(), most });
    }
    match text.char_indices().find(|(_, character)| character.is_control()) {
        Some((at, character)) => Err(NameError::Control { field, character, at }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bounded_and_printable() {
        assert_eq!(check("channel", "räume:42"), Ok(()));
        assert_eq!(check("channel", &"a".repeat(200)), Ok(()));
        assert_eq!(check("channel", ""), Err(NameError::Empty { field: "channel" }));
        let too_long = NameError::TooLong { field: "user", length: 201, most: 200 };
        assert_eq!(check("user", &"a".repeat(201)), Err(too_long));
        assert_eq!(check_text("reason", "four", 4), Ok(()));
        let refused = check_text("reason", "fünf", 4).expect_err("five bytes");
        assert_eq!(refused.to_string(), "reason has 5 bytes; at most 4 are allowed");
        let refused = check("user", "a\nb").expect_err("a control character");
        assert_eq!(
            refused.to_string(),
            "user contains the control character U+000A at byte 1; use printable characters"
        );
        assert_eq!(check_optional("dedupe_key", ""), Ok(()));
    }
}
