//! Hours before they are spent: rates measured on samples of this machine's work, times what the recipe asks for.
//!
//! A matrix product, the quantizer's factor and its solution are timed once for every shape that the model has, at most
//! [`ROWS`] rows and [`INPUTS`] inputs of it; longer ones are extrapolated, linearly in rows, by the square of the inputs for a solution and
//! by the cube for a factor. The forward pass counts the weights that work on a token; a backward pass counts twice as much again.
//! Where the model writes, a step is bound by its products or by reading the weights that it needs. What merging, searching and fitting
//! cost beside the passes is not counted.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::Instant;

use calib::arch::{Part, Site};
use calib::corpus::Demonstrations;
use calib::forward::layer_weights;
use calib::linalg::product;
use calib::sample::{Calibrate, Sampler};
use calib::{Model, Weights};
use kernels::ScaleType;
use ndarray::Array2;
use rayon::prelude::*;
use serde::Serialize;

use super::{Prepared, prepare};
use crate::Result;
use crate::allocate::sensitivity::{Shared, Solver, Wanted};
use crate::allocate::{Allocate, Choice, Cost, Fill, Matrix};
use crate::plan;
use crate::prune::Pruner;
use crate::quantize::Quantizer;
use crate::recipe::{Loaded, Recipe};

/// Rows of a matrix that are solved for a sample.
const ROWS: usize = 256;
/// Inputs.
const INPUTS: usize = 1024;
/// Of the experts of a layer, every how many-th is solved where the table is estimated; as in the survey.
const SAMPLE: f64 = 16.0;

/// What a part of a run will take on this machine.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Item {
    /// What.
    pub what: &'static str,
    /// Seconds.
    pub seconds: f64,
}

/// Seconds of a factor, of rounding and of solving one matrix at one width.
#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    factor: f64,
    rounded: f64,
    solved: f64,
}

/// What the stages of a recipe will take on this machine, from measured rates; loading weights from disk is not in it.
///
/// # Errors
///
/// As [`prepare`]; what a quantizer refuses; a demonstration file that cannot be read.
pub fn estimate(loaded: &Loaded) -> Result<Vec<Item>> {
    let Prepared { model, shape } = prepare(loaded)?;
    let recipe = &loaded.recipe;
    let tokens = recipe.calibrate.as_ref().map_or(0.0, |c| (c.samples * c.tokens) as f64);
    let flops = flops();
    let forward = 2.0 * model.parameters().active as f64 * tokens / flops;
    let mut items = Vec::new();
    let mut add = |what, seconds: f64| {
        if seconds > 0.0 {
            items.push(Item { what, seconds });
        }
    };
    if let Some(calibrate) = &recipe.calibrate {
        add("calibrate: texts that the model writes", writing(&model, calibrate, flops)?);
        add("calibrate: measuring pass", forward);
        // Searches and merges carry the original model; repair also the reduced one, once to try a layer and once with what was fitted.
        let repair = recipe.repair.as_ref().is_some_and(|repair| repair.removal.is_some());
        let stream = recipe.merge.is_some() || repair || matches!(recipe.prune, Some(Pruner::Exhaustive(_)));
        add("reduce: layers with and without experts", forward * (f64::from(u8::from(stream)) + 2.0 * f64::from(u8::from(repair))));
    }
    if let (Some(quantizer), Some(allocate)) = (&recipe.quantize, &recipe.allocate) {
        let matrices = plan::matrices(allocate, &shape);
        let rates = rates(&matrices, Solver { quantizer, refine: recipe.refine.as_ref() })?;
        let moments = moments(&model, &matrices, tokens) / flops;
        quantizing(recipe, (quantizer, allocate), (&matrices, &rates), [forward, moments], &mut add);
    }
    if let Some(evaluate) = &recipe.evaluate {
        let tokens = evaluate.text.len() as f64 * evaluate.max_tokens.unwrap_or(0) as f64;
        add("evaluate: both models", 4.0 * model.parameters().active as f64 * tokens / flops);
    }
    Ok(items)
}

