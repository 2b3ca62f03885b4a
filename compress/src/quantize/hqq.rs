//! HQQ: half-quadratic quantization (Badri and Shaji 2023, package hqq 0.2.8), the baseline without calibration.
//!
//! Scales are those of the range and stay; zero points are fitted. Up to 20 steps, with `p = 0.7` and `β = 10` that grows by 1%
//! a step: codes `u = clamp(round(w/s + z))`, residual `r = w − s·(u − z)`, its sparse part
//! `e = sign(r)·max(|r| − |r|^(p−1)/β, 0)`, and `z` becomes the mean over the group of `u − (w − e)/s`. It stops when the mean `|r|`
//! of the matrix no longer falls. The zero is real, so the grid is `offset`; on `asym` it is rounded at the end.

use kernels::{QuantizedMatrix, Zeros};
use ndarray::ArrayView2;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::columns::check_finite;
use super::grid::floor;
use super::{Grid, Width};
use crate::{Error, Result};

/// Steps, at most.
const STEPS: usize = 20;
/// The norm of the residual that is minimized.
const NORM: f32 = 0.7;
/// The first step's weight of the quadratic part, and how it grows.
const WEIGHT: f32 = 10.0;
const GROWTH: f32 = 1.01;

/// Knobs of HQQ: none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Hqq")]
#[serde(deny_unknown_fields, default)]
pub struct Params {}

/// Quantizes `w`, `[out, in]`, without calibration.
///
/// # Errors
///
/// [`Error::HqqGrid`] on a grid without a zero point to fit; else as [`rtn`](super::rtn::rtn).
pub fn hqq(w: ArrayView2<'_, f32>, width: &Width) -> Result<QuantizedMatrix> {
    if !matches!(width.grid, Grid::Asym | Grid::Offset) {
        return Err(Error::HqqGrid { grid: width.grid });
    }
    let (outputs, inputs) = w.dim();
    let group_len = width.group_len(inputs)?;
    check_finite(w)?;
    let w = w.as_standard_layout();
    let flat = w.as_slice().unwrap_or_default();
    let mut groups: Vec<Group<'_>> = flat.par_chunks(group_len).map(|w| Group::new(w, width)).collect();
    let per_row = inputs / group_len;
    if let Some(at) = groups.iter().position(|group| !group.scale.is_finite()) {
        let (row, group) = (at / per_row, at % per_row);
        return Err(Error::ScaleOverflow { scale: groups[at].scale, row, group, scale_type: width.scale_type });
    }
    let (mut best, mut weight) = (f64::INFINITY, WEIGHT);
    for _ in 0..STEPS {
        // Summed in the order of the groups, whatever thread had them.
        let residuals: Vec<f64> = groups.par_iter_mut().map(|group| group.step(weight)).collect();
        let residual: f64 = residuals.iter().sum();
        weight *= GROWTH;
        if residual >= best {
            break;
        }
        best = residual;
    }
    groups.par_iter_mut().for_each(|group| group.store(width));
    Ok(assemble(&groups, outputs, inputs, width))
}

/// One group on its way.
struct Group<'a> {
    w: &'a [f32],
    scale: f32,
    zero: f32,
    top: f32,
}

impl<'a> Group<'a> {
    /// The range's scale, and the zero that puts its low end on code 0.
    fn new(w: &'a [f32], width: &Width) -> Self {
        let low = w.iter().copied().fold(f32::INFINITY, f32::min);
        let high = w.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let top = f32::from(width.top());
        // A zero point thousands of codes away would lose the digits that it has for the group's own width.
        let reach = ((high - low) / top).max(low.abs().max(high.abs()) / 2048.0);
        let scale = width.scale_type.round(reach).max(floor(width.scale_type));
        let zero = -low / scale;
        // At 4 bits the package starts from a whole zero.
        let zero = if width.bits == 4 { zero.round_ties_even() } else { zero };
        Self { w, scale, zero, top }
    }

    fn code(&self, w: f32) -> f32 {
        (w / self.scale + self.zero).clamp(0.0, self.top).round_ties_even()
    }

    /// Moves the zero; gives `Σ|r|` before.
    fn step(&mut self, weight: f32) -> f64 {
        let (mut sum, mut residual) = (0.0, 0.0);
        for &w in self.w {
            let u = self.code(w);
            let r = w - self.scale * (u - self.zero);
            residual += f64::from(r.abs());
            // A residual of zero to a negative power is infinite, so nothing of it is left.
            let e = r.signum() * (r.abs() - r.abs().powf(NORM - 1.0) / weight).max(0.0);
            sum += f64::from(u - (w - e) / self.scale);
        }
        self.zero = (sum / self.w.len() as f64) as f32;
        residual
    }

