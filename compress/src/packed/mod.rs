//! A compressed-tensors or native checkpoint as a model that runs: weights are unpacked and dequantized when they are asked for.
//!
//! Native checkpoints ([`export::native`](crate::export::native)) hold arenas beside what compressed-tensors packs; see [`arenas`].
//!
//! Read are `pack-quantized` checkpoints, ours and others': `config_groups` by exact names, `re:` expressions and the class `Linear`, in
//! compressed-tensors' own order of precedence. Other formats, activation orders stored as `weight_g_idx`, and the padded packing of
//! compressed-tensors 0.17 at 3, 5, 6 and 7 bits are refused by name.

mod arenas;
pub mod emit;
mod schemes;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use calib::arch::{Kind, Layout, Part, Role, Spec, resolve};
use calib::checkpoint::Checkpoint;
use calib::tensor::Dtype;
use calib::{Applied, Model, Weights};
use kernels::dequant::Product;
use kernels::layout::Arena;
use kernels::{Group, QuantizedMatrix, ScaleType, Zeros, pack};
use ndarray::{Array1, Array2};
use serde_json::Value;

use crate::constants::Constant;
use crate::{Error, Result};
use arenas::{Held, Place};
use schemes::Schemes;

/// How the weights of routed experts are rounded when they are dequantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertRounding {
    /// Not at all: `(u − z) · s` in f32.
    None,
    /// To bf16, as transformers 5 does whatever dtype it is asked for.
    Bf16,
}

/// Opens a model to run: a plain checkpoint, or one that [`is_packed`].
///
/// # Errors
///
/// Whatever opening a checkpoint brings up; [`Error::Packed`] if it is compressed in a way that cannot be read, or if experts are to be
/// rounded that are not packed.
pub fn open(dir: &Path, rounding: ExpertRounding) -> Result<Box<dyn Weights>> {
    let checkpoint = Checkpoint::open(dir)?;
    if is_packed(checkpoint.config()) {
        return Ok(Box::new(Packed::new(checkpoint, rounding)?));
    }
    if rounding != ExpertRounding::None {
        let what = "its experts are not packed, so there is nothing that rounding after dequantization would change; leave out \
                    --round-experts";
        return Err(Error::Packed { dir: dir.to_owned(), what: what.to_owned() });
    }
    Ok(Box::new(Model::from_checkpoint(checkpoint)?))
}

/// Whether a config says compressed-tensors, or the native layout of this project.
pub fn is_packed(config: &Value) -> bool {
    let method = section(config).and_then(|s| s.get("quant_method")).and_then(Value::as_str);
    matches!(method, Some("compressed-tensors" | crate::export::native::METHOD))
}

/// What a config says of matrices that compressed-tensors packs: its own section, or that part of a native one.
pub fn streams(config: &Value) -> Option<&Value> {
    let section = section(config)?;
    if section.get("quant_method").and_then(Value::as_str) == Some(crate::export::native::METHOD) {
        return section.get("linear");
    }
    Some(section)
}

fn section(config: &Value) -> Option<&Value> {
    config.get("quantization_config").or_else(|| config.get("compression_config"))
}

/// How one matrix is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// Bits a code.
    pub bits: u8,
    /// Inputs a scale.
    pub group: Group,
    /// Stored type of the scales.
    pub scale: ScaleType,
    /// Whether integer zeros are stored.
    pub zeros: ZeroPoints,
    /// Bytes of codes, scales and zeros.
    pub bytes: u64,
    /// Its place in an arena, if it lies in one.
    place: Option<Place>,
}

/// Whether integer zero points are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroPoints {
    /// The middle code is zero.
    Symmetric,
    /// One a group.
    Stored,
    /// Zero lies between the two middle codes.
    Half,
    /// A real offset a group.
    Offset,
}

/// A compressed-tensors or native checkpoint seen through its family.
pub struct Packed {
    checkpoint: Checkpoint,
    spec: Spec,
    layout: Layout,
    matrices: BTreeMap<String, Stored>,
    arenas: BTreeMap<String, Arena>,
    /// What dropped experts put out, by layer and expert.
    constants: BTreeMap<(usize, usize), Constant>,
    rounding: ExpertRounding,
}

