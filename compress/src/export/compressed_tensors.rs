//! compressed-tensors, `pack-quantized`: what vLLM, SGLang and transformers load.
//!
//! A matrix `P` of `[N, K]` becomes `P.weight_packed` (I32, the dense bitstream along K), `P.weight_scale` (`[N, K/g]`, in the model's type),
//! `P.weight_shape` (I64) and, where zeros are integers, `P.weight_zero_point` (I32, a bitstream down each column). There is no
//! `P.weight`. The stored `u` is the signed code of compressed-tensors plus `2^(b−1)`, which is our unsigned code as it stands.
//!
//! Experts stay apart, under the names of the source. Version 0.18.0 is stamped, because from it on 3, 5, 6 and 7 bits are packed
//! without holes. Two habits of transformers 5 shape the config: it takes one scheme for all routed experts, from the first group whose
//! `re:` target names experts, so the group of the routed experts comes first; and zeros of experts are dropped when it loads them, so an
//! asymmetric expert is right only elsewhere.

use std::collections::{BTreeMap, BTreeSet};

use calib::arch::Kind;
use calib::checkpoint::Declared;
use calib::tensor::Dtype;
use kernels::{Group, QuantizedMatrix, ScaleType, Zeros, pack};
use serde_json::{Value, json};

use super::{CompressedTensors, Contents, Form, Format, Part, Scheme, Source, Tensor, Zero, config, notes, targets};
use crate::tensorfile::{little_endian, scale_bytes};
use crate::{Error, Result};

/// The version whose packing is written.
pub const VERSION: &str = "0.18.0";

/// Where zero may lie.
const ZEROS: [Zero; 2] = [Zero::Symmetric, Zero::Integer];

impl Format for CompressedTensors {
    fn name(&self) -> &'static str {
        "compressed_tensors"
    }

    fn zeros(&self) -> &'static [Zero] {
        &ZEROS
    }

    fn refusals(&self, tensors: &[Tensor]) -> Vec<String> {
        let constant = |tensor: &Tensor| {
            let what =
                "its expert is dropped, and compressed-tensors has no form for that; use [export.native], or leave allocate.drop out";
            tensor.constant().map(|_| format!("{}: {what}", tensor.name))
        };
        let refused = |tensor: &Tensor| constant(tensor).or_else(|| refusal(tensor, tensor.scheme()?));
        tensors.iter().filter_map(refused).collect()
    }

    fn notes(&self, tensors: &[Tensor]) -> Vec<String> {
        notes::of(tensors)
    }

    fn declare(&self, group: &[&Tensor]) -> Result<Vec<Declared>> {
        Ok(group.iter().map(|tensor| declare(tensor)).collect::<Result<Vec<_>>>()?.concat())
    }

    fn parts(&self, group: &[&Tensor], source: &dyn Source) -> Result<Vec<Part>> {
        Ok(group.iter().map(|tensor| parts(tensor, &source.quantized(&tensor.name)?)).collect::<Result<Vec<_>>>()?.concat())
    }

    fn config(&self, contents: &Contents<'_>) -> Result<String> {
        let section = quantization_config(&contents.tensors);
        config::edit(&contents.config, &["compression_config"], Some(("quantization_config", &section))).ok_or(Error::Config)
    }
}

/// The tensors that one quantized matrix becomes.
pub(super) fn declare(tensor: &Tensor) -> Result<Vec<Declared>> {
    let Some(scheme) = tensor.scheme() else { return Ok(Vec::new()) };
    let [outputs, inputs] = tensor.matrix_shape()?;
    let groups = inputs / scheme.group.len(inputs).max(1);
    let part = |what: &str, dtype, shape| Declared { name: format!("{}.weight_{what}", tensor.module()), dtype, shape };
    let mut parts = vec![
        part("packed", Dtype::I32, vec![outputs, pack::words(inputs, scheme.bits)]),
        part("scale", scale_dtype(scheme.scale), vec![outputs, groups]),
        part("shape", Dtype::I64, vec![2]),
    ];
    if scheme.zero == Zero::Integer {
        parts.push(part("zero_point", Dtype::I32, vec![pack::words(outputs, scheme.bits), groups]));
    }
    Ok(parts)
}

/// Their bytes.
pub(super) fn parts(tensor: &Tensor, matrix: &QuantizedMatrix) -> Result<Vec<Part>> {
    let wrong = |source| Error::Matrix { name: tensor.name.clone(), source };
    let (shape, name) = ([matrix.outputs, matrix.inputs], |what: &str| format!("{}.weight_{what}", tensor.module()));
    let words = pack::pack_rows(&matrix.codes, shape, matrix.bits).map_err(wrong)?;
    let mut parts = vec![
        (name("packed"), little_endian(words)),
        (name("scale"), scale_bytes(&matrix.scales, matrix.scale_type)),
        (name("shape"), shape.iter().flat_map(|&n| (n as i64).to_le_bytes()).collect()),
    ];
    if let Zeros::Asym(zeros) = &matrix.zeros {
        let words = pack::pack_columns(zeros, [matrix.outputs, matrix.groups()], matrix.bits).map_err(wrong)?;
        parts.push((name("zero_point"), little_endian(words)));
    }
    Ok(parts)
}

