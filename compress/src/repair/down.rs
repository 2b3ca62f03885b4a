//! Down projections after removal, in closed form: what the experts that are left can say of what the removed ones said.
//!
//! With the routed output `y_t` of the original block, routing weights `w`, what enters the down projections `a_{t,e}` and the rest
//! `r_t = y_t − Σ_e w_{t,e} D_e a_{t,e}`, the changes minimize `Σ_t ‖r_t − Σ_e w_{t,e} Δ_e a_{t,e}‖² + λ Σ_e ‖Δ_e‖²`: one expert after the
//! other, `Δ_e ← (Σ r (w a)ᵀ + Δ_e Σ w² a aᵀ)(Σ w² a aᵀ + λ)⁻¹` against what the others leave over, in a few rounds ([`Params::rounds`]). `λ` is the same for
//! all experts of a layer, a share of what a direction of theirs holds on average, so that an expert that few tokens chose hardly moves.
//! Samples that are held out decide whether it is taken.

use calib::linalg::{inverse_factor, product};
use calib::stats::Moment;
use ndarray::{Array2, ArrayView2, Axis};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Result;

/// Knobs of the fit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "RemovalDown")]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// How strongly the matrices are held where they were, as a share of their inputs' mean square.
    pub damping: f64,
    /// Rounds over the experts; 0 leaves the projections alone.
    pub rounds: usize,
}

impl Default for Params {
    fn default() -> Self {
        Self { damping: 0.3, rounds: 3 }
    }
}

/// Rows of a product that one thread makes; fixed, so that the sums do not depend on the threads.
const ROWS: usize = 64;

/// What one expert was given.
pub struct Given {
    /// Tokens that chose it, rising.
    pub tokens: Vec<usize>,
    /// What enters its down projection, times the routing weight, `[tokens that chose it, inner]`.
    pub inner: Array2<f32>,
}

/// What came of it.
pub struct Fitted {
    /// What is added to each expert's down projection, `[hidden, inner]`.
    pub changes: Vec<Array2<f32>>,
    /// `Σ ‖r‖²` over the tokens held out before.
    pub before: f64,
    /// And after.
    pub after: f64,
}

/// Fits; `rest` is `r`, `[tokens, hidden]`, and `held` says which tokens are held out.
///
/// # Errors
///
/// [`calib::Error::NotPositiveDefinite`] where there is no damping and too few tokens.
///
/// # Panics
///
/// If the shapes do not fit together.
pub fn fit(given: &[Given], mut rest: Array2<f32>, held: &[bool], params: &Params) -> Result<Fitted> {
    assert_eq!(rest.nrows(), held.len(), "a row for every token");
    let before = squares(&rest, held);
    let seen: Vec<Vec<usize>> = given.iter().map(|given| (0..given.tokens.len()).filter(|&i| !held[given.tokens[i]]).collect()).collect();
    let moment = |(given, seen): (&Given, &Vec<usize>)| {
        let mut moment = Moment::new(given.inner.ncols());
        moment.add(given.inner.select(Axis(0), seen).view(), None);
        moment.into_matrix()
    };
    let moments: Vec<Array2<f32>> = given.par_iter().zip(&seen).map(moment).collect();
    let trace: f64 = moments.iter().flat_map(|h| h.diag().to_vec()).map(f64::from).sum();
    let width: usize = moments.iter().map(Array2::nrows).sum();
    let mut changes: Vec<Array2<f32>> = given.iter().map(|given| Array2::zeros((rest.ncols(), given.inner.ncols()))).collect();
    if trace <= 0.0 {
        return Ok(Fitted { changes, before, after: before });
    }
    let damping = (params.damping * trace / width as f64) as f32;
    let damped = |mut h: Array2<f32>| {
        h.diag_mut().mapv_inplace(|d| d + damping);
        inverse_factor(h).map(|upper| upper.to_dense())
    };
    let factors: Vec<Array2<f32>> = moments.into_par_iter().map(damped).collect::<calib::Result<_>>()?;
    for _ in 0..params.rounds {
        for (((given, seen), factor), change) in given.iter().zip(&seen).zip(&factors).zip(&mut changes) {
            let tokens: Vec<usize> = seen.iter().map(|&i| given.tokens[i]).collect();
            let left = rest.select(Axis(0), &tokens);
            // Its own part of the rest is in `left` already: what damping holds back of the change so far is all that is missing.
            let cross = wide(left.t(), given.inner.select(Axis(0), seen).view()) - &(&*change * damping);
            let step = wide(wide(cross.view(), factor.t()).view(), factor.view());
            let said = wide(given.inner.view(), step.t());
            given.tokens.iter().zip(said.rows()).for_each(|(&t, said)| rest.row_mut(t).zip_mut_with(&said, |r, &s| *r -= s));
            *change += &step;
        }
    }
    let after = squares(&rest, held);
    Ok(Fitted { changes, before, after })
}

