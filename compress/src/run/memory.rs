//! `--memory`: how much may be held, and how many batches and experts are in flight so that it is not exceeded.
//!
//! The peak of each stage is a formula of shapes (the headings of `calib::forward`, `calib::pass`, `calib::backward` and
//! [`crate::apply`]). What grows with the tasks in flight is chosen: the most tasks, up to one a thread, with which every stage stays
//! below. The rest is what the samples take; if that alone is too much, nothing is begun. Files that are mapped do not count: the
//! system takes their pages back when it needs them.

use calib::arch::{Attention, Mlp, Site, Spec};
use calib::evaluate::{BATCH, LOGITS};
use calib::forward::{self, Samples, layer_weights};
use calib::stats::sites;
use calib::{backward, pass};

use crate::allocate::Cost;
use crate::objective::OutputWeight;
use crate::plan::experts;
use crate::prune::Pruner;
use crate::quantize::{Quantizer, Refine, learned};
use crate::recipe::Recipe;
use crate::report::memory;
use crate::{Error, Result, blend, reduce};

/// The program itself: code that is written to, thread stacks, tokenizer, texts.
const PROGRAM: u64 = 128 << 20;

/// Bytes of a weight that learns (the headings of `crate::apply::learned` and `crate::apply::end`).
const LEARNING: u64 = 29;
/// Bytes of a weight that is solved and waits until its layer is whole: its code, and its group's scale and zero at their largest.
const CODES: u64 = 2;
/// The stages in which matrices learn.
const LEARNED: &str = "apply (refine.learned: 29 bytes for each weight of a layer)";
const LEARNED_END: &str = "apply (refine.learned.end: 29 bytes for each weight of the model; leave it out)";

/// The stages in which the model writes and loses experts.
const WRITING: &str = "calibrate (the model that writes, whole in f32; let its experts stay on disk: experts = \"disk\")";
const WRITING_DISK: &str = "calibrate (the model that writes; write fewer texts at_once)";
const REDUCE: &str = "reduce (what experts say of the tokens that they are judged by; ask for fewer `tokens`)";
/// The stage in which outputs count.
const OUTPUTS: &str = "apply (objective.output_weight: 4 bytes for each pair of outputs of the model's matrices; leave it out)";

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
        if let Some((texts, resident)) = calibrate.writing() {
            let held = forward::generator_bytes(spec, resident, texts, in_flight);
            found.push((if resident { WRITING } else { WRITING_DISK }, PROGRAM + held));
        }
        if recipe.reduces() {
            let reduce = most(&|layer| forward::peak_bytes(spec, layer, samples, in_flight) + reduction(recipe, spec, layer, samples));
            found.push((REDUCE, PROGRAM + reduce.max(table + hidden)));
        }
        if recipe.rewrites() {
            let matrix = (0..spec.layers.len()).map(|layer| largest(spec, layer)).max().unwrap_or(0);
            let scaled = recipe.folds().map_or(0, |_| 16 * rayon::current_num_threads() as u64 * matrix);
            // The embedding and the head are rotated too, in f32 and as they are stored.
            let rotated = recipe.rotates().map_or(0, |_| 2 * table.max(4 * matrix));
            found.push(("fold", PROGRAM + scaled.max(rotated)));
        }
        if recipe.quantize.as_ref().is_some_and(Quantizer::needs_calibration) {
            let solve = most(&|layer| forward::peak_bytes(spec, layer, samples, in_flight) + solver(spec, layer, in_flight));
            found.push(("apply", PROGRAM + solve.max(table + hidden)));
            if recipe.objective.as_ref().is_some_and(|objective| objective.output_weight == OutputWeight::EndLoss) {
                let layers = spec.layers.len() as u64;
                let pass = layers * hidden + most(&|layer| backward::peak_bytes(spec, layer, samples, in_flight));
                found.push((OUTPUTS, PROGRAM + outputs(spec) + pass.max(solve) + table + 3 * 4 * LOGITS as u64));
            }
            if let Some(Refine::Learned(params)) = &recipe.refine {
                let left = experts_left(recipe, spec);
                let steps = Steps { spec: &left, samples, in_flight };
                let solving = solve + hidden + most(&|layer| CODES * layer_weights(&left, layer));
                found.push((LEARNED, PROGRAM + solving.max(most(&|layer| steps.of_layer(layer, params)))));
                found.extend(params.end.as_ref().map(|end| (LEARNED_END, PROGRAM + steps.of_model(params, end))));
            }
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

/// What a layer that loses experts holds beside the forward pass (the heading of [`crate::reduce`]).
fn reduction(recipe: &Recipe, spec: &Spec, layer: usize, samples: Samples) -> u64 {
    let Some(moe) = spec.moe(layer) else { return 0 };
    let (d, rows) = (spec.hidden, samples.count * samples.tokens);
    let repair = recipe.repair.as_ref().and_then(|repair| repair.removal.as_ref());
    let searched = match &recipe.prune {
        Some(Pruner::Exhaustive(params)) => params.tokens.min(rows),
        _ => 0,
    };
    let merged = recipe.merge.as_ref().map_or(0, |merger| merger.asked().tokens).min(rows);
    // What all experts say of the tokens that sets or groups are judged by, and of searches their products in f64.
    let said = moe.experts * d * searched.max(merged) + 2 * moe.experts * moe.experts * searched;
    let fitted = repair.map_or(0, |params| {
        let (tokens, k) = (params.tokens.min(rows), 2 * moe.top_k + 2);
        let routers = if params.steps == 0 { 0 } else { reduce::CANDIDATES.min(tokens) * k * d + tokens * k * (k + 2) };
        let down = if params.down.rounds == 0 { 0 } else { tokens * moe.top_k * (moe.inner + d) };
        // The stream of the reduced layers, and a copy that a layer is tried on.
        2 * rows * d + 2 * tokens * d + routers.max(down)
    });
    let asked = searched > 0 || merged > 0 || repair.is_some();
    // Blocks are shown: two more copies of the hidden states. What is made anew waits until its layer is whole.
    let shown = if asked { 2 * rows * d + 3 * moe.experts * moe.inner * d } else { moe.experts * d };
    4 * (said + fitted + shown) as u64
}

/// Weights of a layer's largest matrix.
fn largest(spec: &Spec, layer: usize) -> u64 {
    let inner = match &spec.layers[layer].mlp {
        Mlp::Dense { inner } => *inner,
        Mlp::Moe(moe) => moe.inner.max(moe.shared.as_ref().map_or(0, |shared| shared.inner)),
    };
    let attention = sites(spec, layer).into_iter().map(|(_, width)| width).max().unwrap_or(0);
    (spec.hidden * inner.max(attention)) as u64
}

/// The model that is solved: with the experts that the recipe leaves.
fn experts_left(recipe: &Recipe, spec: &Spec) -> Spec {
    let all = (0..spec.layers.len()).find_map(|layer| spec.moe(layer)).map_or(0, |moe| moe.experts);
    if recipe.reduces() { experts::spec_with(spec, recipe.experts_left(all)) } else { spec.clone() }
}

/// Steps of learned refinement over the samples of a calibration.
struct Steps<'a> {
    spec: &'a Spec,
    samples: Samples,
    in_flight: usize,
}

