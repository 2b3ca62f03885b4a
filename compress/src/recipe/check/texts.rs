//! What is wrong with the texts of a recipe and with what draws them.

use std::borrow::Cow;
use std::path::Path;

use calib::backward::Targets;
use calib::corpus::{Demonstrations, ENDINGS};
use calib::sample::{Calibrate, Through};

use super::super::{Problem, Recipe, Source};
use crate::allocate::Cost;
use crate::objective::TokenWeight;

/// Texts that are needed and absent, asked for and not there, or too few.
pub(super) fn check_texts(recipe: &Recipe, source: &Source) -> Vec<Problem> {
    let mut found = Vec::new();
    let mut add = |key: &str, message: String| found.push(source.problem(key, message, None));
    let mut texts: Vec<(&str, Vec<Text<'_>>)> = Vec::new();
    match &recipe.calibrate {
        Some(calibrate) => {
            texts.push(("calibrate.corpus", calibrate.corpus.iter().map(|s| (s.path.as_path(), s.domain())).collect()));
            for (i, weight) in calibrate.corpus.iter().map(|s| s.weight).enumerate().filter(|(_, w)| !(w.is_finite() && *w > 0.0)) {
                add(&format!("calibrate.corpus.{i}.weight"), format!("{weight} is no weight; ask for more than 0, or leave the text out"));
            }
            let (samples, files) = (calibrate.samples, calibrate.corpus.len());
            if samples < files.max(1) {
                add(
                    "calibrate.samples",
                    format!("calibrate.samples = {samples} cannot be shared out over {files} texts; ask for at least one each"),
                );
            }
            found_of_sampler(calibrate, &mut add);
            found_of_generate(calibrate, &mut add);
            let rule = calibrate.undercalibrated;
            if !(rule.threshold().is_finite() && rule.threshold() >= 0.0) {
                let share = rule.threshold();
                add("calibrate.undercalibrated", format!("{share} tokens an input are no threshold; ask for 0 or more, such as 0.5"));
            }
            found_of_end_loss(recipe, calibrate, &mut add);
            if calibrate.tokens < 2 {
                add("calibrate.tokens", format!("{} tokens are no window; ask for at least 2", calibrate.tokens));
            }
        }
        None if recipe.quantize.as_ref().is_some_and(|q| q.needs_calibration()) => {
            add("quantize", "this quantizer needs calibration, and there is no [calibrate]; name texts with calibrate.corpus".into());
        }
        None => {}
    }
    if let Some(evaluate) = &recipe.evaluate {
        texts.push(("evaluate.text", evaluate.text.iter().map(|path| (path.as_path(), stem(path))).collect()));
        if evaluate.context < 2 {
            add("evaluate.context", format!("{} tokens are no window; ask for at least 2", evaluate.context));
        }
        if let Some(most) = evaluate.max_tokens.filter(|most| *most < evaluate.context) {
            add("evaluate.max_tokens", format!("{most} tokens are less than one window of {}", evaluate.context));
        }
    }
    for (key, texts) in texts {
        if texts.is_empty() && !(key == "calibrate.corpus" && recipe.calibrate.as_ref().is_some_and(|c| c.sampler.writes())) {
            add(key, format!("{key} names no text"));
        }
        for (i, text) in texts.iter().enumerate() {
            let generated = key == "calibrate.corpus" && recipe.calibrate.as_ref().is_some_and(|c| c.generate.is_some());
            let message = text_problem(text, &texts[..i]);
            if let Some(message) = message.or_else(|| if generated { prompt_problem(text.0) } else { demonstration_problem(text.0) }) {
                add(&format!("{key}.{i}"), message);
            }
        }
    }
    found
}

/// What cannot work on tokens that an expert is shown though the router sends them elsewhere: they have no routing weight there, and no
/// output that something could aim at.
pub(super) fn check_through(recipe: &Recipe, source: &Source) -> Vec<Problem> {
    if recipe.calibrate.as_ref().is_none_or(|calibrate| calibrate.experts == Through::Routed) {
        return Vec::new();
    }
    let weighted = recipe.objective.as_ref().is_some_and(|objective| objective.token_weight != TokenWeight::None);
    let aims = recipe.repair.as_ref().is_some_and(|repair| repair.propagate.is_some());
    let said = [("objective.token_weight", weighted), ("repair.propagate", aims)].into_iter().filter(|(_, asked)| *asked);
    let message = |key| format!("{key} works on the tokens that an expert is given, and calibrate.experts = \"all\" shows it all of them");
    said.map(|(key, _)| source.problem("calibrate.experts", message(key), Some("leave one of the two out".into()))).collect()
}

/// What is wrong with a sampler's knobs, and with texts that it has no use for.
fn found_of_sampler(calibrate: &Calibrate, add: &mut impl FnMut(&str, String)) {
    let name = calibrate.sampler.name();
    for (knob, message) in calibrate.sampler.problems() {
        add(&format!("calibrate.sampler.{name}.{knob}"), message);
    }
    if calibrate.sampler.writes() && !calibrate.corpus.is_empty() {
        add("calibrate.corpus", format!("the sampler {name} lets the model write its texts and reads none; leave calibrate.corpus out"));
    }
    if calibrate.sampler.writes() && !calibrate.pack {
        add("calibrate.pack", format!("the sampler {name} writes samples of calibrate.tokens each; there are no documents to keep apart"));
    }
}

/// What is wrong with letting the model write completions: knobs, and that there is none to write.
fn found_of_generate(calibrate: &Calibrate, add: &mut impl FnMut(&str, String)) {
    let Some(generate) = &calibrate.generate else { return };
    for (knob, message) in generate.problems() {
        add(&format!("calibrate.generate.{knob}"), message);
    }
    if calibrate.sampler.writes() {
        let name = calibrate.sampler.name();
        add(
            "calibrate.generate",
            format!("the sampler {name} reads no texts, so there are no prompts to complete; leave one of the two out"),
        );
    } else if calibrate.corpus.iter().all(|source| lines(&source.path).is_some_and(|lines| lines.is_ok_and(|l| l.unfinished().is_empty())))
    {
        add("calibrate.generate", "no text has a prompt without a completion: there is nothing to write; leave it out".into());
    }
}

/// The lines of a text that is a `.jsonl` file; none of another kind of text, `None` where there is no such file.
fn lines(path: &Path) -> Option<calib::Result<Demonstrations>> {
    path.is_file().then(|| if Demonstrations::are_in(path) { Demonstrations::read(path) } else { Ok(Demonstrations::default()) })
}

/// The first line that is no document, or that nothing follows.
fn demonstration_problem(path: &Path) -> Option<String> {
    let checked = lines(path)?.and_then(|lines| lines.check().and_then(|()| lines.complete()));
    checked.err().map(|error| error.to_string())
}

/// The first line that the model can neither read nor go on with.
fn prompt_problem(path: &Path) -> Option<String> {
    lines(path)?.and_then(|lines| lines.check()).err().map(|error| error.to_string())
}

/// A loss that nothing takes a gradient of, or a seed that draws nothing.
fn found_of_end_loss(recipe: &Recipe, calibrate: &Calibrate, add: &mut impl FnMut(&str, String)) {
    let Some(params) = &calibrate.end_loss else { return };
    let weighs = recipe.objective.as_ref().is_some_and(|objective| objective.token_weight == TokenWeight::EndLoss);
    if !weighs && !recipe.allocate.as_ref().is_some_and(|allocate| allocate.is_mixed() && allocate.cost == Cost::EndLoss) {
        let needed = "objective.token_weight = \"end_loss\", or a budget with allocate.cost = \"end_loss\"";
        add("calibrate.end_loss", format!("nothing needs a backward pass, so its loss changes nothing; ask for {needed}, or leave it out"));
    }
    if params.targets == Targets::Text && params.seed != 0 {
        add("calibrate.end_loss.seed", "targets of the text are not drawn; leave the seed out, or use targets = \"own\"".into());
    }
}

/// A file and its domain.
type Text<'a> = (&'a Path, Cow<'a, str>);

fn stem(path: &Path) -> Cow<'_, str> {
    path.file_stem().unwrap_or_default().to_string_lossy()
}

fn text_problem((path, domain): &Text<'_>, before: &[Text<'_>]) -> Option<String> {
    if !path.is_file() {
        return Some(format!("there is no text {}", path.display()));
    }
    match path.extension().and_then(|e| e.to_str()) {
        Some("parquet") if !cfg!(feature = "parquet") => {
            return Some(calib::Error::NoParquet { path: path.to_path_buf() }.to_string());
        }
        Some(ending) if ENDINGS.contains(&ending) => {}
        _ => return Some(format!("{} is neither a .txt, a .jsonl nor a .parquet file", path.display())),
    }
    let (twin, _) = before.iter().find(|(_, other)| other == domain)?;
    Some(format!(
        "{} and {} have the same name, {domain}, and texts are told apart by name; rename one, or name it in the recipe, such as \
         {{ path = \"…\", name = \"{domain}2\" }}",
        twin.display(),
        path.display()
    ))
}
