//! What is wrong with dropping experts, and what cannot go with it.

use calib::arch::{Kind, Part, Role};

use crate::allocate::{Allocate, Cost, Runtime, Substitute};
use crate::plan::Shape;
use crate::quantize::Refine;
use crate::recipe::{Problem, Recipe, Source};

/// What is wrong with `allocate.drop` whatever the model.
pub(super) fn check_drop(recipe: &Recipe, source: &Source) -> Vec<Problem> {
    let Some((allocate, substitute)) = recipe.allocate.as_ref().and_then(|allocate| Some((allocate, allocate.drop?))) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    let mut add = |key: &str, message: String, help: &str| found.push(source.problem(key, message, Some(help.to_owned())));
    let key = "allocate.drop";
    if allocate.bits.is_some() {
        add(key, "one width for all leaves no bytes to gain by it".into(), "ask for bits_per_weight or bytes instead of bits");
    }
    if !matches!(allocate.cost, Cost::Hessian | Cost::Output | Cost::EndLoss) {
        let message = format!("the cost {} has no unit for what an expert puts out", allocate.cost.name());
        add(key, message, "say allocate.cost = \"end_loss\", \"output\" or \"hessian\"");
    }
    if let Some(runtime) = allocate.runtime.filter(|runtime| *runtime != Runtime::Native) {
        let message = format!("runtime {} runs every expert that its router chooses", runtime.name());
        add(key, message, "say allocate.runtime = \"native\" with [export.native], or use [prune]");
    }
    if recipe.export.compressed_tensors.is_some() {
        add("export.compressed_tensors", "it has no form for a dropped expert".into(), "use [export.native], or leave allocate.drop out");
    }
    if recipe.export.dense.is_some() && substitute == Substitute::Mean {
        let message = "a dense expert has no bias that could hold its mean output".to_owned();
        add("export.dense", message, "use [export.native], or allocate.drop = \"zero\"");
    }
    if matches!(recipe.refine, Some(Refine::Learned(_))) {
        add(
            "refine.learned",
            "steps run every expert as it was, the dropped ones too".into(),
            "use [refine.descent], or leave allocate.drop out",
        );
    }
    found
}

/// A model that has nothing to drop.
pub(super) fn check_experts_to_drop(allocate: &Allocate, shape: &Shape, source: &Source) -> Option<Problem> {
    let routed = |role: Role| role.kind() == Kind::Expert && matches!(role, Role::Layer(_, Part::Expert(..)));
    let none = allocate.drop.is_some() && !shape.tensors.iter().any(|tensor| routed(tensor.role));
    none.then(|| source.problem("allocate.drop", "this model has no routed experts".to_owned(), Some("leave it out".into())))
}
