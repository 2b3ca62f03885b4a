//! `moepress inspect`: what a checkpoint is.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use calib::Model;
use calib::Weights as _;
use calib::arch::{Kind, Layout, Part, Role, Spec};
use calib::checkpoint::{Checkpoint, write_shape_only};
use serde::Serialize;

use crate::Result;
use crate::packed::{ExpertRounding, Packed, is_packed};
use crate::report::{bytes, count, table};

/// What a checkpoint is.
#[derive(Debug, Serialize)]
pub(super) struct Inspection {
    family: String,
    /// Compressed-tensors, or as trained.
    packed: bool,
    shape_only: bool,
    fingerprint: String,
    hidden: usize,
    vocab: usize,
    layers: usize,
    moe_layers: usize,
    experts: usize,
    top_k: usize,
    shared_expert: bool,
    tied_embeddings: bool,
    parameters: u64,
    active_parameters: u64,
    mtp_parameters: u64,
    bytes: u64,
    roles: Vec<KindRow>,
    /// Bytes by stored type.
    dtypes: BTreeMap<String, u64>,
    unknown_keys: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tensors: Vec<TensorRow>,
}

/// One kind of tensor.
#[derive(Debug, Serialize)]
struct KindRow {
    role: String,
    tensors: usize,
    parameters: u64,
    bytes: u64,
    /// Widths of packed matrices.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    bits: BTreeSet<u8>,
    /// Stored bits a packed weight, scales counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    bits_per_weight: Option<f64>,
}

/// One tensor.
#[derive(Debug, Serialize)]
struct TensorRow {
    name: String,
    shape: Vec<usize>,
    role: String,
}

/// How much is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Detail {
    Summary,
    EveryTensor,
}

/// Looks at a checkpoint; with `shape_only`, also writes its headers there.
pub(super) fn inspect(dir: &Path, shape_only: Option<&Path>, detail: Detail) -> Result<Inspection> {
    let checkpoint = Checkpoint::open(dir)?;
    if let Some(to) = shape_only {
        write_shape_only(&checkpoint, to)?;
    }
    if is_packed(checkpoint.config()) {
        let packed = Packed::new(checkpoint, ExpertRounding::None)?;
        let mut found = look(packed.checkpoint(), packed.spec(), packed.layout(), detail);
        found.packed = true;
        for (kind, widths) in packed.widths() {
            if let Some(row) = found.roles.iter_mut().find(|row| row.role == kind.to_string()) {
                row.bits_per_weight = (widths.weights > 0).then(|| widths.bytes as f64 * 8.0 / widths.weights as f64);
                row.bits = widths.bits;
            }
        }
        return Ok(found);
    }
    let model = Model::from_checkpoint(checkpoint)?;
    let found = look(model.checkpoint(), model.spec(), model.layout(), detail);
    Ok(Inspection { unknown_keys: model.unknown_keys().to_vec(), ..found })
}

