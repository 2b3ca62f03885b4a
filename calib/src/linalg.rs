//! Dense linear algebra, mostly in f32: the one file that names the libraries, faer and, for plain products, gemm, whose rate does not
//! fall where a factor stands turned (a second moment of 2048 inputs: 137 GFLOP/s against faer's 100, one AVX-512 core, 2026-11).
//! ndarray stands at their wall.
//!
//! Everything runs on the calling thread, in an order that does not depend on the machine's load: threads go over experts
//! and rows, outside.

use std::ops::Range;

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{LltError, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::matmul::triangular;
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::reborrow::{Reborrow, ReborrowMut};
use faer::{Accum, MatMut, MatRef, Par, Spec};
use ndarray::{Array2, ArrayView2, ArrayViewMut2};

use crate::{Error, Result};

/// Side of the squares in which [`mirror`] goes.
const MIRROR: usize = 32;

/// An upper triangular matrix, `[side, side]`, in f32.
#[derive(Clone, PartialEq, Debug)]
pub struct Upper {
    side: usize,
    /// Column by column, zeros below the diagonal.
    columns: Vec<f32>,
}

impl Upper {
    /// Rows, and columns.
    pub fn side(&self) -> usize {
        self.side
    }

    /// Column `j` down to the diagonal: `j + 1` values, the last of them the diagonal's.
    ///
    /// # Panics
    ///
    /// If there is no column `j`.
    #[inline]
    pub fn column(&self, j: usize) -> &[f32] {
        &self.columns[j * self.side..=j * self.side + j]
    }

    /// The diagonal's value of column `j`.
    ///
    /// # Panics
    ///
    /// If there is no column `j`.
    #[inline]
    pub fn diagonal(&self, j: usize) -> f32 {
        self.columns[j * self.side + j]
    }

    /// `w −= U[rows, columns]ᵀ · e`, with `e` `[rows, width]` and `w` `[columns, width]`, both row by row.
    ///
    /// # Panics
    ///
    /// If a range does not lie within the matrix, or a length is not `range · width`.
    pub fn subtract_transposed(&self, rows: Range<usize>, columns: Range<usize>, e: &[f32], w: &mut [f32]) {
        let width = w.len() / columns.len().max(1);
        let block = MatRef::from_column_major_slice(&self.columns, self.side, self.side);
        let block = block.submatrix(rows.start, columns.start, rows.len(), columns.len());
        let e = MatRef::from_row_major_slice(e, rows.len(), width);
        let w = MatMut::from_row_major_slice_mut(w, columns.len(), width);
        multiply(w, Accum::Add, block.transpose(), e, -1.0);
    }

    /// The matrix, `[side, side]`, row by row.
    pub fn to_dense(&self) -> Array2<f32> {
        Array2::from_shape_fn((self.side, self.side), |(i, j)| self.columns[j * self.side + i])
    }
}

/// The upper factor `U` of an inverse: `UᵀU = H⁻¹`, for a symmetric `h`, `[side, side]`.
///
/// Without the inverse: with `R` upper and `H = R·Rᵀ`, which is Cholesky from the last row up, `U = R⁻¹`. That takes ⅔ K³
/// flops, half of what inverting first takes, and loses no digits to a second inversion.
///
/// # Errors
///
/// [`Error::NotPositiveDefinite`], with the row whose pivot failed (rows are eliminated from the last to the first).
pub fn inverse_factor(h: Array2<f32>) -> Result<Upper> {
    let side = square(&h.view())?;
    let mut lower = if h.is_standard_layout() { h.into_raw_vec_and_offset().0 } else { h.iter().copied().collect() };
    // Reversed in memory, a matrix has its rows and columns in reverse order: Cholesky's first row is now `h`'s last. The
    // order of storage does not matter, because `h` is symmetric.
    lower.reverse();
    let scratch = cholesky_in_place_scratch::<f32>(side, Par::Seq, Spec::default());
    let mut memory = MemBuffer::new(scratch);
    let factor = MatMut::from_column_major_slice_mut(&mut lower, side, side);
    cholesky_in_place(factor, Default::default(), Par::Seq, MemStack::new(&mut memory), Spec::default())
        .map_err(|LltError::NonPositivePivot { index }| Error::NotPositiveDefinite { pivot: side - 1 - index.min(side - 1), side })?;
    let mut columns = vec![0.0; side * side];
    let factor = MatRef::from_column_major_slice(&lower, side, side);
    invert_lower_triangular(MatMut::from_column_major_slice_mut(&mut columns, side, side), factor, Par::Seq);
    // Reversed back, a lower triangle is an upper one.
    columns.reverse();
    Ok(Upper { side, columns })
}

/// Rows of a [`Triangle`] that lie together: wide enough for products, narrow enough that little lies below the diagonal.
const BAND: usize = 256;

/// The upper triangle of a symmetric matrix, `[side, side]`, in bands of [`BAND`] rows: each from its first row's diagonal on, row by
/// row, so that about half of the matrix is kept. What lies below the diagonal in a band stays zero.
#[derive(Clone, PartialEq, Debug)]
pub struct Triangle {
    side: usize,
    bands: Vec<f32>,
}

impl Triangle {
    /// Zeros.
    pub fn new(side: usize) -> Self {
        Self { side, bands: vec![0.0; Self::stored(side)] }
    }

    /// The upper triangle of a matrix.
    ///
    /// # Panics
    ///
    /// If it is not square.
    pub fn of(matrix: ArrayView2<'_, f32>) -> Self {
        assert_eq!(matrix.nrows(), matrix.ncols(), "a symmetric matrix is square");
        let mut triangle = Self::new(matrix.nrows());
        triangle.each_row(|row, values| values.iter_mut().zip(matrix.row(row).iter().skip(row)).for_each(|(to, &from)| *to = from));
        triangle
    }

    /// Values that are kept of a matrix of this side.
    pub fn stored(side: usize) -> usize {
        Self::layout(side).map(|(start, rows)| rows * (side - start)).sum()
    }

    /// What is kept, band by band: each from its first row's diagonal on, row by row, with zeros below the diagonal. [`Triangle::stored`].
    pub fn values(&self) -> &[f32] {
        &self.bands
    }

    /// From [`Triangle::values`]; `None` if they are not so many.
    pub fn from_values(side: usize, values: Vec<f32>) -> Option<Self> {
        (values.len() == Self::stored(side)).then_some(Self { side, bands: values })
    }

    /// First row and rows of every band.
    fn layout(side: usize) -> impl Iterator<Item = (usize, usize)> {
        (0..side).step_by(BAND).map(move |start| (start, BAND.min(side - start)))
    }

    /// Every row from its diagonal on.
    fn each_row(&mut self, mut with: impl FnMut(usize, &mut [f32])) {
        let mut rest = self.bands.as_mut_slice();
        for (start, rows) in Self::layout(self.side) {
            let (band, after) = std::mem::take(&mut rest).split_at_mut(rows * (self.side - start));
            rest = after;
            for (i, row) in band.chunks_exact_mut(self.side - start).enumerate() {
                with(start + i, &mut row[i..]);
            }
        }
    }

    /// Rows, and columns.
    pub fn side(&self) -> usize {
        self.side
    }

    /// The diagonal.
    pub fn diagonal(&self) -> impl Iterator<Item = f32> {
        let mut first = 0;
        Self::layout(self.side).flat_map(move |(start, rows)| {
            let (at, width) = (first, self.side - start);
            first += rows * width;
            (0..rows).map(move |i| self.bands[at + i * width + i])
        })
    }

    /// Adds `xᵀ·x` for `x` `[rows, side]`.
    ///
    /// # Panics
    ///
    /// If `x` is not as wide.
    pub fn add_gram(&mut self, x: ArrayView2<'_, f32>) {
        assert_eq!(x.ncols(), self.side, "a second moment of {} inputs", self.side);
        let x = x.as_standard_layout();
        let (count, side) = (x.nrows(), self.side);
        let Some(x) = x.as_slice() else { return };
        let x = MatRef::from_row_major_slice(x, count, side);
        let (upper, full) = (triangular::BlockStructure::TriangularUpper, triangular::BlockStructure::Rectangular);
        let mut rest = self.bands.as_mut_slice();
        for (start, rows) in Self::layout(side) {
            let (band, after) = std::mem::take(&mut rest).split_at_mut(rows * (side - start));
            rest = after;
            let (own, beyond) = MatMut::from_row_major_slice_mut(band, rows, side - start).split_at_col_mut(rows);
            let left = x.subcols(start, rows);
            triangular::matmul(own, upper, Accum::Add, left.transpose(), full, left, full, 1.0_f32, Par::Seq);
            let right = x.subcols(start + rows, side - start - rows);
            multiply(beyond, Accum::Add, left.transpose(), right, 1.0);
        }
    }

    /// Makes it `own · self + with · other`.
    ///
    /// # Panics
    ///
    /// If the other is not of the same size.
    pub fn combine(&mut self, own: f32, other: &Self, with: f32) {
        assert_eq!(self.side, other.side, "two triangles of one size");
        self.bands.iter_mut().zip(&other.bands).for_each(|(a, &b)| *a = own * *a + with * b);
    }

    /// Multiplies it.
    pub fn scale(&mut self, by: f32) {
        self.bands.iter_mut().for_each(|value| *value *= by);
    }

    /// The whole matrix, `[side, side]`.
    pub fn to_dense(mut self) -> Array2<f32> {
        let mut whole = Array2::zeros((self.side, self.side));
        self.each_row(|row, values| whole.row_mut(row).iter_mut().skip(row).zip(&*values).for_each(|(to, &from)| *to = from));
        mirror(whole.view_mut());
        whole
    }
}

/// Copies the upper triangle of `h` over the lower one.
///
/// # Panics
///
/// If `h` is not square.
pub fn mirror(mut h: ArrayViewMut2<'_, f32>) {
    assert_eq!(h.nrows(), h.ncols(), "a symmetric matrix is square");
    // By squares that fit the cache: one of the two sides is read across the rows.
    let side = h.nrows();
    for top in (0..side).step_by(MIRROR) {
        for left in (0..=top).step_by(MIRROR) {
            for i in top..side.min(top + MIRROR) {
                for j in left..i.min(left + MIRROR) {
                    h[(i, j)] = h[(j, i)];
                }
            }
        }
    }
}

/// `c = scale · a · b`, or adds it to `c`.
///
/// # Panics
///
/// If the shapes do not fit.
fn multiply(c: MatMut<'_, f32>, accum: Accum, a: MatRef<'_, f32>, b: MatRef<'_, f32>, scale: f32) {
    let (rows, inner, columns) = (c.nrows(), a.ncols(), c.ncols());
    assert!(a.nrows() == rows && b.nrows() == inner && b.ncols() == columns, "shapes of a product");
    let strides = [(c.col_stride(), c.row_stride()), (a.col_stride(), a.row_stride()), (b.col_stride(), b.row_stride())];
    let [(c_column, c_row), (a_column, a_row), (b_column, b_row)] = strides;
    let (c, a, b) = (c.as_ptr_mut(), a.as_ptr(), b.as_ptr());
    // SAFETY: each pointer and its strides are those of a view of faer's, whose every element may be read, and of `c` written; the shapes
    // are checked above, and `c` is borrowed alone.
    #[allow(unsafe_code)]
    unsafe {
        let add = matches!(accum, Accum::Add);
        gemm::gemm(
            rows,
            columns,
            inner,
            c,
            c_column,
            c_row,
            add,
            a,
            a_column,
            a_row,
            b,
            b_column,
            b_row,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// `a · b`, `[m, k]` times `[k, n]`.
///
/// # Panics
///
/// If the inner dimensions differ.
pub fn product(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) -> Array2<f32> {
    assert_eq!(a.ncols(), b.nrows(), "inner dimensions of a product");
    let mut c = Array2::zeros((a.nrows(), b.ncols()));
    let (a, b) = (a.as_standard_layout(), b.as_standard_layout());
    let (rows, inner, columns) = (a.nrows(), a.ncols(), b.ncols());
    if let (Some(a), Some(b), Some(c)) = (a.as_slice(), b.as_slice(), c.as_slice_mut()) {
        let a = MatRef::from_row_major_slice(a, rows, inner);
        let b = MatRef::from_row_major_slice(b, inner, columns);
        multiply(MatMut::from_row_major_slice_mut(c, rows, columns), Accum::Replace, a, b, 1.0);
    }
    c
}

/// `a · b[rows, columns]`, with `b` row by row in memory: `[m, rows]` times a block.
///
/// # Panics
///
/// If `a` is not as wide as there are rows, the block does not lie within `b`, or `b` is not row by row in memory.
pub fn block_product(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>, rows: Range<usize>, columns: Range<usize>) -> Array2<f32> {
    assert_eq!(a.ncols(), rows.len(), "inner dimensions of a product");
    let mut c = Array2::zeros((a.nrows(), columns.len()));
    let a = a.as_standard_layout();
    let ((height, width), whole) = (c.dim(), b.dim());
    let (Some(a), Some(b), Some(out)) = (a.as_slice(), b.as_slice(), c.as_slice_mut()) else {
        panic!("a matrix whose blocks are multiplied lies row by row in memory");
    };
    let a = MatRef::from_row_major_slice(a, height, rows.len());
    let b = MatRef::from_row_major_slice(b, whole.0, whole.1).submatrix(rows.start, columns.start, rows.len(), columns.len());
    multiply(MatMut::from_row_major_slice_mut(out, height, width), Accum::Replace, a, b, 1.0);
    c
}

/// Solves `a · x = b` for a symmetric positive definite `a`, `[side, side]`, in f64; `b` becomes `x`.
///
/// # Errors
///
/// [`Error::NotPositiveDefinite`]; `b` is then as it was.
///
/// # Panics
///
/// If `a` has not the square of `b`'s length.
pub fn solve(a: &mut [f64], b: &mut [f64]) -> Result<()> {
    let side = b.len();
    let mut memory = MemBuffer::new(cholesky_in_place_scratch::<f64>(side, Par::Seq, Spec::default()));
    let mut a = MatMut::from_column_major_slice_mut(a, side, side);
    cholesky_in_place(a.rb_mut(), Default::default(), Par::Seq, MemStack::new(&mut memory), Spec::default())
        .map_err(|LltError::NonPositivePivot { index }| Error::NotPositiveDefinite { pivot: index.min(side - 1), side })?;
    let mut x = MatMut::from_column_major_slice_mut(b, side, 1);
    solve_lower_triangular_in_place(a.rb(), x.rb_mut(), Par::Seq);
    solve_upper_triangular_in_place(a.rb().transpose(), x, Par::Seq);
    Ok(())
}

/// A thin singular value decomposition, `a = u · diag(s) · vᵀ`, singular values falling.
#[derive(Clone, Debug, PartialEq)]
pub struct Svd {
    /// `[m, r]` with `r = min(m, n)`.
    pub u: Array2<f64>,
    /// `[r]`.
    pub s: Vec<f64>,
    /// `[n, r]`.
    pub v: Array2<f64>,
}

/// Decomposes `a`, `[m, n]`, in f64.
///
/// # Errors
///
/// [`Error::NoConvergence`], for a matrix with NaN or infinity.
pub fn svd(a: ArrayView2<'_, f64>) -> Result<Svd> {
    let (rows, columns) = a.dim();
    let wrong = || Error::NoConvergence { rows, columns };
    let a = faer::Mat::from_fn(rows, columns, |i, j| a[(i, j)]);
    let found = a.thin_svd().map_err(|_| wrong())?;
    let s: Vec<f64> = found.S().column_vector().iter().copied().collect();
    if s.iter().any(|s| !s.is_finite()) {
        return Err(wrong());
    }
    let dense = |m: MatRef<'_, f64>| Array2::from_shape_fn((m.nrows(), m.ncols()), |(i, j)| m[(i, j)]);
    Ok(Svd { u: dense(found.U()), s, v: dense(found.V()) })
}

/// Eigenvectors of a symmetric matrix as columns, `[side, side]`, and their eigenvalues, falling.
///
/// # Errors
///
/// [`Error::NotSquare`]; [`Error::NoConvergence`], for a matrix with NaN or infinity.
pub fn eigh(a: ArrayView2<'_, f64>) -> Result<(Array2<f64>, Vec<f64>)> {
    let (rows, columns) = a.dim();
    if rows != columns {
        return Err(Error::NotSquare { rows, columns });
    }
    let wrong = || Error::NoConvergence { rows, columns };
    let a = faer::Mat::from_fn(rows, columns, |i, j| a[(i, j)]);
    let found = a.self_adjoint_eigen(faer::Side::Lower).map_err(|_| wrong())?;
    let values: Vec<f64> = found.S().column_vector().iter().rev().copied().collect();
    if values.iter().any(|value| !value.is_finite()) {
        return Err(wrong());
    }
    Ok((Array2::from_shape_fn((rows, rows), |(i, j)| found.U()[(i, rows - 1 - j)]), values))
}

fn square(h: &ArrayView2<'_, f32>) -> Result<usize> {
    let (rows, columns) = h.dim();
    if rows == columns { Ok(rows) } else { Err(Error::NotSquare { rows, columns }) }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    /// Reproducible values in −½ .. ½, without a dependency.
    fn values(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5
        };
        (0..count).map(|_| next()).collect()
    }

    fn matrix(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
        Array2::from_shape_vec((rows, columns), values(rows * columns, seed)).unwrap()
    }

    #[test]
    fn singular_values_and_eigenvalues_put_the_matrix_together_again() {
        let a = matrix(7, 4, 11).mapv(f64::from);
        let Svd { u, s, v } = svd(a.view()).unwrap();
        assert!(s.windows(2).all(|w| w[0] >= w[1]) && u.dim() == (7, 4) && v.dim() == (4, 4));
        let again = (&u * &ndarray::Array1::from(s.clone())).dot(&v.t());
        assert!((&again - &a).iter().all(|d| d.abs() < 1e-12), "{again}");
        let (vectors, values) = eigh(a.t().dot(&a).view()).unwrap();
        assert!(values.iter().zip(&s).all(|(value, s)| (value - s * s).abs() < 1e-12), "{values:?} {s:?}");
        let again = (&vectors * &ndarray::Array1::from(values)).dot(&vectors.t());
        assert!((&again - &a.t().dot(&a)).iter().all(|d| d.abs() < 1e-12));
        assert!(svd(array![[f64::NAN, 1.0]].view()).is_err());
        assert!(matches!(eigh(a.view()), Err(Error::NotSquare { rows: 7, columns: 4 })));
    }

    fn gram(rows: usize, side: usize, seed: u64) -> Array2<f32> {
        let mut h = Triangle::new(side);
        h.add_gram(matrix(rows, side, seed).view());
        h.to_dense()
    }

    #[test]
    fn a_factor_by_hand() {
        // H = R·Rᵀ with R = [[1, 2], [0, 4]]: [[1 + 4, 8], [8, 16]]; U = R⁻¹ = [[1, −½], [0, ¼]].
        let u = inverse_factor(array![[5.0, 8.0], [8.0, 16.0]]).unwrap();
        assert_eq!(u.to_dense(), array![[1.0, -0.5], [0.0, 0.25]]);
        assert_eq!((u.column(1), u.diagonal(0)), (&[-0.5, 0.25][..], 1.0));
    }

    #[test]
    fn the_factor_undoes_the_moment() {
        // UᵀU = H⁻¹ is U·H·Uᵀ = 1.
        for side in [1, 7, 64, 130] {
            let h = gram(3 * side + 5, side, side as u64);
            let u = inverse_factor(h.clone()).unwrap().to_dense();
            let one = product(product(u.view(), h.view()).view(), u.t());
            let off = (&one - &Array2::<f32>::eye(side)).iter().fold(0.0_f32, |worst, x| worst.max(x.abs()));
            assert!(off < 1e-3, "side {side}: {off}");
        }
    }

    #[test]
    fn a_moment_of_too_few_rows_names_its_pivot() {
        let error = inverse_factor(array![[1.0, 0.0, 0.0], [0.0, -2.0, 0.0], [0.0, 0.0, 1.0]]).unwrap_err();
        assert!(matches!(error, Error::NotPositiveDefinite { pivot: 1, side: 3 }), "{error}");
        assert!(inverse_factor(Array2::zeros((2, 2))).is_err());
        assert!(inverse_factor(Array2::zeros((2, 3))).unwrap_err().to_string().contains("2 x 3"));
        assert!(inverse_factor(array![[f32::NAN]]).is_err(), "NaN is no pivot");
        assert_eq!(inverse_factor(Array2::zeros((0, 0))).unwrap().side(), 0);
    }

    #[test]
    fn blocks_are_subtracted_where_they_stand() {
        let u = inverse_factor(gram(40, 10, 3)).unwrap();
        let (e, before) = (matrix(3, 5, 4), matrix(4, 5, 5));
        let mut w = before.clone();
        u.subtract_transposed(2..5, 5..9, e.as_slice().unwrap(), w.as_slice_mut().unwrap());
        let block = u.to_dense().slice(ndarray::s![2..5, 5..9]).to_owned();
        let by_hand = before - block.t().dot(&e);
        assert!((&w - &by_hand).iter().all(|x| x.abs() < 1e-5));
    }

    #[test]
    fn grams_add_up_over_batches() {
        // One band, whole bands, and a tail.
        for side in [6, 2 * BAND, BAND + 3] {
            let (first, second) = (matrix(9, side, 1), matrix(4, side, 2));
            let mut h = Triangle::new(side);
            h.add_gram(first.view());
            h.add_gram(second.view());
            let by_hand = first.t().dot(&first) + second.t().dot(&second);
            assert!(h.diagonal().zip(by_hand.diag()).all(|(a, b)| (a - b).abs() < 1e-5));
            assert_eq!(h, Triangle::of(h.clone().to_dense().view()), "what lies below the diagonal is not kept");
            assert!((&h.to_dense() - &by_hand).iter().all(|x| x.abs() < 1e-5), "side {side}");
        }
    }

    #[test]
    fn a_triangle_takes_about_half() {
        let (side, bands) = (2048, Triangle::new(2048).bands.len());
        assert_eq!(bands, side * (side + BAND) / 2);
        let mut h = Triangle::of(array![[1.0, 2.0], [9.0, 3.0]].view());
        h.combine(2.0, &Triangle::of(array![[1.0, 1.0], [1.0, 1.0]].view()), -1.0);
        h.scale(2.0);
        assert_eq!(h.to_dense(), array![[2.0, 6.0], [6.0, 10.0]]);
        assert_eq!(Triangle::new(0).to_dense().dim(), (0, 0));
    }

    #[test]
    fn a_block_of_a_product() {
        let (a, b) = (matrix(3, 4, 1), matrix(10, 9, 2));
        let by_hand = a.dot(&b.slice(ndarray::s![2..6, 5..9]));
        assert!((&block_product(a.view(), b.view(), 2..6, 5..9) - &by_hand).iter().all(|x| x.abs() < 1e-6));
    }

    #[test]
    fn two_unknowns_by_hand() {
        // [[4, 2], [2, 3]] · [1, 2] = [8, 8].
        let mut x = [8.0, 8.0];
        solve(&mut [4.0, 2.0, 2.0, 3.0], &mut x).unwrap();
        assert!((x[0] - 1.0).abs() < 1e-12 && (x[1] - 2.0).abs() < 1e-12, "{x:?}");
        let mut kept = [1.0, 1.0];
        assert!(matches!(solve(&mut [1.0, 2.0, 2.0, 1.0], &mut kept), Err(Error::NotPositiveDefinite { pivot: 1, side: 2 })));
        assert_eq!(kept, [1.0, 1.0]);
    }

    #[test]
    fn mirroring_reaches_every_element() {
        let mut h = matrix(75, 75, 8);
        let upper = h.clone();
        mirror(h.view_mut());
        assert!(h.indexed_iter().all(|((i, j), &x)| x == upper[(i.min(j), i.max(j))]));
    }

    #[test]
    fn products_of_views_and_of_nothing() {
        let (a, b) = (matrix(3, 4, 1), matrix(3, 5, 2));
        assert!((&product(a.t(), b.view()) - &a.t().dot(&b)).iter().all(|x| x.abs() < 1e-6));
        assert_eq!(product(Array2::zeros((0, 3)).view(), Array2::zeros((3, 2)).view()).dim(), (0, 2));
        assert_eq!(product(Array2::zeros((2, 0)).view(), Array2::zeros((0, 2)).view()), Array2::<f32>::zeros((2, 2)));
    }
}
