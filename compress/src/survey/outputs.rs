//! Losses that are measured at the output of an MLP: what comes out with a quantized matrix against what comes out without.
//!
//! `output`: `Σ_t c_t² ‖F(x_t) − F̂(x_t)‖²` with one matrix solved and the other two as they are; `c` is the routing weight, so how much
//! an expert is used is in it. `pmq`: the `ε` of MC-MoE, `Σ_batches (Σ_{t in batch} c_t² ‖F(x_t) − F̂(x_t)‖²)^½` with all three matrices
//! rounded by its trial quantizer; the router stays, so an expert's own output error is the block's.
//!
//! **Memory**: the rows that enter every MLP in flight, and for [`ROWS`] of them what its projections give.

use calib::arch::{Part, Projection, Site};
use calib::linalg::product;
use calib::stats::Moment;
use kernels::ScaleType;
use ndarray::{Array2, ArrayView2, Zip};

use crate::Result;
use crate::allocate::Choice;
use crate::allocate::drop::Costs;
use crate::allocate::sensitivity::{Losses, Shared, Solver, Wanted};
use crate::quantize::pmq::trial;

/// Rows that are run through an MLP at a time.
const ROWS: usize = 1024;

/// The rows that entered an MLP.
#[derive(Clone, Debug, Default)]
pub(super) struct Entered {
    /// `[rows, hidden]`.
    pub rows: Vec<f32>,
    /// What its output is multiplied by, `[rows]`.
    pub weights: Vec<f32>,
    /// Numbers of the rows over all samples where the MLP is routed, `[rows]`.
    pub tokens: Vec<u32>,
}

/// One MLP: gate and up `[inner, hidden]`, down `[hidden, inner]`.
pub(super) struct Mlp {
    pub gate: Array2<f32>,
    pub up: Array2<f32>,
    pub down: Array2<f32>,
}

/// The part of an MLP's matrix, by the site that its rows enter.
pub(super) fn part(enter: Site, projection: Projection) -> Option<Part> {
    match enter {
        Site::ExpertIn(e) => Some(Part::Expert(e, projection)),
        Site::SharedIn => Some(Part::Shared(projection)),
        Site::DenseIn => Some(Part::Dense(projection)),
        _ => None,
    }
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

/// What the projections give for some rows.
struct Inner {
    gate: Array2<f32>,
    up: Array2<f32>,
    /// `silu(gate) ⊙ up`.
    product: Array2<f32>,
}

impl Mlp {
    fn inner(&self, x: ArrayView2<'_, f32>) -> Inner {
        let (gate, up) = (product(x, self.gate.t()), product(x, self.up.t()));
        let product = Zip::from(&gate).and(&up).map_collect(|&g, &u| silu(g) * u);
        Inner { gate, up, product }
    }

    /// The output's error of each of `x`'s rows when one matrix is `quantized`, `[rows, hidden]`.
    fn error(&self, x: ArrayView2<'_, f32>, inner: &Inner, which: Projection, quantized: &Array2<f32>) -> Array2<f32> {
        match which {
            Projection::Gate => {
                let gate = product(x, quantized.t());
                let change = Zip::from(&gate).and(&inner.gate).and(&inner.up).map_collect(|&to, &from, &u| (silu(to) - silu(from)) * u);
                product(change.view(), self.down.t())
            }
            Projection::Up => {
                let up = product(x, quantized.t());
                let change = Zip::from(&up).and(&inner.up).and(&inner.gate).map_collect(|&to, &from, &g| (to - from) * silu(g));
                product(change.view(), self.down.t())
            }
            Projection::Down => product(inner.product.view(), (quantized - &self.down).t()),
        }
    }
}

/// Squared norm of every row.
fn squares(rows: &Array2<f32>) -> impl Iterator<Item = f64> + '_ {
    rows.rows().into_iter().map(|row| row.iter().map(|&x| f64::from(x).powi(2)).sum())
}

impl Entered {
    /// The rows in runs of at most [`ROWS`], each with the number of its first.
    fn chunks(&self, hidden: usize) -> Vec<(usize, Array2<f32>)> {
        let run = |(i, run): (usize, &[f32])| {
            (i * ROWS, Array2::from_shape_fn((run.len() / hidden, hidden), |(row, column)| run[row * hidden + column]))
        };
        self.rows.chunks(ROWS * hidden.max(1)).enumerate().map(run).collect()
    }

    fn squared_weights(&self) -> Vec<f32> {
        self.weights.iter().map(|c| c * c).collect()
    }
}

/// What a matrix of an MLP is judged with.
pub(super) struct Judge<'a> {
    pub choices: &'a [Choice],
    pub solver: Solver<'a>,
    /// What a sum over tokens is multiplied by.
    pub unit: f64,
    pub wanted: Wanted,
}

