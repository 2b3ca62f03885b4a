//! Coordinate descent and scale refit in turn, from a solved matrix (GuidedQuant's LNQ, arXiv 2505.07004, section 4).
//!
//! The loss is `tr(ΔW (H + λ) ΔWᵀ)` with `ΔW = W − Ŵ`, as GPTQ's. *Codes*, scales fixed: with `R = ΔW (H + λ)` kept up to date,
//! coordinate `j` of a row goes to the code nearest to `ŵ_j + R_j / (H_jj + λ)`, which is where the loss is least along it.
//! *Scales*, codes fixed: a row's loss is a quadratic in its scales, so the step to its least solves `A·Δs = g` with
//! `A_ab = c_aᵀ (H + λ)_ab c_b`, `g_a = c_aᵀ R_a`, `c = u − z` and `a`, `b` groups; a row keeps its scales where a new one would not
//! be positive and finite, or where the loss, with the new ones as they are stored, would not fall.
//!
//! Neither step can raise the loss; rounding errors can, by a hair, and a row where that happens goes back and stops. A code
//! that moves costs one pass over a row of `H`: few do after the first sweep, so most of the work is the two products around
//! the refit.

// Lanes stand side by side in several arrays, and one index names the same one in all of them.
#![allow(clippy::needless_range_loop)]

use kernels::QuantizedMatrix;
use kernels::simd::widest;
use ndarray::{Array2, ArrayView2, Axis, s};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Loss;
use super::columns::{CHUNK, LANES, check_finite};
use super::grid::nearest;
use crate::{Error, Result};

/// A code moves when the least loss lies more than half a code away, and by a little more: of two equals the present one stays.
const MOVE: f32 = 0.5001;

/// More rounds than any descent takes, in case a tolerance of zero is asked for.
const MOST_ROUNDS: usize = 64;

/// Numbers of a row's systems that a chunk of rows holds at once.
const SYSTEMS: usize = 1 << 22;

/// Knobs of the descent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Descent")]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Stops when a round of codes and scales lowers the loss by less than this share of it.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub tolerance: f64,
    /// Sweeps over the codes of a row in a round, at most; a sweep that moves none is the last.
    #[schemars(range(min = 1))]
    pub sweeps: u16,
}

impl Default for Params {
    fn default() -> Self {
        Self { tolerance: 0.001, sweeps: 8 }
    }
}

/// A matrix after the descent, and what it gained.
#[derive(Clone, Debug, PartialEq)]
pub struct Descended {
    /// The codes and scales.
    pub matrix: QuantizedMatrix,
    /// The loss of the matrix that it started from.
    pub before: Loss,
    /// The loss of `matrix`; in the damped moment never above `before`.
    pub after: Loss,
    /// Rounds of codes and scales.
    pub rounds: usize,
    /// Codes that moved, all rounds counted.
    pub moved: u64,
}

