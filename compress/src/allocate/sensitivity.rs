//! What a width is predicted to cost: one loss for every matrix and choice.
//!
//! Every cost is a sum over tokens of squared error in one unit, so that losses add over matrices, experts and layers. For a change
//! `ΔW` of a matrix it is `Σ_i r_i (ΔW H ΔWᵀ)_ii` with a second moment `H = Σ_t v_t x_t x_tᵀ` of its inputs; the cost says what the
//! token weights `v` and the row weights `r` are.
//!
//! `hessian` is the squared error of an MLP's output, with the routing weight `c_t` (1 where nothing is routed) in it:
//! `v_t = c_t²`; down: `r = 1`; gate: `r_i = ‖W_d[:,i]‖² · mean((silu′(g_i) u_i)²)`, up: the same with `silu(g_i)²`, where `g = W_g x`,
//! `u = W_u x` and the means are weighted with `c²`. A sum over the tokens that an expert saw, not their mean: how often it is used
//! is part of what its error costs.
//!
//! `output` is the same error, measured at the MLP's output instead of derived; `pmq` is the cost of [`pmq`](super::pmq). `outlier` and
//! `block_importance` are QuantMoE-Bench's scores, which say which matrices come first and nothing about widths.
//!
//! `end_loss` is nats of KL divergence at the end of the model ([`calib::stats::end_loss`]): `v` and `r` come from a backward pass.

use std::collections::BTreeMap;

use calib::linalg::product;
use calib::stats::{First, GateSums};
use kernels::ScaleType;
use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};

use super::drop::Costs;
use super::knobs::{Choice, Cost, Fill};
use crate::Result;
use crate::quantize::factor::{Factor, factorize};
use crate::quantize::{Quantizer, Refine, descent, gptq, hqq, pmq, rtn};

/// Losses of one matrix, `[choices]`; `None` where the choice does not fit the matrix.
pub type Losses = Vec<Option<f64>>;

/// Predicted losses of a model a calibration token, in the unit of its cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// Version of this file's form.
    pub schema: u32,
    /// Fingerprint of the model.
    pub model: String,
    /// Hash of the calibration samples.
    pub corpus: String,
    /// What losses measure.
    pub cost: Cost,
    /// How the table was filled.
    pub fill: Fill,
    /// The choices, in the order of the losses.
    pub choices: Vec<Choice>,
    /// Losses by tensor name.
    pub losses: BTreeMap<String, Losses>,
    /// What dropping a routed expert loses, by the name of its down projection; empty where the cost has no unit for that.
    pub dropped: BTreeMap<String, Costs>,
    /// Loss when solved over loss when rounded, by what it is and choice, where it stands for losses that were not solved.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ratios: BTreeMap<String, Vec<Option<Ratio>>>,
}

/// Solved over rounded, measured on a sample of matrices.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ratio {
    /// Sum of solved losses over sum of rounded ones.
    pub mean: f64,
    /// Standard deviation of the matrices' own ratios.
    pub deviation: f64,
    /// Matrices.
    pub matrices: usize,
}

/// Losses of one matrix as a pass leaves them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// What its ratio is shared with: its kind and projection.
    pub like: String,
    /// When rounded; empty where it was not asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rounded: Losses,
    /// When solved; empty where it was not asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub solved: Losses,
    /// What dropping its expert loses, of a routed expert's down projection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropped: Option<Costs>,
}

/// The version of [`Table::schema`] that is written.
pub const SCHEMA: u32 = 1;

impl Table {
    /// Losses of every matrix: those that were solved, and rounded ones times their ratio where they were not.
    pub fn set(&mut self, entries: BTreeMap<String, Entry>) {
        self.ratios = ratios(&entries, self.choices.len());
        let loss = |entry: &Entry| {
            if !entry.solved.is_empty() {
                return entry.solved.clone();
            }
            let ratios = self.ratios.get(&entry.like);
            let ratio = |o: usize| ratios.and_then(|r| r[o]).map_or(1.0, |ratio| ratio.mean);
            entry.rounded.iter().enumerate().map(|(o, loss)| loss.map(|loss| loss * ratio(o))).collect()
        };
        self.losses = entries.iter().map(|(name, entry)| (name.clone(), loss(entry))).collect();
        self.dropped = entries.iter().filter_map(|(name, entry)| Some((name.clone(), entry.dropped?))).collect();
    }
}

