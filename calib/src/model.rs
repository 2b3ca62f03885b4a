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
        let mut sums = BTreeMap::new();
        for info in self.checkpoint.tensors() {
            let own = self.layout.role(&info.name);
            let role = own.or_else(|| self.layout.role(info.name.strip_suffix("_scale_inv")?));
            if let Some(role) = role {
                *sums.entry(role.kind()).or_default() += info.bytes.end - info.bytes.start;
            }
        }
        sums
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
