//! Every problem of value at once, before any hour is spent.

mod drop;
mod experts;
mod fold;
#[cfg(test)]
mod tests;
mod texts;

use std::collections::BTreeMap;

use calib::arch::Role;
use kernels::Group;

use super::beside::{check_beside, check_pmq};
use super::{Loaded, Problem, Recipe, SCHEMA, Source};
use crate::allocate::{Allocate, BUDGETS, Glob, Matrix, Packed, Runtime};
use crate::export::Kernels;
use crate::objective::{OutputWeight, TokenWeight};
use crate::plan::{Shape, Tensor, matrices};
use crate::quantize::{Grid, Quantizer, Refine, learned, pmq};
use crate::repair::Order;

pub use experts::check_experts;
pub use fold::check_folds;

/// What is wrong with a recipe whatever the model.
pub fn check_values(loaded: &Loaded) -> Vec<Problem> {
    let Loaded { recipe, source } = loaded;
    let mut found = Vec::new();
    let mut add = |key: &str, message: String, help: &str| {
        found.push(source.problem(key, message, (!help.is_empty()).then(|| help.to_owned())));
    };
    if recipe.schema != SCHEMA {
        add("schema", format!("schema {} is not known; this program reads schema {SCHEMA}", recipe.schema), "");
    }
    for (key, given) in [("model", &recipe.model), ("out", &recipe.out)] {
        if given.is_none() {
            add(key, format!("there is no `{key}`"), &format!("name it in the recipe or with --{key} DIR"));
        }
    }
    match (&recipe.quantize, &recipe.allocate) {
        (Some(_), None) => add("quantize", "there is a quantizer but no [allocate]".into(), "say how many bits, such as allocate.bits = 4"),
        (None, Some(_)) => add("allocate", "there are widths but no quantizer".into(), "name one, such as [quantize.gptq]"),
        (None, None) if !recipe.reduces() => {
            add("quantize", "nothing is asked for".into(), "name a quantizer, such as [quantize.gptq], and allocate.bits");
        }
        (None, None) | (Some(_), Some(_)) => {}
    }
    if recipe.export.formats().is_empty() {
        add("export", "no format is asked for".into(), "add [export.compressed_tensors], [export.native] or [export.dense]");
    }
    if recipe.export.kernels.is_some() && recipe.export.native.is_none() {
        add("export.kernels", "kernels are emitted for what [export.native] writes, and it is not asked for".into(), "add [export.native]");
    }
    if let Some(what) = recipe.export.kernels.as_ref().and_then(Kernels::objection) {
        add("export.kernels", what, "name another library with export.kernels.nvrtc, or write archs = [] to compile nothing");
    }
    found.extend(check_methods(recipe, source));
    found.extend(drop::check_drop(recipe, source));
    found.extend(experts::check_reduction(recipe, source));
    found.extend(recipe.allocate.iter().flat_map(|allocate| check_widths(allocate, source)));
    if let Some(allocate) = recipe.allocate.as_ref().filter(|a| a.is_mixed() && a.budgets().len() == 1) {
        found.extend(check_budget(recipe, allocate, source));
    }
    found.extend(texts::check_texts(recipe, source));
    found
}

