//! What can be wrong with a checkpoint, one variant a kind of damage. [`Error::Checkpoint`] puts the file before it.

use std::path::Path;

use crate::Error;
use crate::tensor::Dtype;

/// What is wrong with a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the fields are the words and numbers of the messages")]
pub enum Problem {
    // The directory.
    /// No directory is there.
    #[error("no such directory; give the directory that holds config.json and the *.safetensors files")]
    NoDirectory,
    /// It holds no config.json.
    #[error("no config.json in this directory; give the directory of a Hugging Face checkpoint")]
    NoConfig,
    /// config.json is JSON, but no object.
    #[error("config.json holds no JSON object")]
    ConfigNotObject,
    /// The weights are pickled.
    #[error("the weights are only there as {file} (pickle), which is not read; save them as safetensors first (save_pretrained does)")]
    PickleOnly { file: String },
    /// No weights at all.
    #[error("no model.safetensors and no model.safetensors.index.json in this directory")]
    NoWeights,
    /// Shards, but nothing that says which belong together.
    #[error(
        "{count} safetensors files (first {first}) but neither model.safetensors nor model.safetensors.index.json; download the index too"
    )]
    NoIndex { count: usize, first: String },
    /// An index beside a model in one file that it does not name.
    #[error("both model.safetensors and an index that does not name it: two models in one directory; remove one of them")]
    TwoModels,

    // The index.
    /// A shard's name is not a plain file name.
    #[error("the index places tensor {tensor} in {shard:?}, which is not a plain file name; only files of the same directory are read")]
    IndexPath { tensor: String, shard: String },
    /// A tensor stands twice in the index.
    #[error("the index lists tensor {tensor} twice")]
    IndexTwice { tensor: String },
    /// A shard is not there.
    #[error("shard {shard} is missing; the index places {tensors} tensors in it (first {first}); download it again")]
    ShardMissing { shard: String, tensors: usize, first: String },
    /// The index places a tensor where it is not.
    #[error("the index places tensor {tensor} in {shard}, whose header does not have it; index and shards are of different versions")]
    IndexAbsent { tensor: String, shard: String },
    /// A shard has a tensor that the index does not list.
    #[error("shard {shard} holds tensor {tensor}, which the index does not list; index and shards are of different versions")]
    NotInIndex { tensor: String, shard: String },
    /// A tensor lies in two shards.
    #[error("tensor {tensor} lies both in {first} and in {second}")]
    TwoShards { tensor: String, first: String, second: String },
    /// Some shards have data and some have not.
    #[error("{shape_only} has no data (shape-only) but {whole} has; a checkpoint is the one or the other")]
    MixedShapeOnly { shape_only: String, whole: String },

    // One file.
    /// Shorter than a header's length.
    #[error("the file has {bytes} bytes, too few for a safetensors header; download it again")]
    TooSmall { bytes: u64 },
    /// A header past the format's limit.
    #[error(
        "the header's length is {header} bytes, past the format's limit of {limit}; it is no safetensors file, or has too many tensors"
    )]
    HeaderTooLong { header: u64, limit: u64 },
    /// The header's length is past the file's end.
    #[error(
        "the header's length is {header} bytes, but the file ends {has} bytes after the length; it is truncated or no safetensors file"
    )]
    HeaderBeyondFile { header: u64, has: u64 },
    /// The header is not what the format asks for.
    #[error("malformed safetensors header: {reason}")]
    Header { reason: String },
    /// A name stands twice in the header.
    #[error("the header has the name {tensor} twice")]
    TensorTwice { tensor: String },
    /// An element type that is not read.
    #[error("tensor {tensor} has the unknown dtype {dtype}; known are {known}")]
    UnknownDtype { tensor: String, dtype: String, known: String },
    /// A shape whose bytes overflow.
    #[error("tensor {tensor} of shape {shape:?} is larger than any file: the product overflows")]
    ShapeOverflow { tensor: String, shape: Vec<u64> },
    /// An end before its beginning.
    #[error("tensor {tensor} begins at byte {begin} and ends before it, at {end}")]
    OffsetsReversed { tensor: String, begin: u64, end: u64 },
    /// The offsets do not fit the shape.
    #[error("tensor {tensor} of shape {shape:?} takes {needs} bytes, but its offsets span {has}")]
    OffsetsSize { tensor: String, shape: Vec<usize>, needs: u64, has: u64 },
    /// Offsets past the data.
    #[error("tensor {tensor} lies at bytes {begin} to {end}, but there are only {bytes} bytes of data")]
    OffsetsOutside { tensor: String, begin: u64, end: u64, bytes: u64 },
    /// Two tensors share bytes.
    #[error("tensor {tensor} begins at byte {begin}, inside of tensor {other}, which ends at {end}")]
    Overlap { tensor: String, begin: u64, other: String, end: u64 },
    /// Bytes that belong to no tensor.
    #[error("bytes {begin} to {end}, before tensor {tensor}, belong to no tensor")]
    Hole { tensor: String, begin: u64, end: u64 },
    /// The file ends too early.
    #[error("truncated: its header describes {needs} bytes of data, {has} are there; download it again")]
    Truncated { needs: u64, has: u64 },
    /// The file goes on after its last tensor.
    #[error("{extra} bytes follow the last tensor, which ends at byte {end} of the data")]
    Trailing { extra: u64, end: u64 },

    // One tensor.
    /// No tensor has this name.
    #[error("no tensor {tensor} in this checkpoint")]
    NoSuchTensor { tensor: String },
    /// There are no values to read.
    #[error(
        "tensor {tensor} has no values: this checkpoint is shape-only; inspect, check and plan take it, the rest needs the whole model"
    )]
    ShapeOnly { tensor: String },
    /// NaN or infinity.
    #[error("tensor {tensor} holds {value} at index {index:?}; the checkpoint is damaged or was saved after training diverged")]
    NotFinite { tensor: String, value: f32, index: Vec<usize> },
    /// Values that are no floats.
    #[error("tensor {tensor} has dtype {dtype}, which is no float")]
    NotFloat { tensor: String, dtype: Dtype },
    /// A matrix or vector was wanted.
    #[error("tensor {tensor} has shape {shape:?}; {wanted} dimensions were expected")]
    Dimensions { tensor: String, shape: Vec<usize>, wanted: usize },

    // FP8.
    /// An FP8 tensor without its scales.
    #[error("tensor {tensor} is {dtype} and its block scales {scale} are missing")]
    ScaleMissing { tensor: String, dtype: Dtype, scale: String },
    /// Scales that do not cover their tensor.
    #[error("{scale} has shape {shape:?}; its weight of shape {weight:?} in blocks of {block:?} needs [{}, {}]", weight[0].div_ceil(block[0]), weight[1].div_ceil(block[1]))]
    ScaleShape { scale: String, shape: Vec<usize>, weight: [usize; 2], block: [usize; 2] },
    /// Scales of a type that is none.
    #[error("{scale} has dtype {dtype}; block scales are F32, BF16 or F8_E8M0 (U8 if quantization_config.scale_fmt is \"ue8m0\")")]
    ScaleDtype { scale: String, dtype: Dtype },
    /// No block size to apply the scales by.
    #[error("tensor {tensor} is block-scaled FP8, but quantization_config.weight_block_size is {found}; two positive integers are needed")]
    BlockSize { tensor: String, found: String },

    // Writing.
    /// A name was declared twice.
    #[error("tensor {tensor} was declared twice")]
    DeclaredTwice { tensor: String },
    /// A name that the format keeps for itself.
    #[error("no tensor can be named {tensor}: the safetensors format keeps this name for itself")]
    ReservedName { tensor: String },
    /// A tensor was put that was not declared.
    #[error("tensor {tensor} was not declared before it was written")]
    Undeclared { tensor: String },
    /// A tensor was put twice.
    #[error("tensor {tensor} was written twice")]
    PutTwice { tensor: String },
    /// Bytes that do not fit the declared shape.
    #[error("tensor {tensor} was declared with {declared} bytes, {given} were given")]
    WrongLength { tensor: String, declared: u64, given: u64 },
    /// Declared tensors that never came.
    #[error("{missing} declared tensors were not written (first {first})")]
    NotPut { missing: usize, first: String },
    /// The disk is too small.
    #[error("{needs} bytes are to be written, {free} are free on its disk; free {short} more or choose another output directory")]
    NoSpace { needs: u64, free: u64, short: u64 },
    /// A directory that already holds a checkpoint.
    #[error("{file} is already there; choose a directory that holds no checkpoint")]
    Occupied { file: String },
}

impl Problem {
    /// The problem with its place.
    pub(crate) fn at(self, path: &Path) -> Error {
        Error::Checkpoint { at: path.to_owned(), problem: self }
    }
}
