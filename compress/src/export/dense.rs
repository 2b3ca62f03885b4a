//! The same weights, dequantized to bf16 under their original names: loads everywhere, saves nothing.
//!
//! For judging a method by anyone's code. A weight is `bf16((u − z) · s)`.

use calib::checkpoint::Declared;
use calib::tensor::Dtype;
use kernels::{QuantizedMatrix, ScaleType};

use super::{Contents, Dense, Format, Part, Scheme, Tensor, config};
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

    fn declare(&self, tensor: &Tensor, _: Scheme) -> Result<Vec<Declared>> {
        Ok(vec![Declared { name: tensor.name.clone(), dtype: Dtype::Bf16, shape: tensor.shape.clone() }])
    }

    fn parts(&self, tensor: &Tensor, matrix: &QuantizedMatrix) -> Result<Vec<Part>> {
        let weights = matrix.dequantize();
        let weights = weights.as_slice().ok_or_else(|| Error::NotAMatrix { name: tensor.name.clone(), shape: tensor.shape.clone() })?;
        Ok(vec![(tensor.name.clone(), scale_bytes(weights, ScaleType::Bf16))])
    }

    fn config(&self, contents: &Contents<'_>) -> Result<String> {
        config::edit(&contents.config, &["quantization_config", "compression_config"], None).ok_or(Error::Config)
    }
}
