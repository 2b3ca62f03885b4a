//! Some rows of a matrix, column by column: the form in which quantizers work.
//!
//! Rows are independent of one another, columns are not: so a vector of the CPU holds one column of [`LANES`] rows, and every
//! row of a chunk goes through the columns at the same time. A chunk that ends inside a vector is padded with rows of zeros,
//! which nobody reads.

// Rows stand side by side in several arrays, and one index names the same row in all of them.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use kernels::simd::widest;
use ndarray::{ArrayView1, ArrayView2, CowArray, Ix1};

use crate::{Error, Result};

/// Rows that one vector holds.
pub(super) const LANES: usize = 16;

/// Rows of a chunk: enough that a matrix product over them runs at full rate, few enough that they stay in the cache.
pub(super) const CHUNK: usize = 256;

/// One value of each of [`LANES`] rows.
pub(super) type Lane = [f32; LANES];

/// Rows of a matrix, column by column.
#[derive(Clone)]
pub(super) struct Columns {
    /// Rows, padding included: a multiple of [`LANES`].
    pub width: usize,
    /// `[columns, width]`.
    pub values: Vec<f32>,
}

impl Columns {
    /// Rows `rows` of `w`, `[out, in]`, with its columns in this order.
    pub fn gather(w: ArrayView2<'_, f32>, rows: Range<usize>, order: &[usize]) -> Self {
        let width = rows.len().next_multiple_of(LANES);
        let mut values = vec![0.0; order.len() * width];
        let padding = vec![0.0; w.ncols()];
        for tile in 0..width / LANES {
            // One line is read of each row, and one is written.
            let lines: [CowArray<'_, f32, Ix1>; LANES] = std::array::from_fn(|l| {
                let row = rows.start + tile * LANES + l;
                let line = if row < rows.end { w.row(row) } else { ArrayView1::from(&padding) };
                if line.as_slice().is_some() { line.into() } else { line.to_owned().into() }
            });
            let lines: [&[f32]; LANES] = std::array::from_fn(|l| lines[l].as_slice().unwrap_or(&padding));
            for (position, &column) in order.iter().enumerate() {
                let lane = lane_mut(&mut values, width, position, tile);
                for l in 0..LANES {
                    lane[l] = lines[l][column];
                }
            }
        }
        Self { width, values }
    }

    /// Vectors a column.
    pub fn tiles(&self) -> usize {
        self.width / LANES
    }

    /// Column `column` of the rows of one vector.
    #[inline(always)]
    pub fn lane(&self, column: usize, tile: usize) -> &Lane {
        lane(&self.values, self.width, column, tile)
    }
}

/// Column `column` of the rows of one vector, in `values` `[columns, width]`.
#[inline(always)]
pub(super) fn lane(values: &[f32], width: usize, column: usize, tile: usize) -> &Lane {
    &values[column * width + tile * LANES..][..LANES].as_chunks().0[0]
}

/// As [`lane`], to write.
#[inline(always)]
pub(super) fn lane_mut(values: &mut [f32], width: usize, column: usize, tile: usize) -> &mut Lane {
    &mut values[column * width + tile * LANES..][..LANES].as_chunks_mut().0[0]
}

/// The rows of every chunk of a matrix of `outputs` rows.
pub(super) fn chunks(outputs: usize) -> impl ExactSizeIterator<Item = Range<usize>> {
    (0..outputs.div_ceil(CHUNK)).map(move |chunk| chunk * CHUNK..outputs.min((chunk + 1) * CHUNK))
}

/// Refuses a weight that is not finite.
pub(super) fn check_finite(w: ArrayView2<'_, f32>) -> Result<()> {
    let clean = |row: ArrayView1<'_, f32>| match row.as_slice() {
        // Without a way out of the loop, which then runs over whole vectors.
        Some(row) => {
            let most = widest(
                #[inline(always)]
                || row.iter().fold(0, |most: u32, value| most.max(value.to_bits() & 0x7fff_ffff)),
            );
            most < f32::INFINITY.to_bits()
        }
        None => row.iter().all(|value| value.is_finite()),
    };
    for (row, values) in w.rows().into_iter().enumerate() {
        if !clean(values)
            && let Some((column, &value)) = values.iter().enumerate().find(|(_, value)| !value.is_finite())
        {
            return Err(Error::WeightNotFinite { value, row, column });
        }
    }
    Ok(())
}

#[test]
fn a_chunk_is_its_rows_in_another_order() {
    let w = ndarray::Array2::from_shape_fn((5, 3), |(row, column)| (10 * row + column) as f32);
    let columns = Columns::gather(w.view(), 2..5, &[2, 0, 1]);
    assert_eq!((columns.width, columns.tiles()), (16, 1));
    assert_eq!(columns.lane(0, 0)[..4], [22.0, 32.0, 42.0, 0.0]);
    assert_eq!(columns.lane(2, 0)[..4], [21.0, 31.0, 41.0, 0.0]);
    assert_eq!(chunks(600).collect::<Vec<_>>(), [0..256, 256..512, 512..600]);
}
