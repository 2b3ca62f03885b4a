//! FP8 with a scale a block, as DeepSeek-V3 and R1, Qwen3-FP8 and GLM-FP8 ship it.
//!
//! Beside `P.weight`, F8 `[N, K]`, lies `P.weight_scale_inv`, `[ceil(N / bn), ceil(K / bk)]`, with `[bn, bk]` the config's
//! `quantization_config.weight_block_size`. Despite its name the scale multiplies: `w[n, k] = fp8[n, k] · scale[n / bn, k / bk]`. Blocks
//! at the edges are partial. Scales that are powers of two may be stored as exponents, F8_E8M0 or (`scale_fmt: "ue8m0"`) U8.

use std::num::NonZeroUsize;

use serde_json::Value;

use super::{Checkpoint, Problem, TensorInfo};
use crate::tensor::{self, Dtype};

/// What is put behind a weight's name to name its scales.
const SUFFIX: &str = "_scale_inv";

/// The scales of one tensor, checked against its shape.
pub(super) struct Scales<'a> {
    info: &'a TensorInfo,
    dtype: Dtype,
    block: [usize; 2],
    columns: usize,
}

/// Whether a tensor cannot be read without scales.
fn needs_scales(info: &TensorInfo) -> bool {
    matches!(info.dtype, Dtype::F8E4m3 | Dtype::F8E5m2)
}

/// The weight whose scales a tensor is, if it is one.
pub(super) fn weight_of<'a>(checkpoint: &'a Checkpoint, name: &str) -> Option<&'a TensorInfo> {
    checkpoint.info(name.strip_suffix(SUFFIX)?).filter(|weight| needs_scales(weight))
}

/// Checks the scales of every FP8 tensor, where the config says that the checkpoint is of this kind.
///
/// Other kinds of FP8 are refused by who knows them, and in any case when a tensor is read.
pub(super) fn check(checkpoint: &Checkpoint) -> Result<(), Problem> {
    if setting(checkpoint.config(), "quant_method").as_str() == Some("fp8") {
        for info in checkpoint.tensors() {
            scales(checkpoint, info)?;
        }
    }
    Ok(())
}

/// The scales of a tensor; `None` if it is not FP8.
pub(super) fn scales<'a>(checkpoint: &'a Checkpoint, info: &TensorInfo) -> Result<Option<Scales<'a>>, Problem> {
    if !needs_scales(info) {
        return Ok(None);
    }
    let scale = format!("{}{SUFFIX}", info.name);
    let Some(found) = checkpoint.info(&scale) else {
        return Err(Problem::ScaleMissing { tensor: info.name.clone(), dtype: info.dtype, scale });
    };
    let &[rows, columns] = info.shape.as_slice() else {
        return Err(Problem::Dimensions { tensor: info.name.clone(), shape: info.shape.clone(), wanted: 2 });
    };
    let block = block_size(checkpoint.config(), info)?;
    if found.shape != [rows.div_ceil(block[0]), columns.div_ceil(block[1])] {
        return Err(Problem::ScaleShape { scale, shape: found.shape.clone(), weight: [rows, columns], block });
    }
    let dtype = match found.dtype {
        Dtype::F32 | Dtype::Bf16 | Dtype::F8E8m0 => found.dtype,
        Dtype::U8 if setting(checkpoint.config(), "scale_fmt").as_str() == Some("ue8m0") => Dtype::F8E8m0,
        dtype => return Err(Problem::ScaleDtype { scale, dtype }),
    };
    Ok(Some(Scales { info: found, dtype, block, columns }))
}

impl Scales<'_> {
    /// Multiplies a tensor's values by its scales.
    pub fn apply(&self, values: &mut [f32], checkpoint: &Checkpoint) -> crate::Result<()> {
        let Scales { info, dtype, block, columns } = self;
        let not_float = || Problem::NotFloat { tensor: info.name.clone(), dtype: info.dtype }.at(checkpoint.dir());
        let scales = tensor::decode(*dtype, checkpoint.bytes(&info.name)?).ok_or_else(not_float)?;
        checkpoint.finite(info, &scales)?;
        // No columns, no values: chunks of nothing are not asked for.
        let across = columns.div_ceil(block[1]).max(1);
        for (n, row) in values.chunks_mut((*columns).max(1)).enumerate() {
            let scales = &scales[n / block[0] * across..][..across];
            for (run, scale) in row.chunks_mut(block[1]).zip(scales) {
                run.iter_mut().for_each(|w| *w *= scale);
            }
        }
        Ok(())
    }
}

/// A value of the config's `quantization_config`; null if it is not there.
fn setting<'a>(config: &'a Value, key: &str) -> &'a Value {
    &config["quantization_config"][key]
}

/// `[bn, bk]` of the config.
fn block_size(config: &Value, info: &TensorInfo) -> Result<[usize; 2], Problem> {
    let found = setting(config, "weight_block_size");
    match serde_json::from_value::<[NonZeroUsize; 2]>(found.clone()) {
        Ok(block) => Ok(block.map(NonZeroUsize::get)),
        Err(_) => Err(Problem::BlockSize { tensor: info.name.clone(), found: found.to_string() }),
    }
}
