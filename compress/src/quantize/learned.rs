//! Codes and scales learned by gradient steps, from a solver's codes (SignRound's idea: arXiv 2309.05516; AutoRound).
//!
//! What a weight is stored as, `ŵ = s·(round(v) − z)`, is a function of a position `v` and a scale `s`. A position begins within the
//! solver's code `u`, on the side where the weight itself lies, `v = u + spread · clamp(w/s + z − u, −1, 1)`, and stays within one
//! code of it: `|v − u| ≤ 1`. (At `w/s + z` itself, moved into the code, a third of the positions stand at its very edge, because
//! GPTQ moved those weights; the first step then flips them all, and the loss more than doubles.) A scale is
//! `s = s₀·e^a` as its type stores it, which is at once a clip factor: codes reach as far as it says. Zero points stay. The
//! gradient `g = ∂ℓ/∂ŵ` passes the rounding straight through: `∂ℓ/∂v = g·s`, `∂ℓ/∂a = s·Σ_group g·(u − z)`.
//!
//! A step moves positions and scales by a rate that falls linearly to zero: against the gradient's sign ([`Optimizer::Sign`], as
//! AutoRound), or Adam's way ([`Optimizer::Adam`]: momentum 0.9, squares 0.99, both corrected for their start).
//!
//! What the loss is, is not said here: the squared error of a decoder layer's output, or ([`Params::end`]) the divergence at the model's
//! end.

use kernels::QuantizedMatrix;
use ndarray::{Array2, ArrayView2};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::grid::floor;
use crate::{Error, Result};

/// Adam's shares of the past.
const MOMENTUM: f32 = 0.9;
const SQUARES: f32 = 0.99;

/// Knobs of learned refinement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Learned")]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// What the steps begin from.
    pub start: Start,
    /// Steps a decoder layer; 0 leaves the start as it is.
    pub steps: u32,
    /// Calibration samples a step.
    #[schemars(range(min = 1))]
    pub samples: usize,
    /// The first step's size for positions, in codes; it falls linearly to zero.
    #[schemars(range(min = 0.0))]
    pub rate: f32,
    /// The first step's size for the logarithms of scales.
    #[schemars(range(min = 0.0))]
    pub scale_rate: f32,
    /// How far from the middle of its code a position begins at most, in codes.
    #[schemars(range(min = 0.0, max = 0.49))]
    pub spread: f32,
    /// How a step is made from a gradient.
    pub optimizer: Optimizer,
    /// Calibration samples that no step sees, by which the best step is chosen.
    #[schemars(range(min = 1))]
    pub held_out: usize,
    /// How often the held-out samples are asked, over all steps; the last step is always judged.
    #[schemars(range(min = 1))]
    pub judged: u32,
    /// Seed of the order in which samples are taken.
    pub seed: u64,
    /// Further steps once all layers are done, on all of their matrices at once against the divergence of the model's predictions.
    /// They hold the whole model in memory, at 29 bytes a weight, and so are for small models.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end: Option<End>,
}

/// Steps against the KL divergence at the end of the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "LearnedEnd")]
#[serde(deny_unknown_fields, default)]
pub struct End {
    /// Steps.
    pub steps: u32,
    /// Calibration samples a step.
    #[schemars(range(min = 1))]
    pub samples: usize,
    /// The first step's size for positions, in codes; it falls linearly to zero.
    #[schemars(range(min = 0.0))]
    pub rate: f32,
    /// The first step's size for the logarithms of scales.
    #[schemars(range(min = 0.0))]
    pub scale_rate: f32,
    /// How often the held-out samples are asked, over all steps; the last step is always judged.
    #[schemars(range(min = 1))]
    pub judged: u32,
}

impl Default for End {
    fn default() -> Self {
        Self { steps: 48, samples: 4, rate: 0.02, scale_rate: 0.004, judged: 10 }
    }
}

impl Default for Params {
    fn default() -> Self {
        Self {
            start: Start::default(),
            steps: 100,
            samples: 4,
            rate: 0.006,
            scale_rate: 0.002,
            spread: 0.35,
            optimizer: Optimizer::default(),
            held_out: 8,
            judged: 10,
            seed: 0,
            end: None,
        }
    }
}