fn ratios(entries: &BTreeMap<String, Entry>, choices: usize) -> BTreeMap<String, Vec<Option<Ratio>>> {
    let mut pairs: BTreeMap<&str, Vec<Vec<(f64, f64)>>> = BTreeMap::new();
    for entry in entries.values().filter(|e| !e.solved.is_empty() && !e.rounded.is_empty()) {
        let found = pairs.entry(&entry.like).or_insert_with(|| vec![Vec::new(); choices]);
        for (o, pair) in entry.solved.iter().zip(&entry.rounded).enumerate() {
            if let (Some(solved), Some(rounded)) = pair
                && *rounded > 0.0
            {
                found[o].push((*solved, *rounded));
            }
        }
    }
    let ratio = |pairs: &Vec<(f64, f64)>| {
        if pairs.is_empty() {
            return None;
        }
        let sums = pairs.iter().fold((0.0, 0.0), |sum, pair| (sum.0 + pair.0, sum.1 + pair.1));
        let mean = sums.0 / sums.1;
        let spread: f64 = pairs.iter().map(|(s, r)| (s / r - mean).powi(2)).sum();
        let deviation = (spread / (pairs.len().max(2) - 1) as f64).sqrt();
        Some(Ratio { mean, deviation, matrices: pairs.len() })
    };
    pairs.into_iter().map(|(like, pairs)| (like.to_owned(), pairs.iter().map(ratio).collect())).collect()
}

/// Losses where nothing was measured: every weight as sensitive as any other, a quarter of the error a bit more.
pub fn assumed(weights: u64, choices: &[Choice]) -> Vec<f64> {
    choices.iter().map(|c| weights as f64 * 0.25_f64.powi(i32::from(c.bits))).collect()
}

/// QuantMoE-Bench's outlier score of a matrix `[out, in]` (arXiv 2406.08155): the largest over its input columns of the column's largest
/// weight over its mean one, in absolute values. A column of zeros has 0.
pub fn outlier_score(w: ArrayView2<'_, f32>) -> f64 {
    let score = |column: ndarray::ArrayView1<'_, f32>| {
        let (largest, sum) = column.iter().fold((0.0_f64, 0.0_f64), |(most, sum), &w| {
            let size = f64::from(w).abs();
            (most.max(size), sum + size)
        });
        if sum > 0.0 { largest * column.len() as f64 / sum } else { 0.0 }
    };
    w.columns().into_iter().map(score).fold(0.0, f64::max)
}

/// Losses of a matrix of so many weights by a score that says how important they are, and nothing about widths: as [`assumed`], in
/// proportion to it. Of equal matrices the one with the larger score is given bits first.
pub fn scored(score: f64, weights: u64, choices: &[Choice]) -> Vec<f64> {
    assumed(weights, choices).into_iter().map(|loss| score * loss).collect()
}

/// `(ΔW H ΔWᵀ)_ii`: what a change `[out, in]` costs a row, with `h` the whole second moment, `[in, in]`. `[out]`.
pub fn row_errors(change: &Array2<f32>, h: &Array2<f32>) -> Vec<f64> {
    let through = product(change.view(), h.view());
    let row = |(a, b): (ndarray::ArrayView1<'_, f32>, ndarray::ArrayView1<'_, f32>)| {
        a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>().max(0.0)
    };
    change.rows().into_iter().zip(through.rows()).map(row).collect()
}

/// Who will choose the codes, and what improves them: losses are those that they leave.
#[derive(Clone, Copy, Debug)]
pub struct Solver<'a> {
    /// The quantizer.
    pub quantizer: &'a Quantizer,
    /// What improves its codes.
    pub refine: Option<&'a Refine>,
}

/// A site's second moment with everything that its matrices share.
pub struct Shared<'a> {
    h: Array2<f32>,
    diagonal: Vec<f32>,
    /// `None` where the quantizer rounds, or no token came.
    factor: Option<Factor>,
    choices: &'a [Choice],
    solver: Solver<'a>,
    /// What a sum over tokens is multiplied by.
    unit: f64,
}

/// Which losses of a matrix are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Those of the solver.
    Solved,
    /// Those of rounding.
    Rounded,
    /// Both.
    Both,
}