impl Packed {
    /// Reads the config's groups and holds every packed tensor to them.
    ///
    /// # Errors
    ///
    /// [`Error::Packed`] naming what cannot be read; what the family refuses.
    pub fn new(checkpoint: Checkpoint, rounding: ExpertRounding) -> Result<Self> {
        let resolved = resolve(checkpoint.config())?;
        let schemes = Schemes::read(&checkpoint)?;
        let mut matrices = BTreeMap::new();
        let Held { arenas, matrices: in_arenas, constants, gone, means } = arenas::read(&checkpoint, &resolved)?;
        let mut logical: Vec<(String, Vec<usize>)> = in_arenas.iter().map(|(name, stored)| (name.clone(), stored.shape.to_vec())).collect();
        logical.extend(gone);
        matrices.extend(in_arenas);
        for (name, shape) in checkpoint.logical() {
            match name.rsplit_once('.') {
                Some((module, "weight_packed")) => {
                    let stored = stored(&checkpoint, module, &schemes)?;
                    logical.push((format!("{module}.weight"), stored.shape.to_vec()));
                    matrices.insert(format!("{module}.weight"), stored);
                }
                Some((module, "weight_scale" | "weight_shape" | "weight_zero_point"))
                    if checkpoint.info(&format!("{module}.weight_packed")).is_some() => {}
                Some((module, "arena" | "table")) if arenas.contains_key(module) => {}
                _ if means.contains(&name) => {}
                Some((_, "weight_g_idx")) => return Err(wrong(&checkpoint, format!("{name}: stored activation orders are not read"))),
                _ => logical.push((name, shape)),
            }
        }
        let layout = Layout::claim(resolved.family, &resolved.spec, &logical)?;
        Ok(Self { checkpoint, spec: resolved.spec, layout, matrices, arenas, constants, rounding })
    }

    /// The checkpoint behind it.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Roles by logical name, as if nothing were packed.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The packed matrices by logical name (`….weight`).
    pub fn matrices(&self) -> impl Iterator<Item = (&str, &Stored)> {
        self.matrices.iter().map(|(name, stored)| (name.as_str(), stored))
    }

    /// What dropped experts put out, by layer and expert.
    pub fn constants(&self) -> &BTreeMap<(usize, usize), Constant> {
        &self.constants
    }

    /// What is packed, by kind of tensor: widths, weights and bytes.
    pub fn widths(&self) -> BTreeMap<Kind, Widths> {
        let mut found: BTreeMap<Kind, Widths> = BTreeMap::new();
        for (name, stored) in &self.matrices {
            let Some(role) = self.layout.role(name) else { continue };
            let kind = found.entry(role.kind()).or_default();
            kind.bits.insert(stored.bits);
            kind.weights += stored.shape.iter().product::<usize>() as u64;
            kind.bytes += stored.bytes;
        }
        found
    }

    /// Codes, scales and zeros of one matrix, by logical name; `None` if it is not packed.
    ///
    /// # Errors
    ///
    /// An IO error; [`Error::Matrix`] if the parts do not hold together.
    pub fn quantized(&self, name: &str) -> Result<Option<QuantizedMatrix>> {
        let Some(stored) = self.matrices.get(name) else { return Ok(None) };
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let matrix_error = |source| Error::Matrix { name: name.to_owned(), source };
        if let Some(place) = &stored.place {
            let mut matrices = self.in_arena(place).and_then(|packed| packed.unpack()).map_err(matrix_error)?;
            return Ok((place.which < matrices.len()).then(|| matrices.swap_remove(place.which)));
        }
        let [outputs, inputs] = stored.shape;
        let words = |part: &str| Ok::<_, Error>(words(self.checkpoint.bytes(&format!("{module}.{part}"))?));
        let scales = self.checkpoint.floats(&format!("{module}.weight_scale"))?;
        let groups = inputs / stored.group.len(inputs).max(1);
        let zeros = match stored.zeros {
            ZeroPoints::Symmetric => Zeros::Sym,
            _ => {
                let words = words("weight_zero_point")?;
                Zeros::Asym(pack::unpack_columns(&words, [outputs, groups], stored.bits).map_err(matrix_error)?)
            }
        };
        let codes = pack::unpack_rows(&words("weight_packed")?, stored.shape, stored.bits).map_err(matrix_error)?;
        let (bits, group, scale_type) = (stored.bits, stored.group, stored.scale);
        let matrix = QuantizedMatrix { outputs, inputs, bits, group, scale_type, codes, scales, zeros };
        matrix.check().map_err(matrix_error)?;
        Ok(Some(matrix))
    }

