//! What can be typed.

use std::path::PathBuf;

use calib::device::DeviceChoice;
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::allocate::Size;
use crate::export::Arch;
use crate::plan::Range;

/// Compresses Mixture-of-Experts checkpoints after training.
///
/// A recipe (TOML) says which model, what is done to it and where the result goes; `run` does all of it.
#[derive(Debug, Parser)]
#[command(name = "moepress", version, propagate_version = true)]
pub(super) struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options of every command")]
pub(super) struct Global {
    /// Where the model runs: cpu, cuda, cuda:N or auto (cuda where there is one)
    #[arg(long, global = true, default_value = "cpu", value_name = "DEVICE")]
    pub device: DeviceChoice,
    /// Threads to use; the result does not depend on it [default: one a core]
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<std::num::NonZeroUsize>,
    /// Say nothing on the way but warnings and errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Say more on the way
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// How to say it: text for people, json for machines (one object a line, on standard error)
    #[arg(long, global = true, default_value = "text", value_name = "FORMAT")]
    pub log_format: LogFormat,
}

/// How progress and errors are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    Text,
    Json,
}

/// How a result is written.
#[derive(Clone, Copy, Debug, Args)]
pub(super) struct Json {
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Show what a checkpoint is: family, layers, experts, parameters, bytes by role; with -v every tensor
    Inspect(InspectArgs),
    /// Find every problem of a recipe, against the model's shape, and do nothing
    Check(RecipeArgs),
    /// Do everything a recipe says: calibrate, prune, plan, apply, export, evaluate; goes on where it was interrupted
    Run(StageArgs),
    /// Only the first stage: measure the model on the recipe's texts
    Calibrate(StageArgs),
    /// Up to the choice of experts: which stay, and how clearly
    Prune(PruneArgs),
    /// Up to the plan: decide what becomes of every tensor
    Plan(PlanArgs),
    /// Up to the output: everything but the evaluation
    Apply(StageArgs),
    /// Perplexity of a checkpoint on texts; with --reference also KL divergence and top-1 agreement
    Eval(EvalArgs),
    /// Show an importance matrix of llama.cpp, or write one from the statistics of a calibration
    Imatrix(ImatrixArgs),
    /// Write the kernels of a native output, for its shapes and widths, into its folder `kernels`
    Emit(EmitArgs),
    /// Add up or show statistics of calibration passes
    #[command(subcommand)]
    Stats(StatsCommand),
    /// Print the JSON schema of a recipe
    Schema,
    /// Print a completion script
    Completions {
        /// The shell to complete for
        shell: Shell,
    },
}

/// A recipe and what replaces its values.
#[derive(Debug, Args)]
pub(super) struct RecipeArgs {
    /// The recipe, a TOML file
    pub recipe: PathBuf,
    /// The checkpoint, instead of the recipe's `model`
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Where the result goes, instead of the recipe's `out`
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Let the model write the completions of demonstrations that have none, first (calibrate.generate)
    #[arg(long)]
    pub generate: bool,
    /// Replace a value of the recipe, such as allocate.bits=3; may be given more than once
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

#[derive(Debug, Args)]
pub(super) struct StageArgs {
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Start over: discard what an earlier run left in the output directory
    #[arg(long)]
    pub force: bool,
    /// Most memory to hold, such as 8GiB: fewer batches and experts are in flight if need be; the result does not depend on it
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub memory: Option<Size>,
    #[command(flatten)]
    pub format: Json,
}

/// The plan stage, and what is asked of its table afterwards.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("asked").args(["pareto", "calibrate_curve", "levers", "for_tool", "estimate"]))]
pub(super) struct PlanArgs {
    #[command(flatten)]
    pub stage: StageArgs,
    /// Share out every budget of a range of bits a weight from the one table; leaves pareto.csv and pareto.svg beside the plan
    #[arg(long, value_name = "FROM..TO[:STEP]")]
    pub pareto: Option<Range>,
    /// Make and measure an output for each of these bits a weight, and compare with what was predicted; leaves curve.csv
    #[arg(long, value_name = "BITS", num_args = 1.., value_delimiter = ',')]
    pub calibrate_curve: Vec<f64>,
    /// Plan the same bytes for bits alone and for what [prune] and [merge] leave at each of these experts a layer; leaves levers.csv
    #[arg(long, value_name = "EXPERTS", num_args = 1.., value_delimiter = ',')]
    pub levers: Vec<usize>,
    /// Also write the plan in another tool's words beside it
    #[arg(long = "for", value_name = "TOOL")]
    pub for_tool: Option<ForTool>,
    /// Measure this machine's rates on samples and say how long the stages will take; do nothing else
    #[arg(long)]
    pub estimate: bool,
}

/// Tools that quantize by a plan of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ForTool {
    /// llama.cpp: --tensor-type-file
    LlamaQuantize,
    /// GPTQModel: QuantizeConfig with dynamic
    Gptqmodel,
    /// llm-compressor: a recipe
    LlmCompressor,
}

