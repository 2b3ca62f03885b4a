//! Norms over the last axis, in f32 as the reference computes them.

use burn::tensor::{Tensor, backend::Backend};

use crate::arch::NormKind;

/// A norm with its gain, and its bias where it is a LayerNorm.
#[derive(Clone, Debug)]
pub(crate) struct NormLayer<B: Backend> {
    gain: Tensor<B, 1>,
    bias: Option<Tensor<B, 1>>,
    eps: f64,
}

impl<B: Backend> NormLayer<B> {
    /// `x / sqrt(mean(x²) + eps) · gain`.
    pub fn rms(gain: Tensor<B, 1>, eps: f64) -> Self {
        Self { gain, bias: None, eps }
    }

    /// `(x − mean) / sqrt(var + eps) · gain + bias`.
    pub fn layer(gain: Tensor<B, 1>, bias: Tensor<B, 1>, eps: f64) -> Self {
        Self { gain, bias: Some(bias), eps }
    }

    /// The kind that `bias` decides.
    pub fn kind(&self) -> NormKind {
        if self.bias.is_some() { NormKind::Layer } else { NormKind::Rms }
    }

    /// Normalizes the last axis.
    pub fn apply<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        let x = self.centered(x);
        let variance = (x.clone() * x.clone()).mean_dim(D - 1);
        let y = x * variance.add_scalar(self.eps).sqrt().recip() * self.gain.clone().unsqueeze();
        match &self.bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        }
    }

    /// The gradient at `x` from `dy`, that at the output.
    ///
    /// With `g = gain ⊙ dy` and `s = 1 / sqrt(mean(x²) + eps)`: `dx = s · (g − x · s² · mean(x ⊙ g))`; a LayerNorm takes the
    /// mean off `x` before it, and so off `dx` after it.
    pub fn backward<const D: usize>(&self, x: Tensor<B, D>, dy: Tensor<B, D>) -> Tensor<B, D> {
        let x = self.centered(x);
        let g = dy * self.gain.clone().unsqueeze();
        let variance = (x.clone() * x.clone()).mean_dim(D - 1).add_scalar(self.eps);
        let along = (x.clone() * g.clone()).mean_dim(D - 1) / variance.clone();
        self.centered((g - x * along) * variance.sqrt().recip())
    }

    /// What a LayerNorm does first.
    fn centered<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        match self.kind() {
            NormKind::Rms => x,
            NormKind::Layer => {
                let mean = x.clone().mean_dim(D - 1);
                x - mean
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Cpu;

    fn vector(values: &[f32]) -> Tensor<Cpu, 1> {
        Tensor::from_data(values, &Default::default())
    }

    #[test]
    fn rms_by_hand() {
        // mean square of (3, 4, 0, 0) is 25 / 4; 1 / sqrt = 0.4
        let x = Tensor::<Cpu, 2>::from_data([[3.0, 4.0, 0.0, 0.0]], &Default::default());
        let y = NormLayer::rms(vector(&[1.0, 2.0, 1.0, 1.0]), 0.0).apply(x);
        let y = y.into_data().to_vec::<f32>().unwrap();
        assert!((y[0] - 1.2).abs() < 1e-6 && (y[1] - 3.2).abs() < 1e-6 && y[2] == 0.0);
    }

    #[test]
    fn layer_by_hand() {
        // (1, 3): mean 2, variance 1; eps 3 makes the divisor 2
        let x = Tensor::<Cpu, 3>::from_data([[[1.0, 3.0]]], &Default::default());
        let y = NormLayer::layer(vector(&[2.0, 4.0]), vector(&[10.0, 20.0]), 3.0).apply(x);
        assert_eq!(y.into_data().to_vec::<f32>().unwrap(), [9.0, 22.0]);
    }
}