/// `output`: losses when rounded and when solved of one matrix of an MLP, `[choices]` each; empty where not wanted.
pub(super) fn output(judge: &Judge<'_>, mlp: &Mlp, entered: &Entered, which: Projection, scale: ScaleType) -> Result<(Losses, Losses)> {
    let hidden = mlp.gate.ncols();
    let (chunks, squared) = (entered.chunks(hidden), entered.squared_weights());
    let w = match which {
        Projection::Gate => &mlp.gate,
        Projection::Up => &mlp.up,
        Projection::Down => &mlp.down,
    };
    let mut moment = Moment::new(w.ncols());
    for (first, x) in &chunks {
        let weights = &squared[*first..*first + x.nrows()];
        match which {
            Projection::Down => moment.add(mlp.inner(x.view()).product.view(), Some(weights)),
            _ => moment.add(x.view(), Some(weights)),
        }
    }
    let shared = Shared::new(moment.into_matrix(), judge.choices, judge.solver, judge.unit, judge.wanted)?;
    let loss = |quantized: &Array2<f32>| -> f64 {
        let mut sum = 0.0;
        for (first, x) in &chunks {
            let error = mlp.error(x.view(), &mlp.inner(x.view()), which, quantized);
            sum += squares(&error).zip(&squared[*first..]).map(|(square, &c2)| square * f64::from(c2)).sum::<f64>();
        }
        sum * judge.unit
    };
    shared.judge(w.view(), scale, judge.wanted, &loss)
}

/// What dropping an MLP loses, measured at its output, and its mean output with the weights `c²`, `[hidden]`; sums over tokens are
/// multiplied by `unit`.
pub(super) fn dropped(mlp: &Mlp, entered: &Entered, unit: f64) -> (Costs, Vec<f32>) {
    let (chunks, squared) = (entered.chunks(mlp.gate.ncols()), entered.squared_weights());
    let outputs = || {
        let out = |(first, x): &(usize, Array2<f32>)| (*first, product(mlp.inner(x.view()).product.view(), mlp.down.t()));
        chunks.iter().map(out)
    };
    let (mut sums, mut weight) = (vec![0.0; mlp.down.nrows()], 0.0);
    for (first, out) in outputs() {
        for (row, &c2) in out.rows().into_iter().zip(&squared[first..]) {
            weight += f64::from(c2);
            sums.iter_mut().zip(row).for_each(|(sum, &y)| *sum += f64::from(c2) * f64::from(y));
        }
    }
    let mean: Vec<f64> = sums.iter().map(|sum| if weight > 0.0 { sum / weight } else { 0.0 }).collect();
    let mut costs = Costs { zero: 0.0, mean: 0.0 };
    for (first, out) in outputs() {
        for (row, &c2) in out.rows().into_iter().zip(&squared[first..]) {
            costs.zero += unit * f64::from(c2) * row.iter().map(|&y| f64::from(y).powi(2)).sum::<f64>();
            costs.mean += unit * f64::from(c2) * row.iter().zip(&mean).map(|(&y, m)| (f64::from(y) - m).powi(2)).sum::<f64>();
        }
    }
    (costs, mean.into_iter().map(|m| m as f32).collect())
}

