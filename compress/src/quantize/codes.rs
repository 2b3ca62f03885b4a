//! Codes, scales and zero points while they are being chosen, and the matrix that they become.

// Rows stand side by side in several arrays, and one index names the same row in all of them.
#![allow(clippy::needless_range_loop)]

use kernels::{QuantizedMatrix, Zeros};

use super::columns::{Columns, LANES, Lane, lane, lane_mut};
use super::grid::{self, Fit};
use super::{Grid, Width};
use crate::{Error, Result};

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
    /// One over them, `[groups, width]`.
    inverses: Vec<f32>,
    /// `[groups, width]`.
    zeros: Vec<f32>,
}

impl Codes {
    pub fn new(columns: &Columns, groups: usize, first: usize) -> Self {
        let width = columns.width;
        Self {
            first,
            width,
            codes: vec![0; columns.values.len()],
            scales: vec![0.0; groups * width],
            inverses: vec![0.0; groups * width],
            zeros: vec![0.0; groups * width],
        }
    }

    /// As `other`, without its codes.
    pub fn with_scales(other: &Self) -> Self {
        let (scales, inverses, zeros) = (other.scales.clone(), other.inverses.clone(), other.zeros.clone());
        Self { first: other.first, width: other.width, codes: vec![0; other.codes.len()], scales, inverses, zeros }
    }

    /// The first row of the chunk in the matrix.
    pub fn first(&self) -> usize {
        self.first
    }

    /// What the codes of one column stand for.
    #[inline(always)]
    pub fn values(&self, column: usize, tile: usize, fit: &Fit) -> Lane {
        let codes = &self.codes[column * self.width + tile * LANES..][..LANES];
        let mut back = [0.0; LANES];
        for l in 0..LANES {
            back[l] = (f32::from(codes[l]) - fit.zero[l]) * fit.scale[l];
        }
        back
    }

    /// Scales and zeros of one group.
    #[inline(always)]
    pub fn fit(&self, group: usize, tile: usize) -> Fit {
        Fit {
            scale: *lane(&self.scales, self.width, group, tile),
            inverse: *lane(&self.inverses, self.width, group, tile),
            zero: *lane(&self.zeros, self.width, group, tile),
        }
    }

    /// Sets them.
    #[inline(always)]
    pub fn set_fit(&mut self, group: usize, tile: usize, fit: &Fit) {
        *lane_mut(&mut self.scales, self.width, group, tile) = fit.scale;
        *lane_mut(&mut self.inverses, self.width, group, tile) = fit.inverse;
        *lane_mut(&mut self.zeros, self.width, group, tile) = fit.zero;
    }

    /// Stores the nearest codes of one column; gives what they stand for.
    #[inline(always)]
    pub fn round(&mut self, column: usize, tile: usize, w: &Lane, fit: &Fit, top: f32) -> Lane {
        let stored = &mut self.codes[column * self.width + tile * LANES..][..LANES];
        let codes = fit.codes(w, top);
        let mut back = [0.0; LANES];
        for l in 0..LANES {
            // 0 to 255 by construction; the sum's lowest bits are the number, without the checks of a conversion.
            stored[l] = (codes[l] + grid::ROUND).to_bits() as u8;
            back[l] = (codes[l] - fit.zero[l]) * fit.scale[l];
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
        let rows = chunk.width.min(outputs - chunk.first);
        for first in (0..rows).step_by(LANES) {
            let lanes = first..rows.min(first + LANES);
            let codes = &mut codes[(chunk.first + first) * inputs..];
            for (position, &column) in order.iter().enumerate() {
                let from = &chunk.codes[position * chunk.width + first..][..lanes.len()];
                for (row, &code) in from.iter().enumerate() {
                    codes[row * inputs + column] = code;
                }
            }
        }
        for row in 0..rows {
            for group in 0..groups {
                scales[(chunk.first + row) * groups + group] = chunk.scales[group * chunk.width + row];
                zeros[(chunk.first + row) * groups + group] = chunk.zeros[group * chunk.width + row];
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