    /// A packed expert, or a matrix that is alone in an arena.
    fn in_arena(&self, place: &Place) -> kernels::Result<kernels::layout::Packed> {
        let missing = |what: String| kernels::Error::Table { what };
        let arena = self.arenas.get(&place.arena).ok_or_else(|| missing(format!("there is no arena {}", place.arena)))?;
        let bytes = self.checkpoint.bytes(&format!("{}.arena", place.arena)).map_err(|error| missing(error.to_string()))?;
        arena.take(bytes, place.expert)
    }

    fn name(&self, role: Role) -> calib::Result<&str> {
        let missing = || calib::Error::NoSuchRole { role, model_type: self.spec.model_type.clone() };
        self.layout.name(role).ok_or_else(missing)
    }
}

impl Weights for Packed {
    fn spec(&self) -> &Spec {
        &self.spec
    }

    fn matrix(&self, role: Role) -> calib::Result<Array2<f32>> {
        let name = self.name(role)?;
        if let Role::Layer(layer, Part::Expert(expert, _)) = role
            && self.constants.contains_key(&(layer, expert))
        {
            let error = wrong(&self.checkpoint, format!("{name}: its expert is dropped and puts out a constant; it has no matrices"));
            return Err(calib::Error::Tap(Box::new(error)));
        }
        let matrix = self.quantized(name).map_err(|error| calib::Error::Tap(Box::new(error)))?;
        let Some(matrix) = matrix else { return self.checkpoint.matrix(name) };
        let routed = matches!(role, Role::Layer(_, Part::Expert(..)));
        Ok(match (routed, self.rounding) {
            (true, ExpertRounding::Bf16) => matrix.dequantize_as(Product::Bf16),
            _ => matrix.dequantize(),
        })
    }

    fn vector(&self, role: Role) -> calib::Result<Array1<f32>> {
        self.checkpoint.vector(self.name(role)?)
    }

    fn applied(&self, layer: usize, expert: usize) -> calib::Result<Option<Box<dyn Applied>>> {
        if let Some(constant) = self.constants.get(&(layer, expert)) {
            return Ok(Some(Box::new(constant.clone())));
        }
        if self.rounding == ExpertRounding::Bf16 {
            return Ok(None);
        }
        let found = self.expert(layer, expert).map_err(|error| calib::Error::Tap(Box::new(error)))?;
        Ok(found.map(|expert| Box::new(expert) as Box<dyn Applied>))
    }
}

/// Packed matrices of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Widths {
    /// Every width that occurs.
    pub bits: BTreeSet<u8>,
    /// Weights.
    pub weights: u64,
    /// Bytes stored for them: codes, scales, zeros.
    pub bytes: u64,
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect()
}

fn wrong(checkpoint: &Checkpoint, what: String) -> Error {
    Error::Packed { dir: checkpoint.dir().to_owned(), what }
}