/// What learned refinement begins from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// The solver's codes.
    Solver,
    /// The solver's codes after a descent.
    #[default]
    Descent,
}

/// How a step is made from a gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Optimizer {
    /// Against the gradient's sign.
    Sign,
    /// Adam's way.
    #[default]
    Adam,
}

/// Values with what Adam remembers of their gradients.
#[derive(Clone, Debug)]
struct Moved {
    values: Vec<f32>,
    momentum: Vec<f32>,
    squares: Vec<f32>,
}

impl Moved {
    fn new(values: Vec<f32>, optimizer: Optimizer) -> Self {
        let remembered = if optimizer == Optimizer::Adam { values.len() } else { 0 };
        Self { momentum: vec![0.0; remembered], squares: vec![0.0; remembered], values }
    }
}

/// One matrix on its way.
#[derive(Clone, Debug)]
pub struct Learner {
    /// The solver's codes, scales and zeros.
    start: QuantizedMatrix,
    optimizer: Optimizer,
    /// `v`, `[out, in]`.
    positions: Moved,
    /// `a`, `[out, groups]`.
    shifts: Moved,
    /// Gradients seen.
    steps: i32,
}

impl Learner {
    /// Begins at `start`, a quantization of `w` `[out, in]`.
    ///
    /// # Errors
    ///
    /// [`Error::MomentSize`] where their shapes differ; [`Error::Codes`] for a matrix that does not hold together.
    pub fn new(w: ArrayView2<'_, f32>, start: QuantizedMatrix, params: &Params) -> Result<Self> {
        let optimizer = params.optimizer;
        start.check()?;
        if w.dim() != (start.outputs, start.inputs) {
            return Err(Error::MomentSize { moment: start.inputs, inputs: w.ncols() });
        }
        let (groups, len) = (start.groups(), start.group_len().max(1));
        let top = f32::from(u8::MAX >> (8 - start.bits));
        let position = |((row, column), &w): ((usize, usize), &f32)| {
            let at = row * groups + column / len;
            let u = f32::from(start.codes[row * start.inputs + column]);
            let off = w / start.scales[at] + start.zero(row, column / len) - u;
            (u + params.spread * off.clamp(-1.0, 1.0)).clamp(0.0, top)
        };
        let positions = w.indexed_iter().map(position).collect();
        let shifts = vec![0.0; start.scales.len()];
        Ok(Self { positions: Moved::new(positions, optimizer), shifts: Moved::new(shifts, optimizer), start, optimizer, steps: 0 })
    }

    /// The matrix as it is now.
    pub fn matrix(&self) -> QuantizedMatrix {
        let codes = self.positions.values.iter().map(|v| v.round_ties_even() as u8).collect();
        QuantizedMatrix { codes, scales: self.scales(), ..self.start.clone() }
    }

    /// What it stands for, `[out, in]`.
    pub fn weights(&self) -> Array2<f32> {
        self.matrix().dequantize()
    }

    /// `s₀·e^a` as its type stores it; `s₀` where that is no scale.
    fn scales(&self) -> Vec<f32> {
        let least = floor(self.start.scale_type);
        let scale = |(&s, &a): (&f32, &f32)| {
            let scale = self.start.scale_type.round(s * a.exp());
            if scale.is_finite() && scale >= least { scale } else { s }
        };
        self.start.scales.iter().zip(&self.shifts.values).map(scale).collect()
    }

