//! What is wrong with a wish for scaled input channels, or a rotated residual stream.

use calib::arch::Role;
use calib::{Model, Weights};

use super::super::{Loaded, Problem, Recipe, Source};
use crate::fold::{objection, rotate};

/// What is wrong with `[repair.awq]` whatever the model.
pub(super) fn check_awq(recipe: &Recipe, source: &Source) -> Vec<Problem> {
    let Some(params) = recipe.folds() else { return Vec::new() };
    let mut found = Vec::new();
    let mut add = |key: &str, message: String, help: &str| {
        found.push(source.problem(&format!("repair.awq{key}"), message, (!help.is_empty()).then(|| help.to_owned())));
    };
    if recipe.calibrate.is_none() {
        add("", "channels are scaled by what enters them, and there is no [calibrate]".into(), "name texts with calibrate.corpus");
    }
    if recipe.reduces() {
        let help = "reduce with [export.dense] first, then scale what that wrote";
        add("", "channels are scaled by what the checkpoint was measured with, and experts go".into(), help);
    }
    if params.exponents < 2 {
        add(".exponents", format!("{} exponents leave no choice", params.exponents), "try some, such as 20");
    }
    if params.folds.as_ref().is_some_and(Vec::is_empty) {
        add(".folds", "nothing is scaled".into(), "name some, or leave it out for all that the family allows");
    }
    match (&recipe.quantize, &recipe.allocate) {
        (Some(_), Some(allocate)) => match (params.bits, allocate.is_mixed()) {
            (None, true) => {
                add("", "widths are shared out, and exponents are chosen at one".into(), "name one of allocate.choices with bits")
            }
            (Some(bits), true) if !allocate.options().iter().any(|choice| choice.bits == bits) => {
                add(".bits", format!("{bits} bits are none of allocate.choices"), "name one that is");
            }
            (Some(_), false) => add(".bits", "there is one width, and exponents are chosen at that".into(), "leave it out"),
            _ => {}
        },
        _ => add("", "channels are scaled for a quantizer, and there is none".into(), "name one, such as [quantize.gptq], and its widths"),
    }
    found
}

/// What is wrong with `[repair.rotate]` whatever the model.
pub(super) fn check_rotate(recipe: &Recipe, source: &Source) -> Vec<Problem> {
    if recipe.rotates().is_none() {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut add = |message: &str, help: &str| found.push(source.problem("repair.rotate", message.to_owned(), Some(help.to_owned())));
    if recipe.reduces() {
        add(
            "experts are chosen by what the checkpoint says, and it is rotated",
            "reduce with [export.dense] first, then rotate what that wrote",
        );
    }
    if recipe.folds().is_some() {
        add("rotated channels are all alike, and repair.awq scales those that are not", "leave one of the two out");
    }
    if recipe.quantize.is_none() {
        add("the stream is rotated for a quantizer, and there is none", "name one, such as [quantize.gptq], and its widths");
    }
    found
}

/// What the family or the checkpoint does not allow of the rotation that the recipe names.
fn check_rotation(loaded: &Loaded, model: &Model) -> Vec<Problem> {
    let Some(params) = loaded.recipe.rotates() else { return Vec::new() };
    let problem = |message: String, help: &str| loaded.source.problem("repair.rotate", message, Some(help.to_owned()));
    let mut found = Vec::new();
    if let Some(why) = rotate::objection(model.spec()) {
        let message = format!("a model of the type {} cannot be rotated: {why}", model.spec().model_type);
        found.push(problem(message, "leave repair.rotate out"));
    }
    if params.mtp.is_none() && model.layout().tensors().iter().any(|tensor| tensor.role == Role::Mtp) {
        let message = "the checkpoint has multi-token-prediction layers, which read the last hidden state behind the last norm's gain: it \
                       goes into the head, and another norm stands between the two that it cannot pass";
        found.push(problem(message.to_owned(), "leave them out with repair.rotate.mtp = \"drop\""));
    }
    found
}

/// Scales that the recipe names and the family does not allow, or a rotation.
pub fn check_folds(loaded: &Loaded, model: &Model) -> Vec<Problem> {
    let named = loaded.recipe.folds().and_then(|params| params.folds.as_ref());
    let refused = |(i, fold): (usize, &crate::repair::awq::Fold)| {
        let why = objection(model.spec(), *fold)?;
        let message = format!("{} cannot be scaled in a model of the type {}: {why}", fold.name(), model.spec().model_type);
        let help = "take it out; without `folds` all are scaled that can be";
        Some(loaded.source.problem(&format!("repair.awq.folds.{i}"), message, Some(help.to_owned())))
    };
    let folds = named.into_iter().flatten().enumerate().filter_map(refused);
    folds.chain(check_rotation(loaded, model)).collect()
}