/// `pmq`: `ε` of an MLP for every choice, `[choices]`; a batch is `batch` tokens.
pub(super) fn epsilon(choices: &[Choice], mlp: &Mlp, entered: &Entered, batch: usize) -> Result<Losses> {
    let (chunks, squared) = (entered.chunks(mlp.gate.ncols()), entered.squared_weights());
    let one = |choice: &Choice| -> Result<Option<f64>> {
        let fits = |w: &Array2<f32>| choice.width(ScaleType::F32).group_len(w.ncols()).is_ok();
        if ![&mlp.gate, &mlp.up, &mlp.down].into_iter().all(fits) {
            return Ok(None);
        }
        let round = |w: &Array2<f32>| Ok::<_, crate::Error>(trial(w.view(), choice.bits, choice.group)?.dequantize());
        let rounded = Mlp { gate: round(&mlp.gate)?, up: round(&mlp.up)?, down: round(&mlp.down)? };
        let mut batches: Vec<f64> = Vec::new();
        for (first, x) in &chunks {
            let out = |mlp: &Mlp| product(mlp.inner(x.view()).product.view(), mlp.down.t());
            let error = out(&rounded) - out(mlp);
            for (i, square) in squares(&error).enumerate() {
                let at = entered.tokens[first + i] as usize / batch.max(1);
                if batches.len() <= at {
                    batches.resize(at + 1, 0.0);
                }
                batches[at] += square * f64::from(squared[first + i]);
            }
        }
        Ok(Some(batches.iter().map(|sum| sum.sqrt()).sum()))
    };
    choices.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::{Grid, Quantizer, rtn};
    use kernels::Group;
    use ndarray::s;

    fn noise(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
        let mut state = seed;
        Array2::from_shape_simple_fn((rows, columns), || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5
        })
    }

    fn case() -> (Mlp, Entered) {
        let mlp = Mlp { gate: noise(32, 16, 1), up: noise(32, 16, 2), down: noise(16, 32, 3) };
        let rows = noise(1500, 16, 4) * 3.0;
        let weights = (0..1500).map(|t| 0.1 + (t % 5) as f32 / 5.0).collect();
        (mlp, Entered { rows: rows.into_raw_vec_and_offset().0, weights, tokens: (0..3000).step_by(2).collect() })
    }

    fn whole(mlp: &Mlp, x: ArrayView2<'_, f32>) -> Array2<f32> {
        product(mlp.inner(x).product.view(), mlp.down.t())
    }

    #[test]
    fn each_matrix_costs_what_comes_out_with_it_alone_quantized() {
        let (mlp, entered) = case();
        let choices = [Choice { bits: 3, group: Group::Size(16), grid: Grid::Asym }];
        let quantizer = Quantizer::Rtn(rtn::Params::default());
        let solver = Solver { quantizer: &quantizer, refine: None };
        let judge = Judge { choices: &choices, solver, unit: 0.5, wanted: Wanted::Solved };
        let x = ArrayView2::from_shape((1500, 16), &entered.rows).unwrap();
        for which in Projection::ALL {
            let width = choices[0].width(ScaleType::F32);
            let round = |w: &Array2<f32>| rtn::rtn(w.view(), &width, &rtn::Params::default()).unwrap().dequantize();
            let mut changed = Mlp { gate: mlp.gate.clone(), up: mlp.up.clone(), down: mlp.down.clone() };
            match which {
                Projection::Gate => changed.gate = round(&mlp.gate),
                Projection::Up => changed.up = round(&mlp.up),
                Projection::Down => changed.down = round(&mlp.down),
            }
            let error = whole(&changed, x) - whole(&mlp, x);
            let expected: f64 = squares(&error).zip(entered.squared_weights()).map(|(s, c2)| s * f64::from(c2)).sum::<f64>() * 0.5;
            let (rounded, solved) = output(&judge, &mlp, &entered, which, ScaleType::F32).unwrap();
            assert!(rounded.is_empty());
            assert!((solved[0].unwrap() / expected - 1.0).abs() < 1e-4, "{which:?}: {solved:?} is not {expected}");
        }
    }

    #[test]
    fn what_dropping_costs_is_what_its_moments_say() {
        let (mlp, entered) = case();
        let x = ArrayView2::from_shape((1500, 16), &entered.rows).unwrap();
        let mut inner = Moment::new(32);
        inner.add(mlp.inner(x).product.view(), Some(&entered.squared_weights()));
        let (first, h) = (inner.first().clone(), inner.into_matrix());
        let expected = Costs::of(mlp.down.view(), &h, &first, None, 0.5);
        let (costs, mean) = dropped(&mlp, &entered, 0.5);
        assert!(
            (costs.zero / expected.zero - 1.0).abs() < 1e-4 && (costs.mean / expected.mean - 1.0).abs() < 1e-4,
            "{costs:?} {expected:?}"
        );
        assert!(costs.mean < costs.zero);
        let same = mean.iter().zip(crate::allocate::drop::mean_output(mlp.down.view(), &first)).all(|(a, b)| (a - b).abs() < 1e-5);
        assert!(same, "{mean:?}");
        assert_eq!(dropped(&mlp, &Entered::default(), 0.5), (Costs { zero: 0.0, mean: 0.0 }, vec![0.0; 16]));
    }

    #[test]
    fn epsilon_is_a_sum_of_norms_a_batch() {
        let (mlp, entered) = case();
        let choices =
            [Choice { bits: 2, group: Group::Size(16), grid: Grid::Asym }, Choice { bits: 2, group: Group::Size(15), grid: Grid::Asym }];
        let round = |w: &Array2<f32>| trial(w.view(), 2, Group::Size(16)).unwrap().dequantize();
        let changed = Mlp { gate: round(&mlp.gate), up: round(&mlp.up), down: round(&mlp.down) };
        let x = ArrayView2::from_shape((1500, 16), &entered.rows).unwrap();
        let error = whole(&changed, x) - whole(&mlp, x);
        // Tokens are 0, 2, … 2998; a batch of 1000 holds 500 of them.
        let norm = |from: usize| {
            let part = error.slice(s![from..from + 500, ..]).to_owned();
            squares(&part).zip(&entered.squared_weights()[from..]).map(|(s, &c2)| s * f64::from(c2)).sum::<f64>().sqrt()
        };
        let expected: f64 = [0, 500, 1000].map(norm).iter().sum();
        let found = epsilon(&choices, &mlp, &entered, 1000).unwrap();
        assert!((found[0].unwrap() / expected - 1.0).abs() < 1e-4, "{found:?} is not {expected}");
        assert_eq!(found[1], None);
        // The whole corpus as one batch is one norm, and less.
        let one = epsilon(&choices, &mlp, &entered, 3000).unwrap()[0].unwrap();
        assert!(one < expected);
    }
}
