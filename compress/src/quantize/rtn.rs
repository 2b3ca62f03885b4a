//! Rounding to nearest: every group on its own, no calibration.

use kernels::{QuantizedMatrix, Zeros};
use ndarray::ArrayView2;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::columns::{Columns, LANES, Lane, chunks};
use super::grid::{self, Fit};
use super::{Grid, Width};
use crate::{Error, Result};

/// Knobs of rounding to nearest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Rtn")]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Scales that are tried for each group, from that of its widest weight down to 30% of it; 1 takes the widest weight's.
    #[schemars(range(min = 1))]
    pub clips: u16,
}

impl Default for Params {
    fn default() -> Self {
        Self { clips: 1 }
    }
}

/// Rounds `w`, `[out, in]`, to the nearest codes of `width`.
///
/// # Errors
///
/// [`Error::GridBits`], [`Error::GroupSize`], [`Error::WeightNotFinite`], [`Error::ScaleOverflow`].
pub fn rtn(w: ArrayView2<'_, f32>, width: &Width, params: &Params) -> Result<QuantizedMatrix> {
    rtn_weighted(w, &vec![1.0; w.ncols()], width, params)
}

/// As [`rtn`], with scales chosen by the error weighted with `weights`, one an input: the diagonal of its second moment.
///
/// # Errors
///
/// As [`rtn`], and [`Error::MomentSize`] unless there are as many weights as inputs.
pub fn rtn_weighted(w: ArrayView2<'_, f32>, weights: &[f32], width: &Width, params: &Params) -> Result<QuantizedMatrix> {
    let (outputs, inputs) = w.dim();
    let group_len = width.group_len(inputs)?;
    if weights.len() != inputs {
        return Err(Error::MomentSize { moment: weights.len(), inputs });
    }
    check_finite(w)?;
    let order: Vec<usize> = (0..inputs).collect();
    let rows: Vec<_> = chunks(outputs).collect();
    let chunks = rows.into_par_iter().map(|rows| {
        let columns = Columns::gather(w, rows.clone(), &order);
        let mut codes = Codes::new(&columns, inputs / group_len, rows.start);
        kernels::simd::widest(|| {
            for tile in 0..columns.tiles() {
                for group in 0..inputs / group_len {
                    let span = group * group_len..(group + 1) * group_len;
                    let values: Vec<Lane> = span.clone().map(|column| *columns.lane(column, tile)).collect();
                    let fit = grid::fit(&values, &weights[span.clone()], width, params.clips);
                    codes.set_fit(group, tile, &fit);
                    for (column, w) in span.zip(&values) {
                        codes.round(column, tile, w, &fit, f32::from(width.top()));
                    }
                }
            }
        });
        codes.check(rows.len(), width)?;
        Ok(codes)
    });
    let chunks: Vec<Codes> = chunks.collect::<Result<_>>()?;
    Ok(assemble(&chunks, outputs, &order, group_len, width))
}

/// Refuses a weight that is not finite.
pub(super) fn check_finite(w: ArrayView2<'_, f32>) -> Result<()> {
    match w.indexed_iter().find(|(_, value)| !value.is_finite()) {
        Some(((row, column), &value)) => Err(Error::WeightNotFinite { value, row, column }),
        None => Ok(()),
    }
}

/// Codes, scales and zeros of a chunk of rows, column by column.
pub(super) struct Codes {
    /// The first row of the chunk in the matrix.
    first: usize,
    /// Rows, padding included.
    width: usize,
    /// `[columns, width]`, columns in the order of solving.
    codes: Vec<u8>,
    /// `[groups, width]`, groups in their own order.
    scales: Vec<f32>,
    /// `[groups, width]`.
    zeros: Vec<f32>,
}

impl Codes {
    pub fn new(columns: &Columns, groups: usize, first: usize) -> Self {
        let width = columns.width;
        Self { first, width, codes: vec![0; columns.values.len()], scales: vec![0.0; groups * width], zeros: vec![0.0; groups * width] }
    }

    /// As `other`, without its codes.
    pub fn with_scales(other: &Self) -> Self {
        let (scales, zeros) = (other.scales.clone(), other.zeros.clone());
        Self { first: other.first, width: other.width, codes: vec![0; other.codes.len()], scales, zeros }
    }

    /// The first row of the chunk in the matrix.
    pub fn first(&self) -> usize {
        self.first
    }

