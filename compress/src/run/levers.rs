//! The same bytes spent in other ways: on bits alone, or on bits of a model that a pruner or a merger has left with fewer experts.
//!
//! Where every layer keeps the same number of experts and tokens are re-routed, what an expert's removal costs depends on who else goes, so
//! removal is no option of the program: the number that stays is an outer loop over a few counts, and within it the order of removal is the
//! pruner's, or the groups are the merger's. What is compared is nats a token in two parts: the KL divergence of the model that is left,
//! before anything is quantized, from the original, measured on the validation split of the calibration texts (their last fifth, which no
//! score saw); and the predicted loss of its widths, which is measured on the model that is left. Their sum takes the two as independent.
//! With `allocate.drop` each of these programs may also drop experts that keep their router rows; what it predicts without is its own row.

use std::path::Path;

use calib::corpus::{Corpus, Tokenizer};
use calib::device::Device;
use calib::evaluate::{Models, Windows, evaluate};
use calib::progress::Progress;
use calib::{Model, Weights};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::curve::{budget, copy, folder};
use super::folder::{Earlier, Stage, remove};
use super::{Options, Prepared, prepare, run};
use crate::allocate::{Allocate, Cost, Matrix, Size};
use crate::plan::{self, Shape};
use crate::recipe::Loaded;
use crate::tensorfile::write_whole;
use crate::{Error, Result, reduce, report};

/// Validation tokens of a text that a reduced model is judged on, at most.
const TOKENS: usize = 4096;

/// Longest window of them.
const WINDOW: usize = 512;

/// One way to spend the bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lever {
    /// Who takes experts away: `prune.easy_ep`, `merge.ream`; `None`: nobody.
    pub by: Option<String>,
    /// Experts of a layer that are left.
    pub experts: usize,
    /// Experts of all layers that are dropped besides; `None` where none may be.
    pub dropped: Option<usize>,
    /// Bytes of codes, scales, zeros and constants.
    pub bytes: u64,
    /// KL divergence of what is left from the original, nats a token.
    pub removal: f64,
    /// Predicted loss of the widths, nats a token.
    pub widths: f64,
}

impl Lever {
    /// Both losses.
    pub fn loss(&self) -> f64 {
        self.removal + self.widths
    }
}

/// Plans the recipe's bytes for the model as it is, and for what its pruner and its merger leave of it at each of `counts` experts a layer;
/// leaves `levers.csv` beside the plan. The plans themselves are removed again.
///
/// # Errors
///
/// As [`prepare`]; a recipe without a budget in bytes or bits a weight, without the cost `end_loss`, or without pruner and merger;
/// [`Error::ShapeOnly`]; whatever a stage brings up.
pub fn levers(loaded: &Loaded, counts: &[usize], how: (Device, Option<u64>), progress: &dyn Progress) -> Result<Vec<Lever>> {
    let Prepared { model, shape } = prepare(loaded)?;
    if model.checkpoint().is_shape_only() {
        return Err(Error::ShapeOnly { dir: model.checkpoint().dir().to_owned() });
    }
    let bytes = bytes(loaded, &shape)?;
    let (dir, windows) = (folder(loaded), windows(loaded, &model)?);
    let case = Case { loaded, model: &model, bytes, dir: &dir, windows: &windows, how, progress };
    let mut found = case.plan("bits", &|_, _| Ok(()), 0)?;
    for &count in counts {
        if loaded.recipe.prune.is_some() {
            let keep = &|loaded: &mut Loaded, count| {
                loaded.recipe.prune = loaded.recipe.prune.as_ref().map(|p| with_count(p, count)).transpose()?;
                loaded.recipe.merge = None;
                Ok(())
            };
            found.extend(case.plan(&format!("prune-{count}"), keep, count)?);
        }
        if loaded.recipe.merge.is_some() {
            let keep = &|loaded: &mut Loaded, count| {
                loaded.recipe.merge = loaded.recipe.merge.as_ref().map(|m| with_count(m, count)).transpose()?;
                loaded.recipe.prune = None;
                Ok(())
            };
            found.extend(case.plan(&format!("merge-{count}"), keep, count)?);
        }
    }
    remove(&dir.join("levers"))?;
    write_whole(&dir.join("levers.csv"), report::levers_csv(&found).as_bytes())?;
    Ok(found)
}

/// The recipe's budget, in bytes of what is quantized of the whole model.
fn bytes(loaded: &Loaded, shape: &Shape) -> Result<u64> {
    let allocate = budget(loaded)?;
    let refuse = |key: &str, what: &str| Err(loaded.source.invalid(vec![loaded.source.problem(key, what.to_owned(), None)]).into());
    if !loaded.recipe.reduces() {
        return refuse("allocate", "there is neither [prune] nor [merge], so there is nothing to compare bits with; name one");
    }
    if allocate.cost != Cost::EndLoss {
        return refuse("allocate.cost", "what is left of the experts is judged in nats, and only the cost end_loss is in that unit");
    }
    let weights = |allocate: &Allocate| plan::matrices(allocate, shape).iter().map(Matrix::weights).sum::<u64>();
    match (allocate.bytes, allocate.bits_per_weight) {
        (Some(bytes), _) => Ok(bytes.0),
        (_, Some(bits)) => Ok((bits * weights(allocate) as f64 / 8.0).floor() as u64),
        _ => refuse("allocate", "equal bytes are those of what is quantized; ask for bytes or bits_per_weight"),
    }
}

