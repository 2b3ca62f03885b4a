//! The same weights, dequantized to bf16 under their original names: loads everywhere, saves nothing.
//!
//! For judging a method by anyone's code. A weight is `bf16((u − z) · s)`. A dropped expert that puts out nothing is one of zeros; a mean
//! output has no place here, because experts have no bias.

use calib::checkpoint::Declared;
use calib::tensor::Dtype;
use kernels::ScaleType;

use super::{Constant, Contents, Dense, Form, Format, Part, Source, Tensor, config};
use crate::tensorfile::scale_bytes;
use crate::{Error, Result};

impl Format for Dense {
    fn name(&self) -> &'static str {
        "dense"
    }

    fn refusals(&self, tensors: &[Tensor]) -> Vec<String> {
        let mean = tensors.iter().find(|tensor| matches!(tensor.constant(), Some(Constant::Mean(_))));
        let what = "its expert is dropped and puts out its mean, for which a dense expert has no bias; use [export.native], or allocate.drop = \"zero\"";
        mean.map(|tensor| format!("{}: {what}", tensor.name)).into_iter().collect()
    }

    fn notes(&self, _: &[Tensor]) -> Vec<String> {
        Vec::new()
    }

    fn groups<'t>(&self, tensors: &'t [Tensor]) -> Vec<Vec<&'t Tensor>> {
        tensors.iter().filter(|tensor| !matches!(tensor.form, Form::Kept(_))).map(|tensor| vec![tensor]).collect()
    }

    fn declare(&self, group: &[&Tensor]) -> Result<Vec<Declared>> {
        let declared = |t: &&Tensor| Declared { name: t.name.clone(), dtype: Dtype::Bf16, shape: t.shape.clone() };
        Ok(group.iter().map(declared).collect())
    }

    fn parts(&self, group: &[&Tensor], source: &dyn Source) -> Result<Vec<Part>> {
        let part = |tensor: &&Tensor| {
            if tensor.constant().is_some() {
                return Ok((tensor.name.clone(), vec![0; 2 * tensor.shape.iter().product::<usize>()]));
            }
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