/// Improves `matrix`, a quantization of `w` `[out, in]`, against `moment` `[in, in]` with `lambda` on its diagonal.
///
/// Zero points stay; codes and scales change. What it gives for `moment` and `lambda` of the factor that `matrix` was solved with is
/// a descent in GPTQ's own loss.
///
/// # Errors
///
/// [`Error::WeightNotFinite`]; [`Error::MomentSize`] where shapes do not fit one another; [`Error::Codes`] for a matrix that does not
/// hold together.
pub fn descent(
    w: ArrayView2<'_, f32>,
    matrix: &QuantizedMatrix,
    moment: ArrayView2<'_, f32>,
    lambda: f64,
    params: &Params,
) -> Result<Descended> {
    check(w, matrix, moment)?;
    let moment = moment.as_standard_layout();
    let problem = Problem::new(moment.view(), lambda, matrix, params);
    let mut chunks = problem.chunks(w, matrix);
    chunks.par_iter_mut().for_each(|chunk| chunk.start(&problem));
    let total = |chunks: &[Chunk<'_>]| chunks.iter().map(|chunk| chunk.loss.iter().sum::<f64>()).sum::<f64>();
    let (before, mut loss) = (problem.loss(&chunks), total(&chunks));
    let (mut rounds, mut moved) = (0, 0);
    while rounds < MOST_ROUNDS && loss > 0.0 {
        moved += chunks.par_iter_mut().map(|chunk| chunk.round(&problem)).collect::<Vec<u64>>().iter().sum::<u64>();
        rounds += 1;
        let lower = total(&chunks);
        if loss - lower < params.tolerance.max(f64::EPSILON) * loss {
            break;
        }
        loss = lower;
    }
    let after = problem.loss(&chunks);
    Ok(Descended { matrix: assemble(&chunks, matrix), before, after, rounds, moved })
}

fn check(w: ArrayView2<'_, f32>, matrix: &QuantizedMatrix, moment: ArrayView2<'_, f32>) -> Result<()> {
    matrix.check()?;
    if w.dim() != (matrix.outputs, matrix.inputs) {
        return Err(Error::MomentSize { moment: matrix.inputs, inputs: w.ncols() });
    }
    if moment.dim() != (matrix.inputs, matrix.inputs) {
        return Err(Error::MomentSize { moment: moment.nrows(), inputs: matrix.inputs });
    }
    check_finite(w)
}

/// What all rows share.
struct Problem<'a> {
    moment: ArrayView2<'a, f32>,
    lambda: f64,
    /// `1 / (H_jj + λ)`; 0 where that is 0, so that nothing moves there.
    steps: Vec<f32>,
    group_len: usize,
    top: f32,
    scale_type: kernels::ScaleType,
    sweeps: u16,
}

impl<'a> Problem<'a> {
    fn new(moment: ArrayView2<'a, f32>, lambda: f64, matrix: &QuantizedMatrix, params: &Params) -> Self {
        let step = |&d: &f32| {
            let d = f64::from(d) + lambda;
            if d > 0.0 { (1.0 / d) as f32 } else { 0.0 }
        };
        let steps = moment.diag().iter().map(step).collect();
        let top = f32::from(u8::MAX >> (8 - matrix.bits));
        let (group_len, scale_type) = (matrix.group_len().max(1), matrix.scale_type);
        Self { moment, lambda, steps, group_len, top, scale_type, sweeps: params.sweeps }
    }

    /// The rows in chunks, small where there are many groups.
    fn chunks<'w>(&self, w: ArrayView2<'w, f32>, matrix: &QuantizedMatrix) -> Vec<Chunk<'w>> {
        let groups = matrix.groups();
        let rows = (SYSTEMS / (groups * groups).max(1)).clamp(LANES, CHUNK);
        let chunk = |first: usize| {
            let rows = first..matrix.outputs.min(first + rows);
            let values = |columns: usize, value: &dyn Fn(usize, usize) -> f32| {
                Array2::from_shape_fn((rows.len(), columns), |(row, column)| value(rows.start + row, column))
            };
            let codes = values(matrix.inputs, &|row, column| f32::from(matrix.codes[row * matrix.inputs + column]));
            let scales = values(groups, &|row, group| matrix.scales[row * groups + group]);
            let zeros = values(groups, &|row, group| matrix.zero(row, group));
            Chunk::new(w.slice_move(s![rows.clone(), ..]), codes, scales, zeros)
        };
        (0..matrix.outputs).step_by(rows).map(chunk).collect()
    }

    fn loss(&self, chunks: &[Chunk<'_>]) -> Loss {
        let damped = chunks.iter().map(|chunk| chunk.loss.iter().sum::<f64>()).sum::<f64>();
        let changes = chunks.iter().map(|chunk| squares(chunk.difference(self).view())).sum::<f64>();
        Loss { damped, undamped: (damped - self.lambda * changes).max(0.0) }
    }
}

/// Some rows on their way down.
struct Chunk<'a> {
    w: ArrayView2<'a, f32>,
    /// Codes, `[rows, in]`.
    codes: Array2<f32>,
    /// `[rows, groups]`.
    scales: Array2<f32>,
    /// `[rows, groups]`.
    zeros: Array2<f32>,
    /// `ΔW (H + λ)`, `[rows, in]`.
    gradient: Array2<f32>,
    /// The loss of each row.
    loss: Vec<f64>,
    /// Rows that came back once.
    done: Vec<bool>,
}

