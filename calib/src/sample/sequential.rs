//! Windows spread evenly over a text, the first and the last among them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Nothing to set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Params {}

/// Which of `windows` to take: `take ≤ windows` of them, rising, at equal distances rounded to the nearest (ties to even).
pub(super) fn pick(windows: usize, take: usize) -> Vec<usize> {
    let step = windows.saturating_sub(1) as f64 / take.saturating_sub(1).max(1) as f64;
    (0..take).map(|i| (i as f64 * step).round_ties_even() as usize).collect()
}

#[test]
fn first_and_last_and_evenly_between() {
    assert_eq!(pick(11, 5), [0, 2, 5, 8, 10]); // 0, 2.5, 5, 7.5, 10
    assert_eq!(pick(4, 4), [0, 1, 2, 3]);
    assert_eq!(pick(9, 1), [0]);
    assert_eq!(pick(3, 2), [0, 2]);
}