impl<'a> Shared<'a> {
    /// Prepares a site's matrices from its second moment `h`, `[in, in]`; sums over tokens are multiplied by `unit`.
    ///
    /// # Errors
    ///
    /// As [`factorize`].
    pub fn new(h: Array2<f32>, choices: &'a [Choice], solver: Solver<'a>, unit: f64, wanted: Wanted) -> Result<Self> {
        let diagonal = h.diag().to_vec();
        let inputs = diagonal.len();
        let groups: Vec<_> = choices.iter().filter(|c| c.width(ScaleType::Bf16).group_len(inputs).is_ok()).map(|c| c.group).collect();
        let factor = match solver.quantizer {
            Quantizer::Gptq(params) if wanted != Wanted::Rounded && !groups.is_empty() && diagonal.iter().any(|&d| d > 0.0) => {
                Some(factorize(h.view(), &groups, params)?)
            }
            _ => None,
        };
        Ok(Self { h, diagonal, factor, choices, solver, unit })
    }

    /// Losses of one matrix `w`, `[out, in]`, whose rows count `rows` each, `[out]`; `None`: 1 each.
    ///
    /// # Errors
    ///
    /// What a quantizer refuses.
    pub fn losses(&self, w: ArrayView2<'_, f32>, rows: Option<&[f64]>, scale: ScaleType, wanted: Wanted) -> Result<(Losses, Losses)> {
        self.judge(w, scale, wanted, &|quantized| self.loss(w, rows, quantized))
    }

    /// What dropping the expert of this down projection `w`, `[out, in]`, loses; `first` is that of the same inputs.
    pub fn dropped(&self, w: ArrayView2<'_, f32>, rows: Option<&[f64]>, first: &First) -> Costs {
        Costs::of(w, &self.h, first, rows, self.unit)
    }

    /// As [`Shared::losses`], with another word on what a quantized matrix loses.
    ///
    /// # Errors
    ///
    /// What a quantizer refuses.
    pub fn judge(
        &self,
        w: ArrayView2<'_, f32>,
        scale: ScaleType,
        wanted: Wanted,
        loss: &dyn Fn(&Array2<f32>) -> f64,
    ) -> Result<(Losses, Losses)> {
        let (mut rounded, mut solved) = (Vec::new(), Vec::new());
        for choice in self.choices {
            let width = choice.width(scale);
            let fits = width.group_len(w.ncols()).is_ok();
            if wanted != Wanted::Solved {
                rounded.push(fits.then(|| self.round(w, &width).map(|q| loss(&q))).transpose()?);
            }
            if wanted != Wanted::Rounded {
                solved.push(fits.then(|| self.solve(w, &width).map(|q| loss(&q))).transpose()?);
            }
        }
        Ok((rounded, solved))
    }

    /// What the solver makes of `w`, dequantized: refined by descent where that is asked for.
    fn solve(&self, w: ArrayView2<'_, f32>, width: &crate::quantize::Width) -> Result<Array2<f32>> {
        let (Some(factor), Quantizer::Gptq(params)) = (&self.factor, self.solver.quantizer) else { return self.round(w, width) };
        let solved = gptq::gptq(w, factor, width, params)?.matrix;
        // Learned codes start from those of the descent, if it has one; what learning adds is not known to the table.
        Ok(match self.solver.refine.and_then(Refine::descent) {
            Some(params) => descent::descent(w, &solved, self.h.view(), factor.lambda(), &params)?.matrix,
            None => solved,
        }
        .dequantize())
    }

    fn round(&self, w: ArrayView2<'_, f32>, width: &crate::quantize::Width) -> Result<Array2<f32>> {
        Ok(match self.solver.quantizer {
            Quantizer::Rtn(params) => rtn::rtn(w, width, params)?,
            Quantizer::Hqq(_) => hqq::hqq(w, width)?,
            // It has no factor to share: whatever is wanted, it is solved.
            Quantizer::Pmq(_) => pmq::gptq(w, self.h.view(), width)?.matrix,
            Quantizer::Gptq(params) => rtn::rtn_weighted(w, &self.diagonal, width, &rtn::Params { clips: params.clips })?,
        }
        .dequantize())
    }

