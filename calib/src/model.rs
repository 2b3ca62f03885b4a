//! A checkpoint seen through its family: tensors by role, experts one at a time, nothing read ahead.

use std::collections::BTreeMap;
use std::path::Path;

use ndarray::{Array1, Array2};
use serde_json::Value;

use crate::arch::{Family, Kind, Layout, Part, Projection, Role, Spec, resolve};
use crate::checkpoint::Checkpoint;
use crate::{Error, Result, Weights};

/// A checkpoint of a known family, every tensor of it claimed.
pub struct Model {
    checkpoint: Checkpoint,
    family: &'static Family,
    spec: Spec,
    layout: Layout,
    unknown: Vec<String>,
}

/// The matrices of one routed expert, `[out, in]`: `down(silu(gate x) ⊙ up x)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Expert {
    /// `[inner, hidden]`.
    pub gate: Array2<f32>,
    /// `[inner, hidden]`.
    pub up: Array2<f32>,
    /// `[hidden, inner]`.
    pub down: Array2<f32>,
}

/// How many parameters a model has. A tied head counts once; buffers do not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// All of them but those of multi-token-prediction layers.
    pub total: u64,
    /// Those that one token meets: of the routed experts `top_k` a layer.
    pub active: u64,
    /// Those of multi-token-prediction layers.
    pub mtp: u64,
}

impl Model {
    /// Opens a directory and claims its tensors; no value is read, but for a stored head that the config ties.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::open`] and [`Model::from_checkpoint`].
    pub fn open(dir: &Path) -> Result<Self> {
        Self::from_checkpoint(Checkpoint::open(dir)?)
    }

    /// Claims the tensors of a checkpoint.
    ///
    /// # Errors
    ///
    /// As [`resolve`] and [`Layout::claim`]; [`Error::Quantized`] for an input that the reader does not convert;
    /// [`Error::TiedHead`] where the config ties the head to the embedding and another head is stored.
    pub fn from_checkpoint(checkpoint: Checkpoint) -> Result<Self> {
        let resolved = resolve(checkpoint.config())?;
        quantized(checkpoint.config())?;
        let layout = Layout::claim(resolved.family, &resolved.spec, &checkpoint.logical())?;
        tied_head(&checkpoint, resolved.family, &layout)?;
        Ok(Self { checkpoint, family: resolved.family, spec: resolved.spec, layout, unknown: resolved.unknown })
    }

    /// The files behind it.
    #[must_use]
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Its family.
    #[must_use]
    pub fn family(&self) -> &'static Family {
        self.family
    }

    /// Which tensor has which role.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Config keys that nobody here knows, by full name.
    #[must_use]
    pub fn unknown_keys(&self) -> &[String] {
        &self.unknown
    }

    /// One routed expert, read and converted.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchRole`] where the layer has no such expert, and as [`Checkpoint::matrix`].
    pub fn expert(&self, layer: usize, expert: usize) -> Result<Expert> {
        let matrix = |projection| self.matrix(Role::Layer(layer, Part::Expert(expert, projection)));
        Ok(Expert { gate: matrix(Projection::Gate)?, up: matrix(Projection::Up)?, down: matrix(Projection::Down)? })
    }

    /// How many parameters it has.
    #[must_use]
    pub fn parameters(&self) -> Parameters {
        let mut parameters = Parameters { total: 0, active: 0, mtp: 0 };
        for tensor in self.layout.tensors() {
            let count = tensor.shape.iter().map(|side| *side as u64).product::<u64>();
            match tensor.role {
                Role::Buffer => {}
                Role::Mtp => parameters.mtp += count,
                Role::Layer(layer, Part::Expert(expert, _)) => {
                    parameters.total += count;
                    // All experts are of one size, so the first stand for the chosen.
                    let chosen = self.spec.moe(layer).is_some_and(|moe| expert < moe.top_k);
                    parameters.active += if chosen { count } else { 0 };
                }
                _ => {
                    parameters.total += count;
                    parameters.active += count;
                }
            }
        }
        parameters
    }

    /// The stored bytes by kind, FP8 scales with their tensors.
    #[must_use]
    pub fn bytes_by_kind(&self) -> BTreeMap<Kind, u64> {
        let stored = |name: &str| self.checkpoint.info(name).map_or(0, |info| info.bytes.end - info.bytes.start);
        self.layout.sum_by_kind(|tensor| stored(&tensor.name) + stored(&format!("{}_scale_inv", tensor.name)))
    }

    fn name(&self, role: Role) -> Result<&str> {
        self.layout.name(role).ok_or_else(|| Error::NoSuchRole { role, model_type: self.spec.model_type.clone() })
    }
}

impl Weights for Model {
    fn spec(&self) -> &Spec {
        &self.spec
    }

    fn matrix(&self, role: Role) -> Result<Array2<f32>> {
        self.checkpoint.matrix(self.name(role)?)
    }

    fn vector(&self, role: Role) -> Result<Array1<f32>> {
        self.checkpoint.vector(self.name(role)?)
    }
}

/// Refuses quantized inputs but block-scaled FP8, which the reader converts.
fn quantized(config: &Value) -> Result<()> {
    let method = ["quantization_config", "compression_config"].iter().find_map(|key| {
        let stated = config.get(key).filter(|value| !value.is_null())?;
        Some(stated.get("quant_method").cloned().unwrap_or_default())
    });
    match method {
        Some(method) if method != "fp8" => Err(Error::Quantized { method: method.to_string() }),
        _ => Ok(()),
    }
}

