//! The life of an inbox message: accepted once, then settled in exactly one way.

/// Where an inbox message is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Durable, and waits outside the inbox for its time.
    Scheduled,
    /// Durable in the inbox, not settled.
    Accepted,
    /// A client of the user acknowledged it.
    Acked,
    /// Its time to live passed before it was acknowledged.
    Expired,
    /// A newer message with the same collapse key took its place.
    Superseded,
    /// It was moved to the dead letters.
    Dead,
}

impl State {
    /// Every state with the number that stands for it in stored records; numbers are never reused.
    const NUMBERS: [(State, i32); 6] = [
        (State::Scheduled, 6),
        (State::Accepted, 1),
        (State::Acked, 2),
        (State::Expired, 3),
        (State::Superseded, 4),
        (State::Dead, 5),
    ];

    /// Every state.
    pub fn all() -> impl Iterator<Item = Self> {
        Self::NUMBERS.into_iter().map(|(state, _)| state)
    }

    /// Whether nothing follows this state.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        !matches!(self, State::Scheduled | State::Accepted)
    }

    /// The number that stands for the state in stored records and in the back ends' API.
    #[must_use]
    pub fn number(self) -> i32 {
        Self::NUMBERS.iter().find(|(state, _)| *state == self).map_or(0, |(_, number)| *number)
    }

    /// Its name in milestones and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            State::Scheduled => "scheduled",
            State::Accepted => "accepted",
            State::Acked => "acked",
            State::Expired => "expired",
            State::Superseded => "superseded",
            State::Dead => "dead",
        }
    }

    /// The state with this number, or `None` for a number that this build does not know.
    #[must_use]
    pub fn from_number(number: i32) -> Option<Self> {
        Self::NUMBERS.iter().find(|(_, n)| *n == number).map(|(state, _)| *state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_api() {
        use sanjay_proto::delivery::v1::DeliveryState;
        for (state, number) in State::NUMBERS {
            assert_eq!(state.number(), number);
            assert_eq!(State::from_number(number), Some(state));
            let api = DeliveryState::try_from(number).expect("the API knows it");
            assert!(api.as_str_name().ends_with(&format!("{state:?}").to_uppercase()));
            assert_eq!(state.is_terminal(), ![State::Scheduled, State::Accepted].contains(&state));
        }
        assert_eq!(State::from_number(0), None);
    }
}
