//! Every problem of value at once, before any hour is spent.

mod experts;
mod fold;
mod texts;

use std::collections::BTreeMap;

use calib::arch::Role;
use kernels::Group;

use super::beside::{check_beside, check_pmq};
use super::{Loaded, Problem, Recipe, SCHEMA, Source};
use crate::allocate::{Allocate, BUDGETS, Glob, Matrix, Packed, Runtime};
use crate::objective::TokenWeight;
use crate::plan::{Shape, Tensor, matrices};
use crate::quantize::{Grid, Quantizer, Refine, learned};
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
    found.extend(check_methods(recipe, source));
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
    found.extend(fold::check_awq(recipe, source));
    found.extend(texts::check_through(recipe, source));
    if let Some(objective) = &recipe.objective {
        if !recipe.quantize.as_ref().is_some_and(Quantizer::needs_calibration) {
            let message = "there are no tokens to weigh: the quantizer sees none".to_owned();
            found.push(source.problem("objective", message, Some("name [quantize.gptq], or leave objective out".into())));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::{Overrides, load};
    use calib::arch::{Part, Projection, Role};
    use kernels::ScaleType;

    fn loaded(text: &str) -> (Loaded, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let prompts = "{\"prompt\": \"x\", \"completion\": \"y\"}\n{\"prompt\": \"x\"}\n";
        for (name, text) in [("a.txt", "x"), ("b.jsonl", "{\"text\": \"x\"}"), ("c.md", "x"), ("p.jsonl", prompts)] {
            fs_err::write(dir.path().join(name), text).unwrap();
        }
        let path = dir.path().join("r.toml");
        fs_err::write(&path, text).unwrap();
        (load(&path, &Overrides::default()).unwrap(), dir)
    }

    /// What is said of a recipe, with the directory taken out of it.
    fn said(text: &str, shape: Option<&Shape>) -> Vec<String> {
        let (loaded, dir) = loaded(text);
        let mut problems = check_values(&loaded);
        problems.extend(shape.iter().flat_map(|shape| check(&loaded, shape)));
        let all = loaded.source.invalid(problems).to_string();
        let all = all.replace(&format!("{}/", dir.path().display()), "");
        all.lines().map(str::to_owned).collect()
    }

    const GOOD: &str = "schema = 1\nmodel = \"m\"\nout = \"o\"\n[calibrate]\ncorpus = [\"a.txt\"]\n[quantize.gptq]\n[allocate]\nbits = 4\n[export.dense]\n";

    #[test]
    fn a_good_recipe_has_no_problem() {
        assert_eq!(said(GOOD, Some(&shape())), [""; 0]);
    }

    #[test]
    fn every_problem_of_value_is_found_at_once() {
        let text = "schema = 2\nout = \"o\"\n[calibrate]\ncorpus = [\"a.txt\", \"no.txt\", \"c.md\"]\nsamples = 1\nundercalibrated = { rtn = { tokens_per_input = -1 } }\n[quantize.gptq]\n[allocate]\nbits = 9\nbytes = \"1GB\"\n[evaluate]\ntext = []\nmax_tokens = 3\n";
        let said = said(text, None);
        let expected = [
            "r.toml:1:10: schema 2 is not known; this program reads schema 1",
            "r.toml:4:20: there is no text no.txt",
            "r.toml:4:30: c.md is neither a .txt, a .jsonl nor a .parquet file",
            "r.toml:5:11: calibrate.samples = 1 cannot be shared out over 3 texts; ask for at least one each",
            "r.toml:6:1: -1 tokens an input are no threshold; ask for 0 or more, such as 0.5",
            "r.toml:8:2: one of bits, bits_per_weight, bytes, file is needed, and there are 2: bits, bytes; for one width for all matrices, write bits = 4",
            "r.toml:9:8: 9 bits cannot be exported; choose 2 to 8",
            "r.toml:12:8: evaluate.text names no text",
            "r.toml:13:14: 3 tokens are less than one window of 512",
            "r.toml: there is no `model`; name it in the recipe or with --model DIR",
            "r.toml: no format is asked for; add [export.compressed_tensors], [export.native] or [export.dense]",
        ];
        assert_eq!(said, expected);
    }

    #[test]
    fn what_is_missing_is_asked_for() {
        let said = |text: &str| said(text, None).join("\n");
        assert!(said(&GOOD.replace("[calibrate]\ncorpus = [\"a.txt\"]\n", "")).contains("needs calibration, and there is no [calibrate]"));
        assert!(said(&GOOD.replace("[allocate]\nbits = 4\n", "")).contains("a quantizer but no [allocate]"));
        assert!(said(&GOOD.replace("[quantize.gptq]\n", "")).contains("widths but no quantizer"));
        assert!(said(&format!("{GOOD}[export.kernels]\n")).contains("kernels are emitted for what [export.native] writes"));
        assert!(said(&GOOD.replace("bits = 4\n", "")).contains("is needed, and there is none"));
    }

    #[test]
    fn texts_have_weights_and_samplers_knobs() {
        let said =
            |corpus: &str, more: &str| said(&GOOD.replace("corpus = [\"a.txt\"]", &format!("corpus = {corpus}\n{more}")), None).join("\n");
        assert_eq!(said("[{ path = \"a.txt\", name = \"x\", weight = 2.0 }, \"b.jsonl\"]", ""), "");
        let bad = said("[{ path = \"a.txt\", weight = 0.0 }]", "sampler.ebss.branches = 0\npack = false");
        let expected = "r.toml:5:10: the sampler ebss lets the model write its texts and reads none; leave calibrate.corpus out\n\
            r.toml:5:38: 0 is no weight; ask for more than 0, or leave the text out\n\
            r.toml:6:25: branches = 0; ask for at least 1\n\
            r.toml:7:8: the sampler ebss writes samples of calibrate.tokens each; there are no documents to keep apart";
        assert_eq!(bad, expected);
        assert!(said("[\"a.txt\", { path = \"a.txt\" }]", "").contains("texts are told apart by name"));
        assert_eq!(said("[\"a.txt\", { path = \"a.txt\", name = \"b\" }]", ""), "");
        assert_eq!(said("[]", "sampler.temperature.temperature = 0.8"), "");
        let all = said("[\"a.txt\"]", "experts = \"all\"\n[objective]\ntoken_weight = \"affinity\"");
        assert!(all.contains("r.toml:6:11: objective.token_weight works on the tokens that an expert is given"), "{all}");
        let loss = said("[\"a.txt\"]", "end_loss = { targets = \"text\", seed = 3 }");
        assert!(loss.contains("nothing needs a backward pass") && loss.contains("targets of the text are not drawn"), "{loss}");
        assert_eq!(said("[\"a.txt\"]", "end_loss.targets = \"text\"\n[objective]\ntoken_weight = \"end_loss\""), "");
    }

    #[test]
    fn demonstrations_are_read_before_anything_runs() {
        let said = |corpus: &str, more: &str| {
            said(&GOOD.replace("corpus = [\"a.txt\"]", &format!("corpus = [\"{corpus}\"]\n{more}")), None).join("\n")
        };
        let lacks = said("p.jsonl", "");
        assert!(lacks.contains("r.toml:5:11: p.jsonl, line 2: a prompt without a completion (1 of 2 lines)"), "{lacks}");
        assert_eq!(said("p.jsonl", "generate = { tokens = 9, temperature = 0.7 }"), "");
        assert!(said("b.jsonl", "generate = {}").contains("r.toml:6:1: no text has a prompt without a completion"));
        assert!(said("p.jsonl", "generate.at_once = 0").contains("at_once = 0; ask for at least 1"));
        assert!(said("p.jsonl", "generate = {}\nsampler.ebss = {}").contains("the sampler ebss reads no texts"));
    }

    #[test]
    fn a_repair_of_nothing_is_refused() {
        let said = |removal: &str| said(&format!("{GOOD}[prune.easy_ep]\nkeep = 0.5\n[repair.removal]\n{removal}\n"), None).join("\n");
        assert_eq!((said(""), said("steps = 9\ndown.rounds = 0")), (String::new(), String::new()));
        assert!(said("down.rounds = 0").contains("nothing is fitted; leave `down` as it is"), "{}", said("down.rounds = 0"));
        assert!(said("down.damping = 0.0").contains("0 holds nothing; choose a share"));
    }

    #[test]
    fn a_budget_is_held_to_what_loads_it() {
        let said = |budget: &str, export: &str| {
            let text = GOOD.replace("bits = 4", budget).replace("[export.dense]", export);
            said(&text, Some(&shape())).join("\n")
        };
        assert_eq!(said("bits_per_weight = 3", "[export.dense]"), "");
        assert_eq!(said("bits_per_weight = 3\nruntime = \"native\"", "[export.dense]"), "");
        assert_eq!(said("bytes = \"1MB\"\nruntime = \"transformers4\"", "[export.compressed_tensors]"), "");
        assert!(said("bits_per_weight = 3", "[export.compressed_tensors]").contains("say allocate.runtime = one of transformers4"));
        assert!(said("bits_per_weight = 3\nruntime = \"native\"", "[export.compressed_tensors]").contains("add [export.native]"));
        assert_eq!(said("bits_per_weight = 3\nruntime = \"native\"", "[export.native]"), "");
        assert!(said("bits_per_weight = 3\nruntime = \"vllm\"", "[export.native]").contains("add [export.compressed_tensors]"));
        assert!(said("bits_per_weight = 3\nruntime = \"gguf\"", "[export.dense]").contains("no exporter yet"));
        assert!(said("file = \"1MB\"", "[export.dense]").contains("of one size whatever the widths"));
        assert!(
            said("bits_per_weight = 3\nruntime = \"vllm\"\nchoices = [1, 2, 2]", "[export.compressed_tensors]")
                .contains("1 bits half, group 128: compressed-tensors does not hold it")
        );
        assert!(said("bits_per_weight = 3\nchoices = [{ bits = 1, grid = \"sym\" }]", "[export.dense]").contains("there is no such grid"));
    }

    #[test]
    fn the_best_grid_is_chosen_from_what_the_formats_hold() {
        let grids = |export: &str, bits: u8| {
            let text = GOOD.replace("bits = 4", &format!("bits = {bits}\ngrid = \"best\"")).replace("[export.dense]", export);
            let allocate = loaded(&text).0.recipe.allocate.unwrap();
            (allocate.is_mixed(), allocate.options().iter().map(|choice| choice.grid).collect::<Vec<_>>())
        };
        use crate::quantize::Grid::{Asym, Half, Offset, Sym};
        assert_eq!(grids("[export.dense]", 2), (true, vec![Sym, Half, Asym, Offset]));
        assert_eq!(grids("[export.compressed_tensors]\n[export.dense]", 3), (true, vec![Sym, Asym]));
        assert_eq!(grids("[export.dense]", 4), (false, vec![Sym]));
        assert_eq!(grids("[export.dense]", 1), (false, vec![Half]));
    }

    #[test]
    fn ends_have_the_bits_that_are_offered_and_must_be_there() {
        let with = |ends: &str, shape: &Shape| said(&GOOD.replace("bits = 4\n", &format!("bits = 4\n{ends}\n")), Some(shape)).join("\n");
        assert!(with("head = 8\ngroup = 32", &shape()).is_empty());
        assert!(with("head = 8", &shape()).contains("group 128 does not divide the 96 columns of lm_head.weight"));
        assert!(with("embedding = 5", &shape()).contains("5 bits for the embedding are not offered; choose 8, 6 or 4"));
        let mut tied = shape();
        tied.tensors.retain(|tensor| tensor.role != Role::Head);
        assert!(with("head = 4", &tied).contains("tied to the embedding"));
    }

    #[test]
    fn what_weighs_and_mends_needs_tokens_and_an_order() {
        let said = |extra: &str| said(&format!("{GOOD}{extra}"), Some(&shape())).join("\n");
        assert_eq!(said("[objective]\ntoken_weight = \"affinity\"\npower = 1\n[repair]\norder = \"sequential\"\npropagate = 0.5\n"), "");
        assert!(said("[objective]\ntoken_weight = \"affinity\"\npower = 3\n").contains("3 is no power of the routing weight; use 1 or 2"));
        assert!(said("[objective]\npower = 1\n").contains("only the routing weight has a power"));
        assert!(said("[repair]\npropagate = 0.5\n").contains("add order = \"sequential\""));
        assert!(said("[repair.router_repair]\n").contains("add order = \"sequential\""));
        assert!(said("[repair]\norder = \"sequential\"\npropagate = 1.5\n").contains("between 0 and 1"));
        let rtn = GOOD.replace("gptq", "rtn") + "[objective]\n[repair]\norder = \"sequential\"\n";
        let said = self::said(&rtn, None).join("\n");
        assert!(said.contains("no tokens to weigh") && said.contains("the quantizer sees no tokens"), "{said}");
    }

    #[test]
    fn channels_are_scaled_for_a_quantizer_of_one_width_by_what_was_measured() {
        let said = |extra: &str| said(&format!("{GOOD}{extra}"), Some(&shape())).join("\n");
        assert_eq!(said("[repair.awq]\n"), "");
        assert!(said("[repair.awq]\nbits = 4\n").contains("there is one width"));
        assert!(said("[repair.awq]\nexponents = 1\nfolds = []\n").contains("1 exponents leave no choice"));
        assert!(said("[prune.reap]\nkeep = 0.5\n[repair.awq]\n").contains("experts go; reduce with [export.dense] first"));
    }

    fn shape() -> Shape {
        let tensor =
            |name: &str, role, shape: &[usize]| Tensor { name: name.into(), shape: shape.into(), role, scale: ScaleType::Bf16, bytes: 0 };
        let tensors = vec![
            tensor("lm_head.weight", Role::Head, &[8, 96]),
            tensor("x.0.down.weight", Role::Layer(0, Part::Expert(0, Projection::Down)), &[128, 256]),
            tensor("x.0.up.weight", Role::Layer(0, Part::Expert(0, Projection::Up)), &[128, 128]),
        ];
        Shape { fingerprint: String::new(), tensors }
    }

    #[test]
    fn a_group_that_does_not_fit_names_one_that_does() {
        let text = GOOD.replace("bits = 4", "bits = 4\ngroup = 192");
        let expected = [
            "r.toml:9:9: group 192 does not divide the 128 inputs of x.0.up.weight; choose a divisor, such as 128, or name them in allocate.exclude",
            "r.toml:9:9: group 192 does not divide the 256 inputs of x.0.down.weight; choose a divisor, such as 128, or name them in allocate.exclude",
        ];
        assert_eq!(said(&text, Some(&shape())), expected);
        let text = GOOD.replace("bits = 4", "bits = 4\ngroup = 256\nexclude = [\"*.up\"]");
        assert_eq!(said(&text, Some(&shape())), [""; 0]);
    }

    #[test]
    fn a_glob_that_matches_nothing_is_an_error() {
        let text = GOOD.replace("bits = 4", "bits = 4\nexclude = [\"*.up\", \"x.1.*\", \"lm_head\"]");
        let expected = [
            "r.toml:9:20: `x.1.*` matches no tensor of this model; `moepress inspect MODEL -v` lists the names",
            "r.toml:9:29: `lm_head` excludes lm_head.weight, which is never quantized; take it out: only attention, experts and dense MLPs of the decoder layers are quantized",
        ];
        assert_eq!(said(&text, Some(&shape())), expected);
    }

    #[test]
    fn budgets_beside_the_bytes_are_looked_at() {
        let text = GOOD.replace(
            "bits = 4\n",
            "bits_per_weight = 3.0\nchoices = [2, 4]\ndevices = [{ layers = [0, 3], bytes = \"1GB\" }, { layers = [3, 1], bytes = \"1GB\" }, { layers = [2, 5], bytes = \"1GB\" }]\n\
             speed = { seconds_per_token = 0.0, kernels = [{ bits = 2, nanoseconds_per_million = -1.0 }, { bits = 2, nanoseconds_per_million = 1.0 }] }\n",
        );
        let said = said(&text, None).join("\n");
        for part in [
            "layers 3 to 1 are none",
            "layers 2 to 5 overlap 0 to 3",
            "0 seconds are no time",
            "-1 nanoseconds are no time",
            "2 bits stand there twice",
            "no kernel of 4 bits is in the table",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
    }

    #[test]
    fn what_a_runtime_ties_is_excluded_whole_or_not_at_all() {
        let expert = |e, p: Projection| Tensor {
            name: format!("x.{e}.{p:?}.weight"),
            shape: vec![64, 128],
            role: Role::Layer(0, Part::Expert(e, p)),
            scale: ScaleType::Bf16,
            bytes: 1,
        };
        let tensors = (0..2).flat_map(|e| Projection::ALL.map(|p| expert(e, p))).collect();
        let shape = Shape { fingerprint: String::new(), tensors };
        let with = |exclude: &str, runtime: &str| {
            let text = GOOD.replace("bits = 4\n", &format!("bits = 4\nruntime = \"{runtime}\"\nexclude = [\"{exclude}\"]\n"));
            said(&text, Some(&shape)).join("\n")
        };
        let said = with("x.1.*", "vllm");
        assert!(said.contains("x.1.Gate.weight is excluded and x.0.Gate.weight is not, and vllm loads the 6 matrices"), "{said}");
        assert!(with("x.1.Gate*", "native").contains("the 2 matrices"));
        assert_eq!([with("x.*", "vllm"), with("x.1.*", "native"), with("x.1.Gate*", "transformers4")], [""; 3]);
    }
}