/// The validation split of the calibration texts.
fn windows(loaded: &Loaded, model: &Model) -> Result<Vec<Windows>> {
    let Some(calibrate) = &loaded.recipe.calibrate else { return Err(Error::NoSamples) };
    let corpus = Corpus::of(&calibrate.corpus, &Tokenizer::open(model.checkpoint().dir(), model.spec().vocab)?)?;
    let cut = |text: &calib::corpus::Text| {
        let ids = text.validation();
        let ids = &ids[..ids.len().min(TOKENS)];
        let window = WINDOW.min(ids.len());
        let ids = if window < 2 { Vec::new() } else { ids.chunks_exact(window).map(<[u32]>::to_vec).collect() };
        Windows { domain: text.domain.clone(), ids }
    };
    let found: Vec<Windows> = corpus.texts().iter().map(cut).filter(|windows| !windows.ids.is_empty()).collect();
    if found.is_empty() {
        let what =
            "the last fifth of no text has two tokens, and what is left of the experts is judged there; name longer texts".to_owned();
        return Err(loaded.source.invalid(vec![loaded.source.problem("calibrate.corpus", what, None)]).into());
    }
    Ok(found)
}

/// A pruner or a merger that leaves so many experts.
fn with_count<T: Serialize + DeserializeOwned>(reducer: &T, experts: usize) -> Result<T> {
    let mut value = serde_json::to_value(reducer).map_err(std::io::Error::from)?;
    for params in value.as_object_mut().into_iter().flat_map(serde_json::Map::values_mut).filter_map(serde_json::Value::as_object_mut) {
        params.remove("keep");
        params.insert("experts".to_owned(), experts.into());
    }
    Ok(serde_json::from_value(value).map_err(std::io::Error::from)?)
}

/// What every plan is made with.
struct Case<'a> {
    loaded: &'a Loaded,
    model: &'a Model,
    bytes: u64,
    dir: &'a Path,
    windows: &'a [Windows],
    how: (Device, Option<u64>),
    progress: &'a dyn Progress,
}

impl Case<'_> {
    /// One plan in a folder of its own, of a recipe that `keep` tells how many experts stay (0: all); a row without dropping, and one with
    /// it where the recipe has it.
    fn plan(&self, name: &str, keep: &dyn Fn(&mut Loaded, usize) -> Result<()>, experts: usize) -> Result<Vec<Lever>> {
        let out = self.dir.join("levers").join(name);
        let mut loaded = self.loaded.clone();
        loaded.recipe.out = Some(out.clone());
        if experts == 0 {
            (loaded.recipe.prune, loaded.recipe.merge) = (None, None);
            if let Some(repair) = &mut loaded.recipe.repair {
                repair.removal = None;
            }
        }
        keep(&mut loaded, experts)?;
        if let Some(allocate) = &mut loaded.recipe.allocate {
            (allocate.bytes, allocate.bits_per_weight) = (Some(Size(self.bytes)), None);
        }
        let inner = out.join("moepress");
        fs_err::create_dir_all(&inner)?;
        copy(&self.dir.join("stats"), &inner.join("stats"))?;
        let (device, memory) = self.how;
        run(&loaded, &Options { until: Stage::Plan, earlier: Earlier::Resume, device, memory }, self.progress)?;
        let plan = plan::read(&inner.join("plan.json"))?;
        let missing = || Error::Stage { path: inner.join("plan.json"), what: "it has no allocation".into() };
        let account = plan.allocation.clone().ok_or_else(missing)?;
        let (removal, left) = if loaded.recipe.reduces() {
            let reduced = reduce::open(self.model, &inner)?;
            let scores = evaluate(Models { candidate: &reduced, reference: Some(self.model) }, self.windows, device, self.progress)?;
            (scores.all.divergence.map_or(f64::NAN, |divergence| divergence.kl), experts)
        } else {
            (0.0, plan::experts::count(self.model))
        };
        let pruner = loaded.recipe.prune.as_ref().map(|pruner| format!("prune.{}", pruner.name()));
        let by = pruner.or_else(|| loaded.recipe.merge.as_ref().map(|merger| format!("merge.{}", merger.name())));
        let row = |dropped, widths| Lever { by: by.clone(), experts: left, dropped, bytes: account.bytes, removal, widths };
        let whole = if account.dropped.is_some() { account.loss_whole } else { Some(account.loss) };
        let rows = whole.map(|loss| row(None, loss)).into_iter().chain(account.dropped.map(|n| row(Some(n), account.loss)));
        let rows = rows.collect();
        remove(&out)?;
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::Merger;
    use crate::prune::Pruner;

    #[test]
    fn a_count_takes_the_place_of_a_share() {
        let pruner: Pruner = toml::from_str("easy_ep = { keep = 0.5, domains = [\"code\"] }").unwrap();
        let expected: Pruner = toml::from_str("easy_ep = { experts = 12, domains = [\"code\"] }").unwrap();
        assert_eq!(with_count(&pruner, 12).unwrap(), expected);
        let merger: Merger = toml::from_str("ream = { experts = 3 }").unwrap();
        assert_eq!(with_count(&merger, 12).unwrap().asked().experts, Some(12));
    }
}
