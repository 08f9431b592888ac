//! Page tokens of lists of dead letters: where the next page begins, and for which filter.
//!
//! A token is opaque to callers, and no secret: whoever makes one up gets a page that begins elsewhere.

use std::fmt::Write as _;

use prost::Message as _;
use ring::digest::{SHA256, digest};
use sanjay_proto::delivery::v1::DeadLetterFilter;
use uuid::Uuid;

use super::Refusal;
use crate::store::DeadPosition;

/// Stands before the rest, so that another form can be told apart.
const VERSION: u8 = 1;

/// Version, time, id, and four bytes for the filter.
const LENGTH: usize = 1 + 8 + 16 + 4;

/// The token for what follows `position` in a list of `filter`.
pub(super) fn encode(position: DeadPosition, filter: &DeadLetterFilter) -> String {
    let bytes = std::iter::once(VERSION)
        .chain(position.died_us.to_be_bytes())
        .chain(position.message_id.into_bytes())
        .chain(fingerprint(filter));
    bytes.fold(String::with_capacity(2 * LENGTH), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
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

fn parts(token: &str) -> Option<(u64, Uuid, [u8; 4])> {
    if token.len() != 2 * LENGTH || !token.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let byte = |at: usize| u8::from_str_radix(&token[at..at + 2], 16).ok();
    let bytes: Vec<u8> = (0..LENGTH).map(|index| byte(2 * index)).collect::<Option<_>>()?;
    let (version, rest) = bytes.split_first()?;
    let (died_us, rest) = rest.split_first_chunk()?;
    let (message_id, rest) = rest.split_first_chunk()?;
    let print = rest.first_chunk()?;
    (*version == VERSION).then(|| (u64::from_be_bytes(*died_us), Uuid::from_bytes(*message_id), *print))
}

fn fingerprint(filter: &DeadLetterFilter) -> [u8; 4] {
    let hash = digest(&SHA256, &filter.encode_to_vec());
    let mut print = [0; 4];
    print.copy_from_slice(&hash.as_ref()[..4]);
    print
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
        assert_eq!(decode("", &filter), Ok(None));
        let other = decode(&token, &DeadLetterFilter::default()).unwrap_err();
        assert!(other.message.contains("another filter"), "{}", other.message);
        let newer = format!("02{}", &token[2..]);
        let multibyte = "é".repeat(LENGTH);
        for wrong in
            ["7", &token[1..], &token[..token.len() - 2], &newer, &multibyte, &"g".repeat(2 * LENGTH)]
        {
            let refused = decode(wrong, &filter).unwrap_err();
            assert!(refused.message.contains("not one that this server gave"), "{wrong}");
        }
    }
}
