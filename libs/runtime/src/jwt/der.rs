//! Just enough DER to take a public key out of its `SubjectPublicKeyInfo` (RFC 5280, RFC 8410).

const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;

/// Algorithm identifiers, without their outer tag and length.
const RSA: &[u8] = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00";
const P256: &[u8] = b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07";
const ED25519: &[u8] = b"\x06\x03\x2b\x65\x70";

/// A public key of a kind that tokens are signed with.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PublicKey<'a> {
    Rsa { n: &'a [u8], e: &'a [u8] },
    P256(&'a [u8]),
    Ed25519(&'a [u8]),
}

/// The key in a `SubjectPublicKeyInfo`; `None` when it is of another kind, or anything is left over.
pub(super) fn public_key(spki: &[u8]) -> Option<PublicKey<'_>> {
    let fields = only(spki, SEQUENCE)?;
    let (algorithm, rest) = element(fields, SEQUENCE)?;
    let (unused_bits, key) = only(rest, BIT_STRING)?.split_first()?;
    if *unused_bits != 0 {
        return None;
    }
    match algorithm {
        RSA => {
            let numbers = only(key, SEQUENCE)?;
            let (n, rest) = element(numbers, INTEGER)?;
            Some(PublicKey::Rsa { n, e: only(rest, INTEGER)? })
        }
        P256 => Some(PublicKey::P256(key)),
        ED25519 => Some(PublicKey::Ed25519(key)),
        _ => None,
    }
}

/// The content of the one element that `input` is.
fn only(input: &[u8], tag: u8) -> Option<&[u8]> {
    let (content, rest) = element(input, tag)?;
    rest.is_empty().then_some(content)
}

/// The content of the first element, when it has this tag, and what follows it. Lengths of up to two bytes: a key of
/// 8,192 bits has about 1,100.
fn element(input: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (first, rest) = input.split_first()?;
    if *first != tag {
        return None;
    }
    let (length, rest) = rest.split_first()?;
    let (length, rest) = match *length {
        short @ 0..=0x7f => (usize::from(short), rest),
        0x81 => {
            let (length, rest) = rest.split_first()?;
            (usize::from(*length), rest)
        }
        0x82 => {
            let (length, rest) = rest.split_first_chunk::<2>()?;
            (usize::from(u16::from_be_bytes(*length)), rest)
        }
        _ => return None,
    };
    rest.split_at_checked(length)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_key_is_found_and_a_damaged_one_is_not() {
        let mut spki = b"\x30\x2a\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00".to_vec();
        spki.extend_from_slice(&[7; 32]);
        assert_eq!(public_key(&spki), Some(PublicKey::Ed25519(&[7; 32])));
        for at in 0..spki.len() {
            assert_eq!(public_key(&spki[..at]), None, "cut at {at}");
        }
        spki.push(0);
        assert_eq!(public_key(&spki), None, "something is left over");
        spki.pop();
        spki[8] = 0x71;
        assert_eq!(public_key(&spki), None, "Ed448");
    }

    proptest! {
        #[test]
        fn nonsense_does_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = public_key(&bytes);
        }
    }
}
