//! What the original model does at a layer that is solved behind compressed ones: the inputs that its solvers aim from, and its choices.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::tensor::{Tensor, backend::Backend};
use calib::arch::Site;
use calib::forward::{Routed, Routing, Tap, values};
use ndarray::{Array2, ArrayView2};

use super::tokens::Solver;

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A layer of the original model as it ran.
pub(super) struct Original {
    /// Whether inputs are kept, or choices alone.
    inputs: bool,
    /// What entered sites that all tokens pass, row by row.
    sites: Mutex<BTreeMap<Site, Vec<f32>>>,
    /// What entered the experts, row by row.
    experts: Mutex<Vec<f32>>,
    choices: Mutex<Choice>,
}

/// What a router said and did.
#[derive(Default)]
struct Choice {
    top_k: usize,
    /// `[tokens, experts]`.
    logits: Vec<f32>,
    /// `[tokens, top_k]`.
    chosen: Vec<u32>,
}

impl Choice {
    fn add(&mut self, routing: &Routing) {
        self.top_k = routing.top_k;
        self.logits.extend(&routing.logits);
        self.chosen.extend(&routing.chosen);
    }
}

/// Of the experts in `a`, the share that is in `b` too; both `[tokens, top_k]`, and a token's experts are all different.
pub(super) fn overlap(a: &Chosen, b: &[u32]) -> f64 {
    let rows = a.chosen.chunks_exact(a.top_k.max(1)).zip(b.chunks_exact(a.top_k.max(1)));
    let same: usize = rows.map(|(a, b)| a.iter().filter(|expert| b.contains(expert)).count()).sum();
    if a.chosen.is_empty() { 1.0 } else { same as f64 / a.chosen.len() as f64 }
}

/// Chosen experts, `[tokens, top_k]`.
pub(super) struct Chosen {
    top_k: usize,
    chosen: Vec<u32>,
}

impl std::ops::Deref for Chosen {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        &self.chosen
    }
}

impl Original {
    /// Nothing seen; `inputs`: whether inputs are to be kept, or choices alone.
    pub fn new(inputs: bool) -> Self {
        Self { inputs, sites: Mutex::default(), experts: Mutex::default(), choices: Mutex::default() }
    }

    /// The router's logits, `[tokens, experts]` row by row.
    pub fn logits(&self) -> Vec<f32> {
        held(&self.choices).logits.clone()
    }

    /// The experts that it chose.
    pub fn chosen(&self) -> Chosen {
        let choices = held(&self.choices);
        Chosen { top_k: choices.top_k, chosen: choices.chosen.clone() }
    }

    /// Whether a solver at this site aims at the original output. QEP's code leaves the down projections alone.
    pub fn covers(site: Site) -> bool {
        !matches!(site, Site::ExpertDown(_) | Site::SharedDown | Site::DenseDown)
    }

    /// `x − x̂` for rows `x̂`, `[rows, width]`, of which the first is row `first` of its site, or which `routed` names. A token that the
    /// original gave to another expert has no original output here to aim at: 0.
    pub fn missing(&self, site: Site, rows: ArrayView2<'_, f32>, first: usize, routed: Option<&Routed>) -> Array2<f32> {
        let width = rows.ncols();
        let mut missing = Array2::zeros(rows.dim());
        let mut take = |at: usize, original: &[f32]| {
            let pairs = original.iter().zip(rows.row(at));
            missing.row_mut(at).iter_mut().zip(pairs).for_each(|(m, (x, disturbed))| *m = x - disturbed);
        };
        match (site, routed) {
            (Site::ExpertIn(expert), Some(routed)) => {
                let (experts, choices) = (held(&self.experts), held(&self.choices));
                for (at, &token) in routed.tokens.iter().enumerate() {
                    let token = token as usize;
                    let chosen = choices.chosen.get(token * choices.top_k..(token + 1) * choices.top_k).unwrap_or_default();
                    if chosen.contains(&(expert as u32))
                        && let Some(original) = experts.get(token * width..(token + 1) * width)
                    {
                        take(at, original);
                    }
                }
            }
            _ => {
                let sites = held(&self.sites);
                let all = sites.get(&site).map_or(&[][..], Vec::as_slice);
                for (at, original) in all.chunks_exact(width.max(1)).skip(first).take(rows.nrows()).enumerate() {
                    take(at, original);
                }
            }
        }
        missing
    }
}