/// One packed matrix, its shapes held to what its group says.
fn stored(checkpoint: &Checkpoint, module: &str, schemes: &Schemes) -> Result<Stored> {
    let part = |part: &str| {
        let name = format!("{module}.{part}");
        checkpoint.info(&name).ok_or_else(|| wrong(checkpoint, format!("{name} is missing beside {module}.weight_packed")))
    };
    let scheme = schemes.of(module).ok_or_else(|| wrong(checkpoint, format!("{module} is packed, but no config group matches it")))?;
    let shape = weight_shape(checkpoint, module)?;
    let [outputs, inputs] = shape;
    let (packed, scale) = (part("weight_packed")?, part("weight_scale")?);
    let (bits, group) = (scheme.num_bits, scheme.group(module, checkpoint)?);
    let dense = pack::words(inputs, bits);
    if packed.shape != [outputs, dense] {
        let padded = inputs.div_ceil(32 / usize::from(bits.max(1)));
        let what = if packed.shape == [outputs, padded] {
            format!(
                "{module} holds {bits} bits in {padded} words a row, as compressed-tensors 0.17 padded them; \
                 only the dense packing ({dense} words) of 0.18 and later is read: pack it again with a newer version"
            )
        } else {
            format!(
                "{module}.weight_packed is {:?}, but {outputs} rows of {inputs} codes of {bits} bits take {dense} words each",
                packed.shape
            )
        };
        return Err(wrong(checkpoint, what));
    }
    let length = group.len(inputs);
    if length == 0 || inputs % length != 0 || scale.shape != [outputs, inputs / length] {
        let what = format!("{module}.weight_scale is {:?}, which are no groups of {length} in {outputs} rows of {inputs}", scale.shape);
        return Err(wrong(checkpoint, what));
    }
    let mut bytes = packed.bytes.end - packed.bytes.start + scale.bytes.end - scale.bytes.start;
    let zeros = if scheme.symmetric {
        ZeroPoints::Symmetric
    } else {
        let zeros = part("weight_zero_point")?;
        if zeros.shape != [pack::words(outputs, bits), inputs / length] {
            return Err(wrong(checkpoint, format!("{module}.weight_zero_point is {:?}, which does not fit its scales", zeros.shape)));
        }
        bytes += zeros.bytes.end - zeros.bytes.start;
        ZeroPoints::Stored
    };
    Ok(Stored { shape, bits, group, scale: scale_type(checkpoint, scale.dtype, module)?, zeros, bytes, place: None })
}

fn scale_type(checkpoint: &Checkpoint, dtype: Dtype, module: &str) -> Result<ScaleType> {
    match dtype {
        Dtype::Bf16 => Ok(ScaleType::Bf16),
        Dtype::F16 => Ok(ScaleType::F16),
        Dtype::F32 => Ok(ScaleType::F32),
        other => Err(wrong(checkpoint, format!("{module}.weight_scale has the type {}, which is not read", other.name()))),
    }
}

fn weight_shape(checkpoint: &Checkpoint, module: &str) -> Result<[usize; 2]> {
    let bytes = checkpoint.bytes(&format!("{module}.weight_shape"))?;
    let numbers: Vec<i64> = bytes.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b)).collect();
    let sizes: Option<Vec<usize>> = numbers.iter().map(|&n| usize::try_from(n).ok()).collect();
    sizes
        .and_then(|sizes| <[usize; 2]>::try_from(sizes).ok())
        .ok_or_else(|| wrong(checkpoint, format!("{module}.weight_shape is {numbers:?}, not two sizes")))
}

#[cfg(test)]
mod tests {
    use calib::checkpoint::{Declared, Writer};
    use serde_json::json;

    use super::*;

    /// Tensors with their bytes, before they are written.
    type Tensors = Vec<(Declared, Vec<u8>)>;

