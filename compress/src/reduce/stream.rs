//! What cannot be decided or made without tokens: searches over sets of experts, merges, router repair.
//!
//! The samples go through the original layers. Where routers are repaired they go through the reduced layers too, each of which is fitted
//! to what the original block says of the same tokens, on what the reduced layers before it pass on.

use std::collections::BTreeMap;
use std::sync::Mutex;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use calib::arch::{Moe, Score};
use calib::device::Job;
use calib::forward::router::{At, route};
use calib::forward::{NoTap, Options, Tap, decoder_layer};
use calib::linalg::product;
use calib::pass::{Stream, stream_layers};
use calib::sample::Samples;
use calib::stats::ExpertStats;
use calib::{Model, Weights};
use ndarray::{Array2, Array3, ArrayView2, Axis};
use rayon::prelude::*;

use super::tokens::{ENTERED, Rows, SAID, held_out, output, spread};
use super::weights::{Own, Reduced, merged, sliced};
use super::{Request, decide, write_layer};
use crate::apply::boxed;
use crate::merge::{Group, Merger, Seen};
use crate::plan::experts::spec_with;
use crate::plan::{Experts, Fate};
use crate::prune::exhaustive::{self, Depend, Token};
use crate::prune::{Pruner, UNLIKELY};
use crate::{Error, Result};

/// One pass over the layers.
pub(super) struct Pass<'a> {
    pub request: &'a Request<'a>,
    pub samples: &'a Samples,
    /// What is decided already: everything, or nothing of a layer that tokens decide.
    pub decided: Mutex<Experts>,
    /// Domains that count, as positions.
    pub domains: Vec<usize>,
}

