//! What a channel, user, device or dedupe key may be called.

use crate::limits::MAX_NAME_BYTES;

/// Why a name is refused. The text names the field, what was wrong and what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Empty.
    #[error("{field} is empty; it needs 1 to {MAX_NAME_BYTES} bytes")]
    Empty {
        /// The field's name.
        field: &'static str,
    },
    /// More than [`MAX_NAME_BYTES`] bytes.
    #[error("{field} has {length} bytes; at most {MAX_NAME_BYTES} are allowed")]
    TooLong {
        /// The field's name.
        field: &'static str,
        /// Its length in bytes.
        length: usize,
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
    if name.len() > MAX_NAME_BYTES {
        return Err(NameError::TooLong { field, length: name.len() });
    }
    match name.char_indices().find(|(_, character)| character.is_control()) {
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
        assert_eq!(check("user", &"a".repeat(201)), Err(NameError::TooLong { field: "user", length: 201 }));
        let refused = check("user", "a\nb").expect_err("a control character");
        assert_eq!(
            refused.to_string(),
            "user contains the control character U+000A at byte 1; use printable characters"
        );
        assert_eq!(check_optional("dedupe_key", ""), Ok(()));
    }
}
