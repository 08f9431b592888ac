//! Cursors of the log of receipts, and page tokens of lists of deliveries: places, as text that callers give back as it
//! came. They are no secret: whoever makes one up begins elsewhere. Each ends with four bytes of a digest, so that a
//! damaged one is told apart.

use prost::Message;
use ring::digest::{SHA256, digest};
use uuid::Uuid;

use super::Refusal;
use crate::store::LogPosition;

/// Stands before the rest, so that another form can be told apart.
const VERSION: u8 = 1;

/// Bytes: of the version, the store's id, the first part of the place, the message's id; then the user, and the digest.
const FIXED: usize = 1 + 8 + 8 + 16;
const CHECK: usize = 4;

/// Most bytes of a user's name.
const MAX_USER: usize = 200;

/// The cursor of a place in the log.
pub(super) fn encode(position: &LogPosition) -> String {
    let LogPosition { store_id, at, message_id, user } = position;
    let mut bytes = vec![VERSION];
    bytes.extend(store_id.to_be_bytes());
    bytes.extend(at.to_be_bytes());
    bytes.extend(message_id.as_bytes());
    bytes.extend(user.as_bytes());
    bytes.extend(check(&bytes));
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The place of a cursor.
///
/// # Errors
/// When it is none.
pub(super) fn decode(cursor: &str) -> Result<LogPosition, Refusal> {
    parts(cursor).ok_or_else(|| {
        Refusal::bad(
            "cursor is not one that this server gave; give back the cursor of a response as it came, or leave it empty to begin with the oldest receipt that is kept",
        )
    })
}

fn parts(cursor: &str) -> Option<LogPosition> {
    if cursor.len() > 2 * (FIXED + MAX_USER + CHECK) {
        return None;
    }
    let bytes = from_hex(cursor)?;
    let (bytes, digest) = bytes.split_last_chunk::<CHECK>()?;
    if check(bytes) != *digest || bytes.first() != Some(&VERSION) {
        return None;
    }
    let (store_id, rest) = bytes[1..].split_first_chunk::<8>()?;
    let (at, rest) = rest.split_first_chunk::<8>()?;
    let (message_id, user) = rest.split_first_chunk::<16>()?;
    Some(LogPosition {
        store_id: u64::from_be_bytes(*store_id),
        at: u64::from_be_bytes(*at),
        message_id: Uuid::from_bytes(*message_id),
        user: String::from_utf8(user.to_vec()).ok()?,
    })
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

fn check(bytes: &[u8]) -> [u8; CHECK] {
    let hash = digest(&SHA256, bytes);
    *hash.as_ref().first_chunk().expect("SHA-256 has 32 bytes")
}

/// What a page token is good for: a request without its page.
pub(super) fn fingerprint(request: &impl Message) -> [u8; CHECK] {
    check(&request.encode_to_vec())
}

/// The token for the deliveries below an id.
pub(super) fn encode_page(before: Uuid, print: [u8; CHECK]) -> String {
    let print: String = print.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{VERSION:02x}{}{print}", before.simple())
}

/// What [`encode_page`] put into a token; `None` for the empty one, which stands for the first page.
///
/// # Errors
/// When it is no token, or one of another list.
pub(super) fn decode_page(token: &str, print: [u8; CHECK]) -> Result<Option<Uuid>, Refusal> {
    if token.is_empty() {
        return Ok(None);
    }
    let bytes = from_hex(token).filter(|bytes| bytes.len() == 1 + 16 + CHECK && bytes[0] == VERSION);
    let Some(bytes) = bytes else {
        return Err(Refusal::bad(
            "page_token is not one that this server gave; give back next_page_token as it came, or leave it empty for the first page",
        ));
    };
    if bytes[17..] != print {
        return Err(Refusal::bad(
            "page_token belongs to another list; keep user, states and caller for all pages of a list",
        ));
    }
    Ok(Uuid::from_slice(&bytes[1..17]).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_come_back_as_they_were_and_damage_is_found() {
        let position = LogPosition {
            store_id: u64::MAX - 3,
            at: 1_700_000_000_000_000,
            message_id: Uuid::from_u128(42),
            user: "bøb".to_owned(),
        };
        for position in [position.clone(), LogPosition { user: String::new(), ..position }] {
            let cursor = encode(&position);
            assert_eq!(decode(&cursor), Ok(position));
            for at in 0..cursor.len() {
                let mut wrong = cursor.clone().into_bytes();
                wrong[at] = if wrong[at] == b'0' { b'1' } else { b'0' };
                assert!(decode(&String::from_utf8(wrong).unwrap()).is_err(), "at {at}");
                assert!(decode(&cursor[..at]).is_err(), "{at} long");
            }
        }
        for wrong in ["", "7", "now", &"é".repeat(40), &"0".repeat(2_000)] {
            assert!(decode(wrong).unwrap_err().message.contains("not one that this server gave"), "{wrong}");
        }
    }

    #[test]
    fn a_page_token_is_good_for_its_own_list() {
        let (one, other) = (check(b"one"), check(b"other"));
        let token = encode_page(Uuid::from_u128(42), one);
        assert_eq!(decode_page(&token, one), Ok(Some(Uuid::from_u128(42))));
        assert_eq!(decode_page("", one), Ok(None));
        assert!(decode_page(&token, other).unwrap_err().message.contains("another list"));
        for wrong in ["7", &token[1..], &token[2..], &format!("02{}", &token[2..]), "é"] {
            let refused = decode_page(wrong, one).unwrap_err();
            assert!(refused.message.contains("not one that this server gave"), "{wrong}");
        }
    }
}
