//! By lot, the control: an expert's score is a hash of the seed and of its own weights, so that renumbering the experts renumbers the
//! answer.

use calib::checkpoint::Fingerprint;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::mtp::Mtp;

/// Knobs of the lot.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(rename = "Random")]
pub struct Params {
    /// Share of the experts of a layer that stays. This or `experts`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<f64>,
    /// Experts of a layer that stay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts: Option<usize>,
    /// Seed of the lot.
    pub seed: u64,
    /// What becomes of multi-token-prediction layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtp: Option<Mtp>,
}

/// A number in [0, 1) for every expert from the hashes of the experts' weights, `[experts]`.
pub fn scores(hashes: &[String], seed: u64) -> Vec<f64> {
    let of = |hash: &String| {
        let digits = Fingerprint::of("prune.random").number(seed).field(hash.as_bytes()).finish();
        // 52 bits: every value is a number of f64.
        u64::from_str_radix(&digits[..13], 16).unwrap_or(0) as f64 / 2_f64.powi(52)
    };
    hashes.iter().map(of).collect()
}

#[test]
fn a_lot_follows_the_expert() {
    let hashes: Vec<String> = ["a", "b", "c"].map(str::to_owned).into();
    let (drawn, mut turned) = (scores(&hashes, 7), hashes);
    turned.rotate_left(1);
    assert_eq!(scores(&turned, 7), [drawn[1], drawn[2], drawn[0]]);
    assert_ne!(scores(&turned, 8), scores(&turned, 7));
    assert!(drawn.iter().all(|s| (0.0..1.0).contains(s)) && drawn[0] != drawn[1]);
}
