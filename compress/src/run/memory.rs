//! `--memory`: how much may be held, and how many batches and experts are in flight so that it is not exceeded.
//!
//! The peak of each stage is a formula of shapes (the headings of `calib::forward`, `calib::pass`, `calib::backward` and
//! [`crate::apply`]). What grows with the tasks in flight is chosen: the most tasks, up to one a thread, with which every stage stays
//! below. The rest is what the samples take; if that alone is too much, nothing is begun. Files that are mapped do not count: the
//! system takes their pages back when it needs them.

use calib::arch::{Mlp, Site, Spec};
use calib::evaluate::{BATCH, LOGITS};
use calib::forward::{self, Samples};
use calib::stats::sites;
use calib::{backward, pass};

use crate::allocate::Cost;
use crate::quantize::Quantizer;
use crate::recipe::Recipe;
use crate::report::memory;
use crate::{Error, Result, blend};

/// The program itself: code that is written to, thread stacks, tokenizer, texts.
const PROGRAM: u64 = 128 << 20;

/// How a run fits.
#[derive(Clone, Debug, PartialEq)]
pub struct Fit {
    /// Batches or experts in flight.
    pub in_flight: usize,
    /// The stage that holds most.
    pub stage: &'static str,
    /// What it holds at its peak, in bytes.
    pub peak: u64,
}

/// Chooses how much is in flight.
///
/// # Errors
///
/// [`Error::Memory`] where a stage does not fit with one task in flight, with the samples that would.
pub fn fit(recipe: &Recipe, spec: &Spec, threads: usize, budget: u64) -> Result<Fit> {
    let samples = samples(recipe);
    let worst =
        |in_flight, samples| peaks(recipe, spec, samples, in_flight).into_iter().max_by_key(|(_, peak)| *peak).unwrap_or(("calibrate", 0));
    for in_flight in (1..=threads.max(1)).rev() {
        let (stage, peak) = worst(in_flight, samples);
        if peak <= budget {
            return Ok(Fit { in_flight, stage, peak });
        }
    }
    let (stage, peak) = worst(1, samples);
    let fitting = (1..samples.count).rev().find(|&count| worst(1, Samples { count, ..samples }).1 <= budget);
    let hidden = 4 * (samples.count * samples.tokens * spec.hidden) as u64;
    let advice = match fitting {
        Some(count) => format!("{count} samples of {} tokens would fit", samples.tokens),
        None => "no number of samples would fit".to_owned(),
    };
    let [budget, peak, hidden] = [budget, peak, hidden].map(memory);
    Err(Error::Memory { budget, stage, peak, hidden, tokens: samples.count * samples.tokens, advice })
}

fn samples(recipe: &Recipe) -> Samples {
    recipe.calibrate.as_ref().map_or(Samples { count: 0, tokens: 0 }, |c| Samples { count: c.samples, tokens: c.tokens })
}

/// Bytes that each stage of a recipe holds at its peak.
fn peaks(recipe: &Recipe, spec: &Spec, samples: Samples, in_flight: usize) -> Vec<(&'static str, u64)> {
    let table = 4 * (spec.vocab * spec.hidden) as u64;
    let mut found = Vec::new();
    if let Some(calibrate) = &recipe.calibrate {
        let hidden = 4 * (samples.count * samples.tokens * spec.hidden) as u64;
        let most = |of: &dyn Fn(usize) -> u64| (0..spec.layers.len()).map(of).max().unwrap_or(0);
        let mixed = recipe.allocate.as_ref().filter(|allocate| allocate.is_mixed());
        let cost = mixed.map(|allocate| allocate.cost);
        let watched = |layer| if cost == Some(Cost::Hessian) { survey(spec, layer, in_flight) } else { 0 };
        let pass = most(&|layer| pass::peak_bytes(spec, layer, samples, in_flight, calibrate.similarity_tokens) + watched(layer));
        let mut peak = pass.max(table + hidden);
        if cost == Some(Cost::EndLoss) {
            let back = most(&|layer| backward::peak_bytes(spec, layer, samples, in_flight) + survey(spec, layer, in_flight));
            peak = peak.max(back).max(table + hidden + 3 * 4 * LOGITS as u64);
        }
        found.push(("calibrate", PROGRAM + peak));
        if matches!(recipe.quantize, Some(Quantizer::Gptq(_))) {
            let solve = most(&|layer| forward::peak_bytes(spec, layer, samples, in_flight) + solver(spec, layer, in_flight));
            found.push(("apply", PROGRAM + solve.max(table + hidden)));
        }
    }
    if let Some(evaluate) = &recipe.evaluate {
        let windows = Samples { count: (BATCH / evaluate.context.max(1)).max(1), tokens: evaluate.context };
        let layer = (0..spec.layers.len()).map(|layer| forward::peak_bytes(spec, layer, windows, in_flight)).max().unwrap_or(0);
        // The other model's hidden states wait; in the end two heads and their logits, which are turned into logarithms.
        let other = 4 * (windows.count * windows.tokens * spec.hidden) as u64;
        let heads = 2 * table + 4 * 4 * LOGITS as u64 + 2 * other;
        found.push(("evaluate", PROGRAM + (layer + other).max(heads)));
    }
    found
}

