//! What can go wrong while a recipe is read, a plan is made or a model is changed.

use std::path::PathBuf;

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong: what, where, the numbers, what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading, running or measuring a model failed.
    #[error(transparent)]
    Calib(#[from] calib::Error),

    /// A file could not be read or written; the message names its path.
    #[error(transparent)]
    Io(#[from] std::io::Error),

    /// A JSON file of ours does not parse.
    #[error("{}: not what moepress writes there: {source}; remove it, or start over with --force", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: serde_json::Error,
    },

    // ---- recipe (one section a module, so that each is easy to find) ----
    /// The recipe, or what the command line did to it, is wrong: every problem that was found.
    #[error(transparent)]
    Recipe(Box<crate::recipe::Invalid>),

    // ---- plan ----
    /// A budget that no choice of widths meets.
    #[error(transparent)]
    Undecided(#[from] crate::allocate::Undecided),

    // ---- prune ----
    /// A layer whose experts cannot be chosen as asked.
    #[error("layer {layer}: {what}")]
    Prune {
        /// The layer.
        layer: usize,
        /// What is wrong.
        what: String,
    },

    /// A domain that is no text of the corpus.
    #[error("no calibration text is named {name}; there are {known}")]
    NoDomain {
        /// The name.
        name: String,
        /// The texts.
        known: String,
    },

    // ---- plan, calibration ----
    /// Widths that another tool has none of.
    #[error("{tool} cannot be told this plan: {what}; choose other widths in allocate.choices or another runtime")]
    Foreign {
        /// The tool.
        tool: &'static str,
        /// What it has none of.
        what: String,
    },

    /// Experts that too few tokens reached, where the recipe's rule is to stop.
    #[error(
        "too few calibration tokens reached {}, and calibrate.undercalibrated says stop:{}\nask for more samples or \
         [calibrate.sampler.balanced], or name another rule: blend or rtn",
        plural(experts.len(), "expert", "experts"),
        listed(experts)
    )]
    Undercalibrated {
        /// Each with its layer, its tokens and those it needs.
        experts: Vec<String>,
    },

    // ---- quantize ----
    /// Codes, scales or packed words that do not hold together.
    #[error(transparent)]
    Codes(#[from] kernels::Error),

    /// A weight that no scale can hold.
    #[error("weight {value} at row {row}, column {column} is not finite; nothing can be quantized around it")]
    WeightNotFinite {
        /// The weight.
        value: f32,
        /// Its row.
        row: usize,
        /// Its column.
        column: usize,
    },

    /// A group that does not fit a matrix.
    #[error("groups of {group} do not divide {inputs} inputs; choose a divisor, such as {nearest}, or one group a channel")]
    GroupSize {
        /// Inputs a group.
        group: usize,
        /// Inputs of the matrix.
        inputs: usize,
        /// The nearest divisor.
        nearest: usize,
    },

    /// A width that a grid does not have.
    #[error("{bits} bits on the grid {grid:?}: it has {} to 8 bits{}", grid.fewest_bits(), grid.hint())]
    GridBits {
        /// Bits a code.
        bits: u8,
        /// The grid.
        grid: crate::quantize::Grid,
    },

    /// A grid that MC-MoE's quantizer does not have.
    #[error("pmq has real zeros and at 1 bit none, not the grid {grid:?} at {bits} bits; use it on the grid offset, at 1 bit on half")]
    PmqGrid {
        /// Bits a code.
        bits: u8,
        /// The grid.
        grid: crate::quantize::Grid,
    },

    /// A grid without a zero point for a method that fits one.
    #[error("hqq fits a zero point, which the grid {grid:?} does not have; use it on the grids asym or offset")]
    HqqGrid {
        /// The grid.
        grid: crate::quantize::Grid,
    },

    /// A group whose scale its stored type does not reach.
    #[error("row {row}, group {group}: its weights need a scale of {scale}, which {scale_type:?} does not hold; store scales as bf16")]
    ScaleOverflow {
        /// The scale.
        scale: f32,
        /// The row.
        row: usize,
        /// The group.
        group: usize,
        /// The stored type.
        scale_type: kernels::ScaleType,
    },

    /// A second moment of other inputs than the matrix has.
    #[error("a second moment of {moment} inputs does not fit a matrix of {inputs}")]
    MomentSize {
        /// Inputs of the moment.
        moment: usize,
        /// Inputs of the matrix.
        inputs: usize,
    },

    /// A second moment with an infinity or NaN in it.
    #[error("the second moment of inputs {row} and {column} is {value}: an activation overflowed in the calibration pass")]
    MomentNotFinite {
        /// The value.
        value: f32,
        /// Its row.
        row: usize,
        /// Its column.
        column: usize,
    },

    /// A second moment of nothing.
    #[error("the second moment is zero: no token reached this matrix; round it to nearest instead")]
    NoTokens,

    /// Learned refinement without a sample to learn from.
    #[error(
        "learned refinement holds out {held_out} of {samples} calibration samples, and none is left to learn from; \
         calibrate with more samples, or lower refine.learned.held_out"
    )]
    HeldOut {
        /// Calibration samples.
        samples: usize,
        /// Samples to be held out.
        held_out: usize,
    },

    /// A second moment that damping does not mend.
    #[error("not positive definite even with damping of {damping} times the mean diagonal: {source}")]
    Damping {
        /// The last damping that was tried.
        damping: f64,
        /// What the last factorization said.
        source: calib::Error,
    },

    /// A factor whose column order takes apart the groups of a width.
    #[error("the factor's column order was made for other groups than {group:?}: name every group of every width when factorizing")]
    FactorGroups {
        /// The group that it does not keep together.
        group: kernels::Group,
    },

    /// Group sizes of which one does not divide another, so that no column order keeps both together.
    #[error("groups of {small} and of {large} inputs cannot share one column order: {small} does not divide {large}")]
    GroupsDiffer {
        /// The smaller.
        small: usize,
        /// The larger.
        large: usize,
    },

    // ---- apply, export, packed ----
    /// A file between two stages that is not what the stage wrote.
    #[error("{}: {what}; remove it, or start over with --force", path.display())]
    Stage {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },

    /// Work that was done for another plan.
    #[error("{} was made for the plan {found}, not for this one ({wanted}); give another --out, or start over with --force", path.display())]
    OtherPlan {
        /// The file.
        path: PathBuf,
        /// Hash of the plan that it belongs to.
        found: String,
        /// Hash of the plan at hand.
        wanted: String,
    },

    /// An export of a model that is not solved to its end.
    #[error("{} is missing: layer {layer} of {layers} is not solved yet; run `moepress apply` to its end first", path.display())]
    Unsolved {
        /// The file that is missing.
        path: PathBuf,
        /// Its layer.
        layer: usize,
        /// Layers of the model.
        layers: usize,
    },

    /// A matrix whose codes, scales or zeros do not hold together.
    #[error("{name}: {source}")]
    Matrix {
        /// The tensor.
        name: String,
        /// What does not hold.
        source: kernels::Error,
    },

    /// A tensor that should be a matrix.
    #[error("{name} has shape {shape:?} and cannot be quantized; name it in allocate.exclude")]
    NotAMatrix {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },

    /// A plan that does not fit the model it is applied to.
    #[error(
        "the plan was made for the checkpoint {planned}, but this one is {found}; make the plan again, or name the model it was made for"
    )]
    OtherModel {
        /// The plan's fingerprint.
        planned: String,
        /// The model's.
        found: String,
    },

    /// A plan and a model that disagree about their tensors.
    #[error("{name}: {what}; make the plan again")]
    PlanMisfit {
        /// The tensor.
        name: String,
        /// What does not fit.
        what: &'static str,
    },

    /// A matrix that the plan solves against tokens that never came.
    #[error(
        "{name}: the plan solves it against calibration tokens, but none reached it; \
         calibrate and plan again with the same corpus that is applied"
    )]
    Unreached {
        /// The tensor.
        name: String,
    },

    /// What a solver says of one matrix.
    #[error("{name}: {source}")]
    InMatrix {
        /// The matrix.
        name: String,
        /// What is wrong.
        source: Box<Self>,
    },

    /// A plan that needs calibration samples, and none were given.
    #[error("the plan's quantizer solves against calibration tokens; give the samples that it was made with")]
    NoSamples,

    /// A directory that holds something else.
    #[error(
        "{} is not empty and was not written by moepress (it holds {}); give an empty or new directory with --out", dir.display(), entry.display()
    )]
    NotOurs {
        /// The directory.
        dir: PathBuf,
        /// Something in it.
        entry: PathBuf,
    },

    /// No format was asked for.
    #[error("the recipe names no export; add [export.compressed_tensors], [export.native] or [export.dense]")]
    NoExport,

    /// Matrices that a format cannot hold.
    #[error("{} cannot be exported as asked:{}", plural(problems.len(), "matrix", "matrices"), listed(problems))]
    Refused {
        /// Each by its name.
        problems: Vec<String>,
    },

    /// An export that failed the checks that every output goes through.
    #[error("{}: the export does not pass {}; it was not put in place:{}", dir.display(), plural(problems.len(), "check", "checks"), listed(problems))]
    Invalid {
        /// Where it was written.
        dir: PathBuf,
        /// What does not hold.
        problems: Vec<String>,
    },

    /// A source config that cannot be edited.
    #[error("config.json of the source is not a JSON object")]
    Config,

    /// A compressed checkpoint that cannot be read.
    #[error("{}: {what}", dir.display())]
    Packed {
        /// The checkpoint.
        dir: PathBuf,
        /// What cannot be read, by name.
        what: String,
    },

    // ---- run, cli ----
    /// A run that does not fit the memory it is given.
    #[error(
        "--memory {budget}: the stage {stage} holds {peak} with one batch or expert in flight, of it {hidden} of hidden states of \
         {tokens} tokens a copy; {advice}"
    )]
    Memory {
        /// What may be held.
        budget: String,
        /// The stage that holds most.
        stage: &'static str,
        /// What it holds.
        peak: String,
        /// One copy of the samples' hidden states.
        hidden: String,
        /// Tokens of the samples.
        tokens: usize,
        /// What would fit.
        advice: String,
    },

    /// An output directory that another process works on.
    #[error("another moepress is at work in {}; wait for it, or give another directory with --out", out.display())]
    Busy {
        /// The directory.
        out: PathBuf,
    },

    /// An output directory of another recipe, model or corpus.
    #[error(
        "{} holds the work of another run:{}\ngive another directory with --out, or start over with --force", out.display(), listed(differences)
    )]
    Differs {
        /// The directory.
        out: PathBuf,
        /// What is not the same, in words.
        differences: Vec<String>,
    },

    /// An importance matrix, or statistics to make one of, that does not read.
    #[error("{}: {what}", path.display())]
    Imatrix {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },

    /// A checkpoint without data where data are needed.
    #[error("{} is a shape-only checkpoint: its tensors have no data; only inspect, check and plan take it", dir.display())]
    ShapeOnly {
        /// The checkpoint.
        dir: PathBuf,
    },

    /// An output directory that holds the model.
    #[error("the model {} lies inside the output directory {}, where it might be overwritten; give another directory with --out", model.display(), out.display())]
    ModelInside {
        /// The model.
        model: PathBuf,
        /// The output directory.
        out: PathBuf,
    },

    /// Token ids that are not a list of equally long lists.
    #[error("{}: {what}; give a JSON list of token ids, or a list of equally long lists", path.display())]
    TokenIds {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        what: String,
    },

    /// A folder without statistics.
    #[error("{}: {what}; name a folder of statistics, or an output directory whose calibration is done", dir.display())]
    NoStats {
        /// The folder.
        dir: PathBuf,
        /// What is not there.
        what: String,
    },

    /// An output that is not written yet.
    #[error("{} has no output yet; run `moepress apply` to its end first", out.display())]
    NoOutput {
        /// The directory.
        out: PathBuf,
    },
}

fn plural(count: usize, one: &str, many: &str) -> String {
    if count == 1 { format!("1 {one}") } else { format!("{count} {many}") }
}

/// The first few of a list, one a line.
fn listed(problems: &[String]) -> String {
    const SHOWN: usize = 8;
    let mut text: String = problems.iter().take(SHOWN).map(|problem| format!("\n  {problem}")).collect();
    if problems.len() > SHOWN {
        text += &format!("\n  and {} more", problems.len() - SHOWN);
    }
    text
}

impl Error {
    /// The exit code of a program that stops with this: 2 for wrong usage or a wrong recipe, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Recipe(_) => 2,
            _ => 1,
        }
    }
}

impl From<crate::recipe::Invalid> for Error {
    fn from(invalid: crate::recipe::Invalid) -> Self {
        Self::Recipe(Box::new(invalid))
    }
}