fn scale_dtype(scale: ScaleType) -> Dtype {
    match scale {
        ScaleType::Bf16 => Dtype::Bf16,
        ScaleType::F16 => Dtype::F16,
        ScaleType::F32 => Dtype::F32,
    }
}

/// Why the format cannot hold a matrix, if it cannot.
pub(super) fn refusal(tensor: &Tensor, scheme: Scheme) -> Option<String> {
    let name = &tensor.name;
    if matches!(tensor.kind(), Kind::Embedding | Kind::Head) {
        return Some(format!(
            "{name}: no loader of compressed-tensors is known to take a packed embedding or head; use [export.dense] alone"
        ));
    }
    if !name.ends_with(".weight") {
        return Some(format!("{name}: compressed-tensors packs only tensors named `.weight`; exclude it"));
    }
    if !ZEROS.contains(&scheme.zero) {
        let kind = if scheme.zero == Zero::Half { "half-integer" } else { "real" };
        return Some(format!("{name}: compressed-tensors holds no {kind} zero points; use the grid `sym` or `asym`, or another export"));
    }
    if !(2..=8).contains(&scheme.bits) {
        return Some(format!("{name}: compressed-tensors holds 2 to 8 bits, not {}", scheme.bits));
    }
    let Ok([_, inputs]) = tensor.matrix_shape() else {
        return Some(format!("{name}: compressed-tensors packs matrices, and this has shape {:?}; exclude it", tensor.shape));
    };
    let group = scheme.group.len(inputs);
    if group == 0 || inputs % group != 0 {
        return Some(format!("{name}: groups of {group} do not divide its {inputs} inputs; exclude it or choose another group"));
    }
    None
}

/// The section of `config.json` for these tensors.
pub fn quantization_config(tensors: &[Tensor]) -> Value {
    let all: BTreeSet<&str> = tensors.iter().map(Tensor::module).collect();
    let mut schemes: BTreeMap<(bool, Scheme), BTreeSet<&str>> = BTreeMap::new();
    let routed: BTreeSet<Scheme> = tensors.iter().filter(|t| t.kind() == Kind::Expert).filter_map(Tensor::scheme).collect();
    for tensor in tensors {
        let Some(scheme) = tensor.scheme() else { continue };
        schemes.entry((!routed.contains(&scheme), scheme)).or_default().insert(tensor.module());
    }
    // Padded, so that the order by name is the order of the groups.
    let width = schemes.len().saturating_sub(1).to_string().len();
    let named = schemes.iter().enumerate().map(|(index, ((_, scheme), modules))| {
        let name = format!("group_{index:0width$}");
        (name, group(*scheme, &targets::targets(modules, &all)))
    });
    let groups: serde_json::Map<String, Value> = named.collect();
    json!({
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored(tensors, &all),
        "kv_cache_scheme": null,
        "global_compression_ratio": null,
        "version": VERSION,
    })
}

fn group(scheme: Scheme, targets: &[String]) -> Value {
    let (strategy, size) = match scheme.group {
        Group::Size(size) => ("group", json!(size)),
        Group::PerChannel => ("channel", Value::Null),
    };
    json!({
        "targets": targets,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.zero == Zero::Symmetric,
            "strategy": strategy,
            "group_size": size,
            "block_structure": null,
            "dynamic": false,
            "actorder": null,
            "scale_dtype": null,
            "zp_dtype": null,
            "observer": "minmax",
            "observer_kwargs": {},
        },
        "input_activations": null,
        "output_activations": null,
        "format": "pack-quantized",
    })
}

/// Every Linear module that stays as it was (routers, gates, heads, MTP, what was excluded), and the head even where it is tied.
fn ignored(tensors: &[Tensor], all: &BTreeSet<&str>) -> Vec<String> {
    let linear = |t: &&Tensor| matches!(t.form, Form::Kept(_)) && t.shape.len() == 2 && t.name.ends_with(".weight");
    let embedding = |t: &&Tensor| t.kind() == Kind::Embedding || t.name.ends_with("embed_tokens.weight");
    let kept: BTreeSet<&str> = tensors.iter().filter(linear).filter(|t| !embedding(t)).map(Tensor::module).collect();
    let mut found = targets::targets(&kept, all);
    if !found.iter().any(|t| t == "lm_head") {
        found.insert(0, "lm_head".to_owned());
    }
    found
}