    /// What the code at `position` of one row stands for.
    pub fn value(&self, position: usize, group: usize, row: usize) -> f32 {
        let at = group * self.width + row;
        (f32::from(self.codes[position * self.width + row]) - self.zeros[at]) * self.scales[at]
    }

    #[inline(always)]
    pub fn fit(&self, group: usize, tile: usize) -> Fit {
        use super::columns::lane;
        Fit { scale: *lane(&self.scales, self.width, group, tile), zero: *lane(&self.zeros, self.width, group, tile) }
    }

    #[inline(always)]
    pub fn set_fit(&mut self, group: usize, tile: usize, fit: &Fit) {
        use super::columns::lane_mut;
        *lane_mut(&mut self.scales, self.width, group, tile) = fit.scale;
        *lane_mut(&mut self.zeros, self.width, group, tile) = fit.zero;
    }

    /// Stores the nearest codes of one column; gives what they stand for.
    #[inline(always)]
    pub fn round(&mut self, column: usize, tile: usize, w: &Lane, fit: &Fit, top: f32) -> Lane {
        let stored = &mut self.codes[column * self.width + tile * LANES..][..LANES];
        let mut back = [0.0; LANES];
        for l in 0..LANES {
            let u = grid::code(w[l], 1.0 / fit.scale[l], fit.zero[l], top);
            // A whole number from 0 to 255 by construction.
            stored[l] = u as i32 as u8;
            back[l] = (u - fit.zero[l]) * fit.scale[l];
        }
        back
    }

    /// Refuses a scale that its type did not hold, in the `rows` rows that are not padding.
    pub fn check(&self, rows: usize, width: &Width) -> Result<()> {
        let wrong = |at: &usize| at % self.width < rows && !self.scales[*at].is_finite();
        match (0..self.scales.len()).find(wrong) {
            Some(at) => Err(Error::ScaleOverflow {
                scale: self.scales[at],
                row: self.first + at % self.width,
                group: at / self.width,
                scale_type: width.scale_type,
            }),
            None => Ok(()),
        }
    }
}

/// One matrix of all its chunks, columns back in their own order.
pub(super) fn assemble(chunks: &[Codes], outputs: usize, order: &[usize], group_len: usize, width: &Width) -> QuantizedMatrix {
    let inputs = order.len();
    let groups = inputs / group_len;
    let mut codes = vec![0; outputs * inputs];
    let mut scales = vec![0.0; outputs * groups];
    let mut zeros = vec![0.0; outputs * groups];
    for chunk in chunks {
        for row in chunk.first..outputs.min(chunk.first + chunk.width) {
            let (codes, at) = (&mut codes[row * inputs..], row - chunk.first);
            for (position, &column) in order.iter().enumerate() {
                codes[column] = chunk.codes[position * chunk.width + at];
            }
            for group in 0..groups {
                scales[row * groups + group] = chunk.scales[group * chunk.width + at];
                zeros[row * groups + group] = chunk.zeros[group * chunk.width + at];
            }
        }
    }
    let zeros = match width.grid {
        Grid::Sym => Zeros::Sym,
        Grid::Half => Zeros::Half,
        Grid::Asym => Zeros::Asym(zeros.into_iter().map(|zero| zero as u8).collect()),
        Grid::Offset => Zeros::Offset(zeros),
    };
    QuantizedMatrix { outputs, inputs, bits: width.bits, group: width.group, scale_type: width.scale_type, codes, scales, zeros }
}

#[cfg(test)]
mod tests {
    use kernels::{Group, ScaleType, bounds};
    use ndarray::{Array2, array};

    use super::*;
    use crate::quantize::testing::normals;

    fn width(bits: u8, group: usize, grid: Grid) -> Width {
        Width { bits, group: Group::Size(group), scale_type: ScaleType::Bf16, grid }
    }

    #[test]
    fn two_groups_by_hand() {
        // 3 bits: s = max|w| / 3.5: 1 and ½. 3.5 → 3.5 rounds to 4 and is clipped to 3; −1.75 / ½ = −3.5 → −4.
        let w = array![[3.5_f32, -2.2, 1.0, 0.2, -1.75, 0.6, 0.0, 1.2]];
        let matrix = rtn(w.view(), &width(3, 4, Grid::Sym), &Params::default()).unwrap();
        assert_eq!(matrix.scales, [1.0, 0.5]);
        assert_eq!(matrix.codes, [7, 2, 5, 4, 0, 5, 4, 6]);
        assert_eq!(matrix.dequantize(), array![[3.0, -2.0, 1.0, 0.0, -2.0, 0.5, 0.0, 1.0]]);
    }

