//! A Hugging Face checkpoint directory: `config.json` and tensors by name, memory-mapped, nothing read ahead.
//!
//! ```text
//! dir/config.json                      the config, whole
//! dir/model.safetensors                the tensors, or
//! dir/model.safetensors.index.json     which tensor lies in which
//! dir/model-0000i-of-0000n.safetensors shard
//! ```
//!
//! Opening reads the config, the index and the headers, and checks all that can be checked without values. Nothing is allocated by a
//! length that a file claims before that length was checked against the file. [`Writer`] writes such a directory.

use std::ops::Range;
use std::path::{Path, PathBuf};

use ndarray::{Array1, Array2};
use serde_json::Value;

use crate::tensor::{self, Dtype};
use crate::{Error, Result};

mod fingerprint;
mod fp8;
mod header;
mod index;
mod problem;
mod shard;
#[cfg(test)]
mod testing;
mod write;

pub use fingerprint::{Fingerprint, hash_bytes};
pub use problem::Problem;
pub use write::{Declared, SHARD_BYTES, Writer, free_bytes, write_shape_only};

use shard::Shard;

/// The metadata entry of a file that is a header without data.
const SHAPE_ONLY: (&str, &str) = ("moepress", "shape-only");

/// One stored tensor.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TensorInfo {
    /// Its name in the checkpoint.
    pub name: String,
    /// The type of its elements, as stored.
    pub dtype: Dtype,
    /// Its sides, slowest first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Which of the checkpoint's files holds it, by position in the order of their names.
    pub shard: usize,
    /// Where it lies in that file's data.
    pub bytes: Range<u64>,
}

/// Folder of further chat templates beside `chat_template.jinja`, one a file (transformers).
pub const TEMPLATES: &str = "additional_chat_templates";

/// A checkpoint directory, opened and checked.
pub struct Checkpoint {
    dir: PathBuf,
    config: Value,
    fingerprint: String,
    shards: Vec<Shard>,
    /// Sorted by name.
    tensors: Vec<TensorInfo>,
    /// Files to carry over into an output.
    files: Vec<PathBuf>,
}