/// A size with its unit.
fn size(text: &str) -> Result<Size, String> {
    Size::parse(text).ok_or_else(|| "write a number and a unit, such as 8GiB".to_owned())
}

#[derive(Debug, Args)]
pub(super) struct PruneArgs {
    #[command(flatten)]
    pub stage: StageArgs,
    /// Show how sure the choice is: what each text alone would keep, and what other draws of the samples would
    #[arg(long)]
    pub show: bool,
}

#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// The checkpoint's directory
    pub model: PathBuf,
    /// Also write the checkpoint's headers without its data to this directory
    #[arg(long, value_name = "OUT")]
    pub shape_only: Option<PathBuf>,
    #[command(flatten)]
    pub format: Json,
}

#[derive(Debug, Args)]
pub(super) struct EmitArgs {
    /// The native checkpoint, or the output directory that holds one
    pub out: PathBuf,
    /// Compile for these alone; `--archs` with nothing behind it compiles nothing
    #[arg(long, value_name = "ARCH,...", value_delimiter = ',', num_args = 0.., require_equals = true, hide_possible_values = true,
          default_value = "sm_80,sm_86,sm_89,sm_90a,sm_100a,sm_120")]
    pub archs: Vec<Arch>,
    /// The NVRTC library to compile with, instead of what MOEPRESS_NVRTC names or the system has
    #[arg(long, value_name = "PATH")]
    pub nvrtc: Option<PathBuf>,
    #[command(flatten)]
    pub format: Json,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("input").required(true).args(["text", "tokens"]))]
pub(super) struct EvalArgs {
    /// The checkpoint's directory: an original, or an output of moepress
    pub model: PathBuf,
    /// Texts to evaluate on
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub text: Vec<PathBuf>,
    /// The original to compare with
    #[arg(long, value_name = "MODEL", requires = "text")]
    pub reference: Option<PathBuf>,
    /// Tokens a window
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub context: usize,
    /// At most this many tokens a text
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<usize>,
    /// Token ids (a JSON list, or a list of equally long lists) to run instead of texts
    #[arg(long, value_name = "FILE", requires = "dump", conflicts_with_all = ["text", "max_tokens"])]
    pub tokens: Option<PathBuf>,
    /// Where to write what the forward pass computes for --tokens, as safetensors
    #[arg(long, value_name = "FILE", requires = "tokens")]
    pub dump: Option<PathBuf>,
    /// Round the dequantized experts of a packed checkpoint, as transformers does
    #[arg(long, value_name = "TYPE")]
    pub round_experts: Option<RoundTo>,
    #[command(flatten)]
    pub format: Json,
}

#[derive(Debug, Args)]
pub(super) struct ImatrixArgs {
    /// A folder of statistics or an output directory that holds one, or an importance matrix (GGUF, or the older .dat)
    #[arg(value_name = "STATS|FILE")]
    pub from: PathBuf,
    /// Write it in the GGUF form, for llama-quantize --imatrix
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    #[command(flatten)]
    pub format: Json,
}

#[derive(Debug, Subcommand)]
pub(super) enum StatsCommand {
    /// Add up the statistics of several passes over different samples of one model
    Merge(MergeArgs),
    /// Show which experts saw how many tokens: a heat map, imbalance, dead and starved experts, by layer and domain
    Show(ShowArgs),
}

#[derive(Debug, Args)]
pub(super) struct MergeArgs {
    /// Folders of statistics, or output directories that hold them
    #[arg(required = true, num_args = 2.., value_name = "DIR")]
    pub from: Vec<PathBuf>,
    /// Where the sum goes: an empty or new directory
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// A folder of statistics, or an output directory that holds one
    pub dir: PathBuf,
    /// Also write the heat map as SVG
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Print a line a layer, expert and domain, as CSV
    #[arg(long, conflicts_with = "json")]
    pub csv: bool,
    #[command(flatten)]
    pub format: Json,
}

/// What dequantized experts are rounded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum RoundTo {
    Bf16,
}