/// What a quantizer cannot do, whatever the model.
fn check_methods(recipe: &Recipe, source: &Source) -> Vec<Problem> {
    let mut found = Vec::new();
    if recipe.refine.is_some() && !recipe.quantize.as_ref().is_some_and(Quantizer::needs_calibration) {
        let message = "there is nothing to refine against: the quantizer sees no tokens".to_owned();
        found.push(source.problem("refine", message, Some("name [quantize.gptq], or leave refine out".into())));
    }
    if let Some(Refine::Learned(params)) = &recipe.refine {
        found.extend(check_learned(params, recipe.calibrate.as_ref().map_or(0, |calibrate| calibrate.samples), source));
    }
    found.extend(check_repair(recipe, source));
    found.extend(check_moments(recipe, source));
    found.extend(fold::check_awq(recipe, source));
    found.extend(fold::check_rotate(recipe, source));
    found.extend(texts::check_through(recipe, source));
    if let Some(objective) = &recipe.objective {
        if !recipe.quantize.as_ref().is_some_and(Quantizer::needs_calibration) {
            let message = "there are no tokens to weigh: the quantizer sees none".to_owned();
            found.push(source.problem("objective", message, Some("name [quantize.gptq], or leave objective out".into())));
        }
        if objective.output_weight != OutputWeight::None && recipe.refine.as_ref().is_none_or(|refine| refine.descent().is_none()) {
            let message = "outputs make up for one another in a descent, and there is none".to_owned();
            found.push(source.problem("objective.output_weight", message, Some("add [refine.descent]".into())));
        }
        match objective.power {
            Some(_) if objective.token_weight != TokenWeight::Affinity => {
                let message = "only the routing weight has a power".to_owned();
                found.push(source.problem("objective.power", message, Some("use token_weight = \"affinity\", or leave it out".into())));
            }
            Some(power) if !(1..=2).contains(&power) => {
                found.push(source.problem(
                    "objective.power",
                    format!("{power} is no power of the routing weight"),
                    Some("use 1 or 2".into()),
                ));
            }
            _ => {}
        }
    }
    if let (Some(Quantizer::Hqq(_)), Some(allocate)) = (&recipe.quantize, &recipe.allocate)
        && allocate.options().iter().any(|choice| !matches!(choice.grid, Grid::Asym | Grid::Offset))
    {
        let help = "use allocate.grid = \"asym\", or \"offset\" with [export.dense] alone";
        found.push(source.problem("allocate", "hqq fits zero points, and this grid stores none".into(), Some(help.into())));
    }
    if let (Some(Quantizer::Pmq(_)), Some(allocate)) = (&recipe.quantize, &recipe.allocate) {
        if let Some(choice) = allocate.options().into_iter().find(|choice| !pmq::has(choice.bits, choice.grid)) {
            let help = "use allocate.grid = \"offset\" with [export.dense] alone, and the grid half at 1 bit";
            found.push(source.problem("allocate", format!("pmq has real zeros, and {choice} has none"), Some(help.into())));
        }
        if recipe.refine.is_some() {
            let message = "refined codes would no longer be those of MC-MoE".to_owned();
            found.push(source.problem("refine", message, Some("leave refine out, or name [quantize.gptq]".into())));
        }
    }
    found
}

/// Learned refinement that cannot learn.
fn check_learned(params: &learned::Params, samples: usize, source: &Source) -> Vec<Problem> {
    let mut found = Vec::new();
    let mut add = |key: &str, message: String, help: &str| {
        found.push(source.problem(&format!("refine.learned.{key}"), message, Some(help.to_owned())));
    };
    for (key, value) in [("rate", params.rate), ("scale_rate", params.scale_rate)] {
        if !(value.is_finite() && value >= 0.0) {
            add(key, format!("a rate of {value} leads nowhere"), "choose one from 0 up, such as 0.01");
        }
    }
    if !(0.0..0.5).contains(&params.spread) {
        add("spread", format!("{} reaches out of the code", params.spread), "choose one from 0 to 0.49");
    }
    if params.samples == 0 {
        add("samples", "a step of no samples has no gradient".into(), "take some, such as 4");
    }
    if params.held_out == 0 {
        add("held_out", "nothing is held out to judge steps by".into(), "hold out some samples, such as 8");
    } else if samples > 0 && samples <= params.held_out {
        let message = format!("{} of {samples} calibration samples are held out, and none is left to learn from", params.held_out);
        add("held_out", message, "hold out fewer, or raise calibrate.samples");
    }
    if params.judged == 0 {
        add("judged", "no step is ever judged".into(), "judge some, such as 10");
    }
    if let Some(end) = &params.end {
        for (key, value) in [("rate", end.rate), ("scale_rate", end.scale_rate)] {
            if !(value.is_finite() && value >= 0.0) {
                add(&format!("end.{key}"), format!("a rate of {value} leads nowhere"), "choose one from 0 up, such as 0.01");
            }
        }
        if end.samples == 0 {
            add("end.samples", "a step of no samples has no gradient".into(), "take some, such as 4");
        }
        if end.judged == 0 {
            add("end.judged", "no step is ever judged".into(), "judge some, such as 10");
        }
    }
    found
}

