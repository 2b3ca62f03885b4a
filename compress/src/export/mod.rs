//! Formats that a compressed model is written in.
//!
//! An exporter says which tensors its format has ([`Format`]); [`write`] streams them into a folder of their own, holds the result to
//! the list of checks in [`validate`], and only then gives it its place: the first format of the fixed order at the top of the
//! output directory, every further one in a folder of its name. `config.json` arrives last, so that no loader ever sees half a
//! model.
//!
//! Exporters know nothing of plans: [`Contents`] lists what there is to write, [`Source`] hands it out, one tensor at a time.

pub mod compiled;
pub mod compressed_tensors;
pub mod config;
pub mod dense;
pub mod native;
mod notes;
mod place;
pub mod targets;
pub mod validate;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use calib::arch::{Kind, Role};
use calib::checkpoint::{self, Writer};
use calib::progress::Progress;
use calib::tensor::Dtype;
use kernels::{Group, QuantizedMatrix, ScaleType};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use compiled::{Arch, Kernels};
pub use place::claim;

use crate::{Error, Result};

/// Largest shard, in bytes.
const SHARD_BYTES: u64 = 5_000_000_000;

/// Every format's name, in the fixed order.
pub const NAMES: [&str; 3] = ["compressed_tensors", "native", "dense"];

/// The formats to write, each with its knobs. The first of the order below lies at the top of the output directory, every
/// further one in a folder of its name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Exports {
    /// Packed codes and scales as vLLM, SGLang and transformers load them (`pack-quantized`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compressed_tensors: Option<CompressedTensors>,
    /// Routed experts of any mixture of widths in the layout of this project's own kernels, the rest as compressed-tensors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub native: Option<Native>,
    /// Kernels for the native output, written into its folder `kernels` as `moepress emit` does; wants `native`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernels: Option<Kernels>,
    /// The same weights dequantized to bf16 under their original names: loads everywhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dense: Option<Dense>,
}

/// Knobs of the compressed-tensors export: none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CompressedTensors {}

/// Knobs of the native export: none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Native {}

/// Knobs of the dense export: none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Dense {}

impl Exports {
    /// The formats asked for, in the fixed order: the first one lies at the top of the output directory.
    pub fn formats(&self) -> Vec<&dyn Format> {
        let mut found: Vec<&dyn Format> = Vec::new();
        found.extend(self.compressed_tensors.as_ref().map(|f| f as &dyn Format));
        found.extend(self.native.as_ref().map(|f| f as &dyn Format));
        found.extend(self.dense.as_ref().map(|f| f as &dyn Format));
        found
    }

    /// Where zero may lie in matrices that every format asked for holds.
    pub fn zeros(&self) -> Vec<Zero> {
        let formats = self.formats();
        Zero::ALL.into_iter().filter(|zero| formats.iter().all(|format| format.zeros().contains(zero))).collect()
    }
}

/// Where zero lies between the codes of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Zero {
    /// In the middle code, `2^(bits−1)`.
    Symmetric,
    /// Between the two middle codes.
    Half,
    /// An integer a group.
    Integer,
    /// A real number a group.
    Real,
}

impl Zero {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Symmetric, Self::Half, Self::Integer, Self::Real];
}

/// How a matrix is quantized, as far as formats care.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Scheme {
    /// Bits a code.
    pub bits: u8,
    /// Inputs a scale.
    pub group: Group,
    /// Where zero lies.
    pub zero: Zero,
    /// Stored type of the scales.
    pub scale: ScaleType,
}

/// What becomes of one tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// Carried over, in this type.
    Kept(Dtype),
    /// Quantized.
    Quantized(Scheme),
    /// A matrix of a routed expert that is dropped.
    Constant(Constant),
}

/// What a dropped expert puts out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Constant {
    /// Nothing.
    Zero,
    /// Its mean output, in this type.
    Mean(Dtype),
}

/// One tensor of the model, under its original name.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// The checkpoint's name, `….weight` for matrices.
    pub name: String,
    /// Original shape.
    pub shape: Vec<usize>,
    /// What it is to the model.
    pub role: Role,
    /// What becomes of it.
    pub form: Form,
}