/// A head that is stored though the config ties it has to be the embedding, bit for bit: else it is not known which is meant.
fn tied_head(checkpoint: &Checkpoint, family: &Family, layout: &Layout) -> Result<()> {
    let (Some(head), Some(embedding)) = (family.names.of(Role::Head), layout.name(Role::Embedding)) else { return Ok(()) };
    if layout.role(&head) != Some(Role::Buffer) || checkpoint.is_shape_only() || checkpoint.bytes(&head)? == checkpoint.bytes(embedding)? {
        return Ok(());
    }
    Err(Error::TiedHead { head, embedding: embedding.to_owned() })
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tempfile::TempDir;

    use super::*;
    use crate::arch::expected;
    use crate::checkpoint::{Declared, SHARD_BYTES, Writer};
    use crate::tensor::Dtype;

    /// Four experts of width 2 on a hidden size of 4, two a token; tied or not.
    fn config(tied: bool) -> Value {
        json!({
            "model_type": "qwen3_moe", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 6, "moe_intermediate_size": 2,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "num_experts": 4,
            "num_experts_per_tok": 2, "mlp_only_layers": [0], "tie_word_embeddings": tied, "attn_temperature": 2,
        })
    }

    /// Writes a checkpoint whose elements count up over the whole file, and further tensors as they are given.
    fn write(config: &Value, more: &[(&str, Vec<usize>, f32)]) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs_err::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let resolved = resolve(config).unwrap();
        let shape = |axes: Vec<crate::arch::Axis>| axes.iter().map(|axis| axis.size).collect::<Vec<_>>();
        let mut tensors: Vec<(String, Vec<usize>, f32)> =
            expected(resolved.family, &resolved.spec).map(|(_, name, axes)| (name, shape(axes), 0.0)).collect();
        let mut next = 0.0;
        for (_, shape, first) in &mut tensors {
            *first = next;
            next += shape.iter().product::<usize>() as f32;
        }
        tensors.extend(more.iter().map(|(name, shape, first)| ((*name).to_owned(), shape.clone(), *first)));
        let declared =
            |(name, shape, _): &(String, Vec<usize>, f32)| Declared { name: name.clone(), dtype: Dtype::F32, shape: shape.clone() };
        let mut writer = Writer::create(dir.path(), tensors.iter().map(declared).collect(), SHARD_BYTES, BTreeMap::new()).unwrap();
        for (name, shape, first) in &tensors {
            let values = (0..shape.iter().product::<usize>()).flat_map(|at| (first + at as f32).to_le_bytes());
            writer.put(name, &values.collect::<Vec<u8>>()).unwrap();
        }
        writer.finish().unwrap();
        dir
    }

    #[test]
    fn parameters_by_hand() {
        let model = Model::open(write(&config(false), &[]).path()).unwrap();
        // A layer: norms 4 + 4, query and output 2 · 4 · 4, key and value 2 · 2 · 4, their norms 2 + 2: 60.
        // Dense MLP 3 · 6 · 4 = 72; router 4 · 4 = 16; an expert 3 · 2 · 4 = 24. Embedding and head 2 · 8 · 4 = 64, last norm 4.
        let total = 2 * 60 + 72 + 16 + 4 * 24 + 64 + 4;
        assert_eq!(model.parameters(), Parameters { total, active: total - 2 * 24, mtp: 0 });
        let bytes = model.bytes_by_kind();
        assert_eq!((bytes[&Kind::Expert], bytes[&Kind::Router], bytes[&Kind::Dense]), (4 * 24 * 4, 64, 288));
        assert_eq!(bytes.values().sum::<u64>(), 4 * total);
        assert_eq!(model.unknown_keys(), ["attn_temperature"]);
    }

    #[test]
    fn an_expert_is_read_by_its_number() {
        let model = Model::open(write(&config(false), &[]).path()).unwrap();
        let first = model.expert(1, 0).unwrap();
        assert_eq!((first.gate.dim(), first.up.dim(), first.down.dim()), ((2, 4), (2, 4), (4, 2)));
        assert_eq!(first.up[[0, 0]] - first.gate[[0, 0]], 8.0);
        assert_eq!(model.expert(1, 3).unwrap().down[[3, 1]] - first.gate[[0, 0]], 4.0 * 24.0 - 1.0);
        for (layer, expert) in [(0, 0), (1, 4), (2, 0)] {
            assert!(matches!(model.expert(layer, expert), Err(Error::NoSuchRole { .. })));
        }
    }

    #[test]
    fn a_stored_head_that_the_config_ties_has_to_be_the_embedding() {
        let tied = Model::open(write(&config(true), &[]).path()).unwrap();
        let copied = Model::open(write(&config(true), &[("lm_head.weight", vec![8, 4], 0.0)]).path()).unwrap();
        assert_eq!(tied.parameters(), copied.parameters());
        assert_eq!(copied.layout().buffers().collect::<Vec<_>>(), ["lm_head.weight"]);
        let Err(error) = Model::open(write(&config(true), &[("lm_head.weight", vec![8, 4], 1.0)]).path()) else {
            panic!("opened a model with two heads");
        };
        assert!(error.to_string().contains("differs from model.embed_tokens.weight"), "{error}");
    }

    #[test]
    fn an_input_quantized_in_another_way_is_refused() {
        let mut quantized = config(false);
        quantized["quantization_config"] = json!({"quant_method": "gptq", "bits": 4});
        let Err(error) = Model::open(write(&quantized, &[]).path()) else { panic!("opened a gptq checkpoint") };
        assert!(error.to_string().contains("quant_method \"gptq\""), "{error}");
    }
}
