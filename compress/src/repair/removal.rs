//! Router rows and one factor an expert, fitted to what the whole block said.
//!
//! With the routed output `y_t` of the original block and the survivors' outputs `F_e`, the loss is
//! `Σ_t ‖y_t − Σ_{e ∈ S(t)} w_{t,e} s_e F_e(x_t)‖² / Σ_t ‖y_t‖²`. The router's rows and the factors `s` follow its gradient (Adam,
//! through the weights; the choice itself has none). What the experts say is needed only in products, so a token is a small Gram matrix:
//! `‖y‖² − 2 Σ w s b + ΣΣ w s w′ s′ G` with `b_e = y·F_e` and `G = F·F`, of the few experts that it may choose. The state that serves the
//! tokens held out best is kept: where none serves them better, everything stays as it was.

use calib::arch::Moe;
use calib::forward::router::{self, At};
use ndarray::{Array1, Array2, ArrayView2, Axis};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::down;

/// Knobs of the fit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(rename = "Removal")]
pub struct Params {
    /// Tokens, spread evenly over the samples that count, that it is fitted to: with few of them the tokens held out gain nothing and
    /// layers stay as they were. Each is held for every expert that it chose, 4 bytes a value of its inner and hidden width.
    pub tokens: usize,
    /// Steps of the router's fit, of 1,024 tokens each; 0 leaves the router and the factors alone.
    pub steps: usize,
    /// Step of a router weight, as a share of the router's root mean square; it falls to a tenth.
    pub rate: f64,
    /// Whether each expert gets a factor too.
    pub factors: bool,
    /// The fit of the experts' down projections afterwards, in closed form.
    pub down: down::Params,
}

impl Default for Params {
    fn default() -> Self {
        Self { tokens: 40960, steps: 0, rate: 0.02, factors: true, down: down::Params::default() }
    }
}

/// Tokens a step.
const STEP: usize = 1024;
/// How often the tokens held out are asked.
const LOOKS: usize = 10;
/// Tokens whose gradients are added up before they meet the others'.
const RUN: usize = 64;

/// One token, as far as the loss depends on it.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Experts that it may choose.
    pub candidates: Vec<u32>,
    /// `F_i · F_j` of these, row by row.
    pub gram: Vec<f32>,
    /// `y · F_i` of these.
    pub along: Vec<f32>,
    /// `‖y‖²`.
    pub energy: f64,
}

/// What is fitted.
pub struct Fit<'a> {
    /// The block that is left.
    pub moe: &'a Moe,
    /// Its router, `[experts, hidden]`.
    pub router: ArrayView2<'a, f32>,
    /// Its selection bias, which stays.
    pub correction: Option<&'a [f32]>,
    /// What enters it, `[tokens, hidden]`.
    pub x: ArrayView2<'a, f32>,
    /// And what it may say.
    pub tokens: &'a [Token],
    /// Which tokens are held out, `[tokens]`.
    pub held: &'a [bool],
}

/// At most `count` of them, spread evenly.
pub fn every(held: &[bool], count: usize) -> Vec<bool> {
    let count = count.min(held.len());
    (0..count).map(|i| held[i * held.len() / count]).collect()
}

/// `Σ ‖y‖²` over the tokens held out.
pub fn energy(y: ArrayView2<'_, f32>, held: &[bool]) -> f64 {
    y.rows().into_iter().zip(held).filter(|(_, held)| **held).flat_map(|(row, _)| row.to_vec()).map(|y| f64::from(y).powi(2)).sum()
}

/// What came of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Fitted {
    /// The router's rows, `[experts, hidden]`.
    pub router: Array2<f32>,
    /// A factor for each expert's output, `[experts]`.
    pub factors: Vec<f32>,
    /// Error on the tokens held out before, as a share of the energy.
    pub before: f64,
    /// And after.
    pub after: f64,
}

