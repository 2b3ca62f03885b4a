//! What a finished plan stage is asked for afterwards: the whole curve, how true it is, the plan in another tool's words.

use std::path::{Path, PathBuf};

use calib::device::Device;
use calib::progress::Progress;
use calib::stats::Store;
use serde::{Deserialize, Serialize};

use super::folder::{Earlier, Stage, remove};
use super::{Options, Prepared, prepare, run};
use crate::allocate::sensitivity::Table;
use crate::allocate::{Account, Allocate, Substitute};
use crate::export::{Dense, Exports, Native};
use crate::plan::{self, Measured, Point, Range, Sweep, Tool};
use crate::recipe::Loaded;
use crate::report;
use crate::tensorfile::write_whole;
use crate::{Error, Result};

/// A budget's prediction, and what its output was measured to lose.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Compared {
    /// Stored bits a weight.
    pub bits: f64,
    /// Predicted loss.
    pub predicted: f64,
    /// KL divergence on the recipe's texts, nats a token.
    pub kl: f64,
    /// Its standard error.
    pub kl_se: f64,
}

impl Compared {
    /// Measured over predicted.
    pub fn ratio(&self) -> f64 {
        if self.predicted > 0.0 { self.kl / self.predicted } else { f64::NAN }
    }
}

/// The folder `OUT/moepress` of a recipe whose plan stage is done.
pub(super) fn folder(loaded: &Loaded) -> PathBuf {
    loaded.recipe.out.clone().unwrap_or_default().join("moepress")
}

/// The widths of a recipe that shares out a budget.
pub(super) fn budget(loaded: &Loaded) -> Result<&Allocate> {
    let mixed = loaded.recipe.allocate.as_ref().filter(|allocate| allocate.is_mixed());
    mixed.ok_or_else(|| {
        let what = "one width is given to all, so there is no table of costs to share out by; ask for a budget, such as bits_per_weight"
            .to_owned();
        loaded.source.invalid(vec![loaded.source.problem("allocate", what, None)]).into()
    })
}

/// What calibration left; `None` for a checkpoint without data.
fn measured(prepared: &Prepared, dir: &Path) -> Result<Option<Measured>> {
    if prepared.model.checkpoint().is_shape_only() {
        return Ok(None);
    }
    let path = dir.join("sensitivity.json");
    let table: Table = serde_json::from_slice(&fs_err::read(&path)?).map_err(|source| calib::Error::own_json(path, source))?;
    Measured::read(&Store::new(dir.join("stats")), Some(table)).map(Some)
}

/// Shares out every budget of `range` from the table that the calibration left, and leaves `pareto.csv` and `pareto.svg` beside the plan.
///
/// # Errors
///
/// As [`prepare`]; a recipe without a budget; [`Error::Undecided`]; an IO error.
pub fn pareto(loaded: &Loaded, range: &Range) -> Result<Sweep> {
    let allocate = budget(loaded)?;
    let (prepared, dir) = (prepare(loaded)?, folder(loaded));
    let sweep = plan::sweep(allocate, &prepared.shape, measured(&prepared, &dir)?.as_ref(), range)?;
    write_whole(&dir.join("pareto.csv"), report::curve::csv(&sweep.points).as_bytes())?;
    report::curve::svg(&sweep.points, &[], &dir.join("pareto.svg"))?;
    Ok(sweep)
}