/// Moments that are kept and that no other plan could use.
fn check_moments(recipe: &Recipe, source: &Source) -> Option<Problem> {
    if !recipe.calibrate.as_ref().is_some_and(|calibrate| calibrate.keep_moments) {
        return None;
    }
    let sequential = recipe.repair.as_ref().is_some_and(|repair| repair.order == Order::Sequential);
    let why = match &recipe.refine {
        _ if !recipe.quantize.as_ref().is_some_and(Quantizer::needs_calibration) => Some("the quantizer uses no second moments"),
        _ if sequential => Some("behind compressed layers they serve this one plan alone"),
        Some(Refine::Learned(_)) => Some("learned refinement needs the tokens themselves"),
        _ if recipe.objective.as_ref().is_some_and(|objective| objective.output_weight != OutputWeight::None) => {
            Some("objective.output_weight takes a backward pass over the tokens")
        }
        Some(Refine::Descent(_)) | None => None,
    };
    why.map(|why| source.problem("calibrate.keep_moments", why.to_owned(), Some("leave it out".into())))
}

/// What repair asks for and cannot have.
fn check_repair(recipe: &Recipe, source: &Source) -> Vec<Problem> {
    let Some(repair) = &recipe.repair else { return Vec::new() };
    let mut found = Vec::new();
    let mut add = |key: &str, message: &str, help: &str| found.push(source.problem(key, message.to_owned(), Some(help.to_owned())));
    let sequential = repair.order == Order::Sequential;
    if sequential && !recipe.quantize.as_ref().is_some_and(Quantizer::needs_calibration) {
        add("repair.order", "the quantizer sees no tokens, so it does not matter whose they are", "name [quantize.gptq], or leave it out");
    }
    for (key, asked) in [("propagate", repair.propagate.is_some()), ("router_repair", repair.router_repair.is_some())] {
        if asked && !sequential {
            add(&format!("repair.{key}"), "it mends what compressed layers before it disturb", "add order = \"sequential\"");
        }
    }
    if repair.propagate.is_some_and(|alpha| !(0.0..=1.0).contains(&alpha)) {
        add("repair.propagate", "the share lies between 0 and 1", "use 0.5, as QEP does");
    }
    if repair.router_repair.as_ref().is_some_and(|params| !(params.damping.is_finite() && params.damping >= 0.0)) {
        add("repair.router_repair.damping", "a damping is at least 0", "leave it out for 0.01");
    }
    found
}

fn check_widths(allocate: &Allocate, source: &Source) -> Vec<Problem> {
    let budgets = allocate.budgets();
    let mut found = Vec::new();
    if budgets.len() != 1 {
        let message = format!(
            "one of {} is needed, and there {}",
            BUDGETS.join(", "),
            match budgets.len() {
                0 => "is none".into(),
                _ => format!("are {}: {}", budgets.len(), budgets.join(", ")),
            }
        );
        found.push(source.problem("allocate", message, Some("for one width for all matrices, write bits = 4".into())));
    }
    if let Some(bits) = allocate.bits.filter(|bits| !(allocate.grid.fewest_bits()..=8).contains(bits)) {
        let help = format!("choose {} to 8", allocate.grid.fewest_bits());
        found.push(source.problem("allocate.bits", format!("{bits} bits cannot be exported"), Some(help)));
    }
    for (key, bits) in [("embedding", allocate.embedding), ("head", allocate.head)] {
        if let Some(bits) = bits.filter(|bits| ![4, 6, 8].contains(bits)) {
            let message = format!("{bits} bits for the {key} are not offered");
            found.push(source.problem(
                &format!("allocate.{key}"),
                message,
                Some("choose 8, 6 or 4, or leave it out for the source's dtype".into()),
            ));
        }
    }
    found
}