    /// A qwen3_moe checkpoint of one layer and two experts, 32 wide; every matrix of the layer is packed at `bits` in groups of 16 but for
    /// `change`, which may edit the config and the tensors.
    fn checkpoint(dir: &Path, bits: u8, change: impl Fn(&mut Value, &mut Tensors)) {
        let mut config = json!({
            "model_type": "qwen3_moe", "hidden_size": 32, "moe_intermediate_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_experts": 2, "num_experts_per_tok": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 8,
            "rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_act": "silu", "max_position_embeddings": 64, "tie_word_embeddings": true,
            "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": false, "attention_bias": false,
            "quantization_config": {
                "quant_method": "compressed-tensors", "format": "pack-quantized",
                "config_groups": { "group_0": {
                    "targets": ["Linear"],
                    "weights": { "num_bits": bits, "type": "int", "symmetric": true, "strategy": "group", "group_size": 16 },
                } },
                "ignore": ["lm_head", "re:.*mlp.gate$"],
            },
        });
        let mut tensors = Vec::new();
        let plain = [
            ("model.embed_tokens.weight", vec![8, 32]),
            ("model.norm.weight", vec![32]),
            ("model.layers.0.input_layernorm.weight", vec![32]),
            ("model.layers.0.post_attention_layernorm.weight", vec![32]),
            ("model.layers.0.self_attn.q_norm.weight", vec![16]),
            ("model.layers.0.self_attn.k_norm.weight", vec![16]),
            ("model.layers.0.mlp.gate.weight", vec![2, 32]),
        ];
        for (name, shape) in plain {
            tensors.push(floats(name, &shape, 1.0));
        }
        let attention = ["q", "k", "v", "o"].map(|p| format!("model.layers.0.self_attn.{p}_proj"));
        let experts = (0..2).flat_map(|e| ["gate", "up", "down"].map(|p| format!("model.layers.0.mlp.experts.{e}.{p}_proj")));
        for module in attention.into_iter().chain(experts) {
            tensors.extend(packed(&module, bits));
        }
        change(&mut config, &mut tensors);
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let declared = tensors.iter().map(|(declared, _)| declared.clone()).collect();
        let mut writer = Writer::create(dir, declared, u64::MAX, metadata).unwrap();
        tensors.iter().for_each(|(declared, bytes)| writer.put(&declared.name, bytes).unwrap());
        writer.finish().unwrap();
        fs_err::write(dir.join("config.json"), config.to_string()).unwrap();
    }

    fn floats(name: &str, shape: &[usize], value: f32) -> (Declared, Vec<u8>) {
        let bytes = (0..shape.iter().product::<usize>()).flat_map(|_| half::bf16::from_f32(value).to_le_bytes()).collect();
        (Declared { name: name.to_owned(), dtype: Dtype::Bf16, shape: shape.to_vec() }, bytes)
    }

    /// A matrix of `[32, 32]` whose code at `(row, column)` is `row + column`, cut to its bits; all scales are ½.
    fn packed(module: &str, bits: u8) -> Tensors {
        let codes: Vec<u8> = (0..32 * 32_usize).map(|i| ((i / 32 + i % 32) as u8) & (u8::MAX >> (8 - bits))).collect();
        let words = pack::pack_rows(&codes, [32, 32], bits).unwrap();
        let part = |what: &str, dtype, shape: &[usize]| Declared { name: format!("{module}.weight_{what}"), dtype, shape: shape.to_vec() };
        vec![
            (part("packed", Dtype::I32, &[32, usize::from(bits)]), words.iter().flat_map(|w| w.to_le_bytes()).collect()),
            floats(&format!("{module}.weight_scale"), &[32, 2], 0.5),
            (part("shape", Dtype::I64, &[2]), [32_i64; 2].iter().flat_map(|n| n.to_le_bytes()).collect()),
        ]
    }

    fn read(bits: u8, change: impl Fn(&mut Value, &mut Tensors)) -> Result<Packed> {
        let dir = tempfile::tempdir().unwrap();
        checkpoint(dir.path(), bits, change);
        Packed::new(Checkpoint::open(dir.path()).unwrap(), ExpertRounding::None)
    }

    #[test]
    fn a_class_target_means_everything_packed() {
        let packed = read(3, |_, _| {}).unwrap();
        let q = packed.matrix(Role::Layer(0, Part::Query)).unwrap();
        // Row 2, column 7: (9 mod 8 − 4) · ½.
        assert_eq!(q[(2, 7)], -1.5);
        assert_eq!(q[(0, 31)], (31 % 8 - 4) as f32 * 0.5);
        let attention = &packed.widths()[&Kind::Attention];
        // 32 rows of 3 words and 2 scales, four times.
        assert_eq!((attention.weights, attention.bytes), (4 * 1024, 4 * 32 * (3 * 4 + 2 * 2)));
        assert_eq!(packed.vector(Role::FinalNorm).unwrap()[0], 1.0);
        assert_eq!(packed.matrix(Role::Layer(0, Part::Router)).unwrap().dim(), (2, 32));
    }