impl Job for Pass<'_> {
    type Output = Result<Experts>;

    fn run<B: Backend>(self, device: &B::Device) -> Result<Experts> {
        let Request { model, progress, .. } = *self.request;
        let stream = Stream { weights: model, ids: &self.samples.ids, snapshots: None, progress };
        let mut reduced: Option<Vec<Tensor<B, 3>>> = None;
        stream_layers::<B>(&stream, device, &mut |layer, hidden| {
            if self.request.repair.is_some() && reduced.is_none() {
                reduced = Some(hidden.to_vec());
            }
            self.layer(layer, hidden, reduced.as_mut()).map_err(boxed)
        })?;
        Ok(self.decided.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

impl Pass<'_> {
    /// Carries both streams through one layer, and decides and makes it on the way.
    fn layer<B: Backend>(&self, layer: usize, hidden: &mut [Tensor<B, 3>], reduced: Option<&mut Vec<Tensor<B, 3>>>) -> Result<()> {
        let (Request { model, dir, .. }, options) = (*self.request, Options::of::<B>());
        let held = || self.decided.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (fate, after) = {
            let decided = held();
            (decided.layers.get(&layer).cloned(), decided.after)
        };
        let (Some(mut fate), Some(moe)) = (fate, model.spec().moe(layer)) else {
            decoder_layer(model, layer, hidden, &NoTap, options)?;
            return reduced.map_or(Ok(()), |reduced| Ok(decoder_layer(model, layer, reduced, &NoTap, options)?));
        };
        let wanted = spread(self.samples, &self.domains, self.tokens());
        let rows = Rows::new(&wanted, hidden);
        decoder_layer(model, layer, hidden, &rows as &dyn Tap<B>, options)?;
        let (x, y) = (rows.take(ENTERED), rows.take(SAID));
        let mut own = self.decide(layer, moe, &mut fate, (x.view(), y.view()), after)?;
        if let (Some(params), Some(reduced)) = (self.request.repair, reduced) {
            let spec = spec_with(model.spec(), after);
            if !fate.is_nothing() {
                let rows = Rows::new(&wanted, reduced);
                let mut copy = reduced.clone();
                decoder_layer(&Reduced { model, spec: &spec, fate: &fate, own: &own }, layer, &mut copy, &rows as &dyn Tap<B>, options)?;
                let held = held_out(self.samples, &wanted);
                let (x, y) = (rows.take(ENTERED), y.view());
                self.repair(layer, &spec, (&mut fate, &mut own), (x.view(), y), &held, params)?;
            }
            decoder_layer(&Reduced { model, spec: &spec, fate: &fate, own: &own }, layer, reduced, &NoTap, options)?;
        }
        write_layer(model, dir, layer, &own)?;
        held().layers.insert(layer, fate);
        Ok(())
    }

    /// Tokens that anything is judged by.
    fn tokens(&self) -> usize {
        let searched = match self.request.pruner {
            Some(Pruner::Exhaustive(params)) => params.tokens,
            _ => 0,
        };
        let merged = self.request.merger.map_or(0, |merger| merger.asked().tokens);
        searched.max(merged).max(self.request.repair.map_or(0, |repair| repair.tokens))
    }

    /// Searches and merges as asked; gives what is made anew.
    fn decide(
        &self,
        layer: usize,
        moe: &Moe,
        fate: &mut Fate,
        (x, y): (ArrayView2<'_, f32>, ArrayView2<'_, f32>),
        after: usize,
    ) -> Result<BTreeMap<calib::arch::Role, Own>> {
        let model = self.request.model;
        if let Some(pruner @ Pruner::Exhaustive(params)) = self.request.pruner {
            let (x, y) = (every(x, params.tokens), every(y, params.tokens));
            *fate = self.searched(layer, moe, (x.view(), y.view()), fate.experts.len().min(pruner.asked().count(moe.experts)))?;
        }
        match self.request.merger {
            Some(merger) => {
                let x = every(x, merger.asked().tokens);
                let groups = self.grouped(layer, merger, fate, x.view(), after)?;
                merged(model, layer, merger, &groups)
            }
            None => sliced(model, layer, fate),
        }
    }

    /// The set of experts that loses least.
    fn searched(&self, layer: usize, moe: &Moe, (x, y): (ArrayView2<'_, f32>, ArrayView2<'_, f32>), count: usize) -> Result<Fate> {
        let model = self.request.model;
        let (logits, correction) = self.router(layer, x)?;
        let outputs = outputs(model, layer, &(0..moe.experts).collect::<Vec<_>>(), x)?;
        let tokens: Vec<Token> = (0..x.nrows()).into_par_iter().map(|t| token(&outputs, &logits, y, t)).collect();
        let choose = |logits: &[f32]| {
            let gone: Vec<bool> = logits.iter().map(|z| *z == f32::NEG_INFINITY).collect();
            let mask = |z: f32, gone: bool| if gone { UNLIKELY } else { z };
            let correction = correction.as_ref().map(|c| c.iter().zip(&gone).map(|(&c, &g)| mask(c, g)).collect::<Vec<_>>());
            let logits = logits.iter().zip(&gone).map(|(&z, &g)| mask(z, g)).collect();
            match route(moe, correction.as_deref(), logits, At { layer, first: 0 }) {
                Ok(routing) => (routing.chosen.into_iter().map(|e| e as usize).collect(), routing.weights),
                // Logits that are no numbers stopped the pass before.
                Err(_) => (Vec::new(), Vec::new()),
            }
        };
        let groups = moe.router.groups.map_or(1, |groups| groups.count);
        let size = moe.experts / groups;
        let whole = |set: &[usize]| {
            let of = |group: usize| set.iter().filter(|e| **e / size == group).count();
            let most = if moe.experts <= exhaustive::ALL_SETS { count / groups } else { usize::MAX };
            (0..groups).all(|group| of(group) >= count / groups && (most == usize::MAX || of(group) <= most))
        };
        let router = &moe.router;
        let renormalized = router.score == Score::Softmax && router.renormalize == Some(0.0);
        let depend = if renormalized && router.groups.is_none() && !router.correction { Depend::Chosen } else { Depend::Set };
        let (kept, _) = exhaustive::search(&tokens, moe.experts, count, (&choose, depend), whole);
        // What leaving this one out of the whole block loses: not what decided, but what a reader can compare.
        let alone = |expert: usize| {
            let rest: Vec<usize> = (0..moe.experts).filter(|e| *e != expert).collect();
            exhaustive::loss(&tokens, &rest, moe.experts, &choose)
        };
        let scores: Vec<f64> = (0..moe.experts).into_par_iter().map(alone).collect();
        let reason = |e: usize| format!("not in the set of {count} that loses least; without it alone {:.6e} is lost", scores[e]);
        let dropped = (0..moe.experts).filter(|e| !kept.contains(e)).map(|e| (e, reason(e))).collect();
        Ok(Fate { experts: kept.into_iter().map(|e| vec![e]).collect(), dropped, scores, ..Fate::default() })
    }

    /// The groups that the experts left fall into, by old numbers, noted in `fate`.
    fn grouped(&self, layer: usize, merger: &Merger, fate: &mut Fate, x: ArrayView2<'_, f32>, after: usize) -> Result<Vec<Group>> {
        let model = self.request.model;
        let left: Vec<usize> = fate.experts.iter().flatten().copied().collect();
        let refused = |what: String| Error::Prune { layer, what };
        let stats: ExpertStats =
            self.request.store.get(layer)?.experts.ok_or_else(|| refused("calibration left no statistics of its experts".into()))?;
        let (logits, _) = self.router(layer, x)?;
        let (load, saliency) = (stats.router.load(), stats.outputs.reap());
        let seen = Seen {
            outputs: outputs(model, layer, &left, x)?,
            logits: logits.select(Axis(1), &left),
            counts: left.iter().map(|&e| load[e] as f64).collect(),
            saliency: left.iter().map(|&e| saliency[e]).collect(),
            hashes: left.iter().map(|&e| decide::hash(model, layer, e)).collect::<Result<_>>()?,
        };
        let groups = merger.groups(&seen, after).map_err(refused)?;
        let old = |group: Group| Group { members: group.members.iter().map(|&at| left[at]).collect(), weights: group.weights };
        let mut groups: Vec<Group> = groups.into_iter().map(old).collect();
        groups.sort_by_key(|group| group.members.first().copied());
        if fate.scores.is_empty() {
            fate.scores = load.iter().map(|&n| n as f64).collect();
        }
        fate.experts = groups.iter().map(|group| group.members.clone()).collect();
        Ok(groups)
    }

    /// The original router's logits `[rows, experts]`, and its selection bias.
    fn router(&self, layer: usize, x: ArrayView2<'_, f32>) -> Result<(Array2<f32>, Option<Vec<f32>>)> {
        let model = self.request.model;
        let whole = Fate::nothing(vec![0.0; model.spec().moe(layer).map_or(0, |moe| moe.experts)]);
        let (weights, correction) = Reduced { model, spec: model.spec(), fate: &whole, own: &BTreeMap::new() }.router(layer)?;
        Ok((product(x, weights.t()), correction))
    }
}

/// At most `count` of the rows, spread evenly.
pub(super) fn every(rows: ArrayView2<'_, f32>, count: usize) -> Array2<f32> {
    let (n, count) = (rows.nrows(), count.min(rows.nrows()));
    rows.select(Axis(0), &(0..count).map(|i| i * n / count).collect::<Vec<_>>())
}

/// What these experts say of all rows, `[experts, rows, hidden]`.
fn outputs(model: &Model, layer: usize, experts: &[usize], x: ArrayView2<'_, f32>) -> Result<Array3<f32>> {
    let each: Vec<Array2<f32>> = experts.par_iter().map(|&e| output(model, layer, e, x)).collect::<calib::Result<_>>()?;
    let mut all = Array3::zeros((experts.len(), x.nrows(), x.ncols()));
    all.outer_iter_mut().zip(each).for_each(|(mut to, from)| to.assign(&from));
    Ok(all)
}

/// One token's products.
fn token(outputs: &Array3<f32>, logits: &Array2<f32>, y: ArrayView2<'_, f32>, t: usize) -> Token {
    let f = outputs.index_axis(Axis(1), t).mapv(f64::from);
    let y = y.row(t).mapv(f64::from);
    Token { logits: logits.row(t).to_vec(), gram: f.dot(&f.t()).into_raw_vec_and_offset().0, along: f.dot(&y).to_vec(), energy: y.dot(&y) }
}