/// Makes and measures an output for each number of bits a weight, and leaves `curve.csv` and `pareto.svg` beside the plan. The outputs
/// themselves are removed again.
///
/// # Errors
///
/// As [`pareto`]; a recipe without `[evaluate]`; [`Error::ShapeOnly`]; whatever a stage brings up.
pub fn calibrate_curve(
    loaded: &Loaded,
    at: &[f64],
    (device, memory): (Device, Option<u64>),
    progress: &dyn Progress,
) -> Result<Vec<Compared>> {
    budget(loaded)?;
    if loaded.recipe.evaluate.is_none() {
        let what = "a curve is measured on texts, and there is no [evaluate]; name some with evaluate.text".to_owned();
        return Err(loaded.source.invalid(vec![loaded.source.problem("evaluate", what, None)]).into());
    }
    let dir = folder(loaded);
    let (mut points, mut compared): (Vec<Point>, Vec<Compared>) = (Vec::new(), Vec::new());
    for &bits in at {
        let (account, bits, divergence) = measure(loaded, bits, &dir, (device, memory), progress)?;
        compared.push(Compared { bits, predicted: account.loss, kl: divergence.kl, kl_se: divergence.kl_se });
        points.push(Point { asked: bits, bits, account });
    }
    remove(&dir.join("curve"))?;
    write_whole(&dir.join("curve.csv"), report::curve::compared_csv(&compared).as_bytes())?;
    report::curve::svg(&points, &compared, &dir.join("pareto.svg"))?;
    Ok(compared)
}

/// One output in a folder of its own, from the same measurements.
fn measure(
    loaded: &Loaded,
    bits: f64,
    dir: &Path,
    (device, memory): (Device, Option<u64>),
    progress: &dyn Progress,
) -> Result<(Account, f64, calib::evaluate::Divergence)> {
    let out = dir.join("curve").join(format!("{bits:.4}"));
    let mut loaded = loaded.clone();
    loaded.recipe.out = Some(out.clone());
    // A mean output has a place in the native layout alone.
    let means = loaded.recipe.allocate.as_ref().is_some_and(|allocate| allocate.drop == Some(Substitute::Mean));
    loaded.recipe.export = if means {
        Exports { native: Some(Native::default()), ..Exports::default() }
    } else {
        Exports { dense: Some(Dense::default()), ..Exports::default() }
    };
    if let Some(allocate) = &mut loaded.recipe.allocate {
        (allocate.bits_per_weight, allocate.bytes, allocate.file) = (Some(bits), None, None);
        // The runtime's ties stay; that compressed-tensors is no longer among the exports takes no choice away.
    }
    let inner = out.join("moepress");
    fs_err::create_dir_all(&inner)?;
    for name in ["stats", "sensitivity.json", "means", "token_weights", "calibrate.done"] {
        copy(&dir.join(name), &inner.join(name))?;
    }
    run(&loaded, &Options { until: Stage::Evaluate, earlier: Earlier::Resume, device, memory }, progress)?;
    let report = report::read(&inner.join("report.json"))?;
    let divergence = report.evaluation.and_then(|scores| scores.all.divergence);
    match (report.plan.allocation, report.bits_per_weight, divergence) {
        (Some(account), Some(bits), Some(divergence)) => {
            remove(&out)?;
            Ok((account, bits, divergence))
        }
        _ => Err(Error::Stage { path: inner.join("report.json"), what: "it has no allocation or no KL divergence".into() }),
    }
}

/// Copies a file or a folder, if it is there.
pub(super) fn copy(from: &Path, to: &Path) -> Result<()> {
    if from.is_dir() {
        fs_err::create_dir_all(to)?;
        for entry in fs_err::read_dir(from)? {
            let entry = entry?;
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
    } else if from.is_file() && !to.exists() {
        fs_err::copy(from, to)?;
    }
    Ok(())
}

/// Writes the plan in a tool's words beside it; gives the file, and how llama-quantize's widths were chosen.
///
/// # Errors
///
/// As [`pareto`]; [`Error::Foreign`] for what the tool has none of.
pub fn plan_for(loaded: &Loaded, tool: Tool) -> Result<(PathBuf, Option<Account>)> {
    let dir = folder(loaded);
    let (text, account) = match tool {
        Tool::LlamaQuantize => {
            let allocate = budget(loaded)?;
            let prepared = prepare(loaded)?;
            let (text, account) = plan::foreign::llama_quantize(allocate, &prepared.shape, measured(&prepared, &dir)?.as_ref())?;
            (text, Some(account))
        }
        _ => (plan::foreign::of_plan(&plan::read(&dir.join("plan.json"))?, tool)?, None),
    };
    let path = dir.join(tool.file());
    write_whole(&path, text.as_bytes())?;
    Ok((path, account))
}