/// `a · b` by all threads: the experts follow each other, so their products are what is shared out.
fn wide(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) -> Array2<f32> {
    let (a, b) = (a.as_standard_layout(), b.as_standard_layout());
    let mut c = Array2::zeros((a.nrows(), b.ncols()));
    let parts: Vec<_> = c.axis_chunks_iter_mut(Axis(0), ROWS).zip(a.axis_chunks_iter(Axis(0), ROWS)).collect();
    parts.into_par_iter().for_each(|(mut c, a)| c.assign(&product(a, b.view())));
    c
}

/// `Σ ‖r‖²` over the tokens held out.
fn squares(rest: &Array2<f32>, held: &[bool]) -> f64 {
    let rows = rest.rows().into_iter().zip(held).filter(|(_, held)| **held);
    rows.flat_map(|(row, _)| row.to_vec()).map(|r| f64::from(r).powi(2)).sum()
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn one_expert_by_hand() {
        // Inner values 1 and 2 with rests 1 and 2: Σ r a = 5, Σ a² = 5; damping 1 is of the mean square 5, so Δ = 5 / 10.
        let given = [Given { tokens: vec![0, 2], inner: array![[1.0], [2.0]] }];
        let fitted = fit(&given, array![[1.0], [9.0], [2.0]], &[false; 3], &Params { damping: 1.0, ..Params::default() }).unwrap();
        assert!((fitted.changes[0][(0, 0)] - 0.5).abs() < 1e-3, "{}", fitted.changes[0]);
        let exact = fit(&given, array![[1.0], [9.0], [2.0]], &[false; 3], &Params { damping: 1e-6, ..Params::default() }).unwrap();
        assert!((exact.changes[0][(0, 0)] - 1.0).abs() < 1e-4, "{}", exact.changes[0]);
    }

    #[test]
    fn experts_share_what_is_left() {
        // Two experts see the same number on every token: together they say what is left.
        let inner = || Array2::from_shape_fn((64, 1), |(t, _)| (t as f32).sin());
        let given = [(); 2].map(|()| Given { tokens: (0..64).collect(), inner: inner() });
        let held: Vec<bool> = (0..64).map(|t| t >= 48).collect();
        let fitted = fit(&given, inner() * 2.0, &held, &Params { damping: 1e-3, ..Params::default() }).unwrap();
        let sum = fitted.changes[0][(0, 0)] + fitted.changes[1][(0, 0)];
        assert!((sum - 2.0).abs() < 1e-2 && fitted.after < 1e-3 * fitted.before, "{sum} {} {}", fitted.before, fitted.after);
    }

    #[test]
    fn no_rounds_change_nothing_and_threads_share_the_rows() {
        let given = [Given { tokens: vec![0], inner: array![[1.0]] }];
        let fitted = fit(&given, array![[2.0]], &[true], &Params { rounds: 0, ..Params::default() }).unwrap();
        assert_eq!((fitted.changes[0][(0, 0)], fitted.before, fitted.after), (0.0, 4.0, 4.0));
        // 150 rows are three parts, the last of 22.
        let a = Array2::from_shape_fn((150, 7), |(i, j)| ((i * 7 + j) as f32).sin());
        let b = Array2::from_shape_fn((7, 5), |(i, j)| ((i * 5 + j) as f32).cos());
        assert!((wide(a.view(), b.view()) - a.dot(&b)).iter().all(|d| d.abs() < 1e-5));
    }

    #[test]
    fn experts_without_tokens_stay() {
        let given = [Given { tokens: vec![], inner: Array2::zeros((0, 2)) }, Given { tokens: vec![0], inner: array![[1.0, 0.5]] }];
        let fitted = fit(&given, array![[1.0]], &[false], &Params::default()).unwrap();
        assert!(fitted.changes[0].iter().all(|x| *x == 0.0) && fitted.changes[1].iter().any(|x| *x != 0.0));
        let nothing = fit(&given[..1], array![[1.0]], &[true], &Params::default()).unwrap();
        assert_eq!((nothing.before, nothing.after), (1.0, 1.0));
    }
}
