//! What each subcommand does: one call into the library, and its result as text or JSON.

use std::path::Path;

use calib::Model;
use calib::checkpoint::Checkpoint;
use calib::corpus::{Corpus, Tokenizer};
use calib::device::Device;
use calib::evaluate::{Models, Windows, evaluate};
use calib::progress::Progress;
use calib::stats::Store;
use clap::CommandFactory;
use serde::Serialize;
use serde_json::json;

use super::args::{Cli, Command, EmitArgs, EvalArgs, ForTool, Global, InspectArgs, PlanArgs, PruneArgs, RecipeArgs, RoundTo, StageArgs};
use super::console::Console;
use super::imatrix;
use super::inspect::{self, Detail};
use super::stats::stats;
use crate::export::Kernels;
use crate::packed::{self, ExpertRounding};
use crate::plan::{self, Experts, Shape, Tool};
use crate::recipe::{self, Loaded};
use crate::run::{self, Earlier, Finished, Options, Stage};
use crate::{Error, Result, dump, reduce, report};

/// Does what a command says and gives what is to be printed.
pub(super) fn run(cli: &Cli, console: &Console) -> Result<String> {
    if let Some(threads) = cli.global.threads {
        // The pool is not built yet: nothing has run in parallel.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads.get()).build_global();
    }
    match &cli.command {
        Command::Inspect(args) => show(args, &cli.global),
        Command::Check(args) => check(args),
        Command::Run(args) => stages(args, Stage::Evaluate, &cli.global, console),
        Command::Calibrate(args) => stages(args, Stage::Calibrate, &cli.global, console),
        Command::Prune(args) => prune(args, &cli.global, console),
        Command::Plan(args) => plan(args, &cli.global, console),
        Command::Apply(args) => stages(args, Stage::Export, &cli.global, console),
        Command::Eval(args) => eval(args, cli.global.device.open()?, console.progress().as_ref()),
        Command::Imatrix(args) => imatrix::run(args),
        Command::Emit(args) => emit(args),
        Command::Stats(command) => stats(command),
        Command::Schema => Ok(recipe::schema().map_err(std::io::Error::from)?),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "moepress", &mut script);
            Ok(String::from_utf8_lossy(&script).into_owned())
        }
    }
}

fn pretty(value: &impl Serialize) -> Result<String> {
    Ok(serde_json::to_string_pretty(value).map_err(std::io::Error::from)? + "\n")
}

fn show(args: &InspectArgs, global: &Global) -> Result<String> {
    let detail = if global.verbose > 0 { Detail::EveryTensor } else { Detail::Summary };
    let found = inspect::inspect(&args.model, args.shape_only.as_deref(), detail)?;
    if args.format.json { pretty(&found) } else { Ok(inspect::text(&found)) }
}

fn emit(args: &EmitArgs) -> Result<String> {
    let knobs = Kernels { archs: args.archs.clone(), nvrtc: args.nvrtc.clone() };
    let emitted = packed::emit::emit(&args.out, &knobs)?;
    if args.format.json { pretty(&emitted) } else { Ok(format!("{emitted}\n")) }
}

fn load(args: &RecipeArgs) -> Result<Loaded> {
    let (model, out, set) = (args.model.clone(), args.out.clone(), args.set.clone());
    let overrides = recipe::Overrides { model, out, generate: args.generate, set };
    Ok(recipe::load(&args.recipe, &overrides)?)
}

fn check(args: &RecipeArgs) -> Result<String> {
    let loaded = load(args)?;
    let run::Prepared { shape, model } = run::prepare(&loaded)?;
    // Nothing can be written of a checkpoint without data.
    let problems = match model.checkpoint().is_shape_only() {
        true => Vec::new(),
        false => run::check_space(&loaded, &run::left(&loaded.recipe, &model, &shape))?,
    };
    if !problems.is_empty() {
        return Err(loaded.source.invalid(problems).into());
    }
    Ok(format!("{}: no problem found\n", args.recipe.display()))
}