/// What is wrong with a budget that a program is to share out.
fn check_budget(recipe: &Recipe, allocate: &Allocate, source: &Source) -> Vec<Problem> {
    let mut found = Vec::new();
    let mut add = |key: &str, message: String, help: &str| {
        found.push(source.problem(&format!("allocate{key}"), message, (!help.is_empty()).then(|| help.to_owned())));
    };
    if let Some(bits) = allocate.bits_per_weight.filter(|bits| !(bits.is_finite() && *bits > 0.0)) {
        add(".bits_per_weight", format!("{bits} bits a weight are no budget"), "ask for some, such as 3.0");
    }
    let packed = Packed { compressed_tensors: recipe.export.compressed_tensors.is_some(), native: recipe.export.native.is_some() };
    if allocate.file.is_some() && !packed.compressed_tensors {
        add(
            ".file",
            "the files of the dense export are of one size whatever the widths".into(),
            "add [export.compressed_tensors], or ask for bits_per_weight",
        );
    }
    match allocate.runtime {
        None if packed.compressed_tensors => {
            let message = "several widths, and no word about what is to load them: no two runtimes load the same mixtures".to_owned();
            add("", message, &format!("say allocate.runtime = one of {}", Runtime::MENU));
        }
        Some(runtime) => runtime.refusal(packed).into_iter().for_each(|why| add(".runtime", why, "")),
        None => {}
    }
    if recipe.calibrate.is_none() {
        add("", "widths are shared out by what they cost on texts, and there is no [calibrate]".into(), "name texts with calibrate.corpus");
    }
    found.extend(check_pmq(allocate, source));
    found.extend(check_beside(allocate, source));
    let mut add = |key: &str, message: String, help: &str| {
        found.push(source.problem(&format!("allocate{key}"), message, (!help.is_empty()).then(|| help.to_owned())));
    };
    let options = allocate.options();
    if options.is_empty() {
        add(".choices", "there is no width to choose from".into(), "name some, such as [2, 3, 4]");
    }
    for (i, choice) in options.iter().enumerate() {
        let key = format!(".choices.{i}");
        if !(choice.grid.fewest_bits()..=8).contains(&choice.bits) {
            add(&key, format!("{choice}: there is no such grid"), &format!("choose {} to 8 bits", choice.grid.fewest_bits()));
        } else if packed.compressed_tensors && !matches!(choice.grid, Grid::Sym | Grid::Asym) {
            add(&key, format!("{choice}: compressed-tensors does not hold it"), "use the grid sym or asym, or [export.dense] alone");
        }
        if options[..i].contains(choice) {
            add(&key, format!("{choice} stands there twice"), "");
        }
    }
    found
}

/// Patterns of `exclude` that take some matrices out of a tie and leave others in it.
fn check_ties(allocate: &Allocate, shape: &Shape, source: &Source) -> Option<Problem> {
    let runtime = allocate.runtime?;
    let globs = allocate.globs();
    let all = matrices(&Allocate { exclude: Vec::new(), ..allocate.clone() }, shape);
    let excluded = |m: &Matrix| globs.iter().any(|glob| glob.matches(&m.name));
    let split = |class: &Vec<usize>| {
        let out = class.iter().find(|&&m| excluded(&all[m]))?;
        let within = class.iter().find(|&&m| !excluded(&all[m]))?;
        Some((&all[*out].name, &all[*within].name, class.len()))
    };
    let (out, within, members) = allocate.constraints().classes(&all).iter().find_map(split)?;
    let name = runtime.name();
    let message =
        format!("{out} is excluded and {within} is not, and {name} loads the {members} matrices that they belong to with one width");
    Some(source.problem("allocate.exclude", message, Some("exclude all of them or none".into())))
}

/// Matrices for which the cost has no unit and the recipe leaves a choice.
fn check_cost(allocate: &Allocate, shape: &Shape, source: &Source) -> Option<Problem> {
    let (rules, options) = (allocate.constraints(), allocate.options());
    let several = |m: &&Matrix| options.iter().filter(|choice| rules.objection(m, choice).is_none()).count() > 1;
    let matrices = matrices(allocate, shape);
    let first = matrices.iter().filter(|m| !allocate.cost.covers(m.kind())).find(several)?;
    let kind = first.kind();
    let message = format!("the cost {} has no unit for {kind} matrices such as {}", allocate.cost.name(), first.name);
    let help = format!("give them one width with allocate.min_bits.{kind} and allocate.max_bits.{kind}, or name them in allocate.exclude");
    Some(source.problem("allocate", message, Some(help)))
}