impl Steps<'_> {
    /// Those against a layer's output: its weights, what enters the layer and what should leave it, and beside them the samples of one step
    /// in the backward pass, or those that are held out in the forward pass.
    fn of_layer(&self, layer: usize, params: &learned::Params) -> u64 {
        let at = |count: usize| Samples { count: count.min(self.samples.count), ..self.samples };
        let step = backward::peak_bytes(self.spec, layer, at(params.samples), self.in_flight);
        let judge = forward::peak_bytes(self.spec, layer, at(params.held_out), self.in_flight);
        2 * self.hidden(self.samples.count) + LEARNING * layer_weights(self.spec, layer) + step.max(judge)
    }

    /// Those against the end of the model: the weights of all layers, the original's last hidden states, two heads with an embedding, and
    /// the samples of one step with what entered every layer, or those that are held out.
    fn of_model(&self, params: &learned::Params, end: &learned::End) -> u64 {
        let at = |count: usize| Samples { count: count.min(self.samples.count), ..self.samples };
        let layers = 0..self.spec.layers.len();
        let weights: u64 = layers.clone().map(|layer| layer_weights(self.spec, layer)).sum();
        let most = |of: &dyn Fn(usize) -> u64| layers.clone().map(of).max().unwrap_or(0);
        let kept = layers.len() as u64 * self.hidden(at(end.samples).count);
        let step = kept + most(&|layer| backward::peak_bytes(self.spec, layer, at(end.samples), self.in_flight));
        let judge = most(&|layer| forward::peak_bytes(self.spec, layer, at(params.held_out), self.in_flight));
        let heads = 3 * 4 * (self.spec.vocab * self.spec.hidden) as u64 + 3 * 4 * LOGITS as u64;
        LEARNING * weights + self.hidden(self.samples.count) + heads + step.max(judge)
    }

    fn hidden(&self, count: usize) -> u64 {
        4 * (count * self.samples.tokens * self.spec.hidden) as u64
    }
}

