use super::*;

fn revocation(user: &str, changed_us: u64, lifted: bool) -> Change {
    Arc::new(Revocation {
        subject: Subject::User(user.to_owned()),
        before_s: 1,
        revoked_us: 1,
        expires_us: 1_000,
        reason: String::new(),
        caller: "shop".to_owned(),
        lifted,
        changed_us,
    })
}

#[test]
fn the_newest_that_was_written_counts() {
    let mut known = Known::default();
    assert!(known.take(&revocation("bob", 5, false)));
    assert!(!known.take(&revocation("bob", 5, false)), "it is known");
    assert!(known.take(&revocation("bob", 7, true)));
    assert!(!known.take(&revocation("bob", 6, false)), "an older look does not bring it back");
    assert_eq!(known.in_force, 0);
    assert!(known.take(&revocation("bob", 8, false)), "it is revoked again");
    assert!(known.take(&revocation("bob", 9, false)), "a later one says another time");
    assert!(!known.take(&revocation("eve", 1, true)), "nobody knew of it");
    assert_eq!((known.in_force, known.all.len()), (1, 2));
}

#[test]
fn what_is_over_is_forgotten_and_told_when_it_was_in_force() {
    let mut known = Known::default();
    known.take(&revocation("bob", 1, false));
    known.take(&revocation("eve", 1, true));
    assert!(known.forget(999).is_empty());
    let over = known.forget(1_000);
    assert_eq!(over.iter().map(|over| over.subject.key()).collect::<Vec<_>>(), ["u/bob"]);
    assert_eq!((known.in_force, known.all.len()), (0, 0));
}

#[test]
fn a_subject_is_known_by_its_key() {
    let session = uuid::Uuid::from_u128(7);
    for subject in
        [Subject::User("a/b".to_owned()), Subject::Jti("u/x".to_owned()), Subject::Session(session)]
    {
        assert_eq!(Subject::from_key(&subject.key()), Some(subject));
    }
    for wrong in ["", "u", "x/y", "s/seven"] {
        assert_eq!(Subject::from_key(wrong), None, "{wrong}");
    }
}