/// What is wrong with a recipe for a model of this shape.
pub fn check(loaded: &Loaded, shape: &Shape) -> Vec<Problem> {
    let (Some(allocate), Some(_)) = (&loaded.recipe.allocate, &loaded.recipe.quantize) else { return Vec::new() };
    let mut found = Vec::new();
    let matrices: Vec<&Tensor> = shape.tensors.iter().filter(|t| t.quantizable().is_some()).collect();
    found.extend(check_ends(allocate, shape, &loaded.source));
    found.extend(drop::check_experts_to_drop(allocate, shape, &loaded.source));
    let globs = allocate.globs();
    for (i, glob) in globs.iter().enumerate() {
        if !matrices.iter().any(|tensor| glob.matches(&tensor.name)) {
            found.push(unmatched(glob, &allocate.exclude[i], i, shape, &loaded.source));
        }
    }
    found.extend(check_ties(allocate, shape, &loaded.source));
    if allocate.is_mixed() {
        found.extend(check_cost(allocate, shape, &loaded.source));
    } else if let Group::Size(group) = allocate.group.0 {
        let left = matrices.iter().filter(|t| !globs.iter().any(|glob| glob.matches(&t.name)));
        found.extend(check_group(group, left.copied(), &loaded.source));
    }
    found
}

/// An embedding or a head that is not there, or whose rows the group does not divide.
fn check_ends(allocate: &Allocate, shape: &Shape, source: &Source) -> Vec<Problem> {
    let asked = [("embedding", Role::Embedding, allocate.embedding), ("head", Role::Head, allocate.head)];
    let problem = |(key, role, _): (&str, Role, Option<u8>)| {
        let key = format!("allocate.{key}");
        let Some(tensor) = shape.tensors.iter().find(|tensor| tensor.role == role) else {
            let message = "the head is tied to the embedding: there is none of its own".to_owned();
            return Some(source.problem(&key, message, Some("use allocate.embedding, which is both".into())));
        };
        let inputs = tensor.shape.last().copied().unwrap_or(0);
        let group = allocate.group.0.len(inputs);
        let fits = group > 0 && inputs.is_multiple_of(group);
        let message = || format!("group {group} does not divide the {inputs} columns of {}", tensor.name);
        (!fits).then(|| source.problem(&key, message(), Some("choose another allocate.group, or leave it out".into())))
    };
    asked.into_iter().filter(|(.., bits)| bits.is_some()).filter_map(problem).collect()
}

fn unmatched(glob: &Glob, pattern: &str, i: usize, shape: &Shape, source: &Source) -> Problem {
    let tensor = shape.tensors.iter().find(|tensor| glob.matches(&tensor.name));
    let (message, help) = match tensor {
        Some(tensor) => (
            format!("`{pattern}` excludes {}, which is never quantized", tensor.name),
            "take it out: only attention, experts and dense MLPs of the decoder layers are quantized",
        ),
        None => (format!("`{pattern}` matches no tensor of this model"), "`moepress inspect MODEL -v` lists the names"),
    };
    source.problem(&format!("allocate.exclude.{i}"), message, Some(help.into()))
}

/// One problem a width that the group does not divide: a model has thousands of matrices of a few widths.
fn check_group<'a>(group: usize, matrices: impl Iterator<Item = &'a Tensor>, source: &Source) -> Vec<Problem> {
    let mut widths: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
    for tensor in matrices {
        if let Some((.., inputs)) = tensor.quantizable().filter(|(.., inputs)| inputs % group != 0) {
            widths.entry(inputs).or_default().push(&tensor.name);
        }
    }
    let problem = |(inputs, names): (usize, Vec<&str>)| {
        let nearest = (1..=group).rev().find(|g| inputs % g == 0).unwrap_or(1);
        let others = match names.len() - 1 {
            0 => String::new(),
            1 => " and of 1 more matrix".into(),
            n => format!(" and of {n} more matrices"),
        };
        let message = format!("group {group} does not divide the {inputs} inputs of {}{others}", names[0]);
        let help = format!("choose a divisor, such as {nearest}, or name them in allocate.exclude");
        source.problem("allocate.group", message, Some(help))
    };
    widths.into_iter().map(problem).collect()
}