impl<'a> Chunk<'a> {
    fn new(w: ArrayView2<'a, f32>, codes: Array2<f32>, scales: Array2<f32>, zeros: Array2<f32>) -> Self {
        let rows = w.nrows();
        Self { w, codes, scales, zeros, gradient: Array2::zeros((0, 0)), loss: vec![0.0; rows], done: vec![false; rows] }
    }

    /// `u − z`, `[rows, in]`.
    fn steps(&self, problem: &Problem<'_>) -> Array2<f32> {
        let mut steps = self.codes.clone();
        for (mut steps, zeros) in steps.rows_mut().into_iter().zip(self.zeros.rows()) {
            for (mut run, &zero) in steps.axis_chunks_iter_mut(Axis(0), problem.group_len).zip(zeros) {
                run -= zero;
            }
        }
        steps
    }

    /// `ΔW`, `[rows, in]`.
    fn difference(&self, problem: &Problem<'_>) -> Array2<f32> {
        let mut difference = self.steps(problem);
        for (row, mut steps) in difference.rows_mut().into_iter().enumerate() {
            for (group, mut run) in steps.axis_chunks_iter_mut(Axis(0), problem.group_len).enumerate() {
                run *= -self.scales[(row, group)];
            }
        }
        difference += &self.w;
        difference
    }

    /// The gradient afresh, and the loss of each row.
    fn refresh(&mut self, problem: &Problem<'_>) -> Vec<f64> {
        let difference = self.difference(problem);
        self.gradient = calib::linalg::product(difference.view(), problem.moment);
        self.gradient.scaled_add(problem.lambda as f32, &difference);
        difference.rows().into_iter().zip(self.gradient.rows()).map(|(d, g)| dot(d, g)).collect()
    }

    fn start(&mut self, problem: &Problem<'_>) {
        self.loss = self.refresh(problem);
    }

    /// Codes, then scales; gives how many codes moved.
    fn round(&mut self, problem: &Problem<'_>) -> u64 {
        let (codes, scales) = (self.codes.clone(), self.scales.clone());
        let mut moved = 0;
        for row in (0..self.w.nrows()).filter(|&row| !self.done[row]).collect::<Vec<_>>() {
            moved += self.sweep(problem, row);
        }
        self.refit(problem);
        for (row, loss) in self.refresh(problem).into_iter().enumerate() {
            if loss <= self.loss[row] {
                self.loss[row] = loss;
            } else {
                self.codes.row_mut(row).assign(&codes.row(row));
                self.scales.row_mut(row).assign(&scales.row(row));
                self.done[row] = true;
            }
        }
        moved
    }

    /// Moves the codes of one row until none moves.
    fn sweep(&mut self, problem: &Problem<'_>, row: usize) -> u64 {
        let (mut codes, mut gradient) = (self.codes.row_mut(row), self.gradient.row_mut(row));
        let (Some(codes), Some(gradient)) = (codes.as_slice_mut(), gradient.as_slice_mut()) else { return 0 };
        let scales = self.scales.row(row);
        let mut moved = 0;
        for _ in 0..problem.sweeps {
            let before = moved;
            for (group, &scale) in scales.iter().enumerate() {
                widest(
                    #[inline(always)]
                    || moved += sweep_group(problem, group * problem.group_len, scale, codes, gradient),
                );
            }
            if moved == before {
                break;
            }
        }
        moved
    }

