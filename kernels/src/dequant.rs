//! What codes mean: `w = (u − z) · s`, in f32. The definition that every kernel and every reader is held to.

use ndarray::Array2;
use rayon::prelude::*;

use crate::layout::{Grid, Packed};
use crate::{QuantizedMatrix, Result};

/// How the product `(u − z) · s` is rounded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Product {
    /// In f32: the definition.
    Exact,
    /// To bf16, as transformers does with experts' weights, whose scales are bf16 whatever dtype was asked for.
    Bf16,
}

impl QuantizedMatrix {
    /// The weights that the codes stand for, `[out, in]`: `w = (u − z) · s` in f32.
    pub fn dequantize(&self) -> Array2<f32> {
        self.dequantize_as(Product::Exact)
    }

    /// As [`QuantizedMatrix::dequantize`], with the product rounded as `product` says.
    pub fn dequantize_as(&self, product: Product) -> Array2<f32> {
        let mut weights = Array2::zeros((self.outputs, self.inputs));
        let group_len = self.group_len();
        if let Some(flat) = weights.as_slice_mut()
            && !flat.is_empty()
        {
            flat.par_chunks_mut(self.inputs).zip(self.codes.par_chunks(self.inputs)).enumerate().for_each(|(row, (weights, codes))| {
                let runs = weights.chunks_mut(group_len).zip(codes.chunks(group_len));
                for (group, (weights, codes)) in runs.enumerate() {
                    let (scale, zero) = (self.scales[row * self.groups() + group], self.zero(row, group));
                    for (weight, &code) in weights.iter_mut().zip(codes) {
                        let exact = (f32::from(code) - zero) * scale;
                        *weight = match product {
                            Product::Exact => exact,
                            Product::Bf16 => half::bf16::from_f32(exact).to_f32(),
                        };
                    }
                }
            });
        }
        weights
    }
}

impl Packed {
    /// The weights of each matrix in it, `[out, in]`: `(q − z) · s` in f32, or `fma(s, q, o)` where offsets are stored.
    ///
    /// # Errors
    ///
    /// As [`Packed::unpack`].
    pub fn dequantize(&self) -> Result<Vec<Array2<f32>>> {
        let matrices = self.unpack()?;
        if self.form.grid != Grid::Offset {
            return Ok(matrices.iter().map(QuantizedMatrix::dequantize).collect());
        }
        let one = |(which, matrix): (usize, &QuantizedMatrix)| {
            let length = matrix.group_len().max(1);
            Array2::from_shape_fn((matrix.outputs, matrix.inputs), |(row, k)| {
                let (scale, offset) = self.scale_and_zero(which, row, k / length);
                scale.mul_add(f32::from(matrix.codes[row * matrix.inputs + k]), offset)
            })
        };
        Ok(matrices.iter().enumerate().map(one).collect())
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;
    use crate::{Group, ScaleType, Zeros};

    fn two_groups(zeros: Zeros) -> QuantizedMatrix {
        QuantizedMatrix {
            outputs: 1,
            inputs: 4,
            bits: 2,
            group: Group::Size(2),
            scale_type: ScaleType::F32,
            codes: vec![0, 3, 1, 2],
            scales: vec![0.5, 2.0],
            zeros,
        }
    }

    #[test]
    fn every_zero_by_hand() {
        // Sym: z = 2: (0−2)·½, (3−2)·½, (1−2)·2, (2−2)·2.
        assert_eq!(two_groups(Zeros::Sym).dequantize(), array![[-1.0, 0.5, -2.0, 0.0]]);
        // Half: z = 1.5.
        assert_eq!(two_groups(Zeros::Half).dequantize(), array![[-0.75, 0.75, -1.0, 1.0]]);
        assert_eq!(two_groups(Zeros::Asym(vec![1, 3])).dequantize(), array![[-0.5, 1.0, -4.0, -2.0]]);
        assert_eq!(two_groups(Zeros::Offset(vec![0.25, -1.0])).dequantize(), array![[-0.125, 1.375, 4.0, 6.0]]);
    }

    #[test]
    fn a_product_that_bf16_does_not_hold_is_rounded() {
        // 3 · 1.0078125 = 3.0234375 lies halfway between 3.015625 and 3.03125, the neighbors in bf16; half goes to even.
        let mut matrix = two_groups(Zeros::Asym(vec![0, 0]));
        matrix.scale_type = ScaleType::Bf16;
        matrix.scales = vec![1.007_812_5, 1.0];
        assert_eq!(matrix.dequantize()[(0, 1)], 3.023_437_5);
        assert_eq!(matrix.dequantize_as(Product::Bf16)[(0, 1)], 3.031_25);
    }

    #[test]
    fn an_offset_is_one_fused_step() {
        let matrix = QuantizedMatrix {
            outputs: 1,
            inputs: 32,
            bits: 2,
            group: Group::Size(32),
            scale_type: ScaleType::F32,
            codes: (0..32).map(|i| i % 4).collect(),
            scales: vec![0.1],
            zeros: Zeros::Offset(vec![0.3]),
        };
        let weights = &Packed::new(&matrix).unwrap().dequantize().unwrap()[0];
        let offset = -(0.3_f32 * 0.1);
        assert_eq!(weights.row(0).to_vec()[..4], [0.0_f32, 1.0, 2.0, 3.0].map(|q| 0.1_f32.mul_add(q, offset)));
        let (a, b) = (weights, matrix.dequantize());
        let apart = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-7, "{apart}");
    }

    #[test]
    fn one_group_a_row_and_no_row() {
        let mut matrix = two_groups(Zeros::Sym);
        matrix.group = Group::PerChannel;
        matrix.scales = vec![0.5];
        assert_eq!(matrix.dequantize(), array![[-1.0, 0.5, -0.5, 0.0]]);
        (matrix.outputs, matrix.codes, matrix.scales) = (0, vec![], vec![]);
        assert_eq!(matrix.dequantize().dim(), (0, 4));
    }
}