/// Gradient and loss over some tokens.
struct Slope {
    router: Array2<f64>,
    factors: Array1<f64>,
    loss: f64,
    energy: f64,
}

impl Fit<'_> {
    /// Fits.
    ///
    /// # Errors
    ///
    /// [`calib::Error::RouterNotFinite`].
    ///
    /// # Panics
    ///
    /// If there are not as many tokens as rows.
    pub fn run(&self, params: &Params) -> calib::Result<Fitted> {
        assert_eq!(self.x.nrows(), self.tokens.len(), "a row for every token");
        let experts = self.moe.experts;
        let (held, seen): (Vec<usize>, Vec<usize>) = (0..self.tokens.len()).partition(|&t| self.held[t]);
        let start = (self.router.to_owned(), vec![1.0_f32; experts]);
        let before = self.error(&start, &held)?;
        let mut now = start.clone();
        let mut best = (before, start);
        let size = (self.router.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>() / self.router.len().max(1) as f64).sqrt();
        let mut router = Adam::new(self.router.len());
        let mut factors = Adam::new(experts);
        let parts = seen.len().div_ceil(STEP).max(1);
        for step in 0..params.steps {
            // Every `parts`-th token: each step sees all samples.
            let some: Vec<usize> = seen.iter().copied().skip(step % parts).step_by(parts).collect();
            let slope = self.slope(&now, &some)?;
            let rate = params.rate * (1.0 - 0.9 * step as f64 / params.steps as f64);
            let unit = slope.energy.max(f64::MIN_POSITIVE).recip();
            router.step(now.0.iter_mut(), slope.router.iter().map(|g| g * unit), rate * size);
            if params.factors {
                factors.step(now.1.iter_mut(), slope.factors.iter().map(|g| g * unit), rate * 0.25);
            }
            if (step + 1) % params.steps.div_ceil(LOOKS) == 0 || step + 1 == params.steps {
                let error = self.error(&now, &held)?;
                if error < best.0 {
                    best = (error, now.clone());
                }
            }
        }
        let (after, (router, factors)) = best;
        Ok(Fitted { router, factors, before, after })
    }

    /// The loss on some tokens as a share of their energy; 0 where they have none.
    fn error(&self, at: &(Array2<f32>, Vec<f32>), some: &[usize]) -> calib::Result<f64> {
        let slope = self.slope(at, some)?;
        Ok(if slope.energy > 0.0 { slope.loss / slope.energy } else { 0.0 })
    }

    fn slope(&self, at: &(Array2<f32>, Vec<f32>), some: &[usize]) -> calib::Result<Slope> {
        let parts: Vec<Slope> = some.par_chunks(RUN).map(|run| self.run_slope(at, run)).collect::<calib::Result<_>>()?;
        let empty = || Slope { router: Array2::zeros(self.router.dim()), factors: Array1::zeros(self.moe.experts), loss: 0.0, energy: 0.0 };
        // In order: the sum does not depend on the threads.
        Ok(parts.into_iter().fold(empty(), |mut sum, part| {
            sum.router += &part.router;
            sum.factors += &part.factors;
            (sum.loss, sum.energy) = (sum.loss + part.loss, sum.energy + part.energy);
            sum
        }))
    }

    fn run_slope(&self, (weights, scales): &(Array2<f32>, Vec<f32>), some: &[usize]) -> calib::Result<Slope> {
        let x = self.x.select(Axis(0), some);
        let mut logits = calib::linalg::product(x.view(), weights.t());
        for (mut row, &t) in logits.rows_mut().into_iter().zip(some) {
            let candidates = &self.tokens[t].candidates;
            if candidates.len() < self.moe.experts {
                row.indexed_iter_mut().for_each(|(e, z)| *z = if candidates.contains(&(e as u32)) { *z } else { UNLIKELY });
            }
        }
        let routing = router::route(self.moe, self.correction, logits.into_raw_vec_and_offset().0, At { layer: 0, first: 0 })?;
        let k = routing.top_k;
        let (mut loss, mut energy, mut d_factors) = (0.0, 0.0, Array1::<f64>::zeros(self.moe.experts));
        let mut d_weights = vec![0.0_f32; routing.weights.len()];
        for (i, &t) in some.iter().enumerate() {
            let token = &self.tokens[t];
            let place = |e: &u32| token.candidates.iter().position(|c| c == e);
            let chosen: Vec<(usize, usize, usize, f64)> = (0..k)
                .filter_map(|j| {
                    let expert = routing.chosen[i * k + j];
                    Some((j, place(&expert)?, expert as usize, f64::from(routing.weights[i * k + j])))
                })
                .collect();
            let n = token.candidates.len();
            energy += token.energy;
            loss += token.energy;
            for &(j, at, e, w) in &chosen {
                let s = f64::from(scales[e]);
                let around: f64 = chosen.iter().map(|&(_, b, f, v)| v * f64::from(scales[f]) * f64::from(token.gram[at * n + b])).sum();
                let along = f64::from(token.along[at]);
                loss += w * s * (around - 2.0 * along);
                let slope = 2.0 * (around - along);
                d_weights[i * k + j] = (slope * s) as f32;
                d_factors[e] += slope * w;
            }
        }
        let d_logits = router::backward(self.moe, &routing, &d_weights);
        let d_logits = Array2::from_shape_fn((some.len(), self.moe.experts), |(i, e)| d_logits[i * self.moe.experts + e]);
        let router = calib::linalg::product(d_logits.t(), x.view()).mapv(f64::from);
        Ok(Slope { router, factors: d_factors, loss, energy })
    }
}

