//! A matrix and its bias on a device: `y = x · Wᵀ + b`.

use burn::tensor::{Tensor, TensorData, backend::Backend};
use ndarray::{Array1, Array2};

use super::norm::NormLayer;
use crate::arch::{Part, Role};
use crate::{Error, Result, Weights};

/// A Linear of a decoder layer, `[out, in]` as it is stored.
///
/// The product takes it as a transposed view: from 128 rows on that is as fast as a turned copy (70 to 83 GFLOP/s of one
/// Xeon core either way, 256 to 14336 wide, 2026-11), and turning it would cost time and a second copy.
#[derive(Clone, Debug)]
pub(crate) struct Linear<B: Backend> {
    weight: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
}

/// Where a layer's tensors come from and go to.
pub(crate) struct Source<'a, B: Backend> {
    pub weights: &'a dyn Weights,
    pub layer: usize,
    pub device: &'a B::Device,
}

impl<B: Backend> Source<'_, B> {
    /// The matrix `part` of this layer, `[out, in]` where it is stored.
    pub fn linear(&self, part: Part, bias: Option<Part>, [out, width]: [usize; 2]) -> Result<Linear<B>> {
        let role = Role::Layer(self.layer, part);
        let weight = self.weights.matrix(role)?;
        check(role, &[out, width], weight.shape())?;
        let bias = bias.map(|part| self.vector(part, out)).transpose()?;
        Ok(Linear { weight: as_stored(weight, self.device), bias })
    }

    /// The vector `part` of this layer, `[width]`.
    pub fn vector(&self, part: Part, width: usize) -> Result<Tensor<B, 1>> {
        load_vector(self.weights, Role::Layer(self.layer, part), width, self.device)
    }

    /// An RMSNorm inside this layer, over `width` elements.
    pub fn rms(&self, gain: Part, width: usize, eps: f64) -> Result<NormLayer<B>> {
        Ok(NormLayer::rms(self.vector(gain, width)?, eps))
    }
}

/// A vector of the model, `[width]`.
pub(super) fn load_vector<B: Backend>(w: &dyn Weights, role: Role, width: usize, device: &B::Device) -> Result<Tensor<B, 1>> {
    let vector: Array1<f32> = w.vector(role)?;
    check(role, &[width], vector.shape())?;
    Ok(Tensor::from_data(TensorData::new(vector.to_vec(), [width]), device))
}

/// Refuses a tensor whose shape is not what the spec says.
pub(super) fn check(role: Role, expected: &[usize], found: &[usize]) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::WeightShape { role, expected: expected.to_vec(), found: found.to_vec() })
}

/// `[rows, columns]` as it is, on the device.
pub(super) fn as_stored<B: Backend>(matrix: Array2<f32>, device: &B::Device) -> Tensor<B, 2> {
    let (rows, columns) = matrix.dim();
    Tensor::from_data(TensorData::new(into_values(matrix), [rows, columns]), device)
}

/// The values row by row, without a copy where they stand so already.
fn into_values(matrix: Array2<f32>) -> Vec<f32> {
    if !matrix.is_standard_layout() {
        return matrix.iter().copied().collect();
    }
    match matrix.into_raw_vec_and_offset() {
        (values, None | Some(0)) => values,
        (values, Some(offset)) => values[offset..].to_vec(),
    }
}

impl<B: Backend> Linear<B> {
    /// `x · Wᵀ + b` for rows `[rows, in]`.
    pub fn apply(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let y = x.matmul(self.weight.clone().transpose());
        match &self.bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        }
    }

    /// The gradient at the rows from `dz`, that at the outputs: `dz · W`.
    pub fn backward(&self, dz: Tensor<B, 2>) -> Tensor<B, 2> {
        dz.matmul(self.weight.clone())
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;
    use crate::device::Cpu;
    use crate::forward::testing::Table;

    #[test]
    fn a_product_with_bias_by_hand() {
        let mut table = Table::default();
        table.put(Role::Layer(3, Part::Query), array![[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]);
        table.put(Role::Layer(3, Part::QueryBias), array![[10.0, 20.0, 30.0]]);
        let source = Source::<Cpu> { weights: &table, layer: 3, device: &Default::default() };
        let linear = source.linear(Part::Query, Some(Part::QueryBias), [3, 2]).unwrap();
        // x = [1, -1]: 1 - 2 + 10, 3 - 4 + 20, 5 - 6 + 30
        let y = linear.apply(Tensor::from_data([[1.0, -1.0]], source.device));
        assert_eq!(y.into_data().to_vec::<f32>().unwrap(), [9.0, 19.0, 29.0]);

        let wrong = source.linear(Part::Query, None, [2, 3]).unwrap_err().to_string();
        assert!(wrong.contains("[3, 2]") && wrong.contains("[2, 3]"), "{wrong}");
    }

    #[test]
    fn a_turned_view_is_read_in_its_own_order() {
        let matrix = array![[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]].reversed_axes();
        assert_eq!(into_values(matrix), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    }
}
