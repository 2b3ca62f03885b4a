//! Rotary position embedding: pairs of a head's elements are turned by the angle position · frequency.
//!
//! Interleaved pairs are first sorted into halves. That permutes the elements of queries and keys alike, so their
//! products are those of the reference, although the vectors are not.

use burn::tensor::{Tensor, TensorData, backend::Backend};

use crate::arch::{Pairing, Rope};

/// Cosines and sines of consecutive positions.
#[derive(Clone, Debug)]
pub(crate) struct Rotary<B: Backend> {
    /// `[1, tokens · dim / 2]`: one row to all heads, which flex multiplies faster than a shared matrix.
    cos: Tensor<B, 2>,
    /// `[1, tokens · dim / 2]`.
    sin: Tensor<B, 2>,
    pairing: Pairing,
}

impl<B: Backend> Rotary<B> {
    /// For positions `start .. start + tokens` of an input that is that long altogether.
    pub fn new(rope: &Rope, start: usize, tokens: usize, device: &B::Device) -> Self {
        let (frequencies, factor) = rope.frequencies(start + tokens);
        // As the reference does it: frequency, position and their product are f32.
        let angles = (start..start + tokens).flat_map(|p| frequencies.iter().map(move |&f| f64::from(p as f32 * f as f32)));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|a| ((a.cos() * factor) as f32, (a.sin() * factor) as f32)).unzip();
        let table = |values| Tensor::from_data(TensorData::new(values, [1, tokens * rope.dim / 2]), device);
        Self { cos: table(cos), sin: table(sin), pairing: rope.pairing }
    }

    /// Turns `[samples, heads, tokens, dim]`.
    pub fn apply(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let [samples, heads, tokens, dim] = x.dims();
        let x = match self.pairing {
            Pairing::HalfSplit => x,
            Pairing::Interleaved => x.reshape([samples, heads, tokens, dim / 2, 2]).swap_dims(3, 4).reshape([samples, heads, tokens, dim]),
        };
        let half = |first| x.clone().narrow(3, first, dim / 2).reshape([samples * heads, tokens * dim / 2]);
        let (a, b) = (half(0), half(dim / 2));
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        let first = a.clone() * cos.clone() - b.clone() * sin.clone();
        let second = b * cos + a * sin;
        Tensor::cat(vec![first, second].into_iter().map(|x| x.reshape([samples, heads, tokens, dim / 2])).collect(), 3)
    }

    /// The gradient before the turn from `dy`, that after it: each pair is turned back, and stands where it came from.
    pub fn backward(&self, dy: Tensor<B, 4>) -> Tensor<B, 4> {
        let [samples, heads, tokens, dim] = dy.dims();
        let half = |first| dy.clone().narrow(3, first, dim / 2).reshape([samples * heads, tokens * dim / 2]);
        let (a, b) = (half(0), half(dim / 2));
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        let first = a.clone() * cos.clone() + b.clone() * sin.clone();
        let second = b * cos - a * sin;
        let x = Tensor::cat(vec![first, second].into_iter().map(|x| x.reshape([samples, heads, tokens, dim / 2])).collect(), 3);
        match self.pairing {
            Pairing::HalfSplit => x,
            Pairing::Interleaved => x.reshape([samples, heads, tokens, 2, dim / 2]).swap_dims(3, 4).reshape([samples, heads, tokens, dim]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::RopeScaling;
    use crate::device::Cpu;

    fn rope(pairing: Pairing) -> Rope {
        Rope { dim: 4, theta: 100.0, pairing, scaling: RopeScaling::None }
    }

    fn turned(pairing: Pairing, start: usize, x: [f32; 4]) -> Vec<f32> {
        let x = Tensor::<Cpu, 4>::from_data([[[x]]], &Default::default());
        Rotary::new(&rope(pairing), start, 1, &Default::default()).apply(x).into_data().to_vec().unwrap()
    }

    #[test]
    fn position_two_by_hand() {
        // Frequencies 1 and 100^(-2/4) = 0.1: angles 2 and 0.2 for the pairs (x0, x2) and (x1, x3).
        let y = turned(Pairing::HalfSplit, 2, [1.0, 1.0, 0.0, 2.0]);
        let (c, s) = (0.2_f32.cos(), 0.2_f32.sin());
        let expected = [2.0_f32.cos(), c - 2.0 * s, 2.0_f32.sin(), 2.0 * c + s];
        assert!(y.iter().zip(expected).all(|(y, e)| (y - e).abs() < 1e-6), "{y:?} {expected:?}");
    }

    #[test]
    fn a_turn_back_is_the_inverse_of_a_turn() {
        // A rotation's derivative is its transpose, which is its inverse where the factor on cosine and sine is 1.
        for pairing in [Pairing::HalfSplit, Pairing::Interleaved] {
            let x = Tensor::<Cpu, 4>::from_data([[[[1.0, -2.0, 3.0, 0.5], [0.3, 4.0, -1.0, 2.0]]]], &Default::default());
            let rotary = Rotary::new(&rope(pairing), 3, 2, &Default::default());
            let back = rotary.backward(rotary.apply(x.clone()));
            let error: f32 = (back - x).abs().max().into_scalar();
            assert!(error < 1e-6, "{pairing:?}: {error:e}");
        }
    }

    #[test]
    fn interleaved_is_half_split_of_the_sorted_pairs() {
        assert_eq!(turned(Pairing::Interleaved, 5, [1.0, 3.0, 2.0, 4.0]), turned(Pairing::HalfSplit, 5, [1.0, 2.0, 3.0, 4.0]));
    }
}