impl Checkpoint {
    /// Opens a directory: reads its config and every header, and checks their structure. No value is read.
    ///
    /// # Errors
    ///
    /// [`Error::Io`], [`Error::Json`], or [`Error::Checkpoint`] with the first [`Problem`] found.
    pub fn open(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            return Err(Problem::NoDirectory.at(dir));
        }
        let path = dir.join("config.json");
        if !path.is_file() {
            return Err(Problem::NoConfig.at(dir));
        }
        let text = fs_err::read(&path)?;
        let config: Value = serde_json::from_slice(&text).map_err(|source| Error::Json { path: path.clone(), source })?;
        if !config.is_object() {
            return Err(Problem::ConfigNotObject.at(&path));
        }
        let (paths, index) = index::find(dir)?;
        let shards = paths.iter().map(|path| Shard::open(path)).collect::<Result<Vec<_>>>()?;
        if let Some(index) = index {
            index.check(&shards).map_err(|problem| problem.at(dir))?;
        }
        one_kind(&shards).map_err(|problem| problem.at(dir))?;
        let mut files: Vec<_> = index::file_names(dir)?.into_iter().filter(|name| carried(name)).map(|name| dir.join(name)).collect();
        let templates = dir.join(TEMPLATES);
        if templates.is_dir() {
            let jinja = index::file_names(&templates)?.into_iter().filter(|name| name.ends_with(".jinja"));
            files.extend(jinja.map(|name| templates.join(name)));
        }
        let fingerprint = fingerprint::of_checkpoint(&text, &shards);
        let checkpoint = Self { dir: dir.to_owned(), config, fingerprint, tensors: infos(&shards), shards, files };
        fp8::check(&checkpoint).map_err(|problem| problem.at(dir))?;
        Ok(checkpoint)
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The whole of config.json, an object.
    #[must_use]
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Every stored tensor, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.iter()
    }

    /// A stored tensor, if it is there.
    #[must_use]
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        let at = self.tensors.binary_search_by(|info| info.name.as_str().cmp(name)).ok()?;
        self.tensors.get(at)
    }

    /// Names and shapes as the model has them, sorted by name: the scales of an FP8 tensor are a part of it, not a tensor.
    #[must_use]
    pub fn logical(&self) -> Vec<(String, Vec<usize>)> {
        let own = self.tensors.iter().filter(|info| fp8::weight_of(self, &info.name).is_none());
        own.map(|info| (info.name.clone(), info.shape.clone())).collect()
    }

    /// Whether only headers are there, no values.
    #[must_use]
    pub fn is_shape_only(&self) -> bool {
        self.shards.iter().any(|shard| shard.header.shape_only)
    }

    /// SHA-256 over config, shard names and headers, in hex. The values take no part, and a shape-only copy has its original's.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The files beside config and weights that an output needs too: tokenizer, chat template, generation config, custom code,
    /// licence, sorted, and behind them the templates of the folder [`TEMPLATES`].
    #[must_use]
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The bytes of a tensor as stored, little-endian, of any alignment.
    ///
    /// # Errors
    ///
    /// [`Problem::NoSuchTensor`], or [`Problem::ShapeOnly`].
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let info = self.wanted(name)?;
        let shard = &self.shards[info.shard];
        shard.data(&info.bytes).ok_or_else(|| Problem::ShapeOnly { tensor: name.to_owned() }.at(&self.dir))
    }

    /// The values of a tensor of any float type, in f32, in the stored order; the block scales of FP8 are applied.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::bytes`]; [`Problem::NotFloat`]; [`Problem::NotFinite`] with the place of the first NaN or infinity; for FP8
    /// [`Problem::ScaleMissing`] and the other problems of scales.
    pub fn floats(&self, name: &str) -> Result<Vec<f32>> {
        let info = self.wanted(name)?;
        let not_float = || Problem::NotFloat { tensor: name.to_owned(), dtype: info.dtype }.at(&self.dir);
        let scales = fp8::scales(self, info).map_err(|problem| problem.at(&self.dir))?;
        let mut values = tensor::decode(info.dtype, self.bytes(name)?).ok_or_else(not_float)?;
        if let Some(scales) = scales {
            scales.apply(&mut values, self)?;
        }
        self.finite(info, &values)?;
        Ok(values)
    }

    /// A two-dimensional tensor, `[out, in]`, in f32.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::floats`]; [`Problem::Dimensions`].
    pub fn matrix(&self, name: &str) -> Result<Array2<f32>> {
        let info = self.wanted(name)?;
        let wrong = || Problem::Dimensions { tensor: name.to_owned(), shape: info.shape.clone(), wanted: 2 }.at(&self.dir);
        let &[rows, columns] = info.shape.as_slice() else { return Err(wrong()) };
        Array2::from_shape_vec((rows, columns), self.floats(name)?).map_err(|_| wrong())
    }

    /// A one-dimensional tensor, in f32.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::matrix`].
    pub fn vector(&self, name: &str) -> Result<Array1<f32>> {
        let info = self.wanted(name)?;
        if info.shape.len() != 1 {
            return Err(Problem::Dimensions { tensor: name.to_owned(), shape: info.shape.clone(), wanted: 1 }.at(&self.dir));
        }
        Ok(Array1::from_vec(self.floats(name)?))
    }

    fn wanted(&self, name: &str) -> Result<&TensorInfo> {
        self.info(name).ok_or_else(|| Problem::NoSuchTensor { tensor: name.to_owned() }.at(&self.dir))
    }

    /// Refuses values that are NaN or infinite.
    fn finite(&self, info: &TensorInfo, values: &[f32]) -> Result<()> {
        let Some(at) = tensor::first_not_finite(values) else { return Ok(()) };
        let mut rest = at;
        let mut index: Vec<usize> = info.shape.iter().rev().map(|&side| (rest % side, rest /= side).0).collect();
        index.reverse();
        Err(Problem::NotFinite { tensor: info.name.clone(), value: values[at], index }.at(&self.shards[info.shard].path))
    }
}