    /// Fits the scales of each row to its codes.
    fn refit(&mut self, problem: &Problem<'_>) {
        let groups = self.scales.ncols();
        let systems = self.systems(problem);
        for (row, (a, g)) in systems.into_iter().enumerate().filter(|(row, _)| !self.done[*row]) {
            let mut step = g.clone();
            if calib::linalg::solve(&mut a.clone(), &mut step).is_err() {
                continue;
            }
            let old = self.scales.row(row);
            let new: Vec<f32> = old.iter().zip(&step).map(|(&s, &ds)| problem.scale_type.round((f64::from(s) + ds) as f32)).collect();
            let usable = new.iter().all(|s| s.is_finite() && *s > 0.0);
            let step: Vec<f64> = old.iter().zip(&new).map(|(&old, &new)| f64::from(new) - f64::from(old)).collect();
            // How the loss changes: −2 Δs·g + Δsᵀ A Δs.
            let quadratic: f64 = a.chunks_exact(groups).zip(&step).map(|(a, ds)| ds * inner(a, &step)).sum();
            if usable && quadratic < 2.0 * inner(&step, &g) {
                self.scales.row_mut(row).iter_mut().zip(new).for_each(|(scale, new)| *scale = new);
            }
        }
    }

    /// `A` and `g` of each row.
    fn systems(&self, problem: &Problem<'_>) -> Vec<(Vec<f64>, Vec<f64>)> {
        let (rows, inputs) = self.w.dim();
        let (groups, len) = (self.scales.ncols(), problem.group_len);
        let steps = self.steps(problem);
        let mut systems = vec![(vec![0.0; groups * groups], vec![0.0; groups]); rows];
        for a in 0..groups {
            let span = a * len..(a + 1) * len;
            let own = steps.slice(s![.., span.clone()]);
            // Groups b ≥ a; the others by symmetry.
            let x = calib::linalg::block_product(own, problem.moment, span.clone(), span.start..inputs);
            for (row, (matrix, right)) in systems.iter_mut().enumerate() {
                for b in a..groups {
                    let run = b * len..(b + 1) * len;
                    let mut value = dot(x.slice(s![row, run.start - span.start..run.end - span.start]), steps.slice(s![row, run]));
                    if a == b {
                        let c = own.row(row);
                        value += problem.lambda * dot(c, c);
                        // A group whose codes all stand for zero has no scale to fit: it keeps the one it has.
                        value = if value > 0.0 { value } else { 1.0 };
                    }
                    (matrix[a * groups + b], matrix[b * groups + a]) = (value, value);
                }
                right[a] = dot(own.row(row), self.gradient.slice(s![row, span.clone()]));
            }
        }
        systems
    }
}

/// One sweep over the codes of one group of a row, which begins at input `start`; gives how many moved.
#[inline(always)]
fn sweep_group(problem: &Problem<'_>, start: usize, scale: f32, codes: &mut [f32], gradient: &mut [f32]) -> u64 {
    let inverse = 1.0 / scale;
    let (end, mut moved) = (start + problem.group_len, 0);
    let goal = |u: f32, g: f32, step: f32| {
        let x = (g * step).mul_add(inverse, u);
        let x = if x > 0.0 { x } else { 0.0 };
        if x < problem.top { x } else { problem.top }
    };
    for first in (start..end).step_by(LANES) {
        let run = first..end.min(first + LANES);
        let lanes = codes[run.clone()].iter().zip(&gradient[run.clone()]).zip(&problem.steps[run.clone()]);
        // Seldom true, and found for a whole vector at once.
        if !lanes.fold(false, |any, ((&u, &g), &step)| any | ((goal(u, g, step) - u).abs() > MOVE)) {
            continue;
        }
        for j in run {
            let goal = goal(codes[j], gradient[j], problem.steps[j]);
            if (goal - codes[j]).abs() > MOVE {
                let code = nearest(goal, problem.top);
                let change = (code - codes[j]) * scale;
                codes[j] = code;
                let h = problem.moment.row(j);
                for (g, &h) in gradient.iter_mut().zip(h.as_slice().unwrap_or_default()) {
                    *g = (-change).mul_add(h, *g);
                }
                gradient[j] -= change * problem.lambda as f32;
                moved += 1;
            }
        }
    }
    moved
}

