//! What mends the rest of a model after a matrix was quantized (the scales of its inputs, the order of layers, the aim of a solver, the router) or experts went.

pub mod awq;
pub mod down;
pub mod propagate;
pub mod refit;
pub mod removal;
pub mod rotate;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What mends what quantization disturbs; used where codes are chosen against calibration tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Repair {
    /// Whose outputs a layer is solved on.
    #[serde(default)]
    pub order: Order,
    /// With `sequential`: how far a solver aims at the output that the original inputs would give, 0 to 1 (QEP's α, 0.5 there).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub propagate: Option<f64>,
    /// With `sequential`: fits each layer's router to the original's logits once its attention is compressed. Changes the router,
    /// and no byte of its size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router_repair: Option<refit::Params>,
    /// After experts were pruned or merged: fits the down projections of the experts that are left to what the whole block said, and if
    /// asked the router's rows and a factor an expert (folded into its down projection) before, layer by layer, each on what the repaired
    /// layers before it pass on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub removal: Option<removal::Params>,
    /// Before anything is quantized: scales input channels by how strongly they are excited and makes what feeds them as much smaller
    /// (AWQ), in norms, routers, value and up projections. The model computes what it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub awq: Option<awq::Params>,
    /// Before anything is quantized: rotates the residual stream, so that no channel is outsized (QuaRot). Gains of norms go into what
    /// follows them, and a head that was the embedding becomes one of its own, which takes bytes. The model computes what it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotate: Option<rotate::Params>,
}

/// Whose outputs a layer is solved on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Those of the original layers before it.
    #[default]
    Independent,
    /// Those of the compressed layers before it, and inside a layer those of compressed attention for what follows it.
    Sequential,
}