impl Tensor {
    /// The module that holds it: the name without its last part.
    pub fn module(&self) -> &str {
        self.name.rsplit_once('.').map_or(self.name.as_str(), |(module, _)| module)
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        self.role.kind()
    }

    /// The scheme, if it is quantized.
    pub fn scheme(&self) -> Option<Scheme> {
        match self.form {
            Form::Quantized(scheme) => Some(scheme),
            Form::Kept(_) | Form::Constant(_) => None,
        }
    }

    /// What its expert puts out, if that is dropped.
    pub fn constant(&self) -> Option<Constant> {
        match self.form {
            Form::Constant(constant) => Some(constant),
            Form::Kept(_) | Form::Quantized(_) => None,
        }
    }

    /// `[out, in]` of a matrix.
    ///
    /// # Errors
    ///
    /// [`Error::NotAMatrix`] for any other number of axes.
    pub fn matrix_shape(&self) -> Result<[usize; 2]> {
        <[usize; 2]>::try_from(self.shape.as_slice()).map_err(|_| Error::NotAMatrix { name: self.name.clone(), shape: self.shape.clone() })
    }
}

/// Hands out what is to be written, one tensor at a time.
pub trait Source: Sync {
    /// The bytes of a tensor that is carried over, in the type that [`Contents`] gives it.
    ///
    /// # Errors
    ///
    /// Whatever reading it brings up.
    fn kept(&self, name: &str) -> Result<Cow<'_, [u8]>>;

    /// Codes, scales and zeros of a quantized matrix.
    ///
    /// # Errors
    ///
    /// Whatever reading it brings up.
    fn quantized(&self, name: &str) -> Result<QuantizedMatrix>;

    /// The mean output of the dropped expert whose down projection has this name, `[hidden]`.
    ///
    /// # Errors
    ///
    /// Whatever reading it brings up.
    fn mean(&self, name: &str) -> Result<Vec<f32>>;
}

/// A compressed model in no format yet.
pub struct Contents<'a> {
    /// The source's `config.json`, as it stands.
    pub config: String,
    /// Files that are copied beside the weights: tokenizer, generation config, chat template, code.
    pub files: Vec<PathBuf>,
    /// Every tensor that the output holds, by name.
    pub tensors: Vec<Tensor>,
    /// Where they come from.
    pub source: &'a dyn Source,
}

/// A tensor of a format, with the bytes that the exporter made for it.
pub type Part = (String, Vec<u8>);

/// One format.
pub trait Format: Sync {
    /// Its key in a recipe, and the folder of its output.
    fn name(&self) -> &'static str;

    /// Where zero may lie in the matrices that it holds.
    fn zeros(&self) -> &'static [Zero] {
        &Zero::ALL
    }

    /// Everything in these contents that the format cannot hold, by name; empty if it can hold all of it.
    fn refusals(&self, tensors: &[Tensor]) -> Vec<String>;

    /// Which runtimes will not load the output, or load it wrongly, and why.
    fn notes(&self, tensors: &[Tensor]) -> Vec<String>;

    /// The quantized matrices and those of dropped experts, those together that become tensors together.
    fn groups<'t>(&self, tensors: &'t [Tensor]) -> Vec<Vec<&'t Tensor>> {
        tensors.iter().filter(|tensor| tensor.scheme().is_some()).map(|tensor| vec![tensor]).collect()
    }

    /// The tensors that one group becomes.
    ///
    /// # Errors
    ///
    /// [`Error::NotAMatrix`]; what the format refuses.
    fn declare(&self, group: &[&Tensor]) -> Result<Vec<checkpoint::Declared>>;

    /// Their bytes, in any order.
    ///
    /// # Errors
    ///
    /// A matrix that contradicts itself; whatever reading one brings up.
    fn parts(&self, group: &[&Tensor], source: &dyn Source) -> Result<Vec<Part>>;

    /// The text of `config.json`.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if the source's is not an object.
    fn config(&self, contents: &Contents<'_>) -> Result<String>;
}

