//! Hours before they are spent: rates measured on samples of this machine's work, times what the recipe asks for.
//!
//! A matrix product, the quantizer's factor and its solution are timed once for every shape that the model has, at most
//! [`ROWS`] rows and [`INPUTS`] inputs of it; longer ones are extrapolated, linearly in rows, by the square of the inputs for a solution and
//! by the cube for a factor. The forward pass counts the weights that work on a token; a backward pass counts twice as much again.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::Instant;

use calib::Weights;
use calib::arch::{Part, Site};
use calib::linalg::product;
use kernels::ScaleType;
use ndarray::Array2;
use serde::Serialize;

use super::prepare;
use crate::Result;
use crate::allocate::sensitivity::{Shared, Solver, Wanted};
use crate::allocate::{Choice, Cost, Fill, Matrix};
use crate::plan;
use crate::quantize::Quantizer;
use crate::recipe::Loaded;

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
/// As [`prepare`]; what a quantizer refuses.
pub fn estimate(loaded: &Loaded) -> Result<Vec<Item>> {
    let prepared = prepare(loaded)?;
    let recipe = &loaded.recipe;
    let (Some(quantizer), Some(allocate)) = (&recipe.quantize, &recipe.allocate) else { return Ok(Vec::new()) };
    let matrices = plan::matrices(allocate, &prepared.shape);
    let tokens = recipe.calibrate.as_ref().map_or(0.0, |c| (c.samples * c.tokens) as f64);
    let flops = flops();
    let forward = 2.0 * prepared.model.parameters().active as f64 * tokens / flops;
    let moments = moments(&prepared.model, &matrices, tokens) / flops;
    let solver = Solver { quantizer, refine: recipe.refine.as_ref() };
    let rates = rates(&matrices, solver)?;
    let sites = sites(&matrices);
    let factors: f64 = sites.values().map(|m| rates[&m.shape].factor).sum();
    let mut items = Vec::new();
    let mut add = |what, seconds: f64| {
        if seconds > 0.0 {
            items.push(Item { what, seconds });
        }
    };
    if recipe.calibrate.is_some() {
        add("calibrate: measuring pass", forward);
        if allocate.is_mixed() {
            add("calibrate: backward pass", if allocate.cost == Cost::EndLoss { 4.0 * forward } else { 0.0 });
            add("calibrate: second moments", moments);
            let widths = allocate.options().len() as f64;
            let of = |m: &Matrix| match allocate.fill {
                Fill::Solve => widths * rates[&m.shape].solved,
                Fill::Estimate if matches!(m.part, Part::Expert(..)) => {
                    widths * (rates[&m.shape].rounded + rates[&m.shape].solved / SAMPLE)
                }
                Fill::Estimate => widths * (rates[&m.shape].rounded + rates[&m.shape].solved),
            };
            let covered = matrices.iter().filter(|m| allocate.cost.covers(m.kind()));
            add("calibrate: table of losses", covered.map(of).sum::<f64>() + factors);
        }
    }
    if quantizer.needs_calibration() {
        add("apply: forward pass", forward);
        add("apply: second moments", moments);
    }
    add("apply: codes", matrices.iter().map(|m| rates[&m.shape].solved).sum::<f64>() + factors);
    if let Some(evaluate) = &recipe.evaluate {
        let tokens = evaluate.text.len() as f64 * evaluate.max_tokens.unwrap_or(0) as f64;
        add("evaluate: both models", 4.0 * prepared.model.parameters().active as f64 * tokens / flops);
    }
    Ok(items)
}

/// One matrix of every site: those that share a second moment.
fn sites(matrices: &[Matrix]) -> BTreeMap<(usize, Site), &Matrix> {
    matrices.iter().filter_map(|m| m.part.site().map(|site| ((m.layer, site), m))).collect()
}

/// Operations of all second moments, `2·K²` a row that enters a site.
fn moments(model: &calib::Model, matrices: &[Matrix], tokens: f64) -> f64 {
    let rows = |layer: usize, part: Part| match (part, model.spec().moe(layer)) {
        (Part::Expert(..), Some(moe)) => tokens * moe.top_k as f64 / moe.experts.max(1) as f64,
        _ => tokens,
    };
    sites(matrices).values().map(|m| 2.0 * rows(m.layer, m.part) * (m.shape[1] as f64).powi(2)).sum()
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
