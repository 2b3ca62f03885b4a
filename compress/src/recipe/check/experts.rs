//! What is wrong with a wish for fewer experts.

use calib::arch::Role;
use calib::{Model, Weights};

use super::super::{Loaded, Problem, Recipe, Source};
use crate::plan::experts::count;
use crate::prune::objection;

/// Whoever takes experts away: its key in a recipe, and how many it leaves.
fn reducers(recipe: &Recipe) -> Vec<(String, Option<f64>, Option<usize>)> {
    let pruner = recipe.prune.iter().map(|p| (format!("prune.{}", p.name()), p.asked().keep, p.asked().experts));
    let merger = recipe.merge.iter().map(|m| (format!("merge.{}", m.name()), m.asked().keep, m.asked().experts));
    pruner.chain(merger).collect()
}

/// What is wrong with `[prune]`, `[merge]` and `[repair]` whatever the model.
pub(super) fn check_reduction(recipe: &Recipe, source: &Source) -> Vec<Problem> {
    let mut found = Vec::new();
    let mut add = |key: String, message: String, help: &str| {
        found.push(source.problem(&key, message, (!help.is_empty()).then(|| help.to_owned())));
    };
    for (key, keep, experts) in reducers(recipe) {
        match (keep, experts) {
            (None, None) => add(key.clone(), "how many experts are to stay?".into(), "say keep = 0.75, or experts = 48"),
            (Some(_), Some(_)) => add(key.clone(), "`keep` and `experts` both say how many stay; leave one out".into(), ""),
            (Some(keep), None) if !(keep > 0.0 && keep <= 1.0) => {
                add(format!("{key}.keep"), format!("{keep} is no share of the experts"), "choose one up to 1, such as 0.75");
            }
            _ => {}
        }
        if recipe.calibrate.is_none() {
            let message = "experts are chosen by what they do on texts, and there is no [calibrate]".to_owned();
            add(key, message, "name texts with calibrate.corpus");
        }
    }
    if let Some(calibrate) = &recipe.calibrate {
        let stems: Vec<String> = calibrate.corpus.iter().map(|source| source.domain().into_owned()).collect();
        if let Some(pruner) = &recipe.prune {
            for (i, domain) in pruner.asked().domains.iter().enumerate().filter(|(_, domain)| !stems.contains(domain)) {
                let message = format!("no text of calibrate.corpus is named {domain}; there are {}", stems.join(", "));
                add(format!("prune.{}.domains.{i}", pruner.name()), message, "");
            }
        }
    }
    if let Some(removal) = recipe.repair.as_ref().and_then(|repair| repair.removal.as_ref()) {
        if !recipe.reduces() {
            add("repair.removal".into(), "there is nothing to repair: no expert goes".into(), "name a pruner, such as [prune.easy_ep]");
        }
        if !(removal.rate > 0.0 && removal.rate.is_finite()) {
            add("repair.removal.rate".into(), format!("{} is no step", removal.rate), "choose a small share, such as 0.02");
        }
        if !(removal.down.damping > 0.0 && removal.down.damping.is_finite()) {
            let message = format!("{} holds nothing", removal.down.damping);
            add("repair.removal.down.damping".into(), message, "choose a share, such as 0.3");
        }
        if removal.steps == 0 && removal.down.rounds == 0 {
            let help = "leave `down` as it is, ask for steps, such as 400, or leave [repair.removal] out";
            add("repair.removal".into(), "no step for the router and no round for the down projections: nothing is fitted".into(), help);
        }
        if removal.tokens < 64 {
            add("repair.removal.tokens".into(), format!("{} tokens are too few to fit a layer to", removal.tokens), "ask for at least 64");
        }
    }
    if let Some(crate::merge::Merger::Subspace(params)) = &recipe.merge
        && !(params.rank > 0.0 && params.rank <= 1.0)
    {
        add("merge.subspace.rank".into(), format!("{} is no share of the directions", params.rank), "choose one up to 1");
    }
    found
}

/// What is wrong with a wish for fewer experts of this model.
pub fn check_experts(loaded: &Loaded, model: &Model) -> Vec<Problem> {
    let Loaded { recipe, source } = loaded;
    let (mut found, mut left, spec) = (Vec::new(), count(model), model.spec());
    let Some(moe) = (0..spec.layers.len()).find_map(|layer| spec.moe(layer)) else { return found };
    for (key, keep, experts) in reducers(recipe).into_iter().filter(|(_, keep, experts)| keep.is_some() != experts.is_some()) {
        let asked = experts.unwrap_or_else(|| keep.map_or(left, |keep| (keep * left as f64).round() as usize));
        let knob = if keep.is_some() { "keep" } else { "experts" };
        if asked > left {
            found.push(source.problem(
                &format!("{key}.{knob}"),
                format!("{asked} experts cannot stay of {left}; ask for at most {left}"),
                None,
            ));
            break;
        }
        let merged = key.starts_with("merge.");
        if merged && moe.router.groups.is_some_and(|groups| groups.count > 1) && asked < left {
            let message = "merged experts come from several of the router's groups (n_group), and no group would be what it was";
            found.push(source.problem(&key, message.to_owned(), Some("prune instead".into())));
        }
        if let Some(why) = objection(moe, asked) {
            found.push(source.problem(&format!("{key}.{knob}"), why, None));
        }
        left = asked;
    }
    if recipe.reduces() && recipe.mtp().is_none() && model.layout().tensors().iter().any(|tensor| tensor.role == Role::Mtp) {
        let key = reducers(recipe).first().map(|(key, ..)| key.clone()).unwrap_or_default();
        let message = "the checkpoint has multi-token-prediction layers, which stand under the same count of experts and have no scores";
        found.push(source.problem(&key, message.to_owned(), Some(format!("leave them out with {key}.mtp = \"drop\""))));
    }
    found
}
