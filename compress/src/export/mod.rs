//! Formats that a compressed model is written in.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The formats to write, each with its knobs. The first of the order below lies at the top of the output directory, every
/// further one in a folder of its name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Exports {
    /// Packed codes and scales as vLLM, SGLang and transformers load them (`pack-quantized`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compressed_tensors: Option<CompressedTensors>,
    /// The same weights dequantized to bf16 under their original names: loads everywhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dense: Option<Dense>,
}

/// Knobs of the compressed-tensors export: none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CompressedTensors {}

/// Knobs of the dense export: none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Dense {}
