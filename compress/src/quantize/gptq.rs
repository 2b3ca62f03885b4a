//! GPTQ (arXiv 2210.17323): columns are rounded one after the other, and each one's error is made up for by those after it.
//!
//! With `UᵀU = (H + λ)⁻¹`, `U` upper: `e_j = (w_j − ŵ_j) / U_jj`, then `w_k −= e_j U_jk` for every later `k`. The error that is
//! left is exact and free: `ΔW = E·U`, so `tr(ΔW (H + λ) ΔWᵀ) = ‖E‖²`.
//!
//! Blocked by halves: a range of columns is the left half, one matrix product that carries its errors over to the right half,
//! and the right half; a range of one group has its scales chosen when it is entered, and a range of [`LEAF`] columns goes
//! column by column. So all but `LEAF / K` of the work is large products. (Blocks of 128 would do the same with more of them.)

// Rows stand side by side in several arrays, and one index names the same row in all of them.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use kernels::QuantizedMatrix;
use kernels::simd::widest;
use ndarray::ArrayView2;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::codes::{Codes, assemble};
use super::columns::{CHUNK, Columns, LANES, Lane, check_finite, chunks, lane, lane_mut};
pub use super::factor::{Factor, Order, factorize};
use super::grid;
use super::{Kept, Loss, Solved, Width};
use crate::Result;

/// Columns that are solved one by one.
const LEAF: usize = 32;

/// Columns after which the loss of rounding to nearest is looked at.
const BLOCK: usize = 128;

/// Knobs of GPTQ.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Gptq")]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// What is added to the diagonal of a second moment, as a share of its mean; grows tenfold where that is not enough.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub damping: f64,
    /// The order in which columns are solved.
    pub order: Order,
    /// Scales that are tried for each group, from that of its widest weight down to 30% of it; 1 takes the widest weight's.
    #[schemars(range(min = 1))]
    pub clips: u16,
}

impl Default for Params {
    fn default() -> Self {
        Self { damping: 0.01, order: Order::Group, clips: 32 }
    }
}

/// Solves `w`, `[out, in]`, against the second moment of its inputs.
///
/// Scales are chosen by the error weighted with `1 / U_jj²`, which is what a column's rounding costs. Where GPTQ's loss in the
/// damped moment is above that of rounding to nearest on the same scales, the latter's codes are kept and [`Solved::kept`]
/// says so.
///
/// # Errors
///
/// What [`rtn`](super::rtn::rtn) refuses; [`Error::MomentSize`](crate::Error::MomentSize) for a factor of other inputs,
/// [`Error::FactorGroups`](crate::Error::FactorGroups) for one whose order takes the groups of `width` apart.
pub fn gptq(w: ArrayView2<'_, f32>, factor: &Factor, width: &Width, params: &Params) -> Result<Solved> {
    let (outputs, inputs) = w.dim();
    let group_len = factor.group_len(inputs, width)?;
    check_finite(w)?;
    let job = Job::new(w, factor, width, group_len, params);
    let rows: Vec<Range<usize>> = chunks(outputs).collect();
    let solved: Vec<(Codes, Squares)> = rows.into_par_iter().map(|rows| job.solve(rows)).collect::<Result<_>>()?;
    let (mut solved, losses): (Vec<Codes>, Vec<Squares>) = solved.into_iter().unzip();
    let mut squares = Squares::sum(&losses);
    let mut kept = Kept::Gptq;
    if let Some(rounded) = job.rounding_below(&solved, &losses) {
        let losses: Vec<Squares>;
        (solved, losses) = rounded.into_iter().unzip();
        (squares, kept) = (Squares::sum(&losses), Kept::Rtn);
    }
    let loss = Loss { damped: squares.errors, undamped: (squares.errors - factor.lambda() * squares.changes).max(0.0) };
    let matrix: QuantizedMatrix = assemble(&solved, outputs, factor.order(), group_len, width);
    Ok(Solved { matrix, kept, loss, damping: factor.damping(), dead_channels: factor.dead_channels() })
}