/// Inner product in f64.
fn dot(a: ndarray::ArrayView1<'_, f32>, b: ndarray::ArrayView1<'_, f32>) -> f64 {
    let (Some(a), Some(b)) = (a.as_slice(), b.as_slice()) else {
        return a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
    };
    widest(
        #[inline(always)]
        || {
            // Eight sums side by side, in an order that no CPU changes.
            let mut sums = [0.0_f64; 8];
            let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
            for (a, b) in a.iter().zip(b) {
                for l in 0..8 {
                    sums[l] = f64::from(a[l]).mul_add(f64::from(b[l]), sums[l]);
                }
            }
            sums.iter().sum::<f64>() + a_tail.iter().zip(b_tail).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>()
        },
    )
}

fn inner(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn squares(a: ArrayView2<'_, f32>) -> f64 {
    a.rows().into_iter().map(|row| dot(row, row)).sum()
}

fn assemble(chunks: &[Chunk<'_>], from: &QuantizedMatrix) -> QuantizedMatrix {
    QuantizedMatrix {
        codes: chunks.iter().flat_map(|chunk| chunk.codes.iter().map(|&code| code as u8)).collect(),
        scales: chunks.iter().flat_map(|chunk| chunk.scales.iter().copied()).collect(),
        ..from.clone()
    }
}

#[cfg(test)]
mod tests {
    use kernels::{Group, ScaleType, Zeros, bounds};
    use ndarray::array;

    use super::*;
    use crate::quantize::gptq::{self, factorize, gptq};
    use crate::quantize::testing::{Moment, loss_of, moment, normals};
    use crate::quantize::{Grid, Width};

    #[test]
    fn two_columns_by_hand() {
        // Codes [2, 3] at s = 2/3 stand for [0, 2/3]: ΔW = [0.6, 1/3], R = ΔW·[[1, 1], [1, 2]] = [14/15, 19/15]. Input 0 wants
        // (14/15)/1 more, 1.4 codes, and takes the one there is. Then ΔW = [−1/15, 1/3], R = [4/15, 9/15]: 0.4 codes and
        // 0.45, nothing moves. Scales: c = [1, 1], A = 5, g = 13/15: s = 2/3 + 13/75 = 0.84. ΔW = [−0.24, 0.16], loss 0.032.
        let start = QuantizedMatrix {
            outputs: 1,
            inputs: 2,
            bits: 2,
            group: Group::PerChannel,
            scale_type: ScaleType::F32,
            codes: vec![2, 3],
            scales: vec![2.0 / 3.0],
            zeros: Zeros::Sym,
        };
        let done = descent(array![[0.6, 1.0]].view(), &start, array![[1.0, 1.0], [1.0, 2.0]].view(), 0.0, &Params::default()).unwrap();
        assert_eq!((done.matrix.codes, done.moved, done.rounds), (vec![3, 3], 1, 2));
        assert!((done.matrix.scales[0] - 0.84).abs() < 1e-6, "{:?}", done.matrix.scales);
        assert!((done.before.damped - (0.6 * 14.0 / 15.0 + 19.0 / 45.0)).abs() < 1e-6, "{:?}", done.before);
        assert!((done.after.damped - 0.032).abs() < 1e-6, "{:?}", done.after);
    }

    #[test]
    fn lowers_what_gptq_left_and_raises_nothing() {
        let mut shares = Vec::new();
        for grid in [Grid::Sym, Grid::Half, Grid::Asym, Grid::Offset] {
            for kind in [Moment::White, Moment::Correlated, Moment::IllConditioned, Moment::FewTokens] {
                for (bits, seed) in [(2, 1), (2, 2), (3, 3), (8, 4)] {
                    let (w, h) = (normals(70, 128, seed), moment(kind, 128, seed));
                    let width = Width { bits, group: Group::Size(64), scale_type: ScaleType::Bf16, grid };
                    let factor = factorize(h.view(), &[width.group], &gptq::Params::default()).unwrap();
                    let solved = gptq(w.view(), &factor, &width, &gptq::Params::default()).unwrap();
                    let done = descent(w.view(), &solved.matrix, h.view(), factor.lambda(), &Params::default()).unwrap();
                    done.matrix.check().unwrap();
                    assert!((done.before.damped / solved.loss.damped - 1.0).abs() < bounds::FACTOR, "{:?} {:?}", done.before, solved.loss);
                    let after = loss_of(&w, &done.matrix, &h, factor.lambda());
                    assert!((done.after.damped / after - 1.0).abs() < bounds::FACTOR, "{:?} {after}", done.after);
                    assert!(done.after.damped <= done.before.damped, "{width:?} {kind:?}");
                    if bits == 2 {
                        shares.push(done.after.damped / done.before.damped);
                    }
                }
            }
        }
        assert!(shares.iter().all(|&share| share < 0.99) && shares.iter().sum::<f64>() < 0.95 * shares.len() as f64, "{shares:?}");
    }

    #[test]
    fn where_it_stops_nothing_is_left_to_gain() {
        let (w, h) = (normals(20, 64, 5), moment(Moment::Correlated, 64, 5));
        let width = Width { bits: 2, group: Group::Size(32), scale_type: ScaleType::Bf16, grid: Grid::Half };
        let rounded = super::super::rtn::rtn(w.view(), &width, &super::super::rtn::Params::default()).unwrap();
        let lambda = 0.01 * f64::from(h.diag().mean().unwrap());
        let params = Params { tolerance: 0.0, ..Params::default() };
        let once = descent(w.view(), &rounded, h.view(), lambda, &params).unwrap();
        let twice = descent(w.view(), &once.matrix, h.view(), lambda, &params).unwrap();
        assert!(once.after.damped < 0.8 * once.before.damped && once.rounds > 1);
        assert!(twice.after.damped > 0.999 * once.after.damped, "{:?} {:?}", once.after, twice.after);
        // No single code can move to its gain.
        let back = once.matrix.dequantize();
        let mut damped = h.clone();
        damped.diag_mut().mapv_inplace(|d| d + lambda as f32);
        let gradient = (&w - &back).dot(&damped);
        for ((row, column), &g) in gradient.indexed_iter() {
            let scale = once.matrix.scales[row * 2 + column / 32];
            let u = f32::from(once.matrix.codes[row * 64 + column]);
            let goal = (u + g / damped[(column, column)] / scale).clamp(0.0, 3.0);
            assert!((goal - u).abs() < 0.51, "{row} {column}: {u} wants {goal}");
        }
    }

    #[test]
    fn exact_codes_stay_and_empty_matrices_pass() {
        let width = Width { bits: 3, group: Group::Size(4), scale_type: ScaleType::Bf16, grid: Grid::Sym };
        let w = super::super::rtn::rtn(normals(3, 8, 6).view(), &width, &super::super::rtn::Params::default()).unwrap();
        let h = moment(Moment::Correlated, 8, 6);
        let done = descent(w.dequantize().view(), &w, h.view(), 0.1, &Params::default()).unwrap();
        assert_eq!((done.matrix, done.before.damped, done.rounds), (w.clone(), 0.0, 0));
        let none = QuantizedMatrix { outputs: 0, codes: vec![], scales: vec![], ..w.clone() };
        assert_eq!(descent(Array2::zeros((0, 8)).view(), &none, h.view(), 0.1, &Params::default()).unwrap().matrix, none);
        let error = descent(Array2::zeros((3, 8)).view(), &w, Array2::zeros((4, 4)).view(), 0.1, &Params::default()).unwrap_err();
        assert!(error.to_string().contains("4 inputs does not fit a matrix of 8"), "{error}");
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let (w, h) = (normals(600, 64, 7), moment(Moment::Correlated, 64, 7));
        let width = Width { bits: 2, group: Group::Size(32), scale_type: ScaleType::Bf16, grid: Grid::Sym };
        let rounded = super::super::rtn::rtn(w.view(), &width, &super::super::rtn::Params::default()).unwrap();
        let solve = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| descent(w.view(), &rounded, h.view(), 1.0, &Params::default()).unwrap())
        };
        assert!(solve(1) == solve(3));
    }
}
