//! A compressed-tensors checkpoint as a model that runs: weights are unpacked and dequantized when they are asked for.
//!
//! Read are `pack-quantized` checkpoints, ours and others': `config_groups` by exact names, `re:` expressions and the class `Linear`, in
//! compressed-tensors' own order of precedence. Other formats, activation orders stored as `weight_g_idx`, and the padded packing of
//! compressed-tensors 0.17 at 3, 5, 6 and 7 bits are refused by name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use calib::arch::{Kind, Layout, Part, Role, Spec, resolve};
use calib::checkpoint::Checkpoint;
use calib::tensor::Dtype;
use calib::{Model, Weights};
use kernels::dequant::Product;
use kernels::{Group, QuantizedMatrix, ScaleType, Zeros, pack};
use ndarray::{Array1, Array2};
use regex::Regex;
use serde::Deserialize;
use serde_json::Value;

use crate::{Error, Result};

/// How the weights of routed experts are rounded when they are dequantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertRounding {
    /// Not at all: `(u − z) · s` in f32.
    None,
    /// To bf16, as transformers 5 does whatever dtype it is asked for.
    Bf16,
}

/// Opens a model to run: a plain checkpoint, or a compressed-tensors one.
///
/// # Errors
///
/// Whatever opening a checkpoint brings up; [`Error::Packed`] if it is compressed in a way that cannot be read.
pub fn open(dir: &Path, rounding: ExpertRounding) -> Result<Box<dyn Weights>> {
    let checkpoint = Checkpoint::open(dir)?;
    if is_packed(checkpoint.config()) {
        return Ok(Box::new(Packed::new(checkpoint, rounding)?));
    }
    Ok(Box::new(Model::from_checkpoint(checkpoint)?))
}

/// Whether a config says compressed-tensors.
pub fn is_packed(config: &Value) -> bool {
    section(config).and_then(|s| s.get("quant_method")).and_then(Value::as_str) == Some("compressed-tensors")
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
}

/// Whether integer zero points are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroPoints {
    /// The middle code is zero.
    Symmetric,
    /// One a group.
    Stored,
}