/// Solves `w` for each of `widths` and keeps the one with the least loss in the damped moment; of equals the first.
///
/// For the widest choice of grids that an exporter holds at the same bits; `None` for no width at all.
///
/// # Errors
///
/// As [`gptq`].
pub fn best(w: ArrayView2<'_, f32>, factor: &Factor, widths: &[Width], params: &Params) -> Result<Option<(Width, Solved)>> {
    let mut best: Option<(Width, Solved)> = None;
    for width in widths {
        let solved = gptq(w, factor, width, params)?;
        if best.as_ref().is_none_or(|(_, best)| solved.loss.damped < best.loss.damped) {
            best = Some((*width, solved));
        }
    }
    Ok(best)
}

/// Sums over the rows of a chunk.
#[derive(Clone, Copy, Default)]
struct Squares {
    /// `‖E‖²`.
    errors: f64,
    /// `‖ΔW‖²`.
    changes: f64,
}

impl Squares {
    fn sum(parts: &[Self]) -> Self {
        parts.iter().fold(Self::default(), |a, b| Self { errors: a.errors + b.errors, changes: a.changes + b.changes })
    }
}

/// One matrix to be solved.
struct Job<'a> {
    w: ArrayView2<'a, f32>,
    factor: &'a Factor,
    width: &'a Width,
    group_len: usize,
    clips: u16,
    /// `1 / U_jj`, by position.
    pivots: Vec<f32>,
    /// `1 / U_jj²`, by position.
    weights: Vec<f32>,
    /// The positions of the columns of each group, group after group.
    members: Vec<usize>,
}

impl<'a> Job<'a> {
    fn new(w: ArrayView2<'a, f32>, factor: &'a Factor, width: &'a Width, group_len: usize, params: &Params) -> Self {
        let pivots: Vec<f32> = (0..w.ncols()).map(|j| 1.0 / factor.upper().diagonal(j)).collect();
        let weights = pivots.iter().map(|pivot| pivot * pivot).collect();
        let mut members = vec![0; w.ncols()];
        for (position, &column) in factor.order().iter().enumerate() {
            members[column] = position;
        }
        Self { w, factor, width, group_len, clips: params.clips, pivots, weights, members }
    }

    fn groups(&self) -> usize {
        self.w.ncols() / self.group_len
    }

    /// The codes of these rows.
    fn solve(&self, rows: Range<usize>) -> Result<(Codes, Squares)> {
        let original = Columns::gather(self.w, rows.clone(), self.factor.order());
        let mut columns = original.clone();
        let mut solve = Solve { job: self, codes: Codes::new(&columns, self.groups(), rows.start), values: Vec::new() };
        let unit = match self.factor.kind() {
            Order::Static => {
                (0..self.groups()).for_each(|group| solve.fit(group, &columns));
                columns.values.len() / columns.width.max(1)
            }
            Order::None | Order::Group => self.group_len,
        };
        self.sweep(0..self.w.ncols(), unit, &mut columns, &mut solve);
        let codes = solve.codes;
        codes.check(rows.len(), self.width)?;
        let squares = self.squares(&original, &codes, &columns);
        Ok((codes, squares))
    }

    /// Columns `range`, whole units of them.
    fn sweep(&self, range: Range<usize>, unit: usize, columns: &mut Columns, visit: &mut impl Visit) {
        if range.len() > unit {
            let middle = range.start + (range.len() / unit).div_ceil(2) * unit;
            self.sweep(range.start..middle, unit, columns, visit);
            self.carry(range.start..middle, middle..range.end, columns);
            self.sweep(middle..range.end, unit, columns, visit);
        } else if !range.is_empty() {
            visit.enter(range.clone(), columns);
            self.unit(range, columns, visit);
        }
    }

    /// Columns `range`, all of one unit.
    fn unit(&self, range: Range<usize>, columns: &mut Columns, visit: &mut impl Visit) {
        if range.len() > LEAF {
            let middle = range.start + range.len().div_ceil(2).next_multiple_of(LEAF);
            self.unit(range.start..middle, columns, visit);
            self.carry(range.start..middle, middle..range.end, columns);
            self.unit(middle..range.end, columns, visit);
        } else {
            widest(
                #[inline(always)]
                || self.leaf(range, columns, visit),
            );
        }
    }

