//! What can be known before any hour is spent: whether the formats can hold the result, and the disk the files.

use std::collections::BTreeMap;
use std::path::Path;

use calib::Model;
use calib::arch::Role;
use calib::stats::Moment;

use crate::plan::{self, Shape, Summary};
use crate::recipe::{Loaded, Problem, Recipe};
use crate::report::bytes;
use crate::{Error, Result, apply, export, fold};

/// The shape of the model that is compressed, after experts have gone or it was rotated, as far as it is known now.
pub fn left(recipe: &Recipe, model: &Model, shape: &Shape) -> Shape {
    if let Some(params) = recipe.rotates() {
        return fold::rotate::shape(model, params, shape);
    }
    if !recipe.reduces() {
        return shape.clone();
    }
    plan::experts::shape_with(shape, recipe.experts_left(plan::experts::count(model)), recipe.mtp())
}

/// Matrices that a format cannot hold.
pub(super) fn check_exports(loaded: &Loaded, model: &Model, shape: &Shape) -> Result<Vec<Problem>> {
    let plan = match plan::make(&loaded.recipe, shape, None) {
        Err(Error::Undecided(why)) => return Ok(vec![loaded.source.problem("allocate", why.to_string(), None)]),
        plan => plan?,
    };
    let refusals = export::refusals(&loaded.recipe.export, &apply::contents_of(model, &plan)?);
    Ok(refusals.into_iter().map(|refusal| loaded.source.problem("export", refusal, None)).collect())
}

/// A disk that is too small for what the recipe writes.
///
/// # Errors
///
/// An IO error; what [`plan::make`] refuses.
pub fn check_space(loaded: &Loaded, shape: &Shape) -> Result<Vec<Problem>> {
    let Some(out) = &loaded.recipe.out else { return Ok(Vec::new()) };
    let summary = plan::make(&loaded.recipe, shape, None)?.summary(shape);
    let needs = needs(&loaded.recipe, &summary, shape);
    let Some(disk) = out.ancestors().map(|dir| if dir.as_os_str().is_empty() { Path::new(".") } else { dir }).find(|dir| dir.is_dir())
    else {
        return Ok(Vec::new());
    };
    let free = calib::checkpoint::free_bytes(disk)?;
    if needs <= free {
        return Ok(Vec::new());
    }
    let message = format!("about {} are to be written under {}, and {} are free", bytes(needs), out.display(), bytes(free));
    Ok(vec![loaded.source.problem("out", message, Some("free some, or choose another directory".into()))])
}

/// Bytes that a run writes: codes between stages, every format, the samples' hidden states, what scales change.
fn needs(recipe: &Recipe, summary: &Summary, shape: &Shape) -> u64 {
    let packed = summary.bytes_after + summary.bytes_kept;
    let dense = summary.weights * 2 + summary.bytes_kept;
    let native = recipe.export.native.is_some().then_some(packed);
    let outputs = [recipe.export.compressed_tensors.is_some().then_some(packed), native, recipe.export.dense.is_some().then_some(dense)];
    let hidden = shape.tensors.iter().find(|t| t.role == Role::Embedding).and_then(|t| t.shape.get(1)).copied().unwrap_or(0);
    // A snapshot is replaced by its successor, so two lie there for a moment.
    let states = recipe.calibrate.as_ref().map_or(0, |c| 2 * 4 * (c.samples * c.tokens * hidden) as u64);
    let moments = recipe.calibrate.as_ref().filter(|c| c.keep_moments).map_or(0, |_| moments(shape));
    let folded = if recipe.rewrites() { shape.bytes() } else { 0 };
    summary.bytes_after + outputs.into_iter().flatten().sum::<u64>() + states + folded + moments
}

/// Bytes of a second moment for each site of the decoder layers.
fn moments(shape: &Shape) -> u64 {
    let site = |tensor: &plan::Tensor| match (tensor.role, tensor.shape.as_slice()) {
        (Role::Layer(layer, part), &[_, inputs]) => part.site().map(|site| ((layer, site), inputs)),
        _ => None,
    };
    let sites: BTreeMap<_, usize> = shape.tensors.iter().filter_map(site).collect();
    sites.into_values().map(|inputs| 4 * Moment::stored(inputs) as u64).sum()
}

#[cfg(test)]
mod tests {
    use calib::arch::{Part, Projection};
    use kernels::ScaleType;

    use super::*;

    #[test]
    fn everything_that_is_written_counts() {
        let text = "schema = 1\n[calibrate]\ncorpus = [\"a.txt\"]\nsamples = 3\ntokens = 5\n[quantize.gptq]\n[export.compressed_tensors]\n[export.dense]\n";
        let summary = Summary { weights: 100, bytes_after: 60, bytes_kept: 7, ..Summary::default() };
        let embedding = plan::Tensor { name: "e".into(), shape: vec![9, 2], role: Role::Embedding, scale: ScaleType::Bf16, bytes: 36 };
        let shape = Shape { fingerprint: String::new(), tensors: vec![embedding] };
        // Codes 60, packed 67, dense 207, twice the states of 15 tokens of 2 values of 4 bytes.
        assert_eq!(needs(&toml::from_str(text).unwrap(), &summary, &shape), 60 + 67 + 207 + 240);
        // Gate and up share 3 inputs, down has 2: 9 and 4 values, of bands that are not full.
        let matrix = |projection, shape: [usize; 2]| {
            let role = Role::Layer(0, Part::Expert(0, projection));
            plan::Tensor { name: format!("{projection:?}"), shape: shape.into(), role, scale: ScaleType::Bf16, bytes: 12 }
        };
        let tensors = vec![matrix(Projection::Gate, [2, 3]), matrix(Projection::Up, [2, 3]), matrix(Projection::Down, [3, 2])];
        assert_eq!(moments(&Shape { fingerprint: String::new(), tensors }), 4 * (9 + 4));
    }
}