/// Moments of the outputs of all matrices, `4·out²` bytes each.
fn outputs(spec: &Spec) -> u64 {
    let d = spec.hidden;
    let attention: usize = match &spec.attention {
        Attention::Grouped(a) => [a.heads * a.head_dim, a.kv_heads * a.head_dim, a.kv_heads * a.head_dim, d].iter().map(|n| n * n).sum(),
        Attention::Latent(a) => {
            let query = a.heads * (a.nope_dim + a.rope_dim);
            let key_value = [a.kv_rank + a.rope_dim, a.heads * (a.nope_dim + a.value_dim)];
            [a.q_rank.unwrap_or(0), query, key_value[0], key_value[1], d].iter().map(|n| n * n).sum()
        }
    };
    let gated = |inner: usize| 2 * inner * inner + d * d;
    let mlp = |mlp: &Mlp| match mlp {
        Mlp::Dense { inner } => gated(*inner),
        Mlp::Moe(moe) => moe.experts * gated(moe.inner) + moe.shared.as_ref().map_or(0, |shared| gated(shared.inner)),
    };
    spec.layers.iter().map(|layer| 4 * (attention + mlp(&layer.mlp)) as u64).sum()
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
    fn what_learns_is_counted_by_the_weight() {
        let spec = spec();
        let fitting = |rest: &str, budget| fit(&recipe(4, &format!("[quantize.gptq]\n[allocate]\nbits = 3\n{rest}")), &spec, 1, budget);
        let peak = |rest: &str| fitting(rest, u64::MAX).unwrap().peak;
        let weights: u64 = (0..spec.layers.len()).map(|layer| layer_weights(&spec, layer)).sum();
        let one = layer_weights(&spec, 0);
        let (plain, learned, end) = (peak(""), peak("[refine.learned]\n"), peak("[refine.learned.end]\n"));
        assert!(learned >= plain && learned >= PROGRAM + 29 * one, "{plain} {learned}");
        assert!(end >= PROGRAM + 29 * weights && end > learned, "{end} {learned} {weights}");
        let fit = fitting("[refine.learned.end]\n", u64::MAX).unwrap();
        assert_eq!(fit.stage, LEARNED_END);
        // Half of the experts: what goes with them learns nothing.
        let pruned = peak("[refine.learned.end]\n[prune.reap]\nkeep = 0.5\n");
        let gone: u64 =
            (0..spec.layers.len()).filter_map(|l| spec.moe(l)).map(|m| (m.experts / 2 * 3 * m.inner * spec.hidden) as u64).sum();
        assert!(end - pruned >= 29 * gone, "{end} {pruned} {gone}");
        // One byte less is refused, with the stage and the numbers.
        let said = fitting("[refine.learned.end]\n", end - 1).unwrap_err().to_string();
        assert!(said.contains("refine.learned.end: 29 bytes for each weight of the model") && said.contains(&memory(end)), "{said}");
    }

    #[test]
    fn writing_and_reducing_are_counted() {
        let spec = spec();
        let of = |calibrate: &str, rest: &str| recipe(16, &format!("{calibrate}\n{rest}[quantize.rtn]\n[allocate]\nbits = 4\n"));
        let fitting = |calibrate: &str| fit(&of(calibrate, ""), &spec, 2, u64::MAX).unwrap();
        // 256 texts of 2048 tokens: keys and values of all layers take more than the measuring pass.
        let memory = fitting("sampler.temperature = { at_once = 256 }");
        let disk = fitting("sampler.temperature = { at_once = 256, experts = \"disk\" }");
        assert_eq!((memory.stage, disk.stage), (WRITING, WRITING_DISK));
        let moes = || (0..spec.layers.len()).filter_map(|layer| spec.moe(layer)).map(|moe| 3 * moe.inner * spec.hidden);
        let routed: usize = moes().map(|one| one * 8).sum();
        assert_eq!(memory.peak - disk.peak, 4 * (routed - 2 * moes().max().unwrap()) as u64, "two experts are in flight");
        let branches = fitting("sampler.ebss = { at_once = 256, branches = 3 }");
        assert!(branches.peak > 2 * memory.peak, "{branches:?} {memory:?}");
        let reduced = |rest: &str| {
            let recipe = of("", rest);
            assert!(peaks(&recipe, &spec, samples(&recipe), 2).iter().any(|(stage, _)| *stage == REDUCE));
            reduction(&recipe, &spec, 0, samples(&recipe))
        };
        let d = spec.hidden as u64;
        let (rows, sliced) = (16 * 2048, reduced("[prune.reap]\nkeep = 0.5\n"));
        assert_eq!(sliced, 4 * 8 * d, "one router");
        assert!(reduced("[prune.exhaustive]\nkeep = 0.5\ntokens = 20000\n") > sliced + 4 * 20000 * 8 * d);
        assert!(reduced("[prune.reap]\nkeep = 0.5\n[repair.removal]\n") > sliced + 4 * 4 * rows * d);
    }

    #[test]
    fn outputs_that_count_are_counted() {
        let spec = spec();
        let peak = |rest: &str| {
            fit(&recipe(4, &format!("[quantize.gptq]\n[allocate]\nbits = 3\n[refine.descent]\n{rest}")), &spec, 1, u64::MAX).unwrap()
        };
        let (plain, both) = (peak(""), peak("[objective]\noutput_weight = \"end_loss\"\n"));
        let experts: usize = (0..spec.layers.len())
            .filter_map(|l| spec.moe(l))
            .map(|m| m.experts * (2 * m.inner * m.inner + spec.hidden * spec.hidden))
            .sum();
        assert!(both.peak >= plain.peak + 4 * experts as u64 && both.stage == OUTPUTS, "{plain:?} {both:?}");
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