fn stages(args: &StageArgs, until: Stage, global: &Global, console: &Console) -> Result<String> {
    let loaded = load(&args.recipe)?;
    let earlier = if args.force { Earlier::Discard } else { Earlier::Resume };
    let options = Options { until, earlier, device: global.device.open()?, memory: args.memory.map(|size| size.0) };
    let finished = run::run(&loaded, &options, console.progress().as_ref())?;
    let dir = finished.out.join("moepress");
    let text = match until {
        Stage::Calibrate => coverage(&loaded, &dir.join("stats"), args.format.json)?,
        Stage::Plan => planned(&loaded, &dir.join("plan.json"), args.format.json)?,
        _ => result(&finished, args.format.json)?,
    };
    if finished.ran.is_empty() && !args.format.json {
        let done = format!("{} is complete for this recipe, model and texts: nothing to do", finished.out.display());
        return Ok(format!("{done}\n\n{text}"));
    }
    Ok(text)
}

/// Which experts stay, and on demand how sure that is.
fn prune(args: &PruneArgs, global: &Global, console: &Console) -> Result<String> {
    let loaded = load(&args.stage.recipe)?;
    if !loaded.recipe.reduces() {
        return Ok(format!("{} has neither [prune] nor [merge]; nothing to do\n", loaded.source.path.display()));
    }
    let earlier = if args.stage.force { Earlier::Discard } else { Earlier::Resume };
    let options = Options { until: Stage::Reduce, earlier, device: global.device.open()?, memory: args.stage.memory.map(|size| size.0) };
    let progress = console.progress();
    let finished = run::run(&loaded, &options, progress.as_ref())?;
    let experts = Experts::read(&finished.out.join("moepress/experts.json"))?;
    let sureness = if args.show { run::sureness(&loaded, options.device, progress.as_ref())? } else { None };
    if args.stage.format.json {
        return pretty(&json!({ "experts": experts, "sureness": sureness }));
    }
    Ok(report::experts(&experts, sureness.as_ref()))
}

/// The plan stage, and what is asked of its table.
fn plan(args: &PlanArgs, global: &Global, console: &Console) -> Result<String> {
    let loaded = load(&args.stage.recipe)?;
    let as_json = args.stage.format.json;
    if args.estimate {
        let items = run::estimate(&loaded)?;
        return if as_json { pretty(&items) } else { Ok(report::estimate(&items)) };
    }
    let text = stages(&args.stage, Stage::Plan, global, console)?;
    let dir = loaded.recipe.out.clone().unwrap_or_default().join("moepress");
    if let Some(range) = &args.pareto {
        let sweep = run::pareto(&loaded, range)?;
        return if as_json { pretty(&sweep.points) } else { Ok(report::curve::sweep(&sweep, &dir)) };
    }
    if !args.calibrate_curve.is_empty() {
        let how = (global.device.open()?, args.stage.memory.map(|size| size.0));
        let found = run::calibrate_curve(&loaded, &args.calibrate_curve, how, console.progress().as_ref())?;
        return if as_json { pretty(&found) } else { Ok(report::curve::compared(&found)) };
    }
    if !args.levers.is_empty() {
        let how = (global.device.open()?, args.stage.memory.map(|size| size.0));
        let found = run::levers(&loaded, &args.levers, how, console.progress().as_ref())?;
        return if as_json { pretty(&found) } else { Ok(report::levers(&found)) };
    }
    let Some(tool) = args.for_tool else { return Ok(text) };
    let tool = match tool {
        ForTool::LlamaQuantize => Tool::LlamaQuantize,
        ForTool::Gptqmodel => Tool::GptqModel,
        ForTool::LlmCompressor => Tool::LlmCompressor,
    };
    let (path, account) = run::plan_for(&loaded, tool)?;
    Ok(match account {
        Some(account) if as_json => pretty(&account)?,
        Some(account) => {
            format!(
                "{}: {} of weights, predicted loss {:.6} ({})\n",
                path.display(),
                report::bytes(account.bytes),
                account.loss,
                account.cost
            )
        }
        None => format!("{}\n", path.display()),
    })
}