    /// One step against `gradient`, `∂ℓ/∂ŵ` `[out, in]` in any unit, at these rates.
    ///
    /// # Panics
    ///
    /// If the gradient is not of the matrix's shape.
    pub fn step(&mut self, gradient: &Array2<f32>, rate: f32, scale_rate: f32) {
        assert_eq!(gradient.dim(), (self.start.outputs, self.start.inputs), "the gradient of a matrix");
        self.steps += 1;
        let (groups, len) = (self.start.groups(), self.start.group_len().max(1));
        let scales = self.scales();
        let top = f32::from(u8::MAX >> (8 - self.start.bits));
        let mut shifts = vec![0.0; scales.len()];
        let gradient = gradient.as_standard_layout();
        let gradient = gradient.as_slice().unwrap_or_default();
        let rule = Rule::new(self.optimizer, self.steps, rate);
        for (at, g) in gradient.chunks_exact(len).enumerate() {
            let (scale, zero) = (scales[at], self.start.zero(at / groups, at % groups));
            let span = at * len..(at + 1) * len;
            let v = &mut self.positions.values[span.clone()];
            let along = |(&g, &v): (&f32, &f32)| f64::from(g) * f64::from(v.round_ties_even() - zero);
            shifts[at] = (f64::from(scale) * g.iter().zip(&*v).map(along).sum::<f64>()) as f32;
            let remembered = if self.optimizer == Optimizer::Adam { span.clone() } else { 0..0 };
            let (m, s) = (&mut self.positions.momentum[remembered.clone()], &mut self.positions.squares[remembered]);
            rule.go(v, g, m, s, scale);
            for (v, &u) in v.iter_mut().zip(&self.start.codes[span]) {
                let u = f32::from(u);
                *v = v.clamp((u - 1.0).max(0.0), (u + 1.0).min(top));
            }
        }
        let Moved { values, momentum, squares } = &mut self.shifts;
        Rule::new(self.optimizer, self.steps, scale_rate).go(values, &shifts, momentum, squares, 1.0);
    }
}

/// One step's rule.
struct Rule {
    optimizer: Optimizer,
    rate: f32,
    /// What corrects the two memories for having begun at zero.
    corrections: [f32; 2],
}

impl Rule {
    fn new(optimizer: Optimizer, step: i32, rate: f32) -> Self {
        Self { optimizer, rate, corrections: [1.0 / (1.0 - MOMENTUM.powi(step)), 1.0 / (1.0 - SQUARES.powi(step))] }
    }

