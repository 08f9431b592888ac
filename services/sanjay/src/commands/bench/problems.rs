//! What went wrong during a run: each kind once, with how often.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use serde::Serialize;

/// Most kinds that are told apart; the rest is counted together.
const MAX_KINDS: usize = 16;

/// Collects from many tasks.
#[derive(Debug, Default)]
pub(super) struct Problems(Mutex<BTreeMap<String, u64>>);

/// One kind of problem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Problem {
    pub(super) count: u64,
    pub(super) text: String,
}

impl Problems {
    /// Notes one.
    pub(super) fn note(&self, text: impl ToString) {
        let mut kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = text.to_string();
        if kinds.len() >= MAX_KINDS && !kinds.contains_key(&text) {
            "others".clone_into(&mut text);
        }
        *kinds.entry(text).or_default() += 1;
    }

    /// The most frequent first.
    pub(super) fn list(&self) -> Vec<Problem> {
        let kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut list: Vec<Problem> =
            kinds.iter().map(|(text, count)| Problem { count: *count, text: text.clone() }).collect();
        list.sort_by_key(|problem| std::cmp::Reverse(problem.count));
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_bounded_and_counted() {
        let problems = Problems::default();
        for n in 0..40 {
            problems.note(n);
        }
        problems.note(7);
        let list = problems.list();
        assert_eq!(list.len(), MAX_KINDS + 1);
        assert_eq!(list[0], Problem { count: 24, text: "others".into() });
        assert_eq!(list[1], Problem { count: 2, text: "7".into() });
    }
}