/// How many tokens reached each expert.
fn coverage(loaded: &Loaded, dir: &Path, as_json: bool) -> Result<String> {
    let store = Store::new(dir);
    let Some(manifest) = store.manifest()? else {
        return Ok(format!("{} has no [calibrate]; nothing to do\n", loaded.source.path.display()));
    };
    let layers = (0..manifest.layers).map(|layer| store.get(layer)).collect::<calib::Result<Vec<_>>>()?;
    if as_json {
        let counts = |layer: &calib::stats::LayerStats| {
            layer.experts.as_ref().map(|e| e.router.counts.columns().into_iter().map(|c| c.sum()).collect())
        };
        let counts: Vec<Option<Vec<u64>>> = layers.iter().map(counts).collect();
        return pretty(&json!({ "manifest": manifest, "balance": report::Balance::of(&layers), "tokens_by_expert": counts }));
    }
    let tokens = manifest.parts.iter().map(|part| part.tokens_run).sum();
    Ok(report::coverage(&layers, tokens) + "\n" + &report::sampler(&manifest, &layers))
}

fn planned(loaded: &Loaded, path: &Path, as_json: bool) -> Result<String> {
    if as_json {
        return Ok(fs_err::read_to_string(path)?);
    }
    let model = Model::open(loaded.recipe.model.as_deref().unwrap_or(Path::new("")))?;
    let plan = plan::read(path)?;
    let shape = match (&plan.experts, path.parent()) {
        (Some(_), Some(dir)) => Shape::of(&reduce::open(&model, dir)?),
        _ => run::left(&loaded.recipe, &model, &Shape::of(&model)),
    };
    let text = report::plan(&plan.summary(&shape), path);
    let blind = plan.corpus.is_none() && plan.quantizer.as_ref().is_some_and(|q| q.needs_calibration());
    Ok(if blind { text + "made from the shape alone: which experts no token reaches is not known yet\n" } else { text })
}

/// The report of a finished output, with what its stages cost.
fn result(finished: &Finished, as_json: bool) -> Result<String> {
    let report = report::read(&finished.out.join("moepress/report.json"))?;
    if as_json {
        let stages: serde_json::Map<_, _> = finished.costs.iter().map(|(stage, cost)| (stage.name().to_owned(), json!(cost))).collect();
        return pretty(&json!({ "report": report, "stages": stages }));
    }
    Ok(report::text_report(&report, &finished.costs, &finished.out))
}

fn eval(args: &EvalArgs, device: Device, progress: &dyn Progress) -> Result<String> {
    let rounding = match args.round_experts {
        Some(RoundTo::Bf16) => ExpertRounding::Bf16,
        None => ExpertRounding::None,
    };
    for dir in [&args.model].into_iter().chain(&args.reference) {
        if Checkpoint::open(dir)?.is_shape_only() {
            return Err(Error::ShapeOnly { dir: dir.clone() });
        }
    }
    let model = packed::open(&args.model, rounding)?;
    if let (Some(tokens), Some(path)) = (&args.tokens, &args.dump) {
        dump::write(model.as_ref(), &dump::read_ids(tokens)?, device, path)?;
        return Ok(format!("{}\n", path.display()));
    }
    let tokenizer = Tokenizer::open(&args.model, model.spec().vocab)?;
    let windows = Windows::of(&Corpus::read(&args.text, &tokenizer)?, args.context, args.max_tokens)?;
    let reference = args.reference.as_ref().map(|dir| packed::open(dir, ExpertRounding::None)).transpose()?;
    let models = Models { candidate: model.as_ref(), reference: reference.as_deref() };
    let scores = evaluate(models, &windows, device, progress)?;
    if args.format.json { pretty(&scores) } else { Ok(report::evaluation(&scores)) }
}
