//! Which experts stay, from what calibration measured.

use std::collections::BTreeMap;

use calib::arch::{Part, Projection, Role};
use calib::checkpoint::Fingerprint;
use calib::stats::ExpertStats;
use calib::{Model, Weights};

use super::Request;
use crate::plan::{self, Experts, Fate, experts};
use crate::prune::{self, Pruner, random, select, super_experts};
use crate::{Error, Result};

/// Decides every layer by a pruner that scores experts; of what tokens decide, nothing goes yet.
///
/// # Errors
///
/// [`Error::Stage`] if the calibration pass is not finished; [`Error::NoDomain`]; [`Error::Prune`] for a count that the model cannot
/// take, or protected experts that are more than stay.
pub fn decide(request: &Request<'_>) -> Result<Experts> {
    let Request { model, pruner, merger, store, .. } = *request;
    let manifest = plan::finished(store)?;
    let before = experts::count(model);
    let asked = pruner.map(Pruner::asked);
    let left = asked.map_or(before, |asked| asked.count(before));
    let mut stats = BTreeMap::new();
    for layer in 0..manifest.layers {
        if let Some(experts) = store.get(layer)?.experts {
            stats.insert(layer, experts);
        }
    }
    let names = asked.map_or(&[][..], |asked| asked.domains);
    let domains = domains(names, &manifest.domains)?;
    let protected = protected(asked.is_some_and(|asked| asked.protect), &stats);
    let mut layers = BTreeMap::new();
    for ((&layer, stats), protected) in stats.iter().zip(&protected) {
        let fate = match pruner {
            None | Some(Pruner::Exhaustive(_)) => Fate::nothing(stats.router.load().iter().map(|&n| n as f64).collect()),
            Some(pruner) => fate(model, pruner, (layer, stats), &domains, protected, left)?,
        };
        layers.insert(layer, fate);
    }
    let by = pruner.map(|p| format!("prune.{}", p.name())).into_iter().chain(merger.map(|m| format!("merge.{}", m.name())));
    let has_mtp = model.layout().tensors().iter().any(|tensor| tensor.role == Role::Mtp);
    Ok(Experts {
        model: model.checkpoint().fingerprint().to_owned(),
        corpus: manifest.corpus(),
        by: by.collect::<Vec<_>>().join(" and "),
        domains: if names.is_empty() { manifest.domains.clone() } else { names.to_vec() },
        before,
        after: merger.map_or(left, |merger| merger.asked().count(left)),
        mtp: request.mtp().filter(|_| has_mtp),
        layers,
    })
}

/// Positions of the domains asked for in the statistics; all where none is.
pub fn domains(asked: &[String], known: &[String]) -> Result<Vec<usize>> {
    if asked.is_empty() {
        return Ok((0..known.len()).collect());
    }
    let find = |name: &String| {
        let missing = || Error::NoDomain { name: name.clone(), known: known.join(", ") };
        known.iter().position(|k| k == name).ok_or_else(missing)
    };
    asked.iter().map(find).collect()
}

/// Which experts of which layer stay whatever their score.
pub fn protected(asked: bool, stats: &BTreeMap<usize, ExpertStats>) -> Vec<Vec<bool>> {
    let peaks: Vec<Vec<f64>> = stats.values().map(|stats| stats.outputs.peaks.to_vec()).collect();
    if asked { super_experts(&peaks) } else { peaks.iter().map(|peaks| vec![false; peaks.len()]).collect() }
}

/// What becomes of one layer's experts.
pub fn fate(
    model: &Model,
    pruner: &Pruner,
    (layer, stats): (usize, &ExpertStats),
    domains: &[usize],
    protected: &[bool],
    count: usize,
) -> Result<Fate> {
    let hash = |expert| hash(model, layer, expert);
    let refused = |what: String| Error::Prune { layer, what };
    let Some(moe) = model.spec().moe(layer) else { return Err(refused("it has no experts, but statistics of some".into())) };
    let scores = match (pruner.scores(stats, domains), pruner) {
        (Some(scores), _) => scores,
        (None, Pruner::Random(params)) => random::scores(&(0..moe.experts).map(hash).collect::<Result<Vec<_>>>()?, params.seed),
        (None, _) => return Err(refused(format!("{} scores no statistics", pruner.name()))),
    };
    if let Some(bad) = scores.iter().position(|score| !score.is_finite()) {
        return Err(refused(format!("expert {bad} has the score {}; was the model measured on text that it can read?", scores[bad])));
    }
    if let Some(why) = prune::objection(moe, count) {
        return Err(refused(why));
    }
    let groups = moe.router.groups.map_or(1, |groups| groups.count);
    let crowded = protected.chunks(moe.experts / groups).map(|group| group.iter().filter(|p| **p).count()).max().unwrap_or(0);
    if crowded > count / groups {
        return Err(refused(format!(
            "{crowded} super-experts are protected and {} experts stay; keep more, or protect none",
            count / groups
        )));
    }
    let cut = select(&scores, protected, (count, groups), hash)?;
    let reason = |expert: usize| format!("score {:.6e} is not among the {} best{}", scores[expert], count / groups, of_group(groups));
    let dropped = (0..moe.experts).filter(|e| cut.kept.binary_search(e).is_err()).map(|e| (e, reason(e))).collect();
    Ok(Fate {
        experts: cut.kept.iter().map(|&e| vec![e]).collect(),
        dropped,
        edge: cut.edge,
        protected: protected.iter().enumerate().filter(|(_, p)| **p).map(|(e, _)| e).collect(),
        scores,
        repaired: None,
    })
}

fn of_group(groups: usize) -> &'static str {
    if groups > 1 { " of its group" } else { "" }
}

/// A hash of one expert's weights as stored.
pub fn hash(model: &Model, layer: usize, expert: usize) -> Result<String> {
    let mut print = Fingerprint::of("expert");
    for projection in Projection::ALL {
        if let Some(name) = model.layout().name(Role::Layer(layer, Part::Expert(expert, projection))) {
            print = print.field(model.checkpoint().bytes(name)?);
        }
    }
    Ok(print.finish())
}