impl<B: Backend> Tap<B> for Original {
    fn wants(&self, _: usize, site: Site) -> bool {
        self.inputs && Self::covers(site) && !matches!(site, Site::ExpertIn(_))
    }

    fn rows(&self, _: usize, site: Site, rows: &Tensor<B, 2>, _: Option<&Routed>) -> calib::Result<()> {
        let values = values(rows.clone(), "inputs of a site")?;
        held(&self.sites).entry(site).or_default().extend(values);
        Ok(())
    }

    fn routing(&self, _: usize, routing: &Routing) -> calib::Result<()> {
        held(&self.choices).add(routing);
        Ok(())
    }

    fn wants_blocks(&self) -> bool {
        self.inputs
    }

    fn block(&self, _: usize, name: &'static str, _: usize, x: &Tensor<B, 2>) -> calib::Result<()> {
        if name == "moe.in" {
            let values = values(x.clone(), "what enters the experts")?;
            held(&self.experts).extend(values);
        }
        Ok(())
    }
}

/// A solver, if there is one, and the choices that are made meanwhile.
pub(super) struct Choices<'a, 'b> {
    solver: Option<&'b Solver<'a>>,
    seen: Mutex<Choice>,
}

impl<'a, 'b> Choices<'a, 'b> {
    /// Nothing seen.
    pub fn over(solver: Option<&'b Solver<'a>>) -> Self {
        Self { solver, seen: Mutex::default() }
    }

    /// The experts that were chosen, `[tokens, top_k]`.
    pub fn chosen(&self) -> Vec<u32> {
        held(&self.seen).chosen.clone()
    }
}

impl<B: Backend> Tap<B> for Choices<'_, '_> {
    fn wants_every_row(&self) -> bool {
        self.solver.is_some_and(Tap::<B>::wants_every_row)
    }

    fn wants(&self, layer: usize, site: Site) -> bool {
        self.solver.is_some_and(|solver| Tap::<B>::wants(solver, layer, site))
    }

    fn rows(&self, layer: usize, site: Site, rows: &Tensor<B, 2>, routed: Option<&Routed>) -> calib::Result<()> {
        self.solver.map_or(Ok(()), |solver| solver.rows(layer, site, rows, routed))
    }

    fn done(&self, layer: usize, site: Site) -> calib::Result<()> {
        self.solver.map_or(Ok(()), |solver| Tap::<B>::done(solver, layer, site))
    }

    fn entered(&self, layer: usize, x: &[Tensor<B, 2>], loads: &[u64]) -> calib::Result<()> {
        self.solver.map_or(Ok(()), |solver| solver.entered(layer, x, loads))
    }

    fn routing(&self, _: usize, routing: &Routing) -> calib::Result<()> {
        held(&self.seen).add(routing);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn tokens_are_paired_by_the_original_routing() {
        let original = Original::new(true);
        *held(&original.experts) = vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        *held(&original.choices) = Choice { top_k: 2, logits: vec![], chosen: vec![0, 1, 1, 2, 2, 0] };
        held(&original.sites).insert(Site::AttentionIn, vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let disturbed = array![[0.0, 1.0], [1.0, 1.0]];
        // Token 0 and 2 come to expert 2 now; the original gave it tokens 1 and 2.
        let routed = Routed { tokens: vec![0, 2], weights: vec![0.5, 0.5] };
        assert_eq!(original.missing(Site::ExpertIn(2), disturbed.view(), 0, Some(&routed)), array![[0.0, 0.0], [4.0, 5.0]]);
        assert_eq!(original.missing(Site::AttentionIn, disturbed.view(), 1, None), array![[3.0, 3.0], [4.0, 5.0]]);
        assert!(!Original::covers(Site::SharedDown));
        // 0 1 | 1 2 | 2 0 against 1 0 | 1 3 | 4 5: two, one and none of two.
        assert_eq!(overlap(&original.chosen(), &[1, 0, 1, 3, 4, 5]), 0.5);
    }
}