/// A compressed-tensors checkpoint seen through its family.
pub struct Packed {
    checkpoint: Checkpoint,
    spec: Spec,
    layout: Layout,
    matrices: BTreeMap<String, Stored>,
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
        let mut logical = Vec::new();
        for (name, shape) in checkpoint.logical() {
            match name.rsplit_once('.') {
                Some((module, "weight_packed")) => {
                    let stored = stored(&checkpoint, module, &schemes)?;
                    logical.push((format!("{module}.weight"), stored.shape.to_vec()));
                    matrices.insert(format!("{module}.weight"), stored);
                }
                Some((module, "weight_scale" | "weight_shape" | "weight_zero_point"))
                    if checkpoint.info(&format!("{module}.weight_packed")).is_some() => {}
                Some((_, "weight_g_idx")) => return Err(wrong(&checkpoint, format!("{name}: stored activation orders are not read"))),
                _ => logical.push((name, shape)),
            }
        }
        let layout = Layout::claim(resolved.family, &resolved.spec, &logical)?;
        Ok(Self { checkpoint, spec: resolved.spec, layout, matrices, rounding })
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
        let [outputs, inputs] = stored.shape;
        let words = |part: &str| Ok::<_, Error>(words(self.checkpoint.bytes(&format!("{module}.{part}"))?));
        let scales = self.checkpoint.floats(&format!("{module}.weight_scale"))?;
        let groups = inputs / stored.group.len(inputs).max(1);
        let zeros = match stored.zeros {
            ZeroPoints::Symmetric => Zeros::Sym,
            ZeroPoints::Stored => {
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
    Ok(Stored { shape, bits, group, scale: scale_type(checkpoint, scale.dtype, module)?, zeros, bytes })
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

/// `config_groups` and `ignore`, ready to be matched.
struct Schemes {
    /// Exact names, expressions, classes: in this order they win.
    exact: Vec<(String, usize)>,
    expressions: Vec<(Regex, usize)>,
    class: Option<usize>,
    weights: Vec<WeightArguments>,
}

#[derive(Clone, Debug, Deserialize)]
struct WeightArguments {
    num_bits: u8,
    #[serde(rename = "type", default = "int")]
    kind: String,
    #[serde(default = "yes")]
    symmetric: bool,
    strategy: Option<String>,
    group_size: Option<i64>,
    actorder: Option<String>,
}

fn int() -> String {
    "int".to_owned()
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
struct Section {
    #[serde(default)]
    format: Option<String>,
    config_groups: BTreeMap<String, ConfigGroup>,
}

#[derive(Deserialize)]
struct ConfigGroup {
    targets: Vec<String>,
    weights: Option<WeightArguments>,
    #[serde(default)]
    format: Option<String>,
    #[serde(default)]
    input_activations: Option<Value>,
}

impl WeightArguments {
    fn group(&self, module: &str, checkpoint: &Checkpoint) -> Result<Group> {
        let size = self.group_size.filter(|&size| size > 0).and_then(|size| usize::try_from(size).ok());
        match (self.strategy.as_deref(), size) {
            (Some("group") | None, Some(size)) => Ok(Group::Size(size)),
            (Some("channel") | None, _) => Ok(Group::PerChannel),
            (strategy, _) => Err(wrong(checkpoint, format!("{module}: the strategy {strategy:?} with group size {size:?} is not read"))),
        }
    }
}

impl Schemes {
    fn read(checkpoint: &Checkpoint) -> Result<Self> {
        let refuse = |what: String| wrong(checkpoint, what);
        let section = section(checkpoint.config()).cloned().unwrap_or_default();
        let section: Section = serde_json::from_value(section).map_err(|error| refuse(format!("quantization_config: {error}")))?;
        let mut found = Self { exact: Vec::new(), expressions: Vec::new(), class: None, weights: Vec::new() };
        for (name, group) in section.config_groups {
            let format = group.format.or_else(|| section.format.clone()).unwrap_or_else(|| "pack-quantized".to_owned());
            let Some(weights) = group.weights else { return Err(refuse(format!("{name} quantizes no weights"))) };
            if format != "pack-quantized" || weights.kind != "int" || !(1..=8).contains(&weights.num_bits) {
                let what = format!(
                    "{name} is {format} of {} {} bits; only pack-quantized of 1 to 8 int bits is read",
                    weights.kind, weights.num_bits
                );
                return Err(refuse(what));
            }
            if group.input_activations.is_some_and(|a| !a.is_null()) {
                return Err(refuse(format!("{name} quantizes activations, which is not read")));
            }
            if let Some(order) = weights.actorder.as_deref().filter(|order| !["weight", "static"].contains(order)) {
                return Err(refuse(format!("{name}: the activation order {order:?} is not read")));
            }
            for target in group.targets {
                let index = found.weights.len();
                match target.strip_prefix("re:") {
                    // Python's `re.match` is anchored at the start only.
                    Some(expression) => {
                        let compiled = Regex::new(&format!("^(?:{expression})"));
                        let compiled = compiled.map_err(|error| refuse(format!("{name}: the target {target} is not read: {error}")))?;
                        found.expressions.push((compiled, index));
                    }
                    None if target == "Linear" => found.class = found.class.or(Some(index)),
                    None => found.exact.push((target, index)),
                }
            }
            found.weights.push(weights);
        }
        Ok(found)
    }

    fn of(&self, module: &str) -> Option<&WeightArguments> {
        let exact = self.exact.iter().find(|(name, _)| name == module).map(|(_, index)| *index);
        let expression = || self.expressions.iter().find(|(regex, _)| regex.is_match(module)).map(|(_, index)| *index);
        exact.or_else(expression).or(self.class).map(|index| &self.weights[index])
    }
}
