//! Text that the model writes itself, each token sampled: the plain control of [`ebss`](super::ebss).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::write::Hold;

/// How it is sampled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Params {
    /// What logits are divided by: 1 samples the model's own distribution, less keeps to what is likely.
    #[serde(default = "temperature")]
    pub temperature: f64,
    /// Texts that are written side by side; it takes memory for the keys and values of as many.
    #[serde(default = "super::write::at_once")]
    pub at_once: usize,
    /// Where the routed experts are meanwhile.
    #[serde(default)]
    pub experts: Hold,
}

fn temperature() -> f64 {
    1.0
}

impl Default for Params {
    fn default() -> Self {
        Self { temperature: temperature(), at_once: super::write::at_once(), experts: Hold::default() }
    }
}

#[test]
fn what_is_left_out_has_a_default() {
    assert_eq!(serde_json::from_str::<Params>("{}").unwrap(), Params::default());
    assert!(serde_json::from_str::<Params>(r#"{"tau": 1}"#).is_err());
}