/// A logit that is never chosen while enough others are there, and still a number.
const UNLIKELY: f32 = -1e30;

/// Adam (arXiv 1412.6980) with its usual constants.
struct Adam {
    first: Vec<f64>,
    second: Vec<f64>,
    step: i32,
}

impl Adam {
    fn new(len: usize) -> Self {
        Self { first: vec![0.0; len], second: vec![0.0; len], step: 0 }
    }

    fn step<'a>(&mut self, values: impl Iterator<Item = &'a mut f32>, slopes: impl Iterator<Item = f64>, rate: f64) {
        const FIRST: f64 = 0.9;
        const SECOND: f64 = 0.99;
        self.step += 1;
        let (bias1, bias2) = (1.0 - FIRST.powi(self.step), 1.0 - SECOND.powi(self.step));
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((value, slope), (m, v)) in values.zip(slopes).zip(moments) {
            *m = FIRST * *m + (1.0 - FIRST) * slope;
            *v = SECOND * *v + (1.0 - SECOND) * slope * slope;
            *value -= (rate * (*m / bias1) / ((*v / bias2).sqrt() + 1e-12)) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use calib::arch::{Router, Score};
    use ndarray::array;

    use super::*;

    fn moe() -> Moe {
        let router = Router { score: Score::Softmax, correction: false, groups: None, renormalize: Some(0.0), scale: 1.0 };
        Moe { experts: 2, top_k: 2, inner: 1, router, shared: None }
    }

    /// Two experts that put out (1, 0) and (0, 1); the whole block said `y`.
    fn token(y: [f64; 2]) -> Token {
        let along = y.map(|y| y as f32).into();
        Token { candidates: vec![0, 1], gram: vec![1.0, 0.0, 0.0, 1.0], along, energy: y[0] * y[0] + y[1] * y[1] }
    }

    fn fit(tokens: &[Token], x: &Array2<f32>, router: &Array2<f32>, params: &Params) -> Fitted {
        let held: Vec<bool> = (0..tokens.len()).map(|t| t % 8 == 7).collect();
        Fit { moe: &moe(), router: router.view(), correction: None, x: x.view(), tokens, held: &held }.run(params).unwrap()
    }

    #[test]
    fn the_loss_by_hand() {
        // Equal logits: weights ½. y = (1, 1): (½, ½) is left of it, half of an energy of 2.
        let (tokens, x) = (vec![token([1.0, 1.0]); 8], Array2::ones((8, 1)));
        let fitted = fit(&tokens, &x, &array![[1.0], [1.0]], &Params { steps: 0, ..Params::default() });
        assert!((fitted.before - 0.25).abs() < 1e-6, "{}", fitted.before);
        assert_eq!((fitted.factors, fitted.router), (vec![1.0, 1.0], array![[1.0], [1.0]]));
    }

    #[test]
    fn rows_and_factors_find_what_the_block_said() {
        // y = (1.2, 0.4): factors times weights have to become that, whichever way.
        let (tokens, x) = (vec![token([1.2, 0.4]); 64], Array2::ones((64, 1)));
        let start = array![[0.5], [0.5]];
        let both = fit(&tokens, &x, &start, &Params { steps: 600, rate: 0.05, ..Params::default() });
        assert!(both.after < 1e-4 && both.before > 0.2, "{both:?}");
        let rows = fit(&tokens, &x, &start, &Params { steps: 600, rate: 0.05, factors: false, ..Params::default() });
        assert_eq!(rows.factors, [1.0, 1.0]);
        // With weights that add up to 1 the nearest is (0.9, 0.1): 0.3² + 0.3² of 1.6.
        assert!((rows.after - 0.18 / 1.6).abs() < 1e-3, "{rows:?}");
    }

    #[test]
    fn slopes_are_those_of_the_loss() {
        let moe = Moe { experts: 3, ..moe() };
        let gram = vec![2.0, 0.3, -0.4, 0.3, 1.0, 0.2, -0.4, 0.2, 1.5];
        let tokens: Vec<Token> = (0..5)
            .map(|t| Token { candidates: vec![0, 1, 2], gram: gram.clone(), along: vec![0.5, 0.1 * t as f32, -0.3], energy: 2.0 })
            .collect();
        let x = Array2::from_shape_fn((5, 2), |(t, d)| (t as f32 * 0.7 + d as f32).sin());
        let at = (array![[0.9, 0.2], [0.1, -0.8], [-3.0, -2.0]], vec![1.1, 0.8, 1.0]);
        let fit = Fit { moe: &moe, router: at.0.view(), correction: None, x: x.view(), tokens: &tokens, held: &[false; 5] };
        let all = [0, 1, 2, 3, 4];
        let slope = fit.slope(&at, &all).unwrap();
        let step = 1e-2_f32;
        let row = |e, d, by: f32| {
            let mut moved = at.clone();
            moved.0[(e, d)] += by;
            fit.slope(&moved, &all).unwrap().loss
        };
        let factor = |e: usize, by: f32| {
            let mut moved = at.clone();
            moved.1[e] += by;
            fit.slope(&moved, &all).unwrap().loss
        };
        let near = |a: f64, b: f64| (a - b).abs() < 2e-3 * (1.0 + b.abs());
        for (e, d) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let slow = (row(e, d, step) - row(e, d, -step)) / (2.0 * f64::from(step));
            assert!(near(slope.router[(e, d)], slow), "row {e}, {d}: {} {slow}", slope.router[(e, d)]);
        }
        let slow = (factor(0, step) - factor(0, -step)) / (2.0 * f64::from(step));
        assert!(near(slope.factors[0], slow), "factor: {} {slow}", slope.factors[0]);
    }

    #[test]
    fn a_fit_that_does_not_help_is_not_taken() {
        // What is held out wants the opposite of the rest.
        let tokens: Vec<Token> = (0..64).map(|t| if t % 8 == 7 { token([0.5, 0.5]) } else { token([1.0, 0.0]) }).collect();
        let start = array![[0.5], [0.5]];
        let fitted = fit(&tokens, &Array2::ones((64, 1)), &start, &Params::default());
        assert_eq!((fitted.router, fitted.after), (start, fitted.before));
    }
}
