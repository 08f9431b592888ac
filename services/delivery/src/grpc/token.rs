//! Page tokens of lists of dead letters: where the next page begins, and for which filter.
//!
//! A token is opaque to callers, and no secret: whoever makes one up gets a page that begins elsewhere.

use prost::Message as _;
use ring::digest::{SHA256, digest};
use sanjay_proto::delivery::v1::DeadLetterFilter;
use uuid::Uuid;

use super::Refusal;
use crate::store::DeadPosition;

/// Stands before the rest, so that another form can be told apart.
const VERSION: u8 = 1;

/// Hex digits: of the version, the time, the id, and four bytes for the filter.
const LENGTH: usize = 2 + 16 + 32 + 8;

/// The token for what follows `position` in a list of `filter`.
pub(super) fn encode(position: DeadPosition, filter: &DeadLetterFilter) -> String {
    let DeadPosition { died_us, message_id } = position;
    format!("{VERSION:02x}{died_us:016x}{}{:08x}", message_id.simple(), fingerprint(filter))
}

/// What [`encode`] put into a token; `None` for the empty one, which stands for the first page.
///
/// # Errors
/// When it is no token, or one of another filter.
pub(super) fn decode(token: &str, filter: &DeadLetterFilter) -> Result<Option<DeadPosition>, Refusal> {
    if token.is_empty() {
        return Ok(None);
    }
    let Some((died_us, message_id, print)) = parts(token) else {
        return Err(Refusal::bad(
            "page_token is not one that this server gave; give back next_page_token as it came, or leave it empty for the first page",
        ));
    };
    if print != fingerprint(filter) {
        return Err(Refusal::bad(
            "page_token belongs to a list with another filter; keep the filter for all pages of a list",
        ));
    }
    Ok(Some(DeadPosition { died_us, message_id }))
}

fn parts(token: &str) -> Option<(u64, Uuid, u32)> {
    if token.len() != LENGTH || !token.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let (version, rest) = token.split_at(2);
    let (died_us, rest) = rest.split_at(16);
    let (message_id, print) = rest.split_at(32);
    if u8::from_str_radix(version, 16) != Ok(VERSION) {
        return None;
    }
    let died_us = u64::from_str_radix(died_us, 16).ok()?;
    Some((died_us, Uuid::try_parse(message_id).ok()?, u32::from_str_radix(print, 16).ok()?))
}

fn fingerprint(filter: &DeadLetterFilter) -> u32 {
    let hash = digest(&SHA256, &filter.encode_to_vec());
    hash.as_ref()[..4].iter().fold(0, |print, byte| print << 8 | u32::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_its_own_list_alone() {
        let filter = DeadLetterFilter { user: "bob".into(), ..DeadLetterFilter::default() };
        let position = DeadPosition { died_us: u64::MAX - 7, message_id: Uuid::from_u128(42) };
        let token = encode(position, &filter);
        assert_eq!(decode(&token, &filter), Ok(Some(position)));
        assert!(token.starts_with("01fffffffffffffff80000000000000000000000000000002a"), "{token}");
        assert_eq!(decode("", &filter), Ok(None));
        let other = decode(&token, &DeadLetterFilter::default()).unwrap_err();
        assert!(other.message.contains("another filter"), "{}", other.message);
        let newer = format!("02{}", &token[2..]);
        let multibyte = "é".repeat(LENGTH / 2);
        for wrong in ["7", &token[1..], &token[..token.len() - 2], &newer, &multibyte, &"g".repeat(LENGTH)] {
            let refused = decode(wrong, &filter).unwrap_err();
            assert!(refused.message.contains("not one that this server gave"), "{wrong}");
        }
    }
}