    /// Moves `x` against `scale · g`. A gradient of exactly zero moves nothing that has no momentum.
    fn go(&self, x: &mut [f32], g: &[f32], momentum: &mut [f32], squares: &mut [f32], scale: f32) {
        match self.optimizer {
            Optimizer::Sign => x.iter_mut().zip(g).filter(|(_, g)| **g != 0.0).for_each(|(x, &g)| *x -= self.rate * g.signum()),
            Optimizer::Adam => {
                for ((x, &g), (m, s)) in x.iter_mut().zip(g).zip(momentum.iter_mut().zip(squares)) {
                    let g = g * scale;
                    *m = MOMENTUM * *m + (1.0 - MOMENTUM) * g;
                    *s = SQUARES * *s + (1.0 - SQUARES) * g * g;
                    let size = (*s * self.corrections[1]).sqrt();
                    if size > 0.0 {
                        *x -= self.rate * *m * self.corrections[0] / size;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use kernels::{Group, ScaleType};
    use ndarray::array;

    use super::*;
    use crate::quantize::rtn::{self, rtn};
    use crate::quantize::testing::normals;
    use crate::quantize::{Grid, Width};

    fn start(w: &Array2<f32>, bits: u8, grid: Grid, group: usize) -> QuantizedMatrix {
        let width = Width { bits, group: Group::Size(group), scale_type: ScaleType::F32, grid };
        rtn(w.view(), &width, &rtn::Params::default()).unwrap()
    }

    fn by(optimizer: Optimizer) -> Params {
        Params { optimizer, spread: 0.4, ..Params::default() }
    }

    #[test]
    fn a_step_by_hand() {
        // s = max|w| / 1.5 = 2, codes w/2 + 2: 2.6 → 3, 0.5 → 0, 2.1 → 2.
        let w = array![[1.2_f32, -3.0, 0.2]];
        let matrix = start(&w, 2, Grid::Sym, 3);
        assert_eq!((&matrix.codes[..], matrix.scales[0]), (&[3, 0, 2][..], 2.0));
        let mut learner = Learner::new(w.view(), matrix.clone(), &by(Optimizer::Sign)).unwrap();
        assert_eq!(learner.matrix(), matrix, "the start is what it was given");
        // Begun at 3 − 0.4·0.4 = 2.84, 0 + 0.4·0.5 = 0.2, 2 + 0.4·0.1 = 2.04. Signs +, −, −: 2.44 → 2; 0.6 → 1; 2.44 → 2.
        // The scale: Σ g·(u − z) = 1·1 − 1·(−2) − 1·0 = 3, so it falls by e^−0.1.
        learner.step(&array![[1.0, -1.0, -1.0]], 0.4, 0.1);
        let moved = learner.matrix();
        assert_eq!(moved.codes, [2, 1, 2]);
        assert!((moved.scales[0] - 2.0 * (-0.1_f32).exp()).abs() < 1e-6);
        // No further than one code from where it began, and not off the grid.
        (0..50).for_each(|_| learner.step(&array![[1.0, -1.0, -1.0]], 0.4, 0.0));
        assert_eq!(learner.matrix().codes, [2, 1, 3]);
        // Adam's first step is the sign's.
        let mut adam = Learner::new(w.view(), matrix, &by(Optimizer::Adam)).unwrap();
        adam.step(&array![[5.0, -0.1, -3.0]], 0.4, 0.0);
        assert_eq!(adam.matrix().codes, [2, 1, 2]);
    }

    #[test]
    fn steps_go_down_a_quadratic_that_rounding_to_nearest_ignores() {
        // ℓ = ‖(Ŵ − W)·xᵀ‖² of correlated inputs: errors that cancel cost nothing.
        for (optimizer, grid, bits) in [
            (Optimizer::Sign, Grid::Sym, 2),
            (Optimizer::Adam, Grid::Half, 2),
            (Optimizer::Adam, Grid::Asym, 3),
            (Optimizer::Adam, Grid::Half, 1),
        ] {
            let w = normals(16, 64, 3);
            let common = normals(200, 1, 5);
            let x = normals(200, 64, 4) * 0.3 + &common;
            let matrix = start(&w, bits, grid, 32);
            let loss = |weights: &Array2<f32>| (weights - &w).dot(&x.t()).iter().map(|e| e * e).sum::<f32>();
            let before = loss(&matrix.dequantize());
            let mut learner = Learner::new(w.view(), matrix, &by(optimizer)).unwrap();
            for step in 0..100 {
                let gradient = (learner.weights() - &w).dot(&x.t()).dot(&x);
                let rate = 0.02 * (1.0 - step as f32 / 100.0);
                learner.step(&gradient, rate, rate / 4.0);
            }
            let matrix = learner.matrix();
            matrix.check().unwrap();
            let after = loss(&matrix.dequantize());
            assert!(after < 0.5 * before, "{optimizer:?} {grid:?} {bits}: {after} {before}");
        }
    }

    #[test]
    fn edges() {
        let empty = Array2::<f32>::zeros((0, 8));
        let mut learner = Learner::new(empty.view(), start(&empty, 4, Grid::Sym, 4), &by(Optimizer::Adam)).unwrap();
        learner.step(&empty, 0.1, 0.1);
        assert_eq!(learner.matrix().codes.len(), 0);
        // A group of zeros keeps its least scale, and a gradient of zero moves nothing.
        let zeros = Array2::<f32>::zeros((1, 4));
        let matrix = start(&zeros, 4, Grid::Asym, 4);
        for optimizer in [Optimizer::Adam, Optimizer::Sign] {
            let mut learner = Learner::new(zeros.view(), matrix.clone(), &by(optimizer)).unwrap();
            learner.step(&zeros, 0.1, 0.1);
            assert_eq!(learner.matrix(), matrix);
            learner.step(&array![[1.0, 0.0, 0.0, 0.0]], 100.0, 100.0);
            learner.matrix().check().unwrap();
        }
        assert!(Learner::new(zeros.view(), start(&empty, 4, Grid::Sym, 4), &by(Optimizer::Sign)).is_err());
    }
}