    fn loss(&self, w: ArrayView2<'_, f32>, rows: Option<&[f64]>, quantized: &Array2<f32>) -> f64 {
        let errors = row_errors(&(quantized - &w), &self.h);
        let weighted = errors.iter().enumerate().map(|(i, error)| error * rows.map_or(1.0, |r| r[i]));
        weighted.sum::<f64>() * self.unit
    }
}

/// Row weights of gate and of up, `[inner]` each, before the down projection `[hidden, inner]`: what their squared errors are
/// multiplied by on their way to the MLP's output.
pub fn row_weights(sums: &GateSums, down: ArrayView2<'_, f32>) -> [Vec<f64>; 2] {
    let norms: Vec<f64> = down.columns().into_iter().map(|c| c.iter().map(|&w| f64::from(w).powi(2)).sum()).collect();
    let total = if sums.weight > 0.0 { sums.weight } else { 1.0 };
    [&sums.gate, &sums.up].map(|sums| sums.iter().zip(&norms).map(|(sum, norm)| sum / total * norm).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::Grid;
    use kernels::Group;
    use ndarray::array;

    #[test]
    fn outliers_by_hand() {
        // Columns (1, −1): 1; (3, 1): 3 / 2; zeros: 0.
        assert_eq!(outlier_score(array![[1.0_f32, 3.0, 0.0], [-1.0, 1.0, 0.0]].view()), 1.5);
        assert_eq!(outlier_score(Array2::<f32>::zeros((0, 3)).view()), 0.0);
        let choices = [2, 3].map(|bits| Choice { bits, group: Group::Size(8), grid: Grid::Sym });
        assert_eq!(scored(2.0, 32, &choices), [4.0, 1.0]);
    }

    #[test]
    fn row_errors_by_hand() {
        // (1, −1) H (1, −1)ᵀ = 2 − 1 − 1 + 3 = 3; (0, 2): 4·3 = 12.
        let h = array![[2.0, 1.0], [1.0, 3.0]];
        assert_eq!(row_errors(&array![[1.0, -1.0], [0.0, 2.0]], &h), [3.0, 12.0]);
    }

    fn noise(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
        let mut state = seed;
        Array2::from_shape_simple_fn((rows, columns), || {
            let mut sum = 0.0;
            for _ in 0..6 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                sum += (state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5;
            }
            sum
        })
    }

    /// `W_d (silu(W_g x) ⊙ W_u x)` for every row of `x`.
    fn expert(x: &Array2<f32>, [gate, up, down]: [&Array2<f32>; 3]) -> Array2<f32> {
        let (g, u) = (product(x.view(), gate.t()), product(x.view(), up.t()));
        let h = ndarray::Zip::from(&g).and(&u).map_collect(|&g, &u| g / (1.0 + (-g).exp()) * u);
        product(h.view(), down.t())
    }

    #[test]
    fn at_three_bits_each_matrix_costs_the_output_error_that_a_forward_pass_measures() {
        let (d, f, tokens) = (64, 128, 1500);
        let (gate, up, down) = (noise(f, d, 1) * 0.2, noise(f, d, 2) * 0.2, noise(d, f, 3) * 0.15);
        let x = noise(tokens, d, 4) * 1.4;
        let c: Vec<f32> = (0..tokens).map(|t| 0.2 + 0.8 * (t % 7) as f32 / 7.0).collect();
        let v: Vec<f32> = c.iter().map(|c| c * c).collect();
        let whole = expert(&x, [&gate, &up, &down]);
        let (g, u) = (product(x.view(), gate.t()), product(x.view(), up.t()));
        let inner = ndarray::Zip::from(&g).and(&u).map_collect(|&g, &u| g / (1.0 + (-g).exp()) * u);
        let seen = GateSums::of(g.as_slice().unwrap(), u.as_slice().unwrap(), f, Some(&c));
        let [gate_rows, up_rows] = row_weights(&seen, down.view());
        let moment = |rows: &Array2<f32>| {
            let mut m = calib::stats::Moment::new(rows.ncols());
            m.add(rows.view(), Some(&v));
            m.into_matrix()
        };
        let choices = [Choice { bits: 3, group: Group::Size(64), grid: Grid::Asym }];
        let quantizer = Quantizer::Gptq(gptq::Params::default());
        let solver = Solver { quantizer: &quantizer, refine: None };
        for (which, w, h, rows) in
            [(0, &gate, moment(&x), Some(&gate_rows)), (1, &up, moment(&x), Some(&up_rows)), (2, &down, moment(&inner), None)]
        {
            let shared = Shared::new(h, &choices, solver, 1.0 / tokens as f64, Wanted::Both).unwrap();
            let (rounded, solved) = shared.losses(w.view(), rows.map(Vec::as_slice), ScaleType::Bf16, Wanted::Both).unwrap();
            assert!(solved[0].unwrap() < rounded[0].unwrap());
            let width = choices[0].width(ScaleType::Bf16);
            let factor = shared.factor.as_ref().unwrap();
            let changed = gptq::gptq(w.view(), factor, &width, &gptq::Params::default()).unwrap().matrix.dequantize();
            let mut parts = [&gate, &up, &down];
            parts[which] = &changed;
            let out = expert(&x, parts);
            let squares =
                |(t, row): (usize, ndarray::ArrayView1<'_, f32>)| f64::from(v[t]) * row.iter().map(|&e| f64::from(e).powi(2)).sum::<f64>();
            let measured: f64 = (&out - &whole).rows().into_iter().enumerate().map(squares).sum::<f64>() / tokens as f64;
            let ratio = solved[0].unwrap() / measured;
            assert!((0.85..1.15).contains(&ratio), "matrix {which}: predicted {:?}, measured {measured}, ratio {ratio}", solved[0]);
        }
    }

    #[test]
    fn what_was_not_solved_takes_the_ratio_of_those_that_were() {
        let entry = |rounded: &[f64], solved: &[f64]| Entry {
            like: "expert down".into(),
            rounded: rounded.iter().map(|&l| Some(l)).collect(),
            solved: solved.iter().map(|&l| Some(l)).collect(),
            dropped: None,
        };
        let mut table = Table { choices: vec![Choice { bits: 2, group: Group::Size(8), grid: Grid::Sym }], ..Table::default() };
        let entries = [("a", entry(&[4.0], &[1.0])), ("b", entry(&[8.0], &[5.0])), ("c", entry(&[10.0], &[]))];
        table.set(entries.map(|(name, e)| (name.to_owned(), e)).into());
        // (1 + 5) / (4 + 8) = ½.
        assert_eq!(table.losses["c"], [Some(5.0)]);
        assert_eq!(table.losses["b"], [Some(5.0)]);
        let ratio = table.ratios["expert down"][0].unwrap();
        assert_eq!((ratio.mean, ratio.matrices), (0.5, 2));
    }

    #[test]
    fn losses_are_those_after_the_refinement() {
        let (w, x) = (noise(32, 64, 6), noise(256, 64, 7));
        let h = product(x.t(), x.view());
        let choices = [Choice { bits: 2, group: Group::Size(32), grid: Grid::Sym }];
        let quantizer = Quantizer::Gptq(gptq::Params::default());
        let refine = Refine::Descent(descent::Params::default());
        let loss = |refine: Option<&Refine>| {
            let solver = Solver { quantizer: &quantizer, refine };
            let shared = Shared::new(h.clone(), &choices, solver, 1.0, Wanted::Solved).unwrap();
            shared.losses(w.view(), None, ScaleType::Bf16, Wanted::Solved).unwrap().1[0].unwrap()
        };
        let (plain, refined) = (loss(None), loss(Some(&refine)));
        assert!(refined < 0.98 * plain, "{refined} after {plain}");
    }

    #[test]
    fn a_choice_that_does_not_fit_has_no_loss() {
        let choices =
            [Choice { bits: 2, group: Group::Size(3), grid: Grid::Sym }, Choice { bits: 2, group: Group::Size(4), grid: Grid::Sym }];
        let quantizer = Quantizer::Gptq(gptq::Params::default());
        let solver = Solver { quantizer: &quantizer, refine: None };
        let shared = Shared::new(Array2::eye(8), &choices, solver, 1.0, Wanted::Solved).unwrap();
        let (rounded, solved) = shared.losses(noise(4, 8, 5).view(), None, ScaleType::Bf16, Wanted::Solved).unwrap();
        assert!(rounded.is_empty() && solved[0].is_none() && solved[1].is_some());
    }
}