/// The stages that a quantizer takes part in, from the seconds of a forward pass and of all second moments.
fn quantizing(
    recipe: &Recipe,
    (quantizer, allocate): (&Quantizer, &Allocate),
    (matrices, rates): (&[Matrix], &BTreeMap<[usize; 2], Rate>),
    [forward, moments]: [f64; 2],
    add: &mut impl FnMut(&'static str, f64),
) {
    let factors: f64 = sites(matrices).values().map(|m| rates[&m.shape].factor).sum();
    if let Some(awq) = recipe.folds() {
        add("fold: scales of input channels", matrices.iter().map(|m| awq.exponents as f64 * rates[&m.shape].rounded).sum());
    }
    let measured = quantizer.needs_calibration() || allocate.is_mixed();
    if measured && (recipe.reduces() || recipe.rewrites()) {
        add(if recipe.reduces() { "reduce: measuring pass" } else { "fold: measuring pass" }, forward);
    }
    if recipe.calibrate.is_some() && allocate.is_mixed() {
        add("calibrate: backward pass", if allocate.cost == Cost::EndLoss { 4.0 * forward } else { 0.0 });
        add("calibrate: second moments", moments);
        let widths = allocate.options().len() as f64;
        let of = |m: &Matrix| match allocate.fill {
            Fill::Solve => widths * rates[&m.shape].solved,
            Fill::Estimate if matches!(m.part, Part::Expert(..)) => widths * (rates[&m.shape].rounded + rates[&m.shape].solved / SAMPLE),
            Fill::Estimate => widths * (rates[&m.shape].rounded + rates[&m.shape].solved),
        };
        let covered = matrices.iter().filter(|m| allocate.cost.covers(m.kind()));
        add("calibrate: table of losses", covered.map(of).sum::<f64>() + factors);
    }
    if quantizer.needs_calibration() {
        add("apply: forward pass", forward);
        add("apply: second moments", moments);
    }
    add("apply: codes", matrices.iter().map(|m| rates[&m.shape].solved).sum::<f64>() + factors);
}

/// Seconds in which the model writes: a step takes its products, or the reading of the weights that it needs, whichever is longer.
fn writing(model: &Model, calibrate: &Calibrate, flops: f64) -> Result<f64> {
    let Some(([sequences, _], _)) = calibrate.writing() else { return Ok(0.0) };
    let (at_once, texts, tokens) = match (&calibrate.sampler, &calibrate.generate) {
        (_, Some(generate)) => {
            let open = calibrate.corpus.iter().filter(|source| Demonstrations::are_in(&source.path));
            let open: Vec<usize> = open.map(|source| Ok(Demonstrations::read(&source.path)?.unfinished().len())).collect::<Result<_>>()?;
            (generate.at_once, open.into_iter().sum(), generate.tokens)
        }
        (Sampler::Ebss(params), None) => (params.at_once, calibrate.samples, calibrate.tokens),
        (Sampler::Temperature(params), None) => (params.at_once, calibrate.samples, calibrate.tokens),
        (Sampler::Sequential(_) | Sampler::Random(_) | Sampler::Balanced(_), None) => return Ok(0.0),
    };
    let spec = model.spec();
    let idle = |layer: usize| {
        spec.moe(layer).map_or(0, |moe| 3 * moe.inner * spec.hidden * (moe.experts - moe.experts.min(sequences * moe.top_k)))
    };
    let layers = 0..spec.layers.len();
    let read: u64 = layers.map(|layer| layer_weights(spec, layer) - idle(layer) as u64).sum::<u64>() + (spec.vocab * spec.hidden) as u64;
    let products = 2.0 * model.parameters().active as f64 * sequences as f64 / flops;
    Ok((texts.div_ceil(at_once.max(1)) * tokens) as f64 * products.max(4.0 * read as f64 / reading()))
}

/// Bytes a second that all threads read of what lies in memory.
fn reading() -> f64 {
    let values = vec![1.0_f32; 16 << 20];
    let sum = || values.par_chunks(1 << 16).map(|part| part.iter().sum::<f32>()).sum::<f32>();
    std::hint::black_box(sum());
    let start = Instant::now();
    let mut rounds = 0;
    while rounds < 2 || start.elapsed().as_secs_f64() < 0.1 {
        std::hint::black_box(sum());
        rounds += 1;
    }
    f64::from(rounds) * 4.0 * values.len() as f64 / start.elapsed().as_secs_f64()
}

/// One matrix of every site: those that share a second moment.
fn sites(matrices: &[Matrix]) -> BTreeMap<(usize, Site), &Matrix> {
    matrices.iter().filter_map(|m| m.part.site().map(|site| ((m.layer, site), m))).collect()
}

/// Operations of all second moments, `K²` a row that enters a site: one triangle.
fn moments(model: &Model, matrices: &[Matrix], tokens: f64) -> f64 {
    let rows = |layer: usize, part: Part| match (part, model.spec().moe(layer)) {
        (Part::Expert(..), Some(moe)) => tokens * moe.top_k as f64 / moe.experts.max(1) as f64,
        _ => tokens,
    };
    sites(matrices).values().map(|m| rows(m.layer, m.part) * (m.shape[1] as f64).powi(2)).sum()
}

/// Operations a second of a product, all threads.
fn flops() -> f64 {
    let side = 1024;
    let a = noise(side, side);
    let start = Instant::now();
    let mut rounds = 0;
    while rounds < 2 || start.elapsed().as_secs_f64() < 0.2 {
        std::hint::black_box(product(a.view(), a.view()));
        rounds += 1;
    }
    // A product runs on one thread, and experts beside one another.
    let threads = rayon::current_num_threads() as f64;
    threads * f64::from(rounds) * 2.0 * (side as f64).powi(3) / start.elapsed().as_secs_f64()
}

fn rates(matrices: &[Matrix], solver: Solver<'_>) -> Result<BTreeMap<[usize; 2], Rate>> {
    let mut found = BTreeMap::new();
    for matrix in matrices {
        if let Entry::Vacant(vacant) = found.entry(matrix.shape) {
            vacant.insert(rate(matrix.shape, solver)?);
        }
    }
    Ok(found)
}

/// One shape, on a sample of it; every number that a factor or a solution is made of is what a real one is made of, so noise will do.
fn rate([outputs, inputs]: [usize; 2], solver: Solver<'_>) -> Result<Rate> {
    let (rows, columns) = (outputs.min(ROWS), inputs.min(INPUTS));
    let w = noise(rows, columns);
    let x = noise(2 * columns, columns);
    let h = product(x.t(), x.view());
    let group = kernels::Group::Size((1..=128.min(columns)).rev().find(|g| columns.is_multiple_of(*g)).unwrap_or(1));
    let grid = match solver.quantizer {
        Quantizer::Hqq(_) => crate::quantize::Grid::Asym,
        Quantizer::Pmq(_) => crate::quantize::Grid::Offset,
        Quantizer::Rtn(_) | Quantizer::Gptq(_) => crate::quantize::Grid::Sym,
    };
    let choices = [Choice { bits: 3, group, grid }];
    let timed = |wanted: Wanted| -> Result<(f64, f64)> {
        let start = Instant::now();
        let shared = Shared::new(h.clone(), &choices, solver, 1.0, wanted)?;
        let factor = start.elapsed().as_secs_f64();
        shared.losses(w.view(), None, ScaleType::Bf16, wanted)?;
        Ok((factor, start.elapsed().as_secs_f64() - factor))
    };
    let (factor, solved) = timed(Wanted::Solved)?;
    let (_, rounded) = timed(Wanted::Rounded)?;
    let (more_rows, more_inputs) = (outputs as f64 / rows as f64, inputs as f64 / columns as f64);
    Ok(Rate {
        // Factors run beside one another, one thread each; solutions take all threads.
        factor: factor * more_inputs.powi(3) / rayon::current_num_threads() as f64,
        rounded: rounded * more_rows * more_inputs.powi(2),
        solved: solved * more_rows * more_inputs.powi(2),
    })
}

/// Values between −½ and ½, the same every time.
fn noise(rows: usize, columns: usize) -> Array2<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    Array2::from_shape_simple_fn((rows, columns), || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5
    })
}