    /// Takes the errors of the columns `from` out of the columns `to`, which follow.
    fn carry(&self, from: Range<usize>, to: Range<usize>, columns: &mut Columns) {
        let width = columns.width;
        let (before, after) = columns.values.split_at_mut(to.start * width);
        let (errors, w) = (&before[from.start * width..from.end * width], &mut after[..to.len() * width]);
        self.factor.upper().subtract_transposed(from, to, errors, w);
    }

    /// Column by column: in comes a column of weights, out of it goes one of errors.
    #[inline(always)]
    fn leaf(&self, range: Range<usize>, columns: &mut Columns, visit: &mut impl Visit) {
        let (upper, width) = (self.factor.upper(), columns.width);
        for tile in 0..columns.tiles() {
            let mut errors = [[0.0; LANES]; LEAF];
            for (at, j) in range.clone().enumerate() {
                let mut w = *lane(&columns.values, width, j, tile);
                for (e, &u) in errors[..at].iter().zip(&upper.column(j)[range.start..]) {
                    for l in 0..LANES {
                        w[l] = (-u).mul_add(e[l], w[l]);
                    }
                }
                let back = visit.settle(j, tile, &w);
                for l in 0..LANES {
                    errors[at][l] = (w[l] - back[l]) * self.pivots[j];
                }
                *lane_mut(&mut columns.values, width, j, tile) = errors[at];
            }
        }
    }

    /// `‖E‖²` over the columns `range`, a row.
    fn errors(&self, range: Range<usize>, errors: &Columns) -> Vec<f64> {
        let mut squares = vec![0.0; errors.width];
        widest(
            #[inline(always)]
            || {
                for e in errors.values[range.start * errors.width..range.end * errors.width].chunks_exact(errors.width.max(1)) {
                    for (square, &e) in squares.iter_mut().zip(e) {
                        *square += f64::from(e) * f64::from(e);
                    }
                }
            },
        );
        squares
    }

    /// `‖ΔW‖²`, a row.
    fn changes(&self, original: &Columns, codes: &Codes) -> Vec<f64> {
        let mut squares = vec![0.0; original.width];
        widest(
            #[inline(always)]
            || {
                for (position, &column) in self.factor.order().iter().enumerate() {
                    for tile in 0..original.tiles() {
                        let w = original.lane(position, tile);
                        let back = codes.values(position, tile, &codes.fit(column / self.group_len, tile));
                        let squares = &mut squares[tile * LANES..][..LANES];
                        for l in 0..LANES {
                            let off = f64::from(w[l] - back[l]);
                            squares[l] += off * off;
                        }
                    }
                }
            },
        );
        squares
    }

    /// The codes of rounding to nearest on the scales of `solved`, if their loss is below GPTQ's.
    ///
    /// It seldom is, and finding out costs as much as solving. So every fourth chunk of rows is looked at first, and the others
    /// only where rounding's loss there is less than a tenth above GPTQ's.
    fn rounding_below(&self, solved: &[Codes], losses: &[Squares]) -> Option<Vec<(Codes, Squares)>> {
        if solved.len() > 1 {
            let some: Vec<&Codes> = solved.iter().step_by(4).collect();
            let loss: f64 = losses.iter().step_by(4).map(|squares| squares.errors).sum();
            self.rounding(&some, 1.1 * loss)?;
        }
        let all: Vec<&Codes> = solved.iter().collect();
        let rounded = self.rounding(&all, losses.iter().map(|squares| squares.errors).sum())?;
        let squares = |(codes, errors): (Codes, Columns)| {
            let original = Columns::gather(self.w, codes.first()..codes.first() + self.rows(&codes), self.factor.order());
            let squares = self.squares(&original, &codes, &errors);
            (codes, squares)
        };
        Some(rounded.into_iter().map(squares).collect())
    }