/// Checks that all shards have data, or none.
fn one_kind(shards: &[Shard]) -> Result<(), Problem> {
    let without = shards.iter().find(|shard| shard.header.shape_only);
    let with = shards.iter().find(|shard| !shard.header.shape_only);
    match (without, with) {
        (Some(without), Some(with)) => Err(Problem::MixedShapeOnly { shape_only: without.name(), whole: with.name() }),
        _ => Ok(()),
    }
}

/// All tensors, sorted by name.
fn infos(shards: &[Shard]) -> Vec<TensorInfo> {
    let of_shard = |(at, shard): (usize, &Shard)| {
        let info = move |entry: &header::Entry| {
            let header::Entry { name, dtype, shape, bytes } = entry.clone();
            TensorInfo { name, dtype, shape, shard: at, bytes }
        };
        shard.header.entries.iter().map(info).collect::<Vec<_>>()
    };
    let mut tensors: Vec<TensorInfo> = shards.iter().enumerate().flat_map(of_shard).collect();
    tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    tensors
}

/// Whether a file beside config and weights goes into an output too.
fn carried(name: &str) -> bool {
    const NAMES: [&str; 6] =
        ["generation_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"];
    const BEGINNINGS: [&str; 4] = ["tokenizer", "chat_template", "LICENSE", "NOTICE"];
    const ENDS: [&str; 3] = [".py", ".model", ".tiktoken"];
    NAMES.contains(&name) || BEGINNINGS.iter().any(|beginning| name.starts_with(beginning)) || ENDS.iter().any(|end| name.ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::testing::{dir, file, open, problem, vectors};
    use super::*;
    use crate::tensor::encode;

    #[test]
    fn values_of_any_alignment() {
        // One byte before the f32, and a header of odd length.
        let header = r#"{"odd":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"m":{"dtype":"F32","shape":[2,3],"data_offsets":[1,25]}}"#;
        let values = [1.0, -2.0, 3.5, 0.0, 5.0, -6.25];
        let data = [vec![7], encode(Dtype::F32, &values).unwrap()].concat();
        let (_dir, checkpoint) = open(&[("model.safetensors", &file(header, &data))]).unwrap();
        assert_eq!(checkpoint.matrix("m").unwrap(), ndarray::arr2(&[[1.0, -2.0, 3.5], [0.0, 5.0, -6.25]]));
        assert_eq!(checkpoint.bytes("odd").unwrap(), [7]);
        assert!(matches!(problem(checkpoint.floats("odd")), Problem::NotFloat { tensor, dtype: Dtype::U8 } if tensor == "odd"));
        assert!(matches!(problem(checkpoint.vector("m")), Problem::Dimensions { wanted: 1, .. }));
    }

    #[test]
    fn a_vector_is_no_matrix_and_an_absent_tensor_is_named() {
        let (_dir, checkpoint) = open(&[("model.safetensors", &vectors(&[("v", &[1.0, 2.0])]))]).unwrap();
        assert_eq!(checkpoint.vector("v").unwrap(), ndarray::arr1(&[1.0, 2.0]));
        assert!(matches!(problem(checkpoint.matrix("v")), Problem::Dimensions { wanted: 2, .. }));
        for result in [checkpoint.floats("w").map(|_| ()), checkpoint.bytes("w").map(|_| ()), checkpoint.matrix("w").map(|_| ())] {
            assert!(matches!(problem(result), Problem::NoSuchTensor { tensor } if tensor == "w"));
        }
    }

    #[test]
    fn nan_and_infinity_are_placed() {
        let header = r#"{"m":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}"#;
        for (value, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
            let data = encode(Dtype::Bf16, &[1.0, 2.0, 3.0, 4.0, 5.0, value]).unwrap();
            let (_dir, checkpoint) = open(&[("model.safetensors", &file(header, &data))]).unwrap();
            let found = problem(checkpoint.matrix("m"));
            assert!(found.to_string().starts_with(&format!("tensor m holds {shown} at index [1, 2]")), "{found}");
            assert!(matches!(found, Problem::NotFinite { tensor, index, .. } if tensor == "m" && index == [1, 2]));
        }
    }

    #[test]
    fn what_is_no_checkpoint() {
        let empty = tempfile::tempdir().unwrap();
        assert!(matches!(problem(Checkpoint::open(&empty.path().join("absent"))), Problem::NoDirectory));
        assert!(matches!(problem(Checkpoint::open(empty.path())), Problem::NoConfig));
        let weights = vectors(&[("a", &[1.0])]);
        assert!(matches!(problem(open(&[("config.json", b"[]"), ("model.safetensors", &weights)])), Problem::ConfigNotObject));
        let broken = open(&[("config.json", b"{"), ("model.safetensors", &weights)]);
        assert!(matches!(broken, Err(Error::Json { path, .. }) if path.ends_with("config.json")));
        // The file is no directory.
        let dir = dir(&[("model.safetensors", &weights)]);
        assert!(matches!(problem(Checkpoint::open(&dir.path().join("model.safetensors"))), Problem::NoDirectory));
    }

    #[test]
    fn damage_is_reported_with_its_file() {
        let whole = vectors(&[("a", &[1.0, 2.0])]);
        let error = open(&[("model.safetensors", &whole[..whole.len() - 1])]).err().unwrap().to_string();
        assert!(error.contains("model.safetensors: truncated: its header describes 8 bytes of data, 7 are there"), "{error}");
    }

    #[test]
    fn shards_with_and_without_data_do_not_mix() {
        let without = file(r#"{"__metadata__":{"moepress":"shape-only"},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, &[]);
        let index = testing::index(&[("a", "1.safetensors"), ("b", "2.safetensors")]);
        let files: [(&str, &[u8]); 3] =
            [("1.safetensors", &vectors(&[("a", &[1.0])])), ("2.safetensors", &without), ("model.safetensors.index.json", &index)];
        let found = problem(open(&files));
        assert!(
            matches!(found, Problem::MixedShapeOnly { shape_only, whole } if shape_only == "2.safetensors" && whole == "1.safetensors")
        );
    }

    #[test]
    fn the_fingerprint_sees_config_and_headers() {
        let print = |files: &[(&str, &[u8])]| open(files).unwrap().1.fingerprint().to_owned();
        let weights = vectors(&[("a", &[1.0])]);
        let first = print(&[("model.safetensors", &weights)]);
        assert_eq!(first.len(), 64);
        assert_eq!(first, print(&[("model.safetensors", &weights), ("tokenizer.json", b"{}")]));
        assert_ne!(first, print(&[("model.safetensors", &vectors(&[("b", &[1.0])]))]));
        assert_ne!(first, print(&[("model.safetensors", &vectors(&[("a", &[1.0, 2.0])]))]));
        assert_ne!(first, print(&[("model.safetensors", &weights), ("config.json", b"{ }")]));
        assert_ne!(first, print(&[("model-00001-of-00001.safetensors", &weights)]));
    }

    #[test]
    fn files_that_are_carried_over() {
        let carried =
            ["chat_template.jinja", "configuration_x.py", "generation_config.json", "merges.txt", "tokenizer.json", "tokenizer.model"];
        let left = ["README.md", "pytorch_model.bin", "x.safetensors", "config.json.bak", ".gitattributes"];
        let weights = vectors(&[("a", &[1.0])]);
        let mut files: Vec<(&str, &[u8])> = carried.iter().chain(&left).map(|name| (*name, &b"x"[..])).collect();
        files.push(("model.safetensors", &weights));
        let (dir, checkpoint) = open(&files).unwrap();
        let names = |checkpoint: &Checkpoint| -> Vec<String> {
            let below = |path: &PathBuf| path.strip_prefix(checkpoint.dir()).unwrap().to_str().unwrap().to_owned();
            checkpoint.files().iter().map(below).collect()
        };
        assert_eq!(names(&checkpoint), carried);
        let templates = dir.path().join(TEMPLATES);
        fs_err::create_dir(&templates).unwrap();
        for name in ["tool.jinja", "rag.jinja", "notes.txt"] {
            fs_err::write(templates.join(name), "x").unwrap();
        }
        let with = names(&Checkpoint::open(dir.path()).unwrap());
        assert_eq!(with[carried.len()..], ["additional_chat_templates/rag.jinja", "additional_chat_templates/tool.jinja"]);
    }
}