    fn relative(w: &Array2<f32>, matrix: &QuantizedMatrix) -> f64 {
        let norm = |a: &Array2<f32>| a.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        norm(&(w - &matrix.dequantize())) / norm(w)
    }

    #[test]
    fn every_width_of_every_grid_stays_in_its_bound() {
        let w = normals(300, 256, 1);
        for grid in [Grid::Sym, Grid::Half, Grid::Asym, Grid::Offset] {
            let mut before = f64::INFINITY;
            for bits in grid.fewest_bits()..=8 {
                for clips in [1, 32] {
                    let width = width(bits, 128, grid);
                    let matrix = rtn(w.view(), &width, &Params { clips }).unwrap();
                    matrix.check().unwrap();
                    let error = relative(&w, &matrix);
                    assert!(error < bounds::rounding(bits), "{width:?} {clips}: {error}");
                    if clips == 32 {
                        assert!(error < before, "{width:?}: {error} at one bit more than {before}");
                        before = error;
                    }
                }
            }
        }
    }

    #[test]
    fn a_search_gains_what_the_literature_says() {
        // Relative errors on normal weights in groups of 128 at 2 bits, 20,000 groups, found once by the same search in
        // torch: integer zero 0.365, half 0.341, real zero 0.339.
        let w = normals(2000, 128, 3);
        for (grid, expected) in [(Grid::Asym, 0.365), (Grid::Half, 0.341), (Grid::Offset, 0.339)] {
            let error = relative(&w, &rtn(w.view(), &width(2, 128, grid), &Params { clips: 64 }).unwrap());
            assert!(error < 1.01 * expected, "{grid:?}: {error}");
        }
    }

    #[test]
    fn weights_move_the_scale_to_where_they_are() {
        let w = normals(50, 64, 4);
        let weights: Vec<f32> = (0..64).map(|column| if column % 4 == 0 { 10.0 } else { 0.1 }).collect();
        let weighted = |matrix: &QuantizedMatrix| {
            let off = &w - &matrix.dequantize();
            off.columns().into_iter().zip(&weights).map(|(c, &h)| h * c.dot(&c)).sum::<f32>()
        };
        let (width, params) = (width(2, 64, Grid::Sym), Params { clips: 32 });
        let plain = rtn(w.view(), &width, &params).unwrap();
        let aware = rtn_weighted(w.view(), &weights, &width, &params).unwrap();
        assert!(weighted(&aware) < 0.97 * weighted(&plain));
        assert!(relative(&w, &plain) < relative(&w, &aware));
    }

    #[test]
    fn edges() {
        let params = Params::default();
        let width = width(4, 2, Grid::Sym);
        let empty = rtn(Array2::zeros((0, 4)).view(), &width, &params).unwrap();
        assert_eq!((empty.codes.len(), empty.groups()), (0, 2));
        rtn(Array2::zeros((3, 0)).view(), &width, &params).unwrap().check().unwrap();
        // A constant group and one of zeros.
        let matrix = rtn(array![[0.3_f32, 0.3, 0.0, 0.0]].view(), &width, &Params { clips: 32 }).unwrap();
        matrix.check().unwrap();
        let back = matrix.dequantize();
        assert!((back[(0, 0)] - 0.3).abs() < 0.002 && back[(0, 2)] == 0.0, "{back}");
        let wrong = |w: Array2<f32>, width: Width| rtn(w.view(), &width, &params).unwrap_err().to_string();
        assert!(wrong(array![[0.1, f32::NAN]], width).contains("weight NaN at row 0, column 1 is not finite"));
        assert!(wrong(array![[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]], super::Width { group: Group::Size(4), ..width }).contains("such as 3"));
        assert!(wrong(array![[0.1, 0.2]], super::Width { bits: 1, ..width }).contains("1 bit is the grid half"));
        assert!(wrong(array![[0.1, 0.2]], super::Width { bits: 9, ..width }).contains("2 to 8 bits"));
        let f16 = super::Width { scale_type: ScaleType::F16, ..width };
        assert!(wrong(array![[0.1, 0.2], [1e6, 0.0]], f16).contains("row 1, group 0: its weights need a scale of inf"));
    }
}