/// One output that was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Written {
    /// The format's name.
    pub format: &'static str,
    /// Where it lies.
    pub dir: PathBuf,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Tensors carried over.
    pub kept: usize,
    /// Matrices quantized.
    pub quantized: usize,
    /// Which runtimes will not load it, and why.
    pub notes: Vec<String>,
}

/// Everything in `tensors` that a format of `exports` cannot hold, by name: what can be known before any work is done.
pub fn refusals(exports: &Exports, tensors: &[Tensor]) -> Vec<String> {
    let mut found: Vec<String> = exports.formats().into_iter().flat_map(|format| format.refusals(tensors)).collect();
    if exports.kernels.is_some() {
        found.extend(native::without_kernels(tensors));
    }
    found
}

/// Writes every format asked for under `out`, each whole and checked before it gets its place.
///
/// Peak memory beside what `contents.source` holds: one matrix's codes and its bytes in the format (for `dense` also its values in f32); for `native` the arena
/// of one projection of a layer: all its experts' packed bytes.
///
/// # Errors
///
/// [`Error::NoExport`], [`Error::NotOurs`], [`Error::Refused`] before anything is written; [`Error::Invalid`] if a written folder does not
/// pass its checks; whatever reading and writing bring up.
pub fn write(contents: &Contents<'_>, exports: &Exports, out: &Path, progress: &dyn Progress) -> Result<Vec<Written>> {
    let formats = exports.formats();
    if formats.is_empty() {
        return Err(Error::NoExport);
    }
    let refusals = refusals(exports, &contents.tensors);
    if !refusals.is_empty() {
        return Err(Error::Refused { problems: refusals });
    }
    claim(out)?;
    let mut written = Vec::new();
    for (index, format) in formats.into_iter().enumerate() {
        let stage = place::stage(out, format.name())?;
        let bytes = fill(contents, format, &stage, progress)?;
        validate::check(contents, format, &stage)?;
        let dir = if index == 0 { place::at_top(&stage, out)? } else { place::beside(&stage, &out.join(format.name()))? };
        let quantized = contents.tensors.iter().filter(|t| t.scheme().is_some()).count();
        let kept = contents.tensors.iter().filter(|t| matches!(t.form, Form::Kept(_))).count();
        let notes = format.notes(&contents.tensors);
        written.push(Written { format: format.name(), dir, bytes, kept, quantized, notes });
    }
    Ok(written)
}

/// Streams one format into an empty folder; gives the bytes of its tensors.
fn fill(contents: &Contents<'_>, format: &dyn Format, stage: &Path, progress: &dyn Progress) -> Result<u64> {
    let mut declared = Vec::new();
    let groups = format.groups(&contents.tensors);
    for tensor in &contents.tensors {
        if let Form::Kept(dtype) = tensor.form {
            declared.push(checkpoint::Declared { name: tensor.name.clone(), dtype, shape: tensor.shape.clone() });
        }
    }
    for group in &groups {
        declared.extend(format.declare(group)?);
    }
    let bytes = declared.iter().map(|d| (d.shape.iter().product::<usize>() * d.dtype.size()) as u64).sum();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut writer = Writer::create(stage, declared, SHARD_BYTES, metadata)?;
    progress.start(format.name(), contents.tensors.len() as u64);
    for tensor in contents.tensors.iter().filter(|tensor| matches!(tensor.form, Form::Kept(_))) {
        writer.put(&tensor.name, &contents.source.kept(&tensor.name)?)?;
        progress.tick(1);
    }
    for group in &groups {
        for (name, bytes) in format.parts(group, contents.source)? {
            writer.put(&name, &bytes)?;
        }
        progress.tick(group.len() as u64);
    }
    writer.finish()?;
    for file in &contents.files {
        let Some(name) = file.file_name() else { continue };
        let folder = match file.parent().and_then(Path::file_name) {
            Some(folder) if folder == checkpoint::TEMPLATES => stage.join(folder),
            _ => stage.to_owned(),
        };
        fs_err::create_dir_all(&folder)?;
        // Not copied: a read-only source would make a read-only output.
        fs_err::write(folder.join(name), fs_err::read(file)?)?;
    }
    fs_err::write(stage.join("config.json"), format.config(contents)?)?;
    progress.finish();
    Ok(bytes)
}
