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
pub(super) const SUFFIX: &str = "_scale_inv";

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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tempfile::TempDir;

    use super::super::testing::problem;
    use super::*;
    use crate::Result;
    use crate::checkpoint::{Declared, SHARD_BYTES, Writer};
    use crate::tensor::encode;

    const CONFIG: &str = r#"{"quantization_config":{"quant_method":"fp8","fmt":"e4m3","weight_block_size":[2,3]}}"#;

    /// A checkpoint of these tensors, values in the order of their shape.
    fn open(config: &str, tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) -> Result<(TempDir, Checkpoint)> {
        let dir = tempfile::tempdir().unwrap();
        fs_err::write(dir.path().join("config.json"), config).unwrap();
        let declared =
            tensors.iter().map(|(name, dtype, shape, _)| Declared { name: (*name).into(), dtype: *dtype, shape: shape.to_vec() });
        let mut writer = Writer::create(dir.path(), declared.collect(), SHARD_BYTES, BTreeMap::new()).unwrap();
        tensors.iter().for_each(|(name, _, _, bytes)| writer.put(name, bytes).unwrap());
        writer.finish().unwrap();
        Checkpoint::open(dir.path()).map(|checkpoint| (dir, checkpoint))
    }

    /// `w` of ones, `[3, 4]`, and its scales.
    fn ones(scales: (Dtype, &[usize], Vec<u8>)) -> [(&str, Dtype, &[usize], Vec<u8>); 2] {
        let (dtype, shape, bytes) = scales;
        [("w", Dtype::F8E4m3, &[3, 4], encode(Dtype::F8E4m3, &[1.0; 12]).unwrap()), ("w_scale_inv", dtype, shape, bytes)]
    }

    /// Blocks of 2 by 3 over 3 by 4: the right ones are a column wide, the lower ones a row high.
    const SCALED: [f32; 12] = [0.5, 0.5, 0.5, 2.0, 0.5, 0.5, 0.5, 2.0, 4.0, 4.0, 4.0, 8.0];

    #[test]
    fn blocks_at_the_edges_are_partial() {
        let scales = encode(Dtype::F32, &[0.5, 2.0, 4.0, 8.0]).unwrap();
        let (_dir, checkpoint) = open(CONFIG, &ones((Dtype::F32, &[2, 2], scales))).unwrap();
        assert_eq!(checkpoint.matrix("w").unwrap().into_raw_vec_and_offset().0, SCALED);
        assert_eq!(checkpoint.logical(), [("w".to_owned(), vec![3, 4])]);
        assert_eq!(checkpoint.tensors().count(), 2);
        assert_eq!(checkpoint.floats("w_scale_inv").unwrap(), [0.5, 2.0, 4.0, 8.0]);
    }

    #[test]
    fn scales_may_be_exponents() {
        // 2^(126 − 127) = 0.5, and so on.
        let exponents = vec![126, 128, 129, 130];
        let (_dir, checkpoint) = open(CONFIG, &ones((Dtype::F8E8m0, &[2, 2], exponents.clone()))).unwrap();
        assert_eq!(checkpoint.floats("w").unwrap(), SCALED);
        let config = CONFIG.replace("e4m3\"", "e4m3\",\"scale_fmt\":\"ue8m0\"");
        let (_dir, checkpoint) = open(&config, &ones((Dtype::U8, &[2, 2], exponents.clone()))).unwrap();
        assert_eq!(checkpoint.floats("w").unwrap(), SCALED);
        let found = problem(open(CONFIG, &ones((Dtype::U8, &[2, 2], exponents))));
        assert!(matches!(found, Problem::ScaleDtype { scale, dtype: Dtype::U8 } if scale == "w_scale_inv"));
    }

    #[test]
    fn scales_that_are_missing_are_named() {
        let weight = [("w", Dtype::F8E4m3, &[3, 4][..], vec![0; 12])];
        let missing =
            |found: Problem| matches!(found, Problem::ScaleMissing { tensor, scale, .. } if tensor == "w" && scale == "w_scale_inv");
        assert!(missing(problem(open(CONFIG, &weight))));
        // Another scheme is opened, for whoever knows it, but not read as if it had none.
        let (_dir, other) = open(r#"{"quantization_config":{"quant_method":"modelopt"}}"#, &weight).unwrap();
        assert!(missing(problem(other.floats("w"))));
    }

    #[test]
    fn scales_of_a_wrong_shape() {
        let found = problem(open(CONFIG, &ones((Dtype::F32, &[2, 1], vec![0; 8]))));
        assert_eq!(found.to_string(), "w_scale_inv has shape [2, 1]; its weight of shape [3, 4] in blocks of [2, 3] needs [2, 2]");
        assert!(matches!(found, Problem::ScaleShape { .. }));
        let vector = [("w", Dtype::F8E4m3, &[4][..], vec![0; 4]), ("w_scale_inv", Dtype::F32, &[2], vec![0; 8])];
        assert!(matches!(problem(open(CONFIG, &vector)), Problem::Dimensions { wanted: 2, .. }));
    }

    #[test]
    fn a_block_size_that_is_none() {
        for size in ["null", "[0,3]", "[2]", "[2,3,4]", "128", "[2,-3]"] {
            let config = CONFIG.replace("[2,3]", size);
            let found = problem(open(&config, &ones((Dtype::F32, &[2, 2], vec![0; 16]))));
            assert!(matches!(found, Problem::BlockSize { tensor, found } if tensor == "w" && found == size), "{size}");
        }
    }

    #[test]
    fn values_that_are_not_finite_are_found_after_scaling() {
        let scales = |values: [f32; 4]| ones((Dtype::F32, &[2, 2], encode(Dtype::F32, &values).unwrap()));
        let (_dir, checkpoint) = open(CONFIG, &scales([1.0, f32::NAN, 1.0, 1.0])).unwrap();
        assert!(
            matches!(problem(checkpoint.floats("w")), Problem::NotFinite { tensor, index, .. } if tensor == "w_scale_inv" && index == [0, 1])
        );
        let mut tensors = scales([1.0, 1.0, 1.0, f32::MAX]);
        tensors[0].3 = encode(Dtype::F8E4m3, &[2.0; 12]).unwrap();
        let (_dir, checkpoint) = open(CONFIG, &tensors).unwrap();
        assert!(matches!(problem(checkpoint.floats("w")), Problem::NotFinite { tensor, index, .. } if tensor == "w" && index == [2, 3]));
    }

    #[test]
    fn a_scale_without_its_weight_is_a_tensor_of_its_own() {
        let alone = [("w", Dtype::Bf16, &[3, 4][..], vec![0; 24]), ("w_scale_inv", Dtype::F32, &[2, 2], vec![0; 16])];
        let (_dir, checkpoint) = open(CONFIG, &alone).unwrap();
        assert_eq!(checkpoint.logical().len(), 2);
    }

    #[test]
    fn an_empty_tensor() {
        let empty = [("w", Dtype::F8E4m3, &[3, 0][..], vec![]), ("w_scale_inv", Dtype::F32, &[2, 0], vec![])];
        let (_dir, checkpoint) = open(CONFIG, &empty).unwrap();
        assert_eq!(checkpoint.matrix("w").unwrap().dim(), (3, 0));
    }
}