    /// Rounds the zero to what is stored.
    fn store(&mut self, width: &Width) {
        self.zero = match width.grid {
            Grid::Asym => self.zero.round_ties_even().clamp(0.0, self.top),
            _ => width.scale_type.round(self.zero),
        };
    }
}

fn assemble(groups: &[Group<'_>], outputs: usize, inputs: usize, width: &Width) -> QuantizedMatrix {
    let zeros = groups.iter().map(|group| group.zero);
    QuantizedMatrix {
        outputs,
        inputs,
        bits: width.bits,
        group: width.group,
        scale_type: width.scale_type,
        codes: groups.iter().flat_map(|group| group.w.iter().map(|&w| group.code(w) as u8)).collect(),
        scales: groups.iter().map(|group| group.scale).collect(),
        zeros: if width.grid == Grid::Asym { Zeros::Asym(zeros.map(|zero| zero as u8).collect()) } else { Zeros::Offset(zeros.collect()) },
    }
}

#[cfg(test)]
mod tests {
    use kernels::{ScaleType, bounds};
    use ndarray::{Array2, array};

    use super::*;
    use crate::quantize::rtn::{self, rtn};
    use crate::quantize::testing::normals;

    fn width(bits: u8, group: usize, grid: Grid) -> Width {
        Width { bits, group: kernels::Group::Size(group), scale_type: ScaleType::F32, grid }
    }

    #[test]
    fn one_step_by_hand() {
        // 2 bits over 0 .. 3: s = 1, z = 0; codes 0, 1, 3 and, for 1.4, 1; the only residual is 0.4. Its sparse part is
        // 0.4 − 0.4^(−0.3)/10 = 0.4 − 0.13163 = 0.26837, so z = (1 − (1.4 − 0.26837))/4 = −0.0329.
        let w = [0.0_f32, 1.0, 3.0, 1.4];
        let mut group = Group::new(&w, &width(2, 4, Grid::Offset));
        assert_eq!((group.scale, group.zero), (1.0, 0.0));
        let residual = group.step(10.0);
        assert!((residual - 0.4).abs() < 1e-6);
        assert!((group.zero + 0.131_63 / 4.0).abs() < 1e-4, "{}", group.zero);
    }

    /// The mean of `|r|^p`, which HQQ lowers.
    fn residual(w: &Array2<f32>, matrix: &QuantizedMatrix) -> f64 {
        (w - &matrix.dequantize()).iter().map(|r| f64::from(r.abs()).powf(f64::from(NORM))).sum()
    }

    #[test]
    fn beats_the_plain_range_in_its_own_norm() {
        let w = normals(64, 256, 1);
        for bits in 2..=4 {
            let width = width(bits, 64, Grid::Offset);
            let plain = rtn(w.view(), &width, &rtn::Params::default()).unwrap();
            let fitted = hqq(w.view(), &width).unwrap();
            fitted.check().unwrap();
            assert_eq!(fitted.scales, plain.scales);
            assert!(residual(&w, &fitted) < residual(&w, &plain), "{bits} bits");
        }
    }

    #[test]
    fn a_whole_zero_costs_little() {
        let w = normals(64, 128, 2);
        for bits in 2..=8 {
            let matrix = hqq(w.view(), &width(bits, 64, Grid::Asym)).unwrap();
            matrix.check().unwrap();
            let off = &w - &matrix.dequantize();
            assert!((off.mapv(|x| x * x).sum() / w.mapv(|x| x * x).sum()).sqrt() < bounds::rounding(bits) as f32 * 1.2, "{bits}");
        }
    }

    #[test]
    fn edges() {
        hqq(Array2::zeros((2, 4)).view(), &width(4, 2, Grid::Offset)).unwrap().check().unwrap();
        assert_eq!(hqq(Array2::zeros((0, 4)).view(), &width(4, 2, Grid::Asym)).unwrap().codes.len(), 0);
        let constant = hqq(array![[0.3_f32, 0.3]].view(), &width(3, 2, Grid::Offset)).unwrap();
        assert!((constant.dequantize() - 0.3).iter().all(|off| off.abs() < 0.003), "{constant:?}");
        let error = hqq(Array2::zeros((2, 4)).view(), &width(4, 2, Grid::Sym)).unwrap_err().to_string();
        assert!(error.contains("hqq fits a zero point"), "{error}");
        let f16 = Width { scale_type: ScaleType::F16, ..width(2, 2, Grid::Offset) };
        assert!(hqq(array![[0.0, 1.0], [1e6, 0.0]].view(), &f16).unwrap_err().to_string().contains("row 1, group 0"));
    }
}