fn look(checkpoint: &Checkpoint, spec: &Spec, layout: &Layout, detail: Detail) -> Inspection {
    let moe: Vec<_> = (0..spec.layers.len()).filter_map(|layer| spec.moe(layer)).collect();
    let (mut bytes_of, mut dtypes) = (BTreeMap::<Kind, u64>::new(), BTreeMap::<String, u64>::new());
    for info in checkpoint.tensors() {
        let size = info.bytes.end - info.bytes.start;
        *dtypes.entry(info.dtype.to_string()).or_default() += size;
        if let Some(role) = role(layout, &info.name) {
            *bytes_of.entry(role.kind()).or_default() += size;
        }
    }
    let (mut rows, mut parameters, mut active) = (BTreeMap::<Kind, (usize, u64)>::new(), 0, 0);
    for tensor in layout.tensors() {
        let weights = tensor.shape.iter().map(|side| *side as u64).product::<u64>();
        let row = rows.entry(tensor.role.kind()).or_default();
        (row.0, row.1) = (row.0 + 1, row.1 + weights);
        let (counts, works) = match tensor.role {
            Role::Buffer | Role::Mtp => (false, false),
            // All experts are of one size, so the first stand for the chosen.
            Role::Layer(layer, Part::Expert(expert, _)) => (true, spec.moe(layer).is_some_and(|moe| expert < moe.top_k)),
            _ => (true, true),
        };
        parameters += if counts { weights } else { 0 };
        active += if works { weights } else { 0 };
    }
    let mtp_parameters = rows.get(&Kind::Mtp).map_or(0, |row| row.1);
    let kind_row = |(kind, (tensors, parameters)): (Kind, (usize, u64))| KindRow {
        role: kind.to_string(),
        tensors,
        parameters,
        bytes: bytes_of.get(&kind).copied().unwrap_or(0),
        bits: BTreeSet::new(),
        bits_per_weight: None,
    };
    let every = layout.tensors().iter().filter(|_| detail == Detail::EveryTensor);
    Inspection {
        family: spec.model_type.clone(),
        packed: false,
        shape_only: checkpoint.is_shape_only(),
        fingerprint: checkpoint.fingerprint().to_owned(),
        hidden: spec.hidden,
        vocab: spec.vocab,
        layers: spec.layers.len(),
        moe_layers: moe.len(),
        experts: moe.first().map_or(0, |moe| moe.experts),
        top_k: moe.first().map_or(0, |moe| moe.top_k),
        shared_expert: moe.first().is_some_and(|moe| moe.shared.is_some()),
        tied_embeddings: spec.tied,
        parameters,
        active_parameters: active,
        mtp_parameters,
        bytes: bytes_of.values().sum(),
        roles: rows.into_iter().map(kind_row).collect(),
        dtypes,
        unknown_keys: Vec::new(),
        tensors: every.map(|t| TensorRow { name: t.name.clone(), shape: t.shape.clone(), role: t.role.kind().to_string() }).collect(),
    }
}

/// The role of a stored tensor; parts of a packed or FP8 matrix have the matrix's.
fn role(layout: &Layout, name: &str) -> Option<Role> {
    let whole = |suffix: &str| name.strip_suffix(suffix).map(|module| format!("{module}.weight"));
    layout.role(name).or_else(|| {
        let parts = [".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_scale_inv"];
        layout.role(&parts.iter().find_map(|suffix| whole(suffix))?)
    })
}

/// The same for a person.
pub(super) fn text(found: &Inspection) -> String {
    let yes = |flag: bool, text: &str| if flag { text.to_owned() } else { String::new() };
    let experts = match found.moe_layers {
        0 => "no experts".to_owned(),
        n => format!("{n} with {} experts, top-{}{}", found.experts, found.top_k, yes(found.shared_expert, ", and a shared expert")),
    };
    let mut text = format!(
        "{}{}{}: {} layers, {experts}; hidden size {}, vocabulary {}{}\n{} parameters ({} active a token), {}\n",
        found.family,
        yes(found.packed, ", compressed-tensors"),
        yes(found.shape_only, ", shape only (no data)"),
        found.layers,
        found.hidden,
        found.vocab,
        yes(found.tied_embeddings, ", tied embeddings"),
        count(found.parameters),
        count(found.active_parameters),
        bytes(found.bytes),
    );
    let mut rows = vec![["role", "tensors", "parameters", "bytes", "bits", "stored bits a weight"].map(str::to_owned).to_vec()];
    for row in &found.roles {
        let bits: Vec<String> = row.bits.iter().map(u8::to_string).collect();
        let stored = row.bits_per_weight.map_or(String::new(), |bits| format!("{bits:.3}"));
        rows.push(vec![row.role.clone(), row.tensors.to_string(), count(row.parameters), bytes(row.bytes), bits.join(", "), stored]);
    }
    if !found.packed {
        rows.iter_mut().for_each(|row| row.truncate(4));
    }
    text += &format!("\n{}\n", table(&rows));
    let dtypes: Vec<String> = found.dtypes.iter().map(|(name, size)| format!("{name} {}", bytes(*size))).collect();
    text += &format!("stored as {}\n", dtypes.join(", "));
    if !found.unknown_keys.is_empty() {
        text += &format!("config keys that are not known here, and change nothing: {}\n", found.unknown_keys.join(", "));
    }
    text += &format!("fingerprint {}\n", found.fingerprint);
    if !found.tensors.is_empty() {
        let rows: Vec<_> = found.tensors.iter().map(|t| vec![t.name.clone(), format!("{:?}", t.shape), t.role.clone()]).collect();
        text += &format!("\n{}", table(&rows));
    }
    text
}
