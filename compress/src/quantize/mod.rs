//! Quantizers.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where zero lies between the codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grid {
    /// Symmetric.
    Sym,
}

/// Who chooses the codes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Quantizer {
    /// Round to nearest: needs no calibration.
    Rtn(Rtn),
    /// GPTQ.
    Gptq(Gptq),
}

impl Quantizer {
    /// Whether it solves against second moments of a calibration pass.
    pub fn needs_calibration(&self) -> bool {
        matches!(self, Self::Gptq(_))
    }
}

/// Knobs of rounding to nearest: none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rtn {}

/// Knobs of GPTQ.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Gptq {
    /// Damping.
    pub damping: f64,
}

impl Default for Gptq {
    fn default() -> Self {
        Self { damping: 0.01 }
    }
}
