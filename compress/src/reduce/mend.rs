//! A layer that lost experts, fitted to what its whole block said of the same tokens.

use calib::arch::{Moe, Spec};
use calib::forward::router::{At, route};
use calib::linalg::product;
use ndarray::{Array2, ArrayView2, Axis, s};
use rayon::prelude::*;

use super::stream::{Pass, every};
use super::tokens::{self, inner, output};
use super::weights::{Owned, Reduced, adjusted, repaired};
use crate::Result;
use crate::plan::{Fate, Repaired};
use crate::repair::{down, removal};

/// Tokens whose candidates are held at once.
pub const CHUNK: usize = 4096;

impl Pass<'_> {
    /// Fits the router and a factor an expert, and then the down projections, each if asked, and puts them into `own`. `held` says
    /// which of the rows are held out.
    pub(super) fn repair(
        &self,
        layer: usize,
        spec: &Spec,
        (fate, own): (&mut Fate, &mut Owned),
        (x, y): (ArrayView2<'_, f32>, ArrayView2<'_, f32>),
        held: &[bool],
        params: &removal::Params,
    ) -> Result<()> {
        let Some(moe) = spec.moe(layer) else { return Ok(()) };
        let model = self.request.model;
        let (x, y, held) = (every(x, params.tokens), every(y, params.tokens), removal::every(held, params.tokens));
        let mut found = None;
        if params.steps > 0 {
            let reduced = Reduced { model, spec, fate, own };
            let (weights, correction) = reduced.router(layer)?;
            let tokens = candidates(&reduced, layer, moe, weights.view(), (x.view(), y.view()))?;
            let (router, correction) = (weights.view(), correction.as_deref());
            let fitted = removal::Fit { moe, router, correction, x: x.view(), tokens: &tokens, held: &held }.run(params)?;
            repaired(model, layer, fate, own, &fitted)?;
            found = Some(Repaired { before: fitted.before, after: fitted.after });
        }
        if params.down.rounds > 0 {
            let (given, rest) = given(&Reduced { model, spec, fate, own }, layer, moe, (x.view(), y.view()))?;
            let fitted = down::fit(&given, rest, &held, &params.down)?;
            let of_all = |squares: f64| squares / removal::energy(y.view(), &held).max(f64::MIN_POSITIVE);
            let found = found.get_or_insert(Repaired { before: of_all(fitted.before), after: of_all(fitted.before) });
            if fitted.after < fitted.before {
                adjusted(model, layer, fate, own, &fitted.changes)?;
                found.after = of_all(fitted.after);
            }
        }
        fate.repaired = found;
        Ok(())
    }
}

/// What each expert of a reduced layer is given, and what the original block said beyond what they say, `[tokens, hidden]`.
fn given(
    reduced: &Reduced<'_>,
    layer: usize,
    moe: &Moe,
    (x, y): (ArrayView2<'_, f32>, ArrayView2<'_, f32>),
) -> Result<(Vec<down::Given>, Array2<f32>)> {
    let (weights, correction) = reduced.router(layer)?;
    let logits = product(x, weights.t()).into_raw_vec_and_offset().0;
    let routing = route(moe, correction.as_deref(), logits, At { layer, first: 0 })?;
    let of = |expert: usize| {
        let chosen = routing.chosen.iter().enumerate().filter(|(_, e)| **e as usize == expert).map(|(at, _)| at);
        let (tokens, weights): (Vec<usize>, Vec<f32>) = chosen.map(|at| (at / routing.top_k, routing.weights[at])).unzip();
        let mut inner = inner(reduced, layer, expert, x.select(Axis(0), &tokens).view())?;
        inner.rows_mut().into_iter().zip(weights).for_each(|(mut row, weight)| row *= weight);
        let said = product(inner.view(), tokens::down(reduced, layer, expert)?.t());
        Ok((down::Given { tokens, inner }, said))
    };
    let each: Vec<(down::Given, Array2<f32>)> = (0..moe.experts).into_par_iter().map(of).collect::<calib::Result<_>>()?;
    let mut rest = y.to_owned();
    let given = each.into_iter().map(|(given, said)| {
        given.tokens.iter().zip(said.rows()).for_each(|(&t, said)| rest.row_mut(t).zip_mut_with(&said, |r, &s| *r -= s));
        given
    });
    let given = given.collect();
    Ok((given, rest))
}

/// The products of every token with the experts that it may choose: the best `2 k + 2` by logit.
fn candidates(
    reduced: &Reduced<'_>,
    layer: usize,
    moe: &Moe,
    router: ArrayView2<'_, f32>,
    (x, y): (ArrayView2<'_, f32>, ArrayView2<'_, f32>),
) -> Result<Vec<removal::Token>> {
    let mut all = Vec::with_capacity(x.nrows());
    for start in (0..x.nrows()).step_by(CHUNK) {
        let some = s![start..(start + CHUNK).min(x.nrows()), ..];
        let (x, y) = (x.slice(some), y.slice(some));
        all.extend(chunk(reduced, layer, moe, &product(x, router.t()), (x, y))?);
    }
    Ok(all)
}

/// [`candidates`] of some tokens.
fn chunk(
    reduced: &Reduced<'_>,
    layer: usize,
    moe: &Moe,
    logits: &Array2<f32>,
    (x, y): (ArrayView2<'_, f32>, ArrayView2<'_, f32>),
) -> Result<Vec<removal::Token>> {
    let few = (2 * moe.top_k + 2).min(moe.experts);
    let best = |row: ndarray::ArrayView1<'_, f32>| {
        let mut order: Vec<u32> = (0..moe.experts as u32).collect();
        order.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]).then(a.cmp(&b)));
        order.truncate(few);
        order.sort_unstable();
        order
    };
    let chosen: Vec<Vec<u32>> = logits.rows().into_iter().map(best).collect();
    let rows_of = |e: u32| (0..chosen.len()).filter(|&t| chosen[t].binary_search(&e).is_ok()).collect::<Vec<_>>();
    let said = |e: u32| {
        let rows = rows_of(e);
        let out = output(reduced, layer, e as usize, x.select(Axis(0), &rows).view())?;
        Ok((rows, out))
    };
    let said: Vec<(Vec<usize>, Array2<f32>)> = (0..moe.experts as u32).into_par_iter().map(said).collect::<calib::Result<_>>()?;
    let of = |(t, candidates): (usize, Vec<u32>)| {
        let row = |e: &u32| {
            let (rows, out) = &said[*e as usize];
            out.row(rows.partition_point(|row| *row < t))
        };
        let f = Array2::from_shape_fn((candidates.len(), x.ncols()), |(i, d)| row(&candidates[i])[d]);
        let y = y.row(t);
        let energy = y.iter().map(|&y| f64::from(y).powi(2)).sum();
        removal::Token { gram: product(f.view(), f.t()).into_raw_vec_and_offset().0, along: f.dot(&y).to_vec(), energy, candidates }
    };
    Ok(chosen.into_par_iter().enumerate().map(of).collect())
}
