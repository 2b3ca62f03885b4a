//! What becomes of multi-token-prediction layers when experts go.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where a config says how many there are.
pub(crate) const COUNTS: [&str; 2] = ["num_nextn_predict_layers", "num_mtp_layers"];

/// What becomes of multi-token-prediction layers, which stand under the same count of experts and are not measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mtp {
    /// They are left out and their number in the config becomes 0.
    Drop,
}
