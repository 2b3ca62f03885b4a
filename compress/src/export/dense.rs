//! The same weights, dequantized to bf16 under their original names: loads everywhere, saves nothing.
//!
//! For judging a method by anyone's code. A weight is `bf16((u − z) · s)`.

use calib::checkpoint::Declared;
use calib::tensor::Dtype;
use kernels::ScaleType;

use super::{Contents, Dense, Format, Part, Source, Tensor, config};
use crate::tensorfile::scale_bytes;
use crate::{Error, Result};

impl Format for Dense {
    fn name(&self) -> &'static str {
        "dense"
    }

    fn refusals(&self, _: &[Tensor]) -> Vec<String> {
        Vec::new()
    }

    fn notes(&self, _: &[Tensor]) -> Vec<String> {
        Vec::new()
    }

    fn declare(&self, group: &[&Tensor]) -> Result<Vec<Declared>> {
        let declared = |t: &&Tensor| Declared { name: t.name.clone(), dtype: Dtype::Bf16, shape: t.shape.clone() };
        Ok(group.iter().map(declared).collect())
    }

    fn parts(&self, group: &[&Tensor], source: &dyn Source) -> Result<Vec<Part>> {
        let part = |tensor: &&Tensor| {
            let weights = source.quantized(&tensor.name)?.dequantize();
            let weights = weights.as_slice().ok_or_else(|| Error::NotAMatrix { name: tensor.name.clone(), shape: tensor.shape.clone() })?;
            Ok((tensor.name.clone(), scale_bytes(weights, ScaleType::Bf16)))
        };
        group.iter().map(part).collect()
    }

    fn config(&self, contents: &Contents<'_>) -> Result<String> {
        config::edit(&contents.config, &["quantization_config", "compression_config"], None).ok_or(Error::Config)
    }
}
