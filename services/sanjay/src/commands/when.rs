//! A point in time on the command line: written out, or as how far from now it is.

use std::{str::FromStr, time::Duration};

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::commands::token::parse_span;

/// A point in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    /// Unix time in microseconds.
    At(u64),
    /// So far from now: before or after it, as the option says.
    Away(Duration),
}

impl When {
    /// Unix time in microseconds of something that was.
    pub(super) fn past_us(self, now_us: u64) -> u64 {
        match self {
            When::At(us) => us,
            When::Away(span) => now_us.saturating_sub(span.as_micros() as u64),
        }
    }

    /// Unix time in microseconds of something that is to be.
    pub(super) fn ahead_us(self, now_us: u64) -> u64 {
        match self {
            When::At(us) => us,
            When::Away(span) => now_us.saturating_add(span.as_micros() as u64),
        }
    }
}

impl FromStr for When {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "now" {
            return Ok(When::Away(Duration::ZERO));
        }
        if let Ok(span) = parse_span(text) {
            return Ok(When::Away(span));
        }
        let time = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| {
            "give a time such as 2026-11-24T09:30:00Z, or a span such as 90s, 15m, 24h or 7d, which counts back from now, or ahead where something is to be, or now".to_owned()
        })?;
        let us = u64::try_from(time.unix_timestamp_nanos() / 1_000);
        us.map(When::At).map_err(|_| "the time is before 1970".to_owned())
    }
}

/// A time as one reads it: RFC 3339 in UTC, to the millisecond.
pub(super) fn readable(unix_us: u64) -> String {
    let ms = unix_us / 1_000;
    let time = OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000);
    match time {
        Ok(time) => {
            let (date, clock) = (time.date(), time.time());
            format!(
                "{date}T{:02}:{:02}:{:02}.{:03}Z",
                clock.hour(),
                clock.minute(),
                clock.second(),
                ms % 1_000
            )
        }
        // Beyond the year 9999.
        Err(_) => format!("{unix_us} µs"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_out_or_so_long_ago() {
        let at = |text: &str| text.parse::<When>().map(|when| when.past_us(1_700_000_000_000_000));
        assert_eq!(at("2023-11-14T22:13:20Z"), Ok(1_700_000_000_000_000));
        assert_eq!(at("2023-11-14T23:13:20.5+01:00"), Ok(1_700_000_000_500_000));
        assert_eq!(at("2h"), Ok(1_699_992_800_000_000));
        assert_eq!(at("now"), Ok(1_700_000_000_000_000));
        assert_eq!(at("36500d"), Ok(0));
        let ahead = |text: &str| text.parse::<When>().map(|when| when.ahead_us(1_700_000_000_000_000));
        assert_eq!(ahead("2h"), Ok(1_700_007_200_000_000));
        assert_eq!(ahead("2023-11-14T22:13:21Z"), Ok(1_700_000_001_000_000));
        for wrong in
            ["", "yesterday", "2 h", "2023-11-14", "1969-01-01T00:00:00Z", "-1h", "99999999999999999999d"]
        {
            assert!(at(wrong).is_err(), "{wrong}");
        }
        assert!(at("h").unwrap_err().contains("such as 2026-11-24T09:30:00Z"));
        assert_eq!(readable(1_700_000_000_500_999), "2023-11-14T22:13:20.500Z");
        assert_eq!(at(&readable(7_000)), Ok(7_000));
        assert_eq!(readable(u64::MAX), format!("{} µs", u64::MAX));
    }
}