/// What solving holds beside the forward pass: a moment with its factor (12 bytes a pair of inputs) and a matrix with what becomes of
/// it (12 bytes a weight) for every expert in flight or one site of attention, and the rows that a blend takes.
fn solver(spec: &Spec, layer: usize, in_flight: usize) -> u64 {
    site_bytes(spec, layer, in_flight, 12, 12)
}

/// The same in a survey of losses: the three matrices of an MLP in f32 and working copies beside the moment.
fn survey(spec: &Spec, layer: usize, in_flight: usize) -> u64 {
    site_bytes(spec, layer, in_flight, 12, 28)
}

fn site_bytes(spec: &Spec, layer: usize, in_flight: usize, pair: usize, weight: usize) -> u64 {
    let d = spec.hidden;
    let moe = match &spec.layers[layer].mlp {
        Mlp::Moe(moe) => Some(moe),
        Mlp::Dense { .. } => None,
    };
    let one = |(site, width): (Site, usize)| {
        let outputs = if width == d { moe.map_or(width, |moe| moe.inner.max(d)) } else { d };
        let times = if matches!(site, Site::ExpertIn(_) | Site::ExpertDown(_)) { in_flight } else { 1 };
        times * (pair * width * width + weight * width * outputs)
    };
    let largest = sites(spec, layer).into_iter().map(one).max().unwrap_or(0);
    let blended = moe.map_or(0, |moe| {
        let rows = blend::rows(d, moe.inner);
        4 * (rows * d + d * d) + in_flight * 4 * (3 * rows * moe.inner + moe.inner * moe.inner)
    });
    (largest + blended) as u64
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use calib::{Model, Weights};

    use super::*;

    fn recipe(samples: usize, rest: &str) -> Recipe {
        let text = format!("schema = 1\n[calibrate]\ncorpus = []\nsamples = {samples}\ntokens = 2048\n{rest}");
        toml::from_str(&text).unwrap()
    }

    fn spec() -> Spec {
        Model::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/moe-4m")).unwrap().spec().clone()
    }

    #[test]
    fn the_most_that_fits_is_in_flight() {
        let (spec, recipe) = (spec(), recipe(64, "[quantize.gptq]\n[allocate]\nbits = 4\n"));
        let all = fit(&recipe, &spec, 8, u64::MAX).unwrap();
        assert_eq!(all.in_flight, 8);
        let one = fit(&recipe, &spec, 1, u64::MAX).unwrap();
        assert!(one.peak < all.peak);
        // Between the two some of them fit, and never more than asked for.
        let between = fit(&recipe, &spec, 8, (one.peak + all.peak) / 2).unwrap();
        assert!((1..8).contains(&between.in_flight) && between.peak <= (one.peak + all.peak) / 2, "{between:?}");
        assert_eq!(fit(&recipe, &spec, 8, all.peak).unwrap(), all);
        assert_eq!(fit(&recipe, &spec, 8, one.peak).unwrap().in_flight, 1);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_numbers() {
        let (spec, recipe) = (spec(), recipe(512, "[quantize.gptq]\n[allocate]\nbits = 4\n"));
        let said = fit(&recipe, &spec, 2, 1 << 30).unwrap_err().to_string();
        // 512 samples of 2048 tokens are 2^20 rows of 128 values: 512 MiB a copy.
        assert!(said.contains("--memory 1.00 GiB") && said.contains("512 MiB of hidden states of 1048576 tokens"), "{said}");
        let count: usize = said.split(" samples of 2048 tokens would fit").next().unwrap().rsplit(' ').next().unwrap().parse().unwrap();
        let recipe =
            |samples| Recipe { calibrate: recipe.calibrate.clone().map(|c| calib::sample::Calibrate { samples, ..c }), ..recipe.clone() };
        fit(&recipe(count), &spec, 2, 1 << 30).unwrap();
        fit(&recipe(count + 1), &spec, 2, 1 << 30).unwrap_err();
        let said = fit(&recipe(512), &spec, 2, 1 << 20).unwrap_err().to_string();
        assert!(said.contains("no number of samples would fit"), "{said}");
    }

    #[test]
    fn a_table_of_losses_and_a_backward_pass_take_more() {
        let spec = spec();
        let peak = |cost: &str| {
            let rest = format!("[quantize.gptq]\n[allocate]\nbits_per_weight = 3\ncost = \"{cost}\"\n");
            fit(&recipe(16, &rest), &spec, 2, u64::MAX).unwrap().peak
        };
        let plain = fit(&recipe(16, "[quantize.rtn]\n[allocate]\nbits = 4\n"), &spec, 2, u64::MAX).unwrap().peak;
        assert!(plain < peak("hessian") && peak("hessian") < peak("end_loss"));
    }
}