    /// Codes and errors of rounding to nearest on the scales of `solved`, if their loss is below `limit`.
    ///
    /// Losses of columns add up in the order of solving, where the first are the cheapest to find: as soon as a part of them is
    /// above, the whole is.
    fn rounding(&self, solved: &[&Codes], limit: f64) -> Option<Vec<(Codes, Columns)>> {
        let mut rounded: Vec<(Codes, Columns)> = solved.par_iter().map(|codes| self.round(codes)).collect();
        let mut total = 0.0;
        for start in (0..self.w.ncols()).step_by(BLOCK) {
            let range = start..self.w.ncols().min(start + BLOCK);
            let losses: Vec<f64> = rounded
                .par_iter_mut()
                .map(|(codes, columns)| {
                    self.carry(0..range.start, range.clone(), columns);
                    self.unit(range.clone(), columns, &mut Given);
                    self.errors(range.clone(), columns)[..self.rows(codes)].iter().sum()
                })
                .collect();
            total += losses.iter().sum::<f64>();
            if total >= limit {
                return None;
            }
        }
        Some(rounded)
    }

    /// Rows of a chunk that are not padding.
    fn rows(&self, codes: &Codes) -> usize {
        CHUNK.min(self.w.nrows() - codes.first())
    }

    fn squares(&self, original: &Columns, codes: &Codes, errors: &Columns) -> Squares {
        let sum = |squares: Vec<f64>| squares[..self.rows(codes)].iter().sum();
        Squares { errors: sum(self.errors(0..self.w.ncols(), errors)), changes: sum(self.changes(original, codes)) }
    }

    /// Rounding to nearest on the scales of `solved`, and `ΔW`.
    fn round(&self, solved: &Codes) -> (Codes, Columns) {
        let mut columns = Columns::gather(self.w, solved.first()..solved.first() + self.rows(solved), self.factor.order());
        let mut codes = Codes::with_scales(solved);
        let (top, width) = (f32::from(self.width.top()), columns.width);
        widest(
            #[inline(always)]
            || {
                for (position, &column) in self.factor.order().iter().enumerate() {
                    for tile in 0..columns.tiles() {
                        let fit = codes.fit(column / self.group_len, tile);
                        let w = lane_mut(&mut columns.values, width, position, tile);
                        let back = codes.round(position, tile, w, &fit, top);
                        for l in 0..LANES {
                            w[l] -= back[l];
                        }
                    }
                }
            },
        );
        (codes, columns)
    }
}

/// What is done with a column when its turn comes.
trait Visit {
    /// Columns `range` are up to date.
    fn enter(&mut self, range: Range<usize>, columns: &Columns);
    /// What becomes of column `j`, whose weights are `w` by now.
    fn settle(&mut self, j: usize, tile: usize, w: &Lane) -> Lane;
}

/// Chooses codes.
struct Solve<'j, 'a> {
    job: &'j Job<'a>,
    codes: Codes,
    values: Vec<Lane>,
}

impl Solve<'_, '_> {
    /// Chooses the scales of one group on the weights as they are.
    fn fit(&mut self, group: usize, columns: &Columns) {
        let members = &self.job.members[group * self.job.group_len..][..self.job.group_len];
        let weights: Vec<f32> = members.iter().map(|&position| self.job.weights[position]).collect();
        widest(
            #[inline(always)]
            || {
                for tile in 0..columns.tiles() {
                    self.values.clear();
                    self.values.extend(members.iter().map(|&position| *columns.lane(position, tile)));
                    let fit = grid::fit(&self.values, &weights, self.job.width, self.job.clips);
                    self.codes.set_fit(group, tile, &fit);
                }
            },
        );
    }
}

impl Visit for Solve<'_, '_> {
    fn enter(&mut self, range: Range<usize>, columns: &Columns) {
        if self.job.factor.kind() != Order::Static {
            self.fit(self.job.factor.order()[range.start] / self.job.group_len, columns);
        }
    }

    #[inline(always)]
    fn settle(&mut self, j: usize, tile: usize, w: &Lane) -> Lane {
        let fit = self.codes.fit(self.job.factor.order()[j] / self.job.group_len, tile);
        self.codes.round(j, tile, w, &fit, f32::from(self.job.width.top()))
    }
}

/// Chooses nothing: the column is an error already.
struct Given;

impl Visit for Given {
    fn enter(&mut self, _: Range<usize>, _: &Columns) {}

    #[inline(always)]
    fn settle(&mut self, _: usize, _: usize, _: &Lane) -> Lane {
        [0.0; LANES]
    }
}

#[cfg(test)]
mod tests;
