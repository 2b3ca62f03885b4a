//! What can be made good after experts have gone, without training: pure functions over what a block saw and said.

pub mod router;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[repair]`: what is made good.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Repair {
    /// After experts were pruned or merged: fits the router's rows and a factor an expert (folded into its down projection) to what the
    /// whole block said, layer by layer, each on what the repaired layers before it pass on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub router: Option<router::Params>,
}