    #[test]
    fn a_name_wins_over_an_expression_and_that_over_a_class() {
        let groups = json!({
            "a": { "targets": ["Linear"], "weights": { "num_bits": 2, "strategy": "group", "group_size": 16 } },
            "b": { "targets": ["re:.*proj"], "weights": { "num_bits": 2, "strategy": "group", "group_size": 16 } },
            "c": { "targets": ["model.layers.0.self_attn.q_proj"], "weights": { "num_bits": 5, "strategy": "group", "group_size": 16 } },
        });
        let packed = read(2, |config, tensors| {
            config["quantization_config"]["config_groups"] = groups.clone();
            tensors.retain(|(declared, _)| !declared.name.contains("q_proj"));
            tensors.extend(super::tests::packed("model.layers.0.self_attn.q_proj", 5));
        });
        let packed = packed.unwrap();
        let bits: BTreeSet<u8> = packed.matrices().map(|(_, stored)| stored.bits).collect();
        assert_eq!(bits, BTreeSet::from([2, 5]));
    }

    #[test]
    fn what_is_not_read_is_refused_by_name() {
        let refused = |bits, words: &str, change: &dyn Fn(&mut Value, &mut Tensors)| {
            let said = read(bits, change).err().unwrap().to_string();
            assert!(said.contains(words), "{said}");
        };
        let reshape = |suffix: &'static str, shape: [usize; 2], bytes: usize| {
            move |_: &mut Value, tensors: &mut Tensors| {
                let (declared, data) = tensors.iter_mut().find(|(d, _)| d.name.ends_with(suffix)).unwrap();
                (declared.shape, *data) = (shape.to_vec(), vec![0; bytes]);
            }
        };
        // Ten codes of 3 bits a word: 4 words for 32 codes instead of 3.
        refused(
            3,
            "q_proj holds 3 bits in 4 words a row, as compressed-tensors 0.17 padded them",
            &reshape("q_proj.weight_packed", [32, 4], 512),
        );
        refused(4, "32 rows of 32 codes of 4 bits take 4 words each", &reshape("q_proj.weight_packed", [32, 5], 640));
        refused(4, "no groups of 16", &reshape("v_proj.weight_scale", [32, 4], 256));
        let config = |key: &'static str, value: Value| {
            move |config: &mut Value, _: &mut Tensors| {
                config["quantization_config"]["config_groups"]["group_0"][key] = value.clone();
            }
        };
        refused(4, "group_0 is int-quantized", &config("format", json!("int-quantized")));
        refused(4, "quantizes activations", &config("input_activations", json!({ "num_bits": 8 })));
        refused(4, "no config group matches it", &config("targets", json!(["re:.*nothing"])));
        refused(4, "the target re:( is not read", &config("targets", json!(["re:("])));
        let weights = |key: &str, value: Value| {
            let mut weights = json!({ "num_bits": 4, "symmetric": true, "strategy": "group", "group_size": 16 });
            weights[key] = value;
            config("weights", weights)
        };
        refused(4, "\"group\" is not read", &weights("actorder", json!("group")));
        refused(4, "the strategy Some(\"block\")", &weights("strategy", json!("block")));
        refused(4, "weight_zero_point is missing", &weights("symmetric", json!(false)));
        refused(4, "q_proj.weight_scale is missing", &|_, tensors| tensors.retain(|(d, _)| !d.name.ends_with("q_proj.weight_scale")));
        refused(4, "weight_g_idx: stored activation orders", &|_, tensors| {
            let declared = Declared { name: "model.layers.0.self_attn.q_proj.weight_g_idx".into(), dtype: Dtype::I32, shape: vec![32] };
            tensors.push((declared, vec![0; 128]));
        });
    }
}
