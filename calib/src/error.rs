//! What can go wrong while a model is read, run or measured.

use std::path::PathBuf;

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong: what, where, the numbers, what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written; the message names its path.
    #[error(transparent)]
    Io(#[from] std::io::Error),

    /// A JSON file does not parse.
    #[error("{}: not valid JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: serde_json::Error,
    },

    /// A file of ours whose fields are not those that this program writes.
    #[error(
        "{}: another version of moepress wrote it ({what}), and what it measured cannot be used here; calibrate again with --force",
        path.display()
    )]
    OtherVersion {
        /// The file.
        path: PathBuf,
        /// What is different: `missing field `drawn``, …
        what: String,
    },

    // ---- checkpoint (one section a module, so that each is easy to find) ----
    /// A checkpoint, or a part of one, that cannot be read or written.
    #[error("{}: {problem}", at.display())]
    Checkpoint {
        /// The directory or file.
        at: PathBuf,
        /// What is wrong with it.
        problem: crate::checkpoint::Problem,
    },

    // ---- arch, model ----
    /// config.json does not say what the model is.
    #[error("config.json: no model_type; is this a Hugging Face model directory?")]
    NoModelType,

    /// A family that nobody has described.
    #[error("config.json: model_type {model_type:?} is not supported; supported are {supported}")]
    UnsupportedFamily {
        /// What the config says.
        model_type: String,
        /// What could be opened, separated by commas.
        supported: String,
    },

    /// A config value that changes the arithmetic and is not implemented.
    #[error("config.json: {key} = {value} is not implemented for {model_type}; implemented: {supported}")]
    UnsupportedValue {
        /// The key, with the object it stands in.
        key: String,
        /// Its value, as JSON.
        value: String,
        /// The family.
        model_type: &'static str,
        /// What is implemented.
        supported: String,
    },

    /// A config value that cannot be.
    #[error("config.json: {key} is {value}, but has to be {expected}")]
    WrongValue {
        /// The key, with the object it stands in.
        key: String,
        /// Its value, as JSON.
        value: String,
        /// What it has to be.
        expected: String,
    },

    /// A config key without a default is missing.
    #[error("config.json: {key} is missing, and {model_type} has no default for it")]
    MissingKey {
        /// The key, with the object it stands in.
        key: String,
        /// The family.
        model_type: &'static str,
    },

    /// Two config values that cannot both be.
    #[error("config.json: {what}")]
    Contradiction {
        /// The two, and what is wrong with them.
        what: String,
    },

    /// The tensors are not those that the config describes.
    #[error(transparent)]
    Misfit(#[from] Box<crate::arch::Misfit>),

    /// The checkpoint is quantized in a way that the reader does not convert.
    #[error(
        "config.json: quantization_config with quant_method {method} is not supported as an input; \
         take the original, unquantized or in block-scaled fp8"
    )]
    Quantized {
        /// `quant_method`, as JSON.
        method: String,
    },

    /// The config ties the head to the embedding, and the stored head is another matrix.
    #[error(
        "{head} is stored and differs from {embedding}, but config.json has tie_word_embeddings = true; set it to false to keep the \
         stored head, or remove {head}"
    )]
    TiedHead {
        /// Name of the stored head.
        head: String,
        /// Name of the embedding.
        embedding: String,
    },

    /// A role that this model does not have was asked for.
    #[error("{role:?} is not a tensor of this {model_type} model")]
    NoSuchRole {
        /// What was asked for.
        role: crate::arch::Role,
        /// The model's family.
        model_type: String,
    },

    // ---- corpus, sample ----
    /// A checkpoint without a fast tokenizer.
    #[error("{}: there is no tokenizer.json; put the model's own beside its config.json", dir.display())]
    NoTokenizer {
        /// The checkpoint's directory.
        dir: PathBuf,
    },

    /// A tokenizer that does not load, or a text that it cannot encode.
    #[error("{}: {message}", path.display())]
    Tokenizer {
        /// The tokenizer's file.
        path: PathBuf,
        /// What the tokenizers library said.
        message: String,
    },

    /// No text at all was named.
    #[error("the corpus is empty: name at least one .txt, .jsonl or .parquet file")]
    EmptyCorpus,

    /// A text of no token.
    #[error("{}: the text is empty", path.display())]
    EmptyText {
        /// The file.
        path: PathBuf,
    },

    /// A file whose name does not say how to read it.
    #[error("{}: a text is a .txt, .jsonl or .parquet file", path.display())]
    TextFormat {
        /// The file.
        path: PathBuf,
    },

    /// A text that is not UTF-8.
    #[error("{}: not UTF-8 at byte {at}", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// First byte that is not part of a character.
        at: usize,
    },

    /// A line of a .jsonl file that is not JSON.
    #[error("{}, line {line}: not valid JSON: {source}", path.display())]
    JsonLine {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What the parser said.
        source: serde_json::Error,
    },

    /// A demonstration without what follows its prompt.
    #[error(
        "{}, line {line}: a prompt without a completion ({lacking} of {lines} lines); add `completion`, or for a calibration text let the \
         model write it with --generate",
        path.display()
    )]
    NoCompletion {
        /// The file.
        path: PathBuf,
        /// The first such line, from 1.
        line: usize,
        /// How many there are.
        lacking: usize,
        /// Lines that are not empty.
        lines: usize,
    },

    /// A demonstration that the model cannot begin.
    #[error("{}, line {line}: the prompt is empty, and there is nothing that a completion could follow; leave the line out", path.display())]
    EmptyPrompt {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },

    /// A line of a .jsonl file, or a row of a .parquet, without the fields that make a document.
    #[error("{}, line {line}: a document has `text`, or `prompt` and `completion`, as strings, or `messages`, a list of objects", path.display())]
    JsonFields {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },

    /// What is wrong with one line of a file, or with what it needs.
    #[error("{}, line {line}: {source}", path.display())]
    AtLine {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        source: Box<Error>,
    },

    /// A conversation, and no template to make a text of it.
    #[error(
        "{}: there is no chat template, and `messages` need one; put the model's chat_template.jinja there, or set chat_template in \
         tokenizer_config.json (a text, or a list with one named `default`)",
        dir.display()
    )]
    NoChatTemplate {
        /// The checkpoint's directory.
        dir: PathBuf,
    },

    /// A chat template that does not compile, or that refuses a conversation.
    #[error("{}: the chat template says: {message}", path.display())]
    ChatTemplate {
        /// The template's file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },

    /// A .parquet file in a build that does not read them.
    #[error("{}: this build does not read .parquet; build with `cargo build --release --features parquet`, or write the text as .jsonl", path.display())]
    NoParquet {
        /// The file.
        path: PathBuf,
    },

    /// A .parquet file that does not read.
    #[error("{}: {message}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What the reader said.
        message: String,
    },

    /// Two texts would be one domain.
    #[error(
        "{} and {} are both the domain `{domain}`; give one another name, such as {{ path = \"{}\", name = \"{domain}2\" }}",
        first.display(), second.display(), second.display()
    )]
    SameDomain {
        /// The name.
        domain: String,
        /// One file.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },

    /// A text that is too short for what is asked of it.
    #[error(
        "{}: {} of {window} tokens asked for, but {what} has {tokens} tokens, which is {}; \
         ask for fewer or shorter windows, or give a longer text",
        path.display(), plural(*asked), plural(*tokens / *window)
    )]
    TooFewTokens {
        /// The file.
        path: PathBuf,
        /// Which part of it: `the text`, `its first four fifths`.
        what: &'static str,
        /// Tokens there are.
        tokens: usize,
        /// Windows asked for.
        asked: usize,
        /// Tokens a window.
        window: usize,
    },

    /// A text with fewer documents than samples are asked for.
    #[error(
        "{}: {asked} samples of a document each asked for, but its first four fifths has {documents} documents of two or more tokens; \
         ask for fewer, or pack documents (calibrate.pack = true)",
        path.display()
    )]
    TooFewDocuments {
        /// The file.
        path: PathBuf,
        /// Documents there are.
        documents: usize,
        /// Documents asked for.
        asked: usize,
    },

    /// A text that no sample falls to.
    #[error("{domain}: with weight {weight} none of the {samples} samples falls to it; raise its weight or the samples, or leave it out")]
    NoShare {
        /// The domain.
        domain: String,
        /// Its weight.
        weight: f64,
        /// Samples over all texts.
        samples: usize,
    },

    /// A number of samples, tokens or a context that makes no windows.
    #[error("{what} is {value}, but must be at least {least}")]
    TooSmall {
        /// Which knob.
        what: &'static str,
        /// Its value.
        value: usize,
        /// The least that makes sense.
        least: usize,
    },

    /// A sampler that chooses by what the model does was asked for where there is no model.
    #[error("the sampler `{sampler}` has to run the model to choose its samples")]
    SamplerNeedsModel {
        /// Its name in the recipe.
        sampler: &'static str,
    },

    /// The tokenizer knows more than the model.
    #[error("{}: token {id} is past the model's vocabulary of {vocab}; is this the model's own tokenizer?", path.display())]
    TokenPastVocabulary {
        /// The text in which it came up.
        path: PathBuf,
        /// The token.
        id: u32,
        /// Rows of the embedding.
        vocab: usize,
    },

    // ---- forward, device ----
    /// A tensor handed out for a role has another shape than the spec says.
    #[error("{role:?} has shape {found:?} where the config asks for {expected:?}; the config does not fit these weights")]
    WeightShape {
        /// The tensor.
        role: crate::arch::Role,
        /// What the spec says.
        expected: Vec<usize>,
        /// What was found.
        found: Vec<usize>,
    },
    /// A token id that the embedding does not have.
    #[error("sample {sample}, token {position}: id {id} is past the vocabulary of {vocab}; tokenize with the tokenizer of this checkpoint")]
    TokenId {
        /// The id.
        id: u32,
        /// Sample, from 0.
        sample: usize,
        /// Position in the sample, from 0.
        position: usize,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// A sample without a token.
    #[error("sample {sample} has no token; leave empty samples out")]
    EmptySample {
        /// Sample, from 0.
        sample: usize,
    },
    /// Samples that must be equally long are not.
    #[error("sample {sample} has {tokens} tokens and sample 0 has {first}; generate from equally long prompts, or one by one")]
    UnequalSamples {
        /// Sample, from 0.
        sample: usize,
        /// Its length.
        tokens: usize,
        /// The first one's length.
        first: usize,
    },
    /// A router computed NaN or infinity.
    #[error(
        "layer {layer}: the router's logit of expert {expert} for row {row} is not a finite number; the hidden state overflowed before it, \
         look at the layers below with `eval --dump`"
    )]
    RouterNotFinite {
        /// The decoder layer.
        layer: usize,
        /// Row over all samples.
        row: usize,
        /// The expert.
        expert: usize,
    },
    /// A result could not be brought back from the device.
    #[error("reading {what} back from the device: {message}")]
    Device {
        /// What was read.
        what: &'static str,
        /// What the backend said.
        message: String,
    },
    /// `--device` says something that is not a device.
    #[error("no device {name:?}; choose cpu, cuda, cuda:N or auto")]
    NoSuchDevice {
        /// What was asked for.
        name: String,
    },
    /// A CUDA device was asked for and cannot be had.
    #[error("device cuda:{index} cannot be used: {reason}; run with --device cpu, or auto to take a GPU only where there is one")]
    NoCuda {
        /// Its number.
        index: usize,
        /// Why not.
        reason: String,
    },

    // ---- pass, stats, evaluate ----
    /// Statistics that are not of one shape cannot be added.
    #[error("statistics of different models or corpora do not add up: {ours} and {theirs} {what}")]
    StatsDiffer {
        /// Of what there are different numbers.
        what: &'static str,
        /// On one side.
        ours: usize,
        /// On the other.
        theirs: usize,
    },

    /// What was begun with one model or corpus cannot go on with another.
    #[error("{}: this was made with other {what}; delete its folder, or use --force, to start over", path.display())]
    Changed {
        /// What was found.
        path: PathBuf,
        /// In which the two differ: `model weights`, `samples`, …
        what: String,
    },

    /// More experts than a routing trace has numbers for.
    #[error("a layer has {experts} experts; statistics are kept of at most 65536")]
    TooManyExperts {
        /// Of the layer.
        experts: usize,
    },

    /// Two models cannot be compared token by token.
    #[error("the models have vocabularies of {candidate} and {reference} tokens; only models of one vocabulary can be compared")]
    Vocabularies {
        /// Of the candidate.
        candidate: usize,
        /// Of the original.
        reference: usize,
    },

    /// A model whose logits are not numbers.
    #[error("{domain}: the mean score of {tokens} tokens is not a number; the model gives infinite or undefined logits")]
    NotFinite {
        /// The text.
        domain: String,
        /// Tokens scored.
        tokens: usize,
    },

    /// A folder of statistics that cannot be added to others.
    #[error("{}: {reason}", dir.display())]
    Unmergeable {
        /// The folder.
        dir: PathBuf,
        /// Why.
        reason: String,
    },

    /// A file of statistics or hidden states that does not read.
    #[error("{}: {message}; delete it and run the pass again", path.display())]
    Statistics {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },

    /// Token weights that are not of the rows that are asked for.
    #[error("{site}: {asked} rows asked for, but there are token weights of {found}; they are of other samples")]
    TokenWeights {
        /// Where the rows enter.
        site: crate::arch::Site,
        /// Rows that have weights.
        found: usize,
        /// Rows asked for.
        asked: usize,
    },

    // ---- linalg ----
    /// A decomposition that found no end.
    #[error("a matrix of {rows} by {columns} cannot be decomposed; does it hold NaN or infinity?")]
    NoConvergence {
        /// Rows.
        rows: usize,
        /// Columns.
        columns: usize,
    },

    /// A symmetric matrix was asked for.
    #[error("a matrix of {rows} x {columns} is not square, so it is no second moment")]
    NotSquare {
        /// Rows.
        rows: usize,
        /// Columns.
        columns: usize,
    },

    /// A Cholesky factor of something that has none.
    #[error("not positive definite: the pivot of row {pivot} of {side} is not positive; add to the diagonal (damping)")]
    NotPositiveDefinite {
        /// The row whose pivot failed; rows are eliminated from the last to the first.
        pivot: usize,
        /// Rows of the matrix.
        side: usize,
    },

    /// Whatever a [`Tap`](crate::forward::Tap) found wrong, from outside this crate.
    #[error(transparent)]
    Tap(Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// What is wrong with a JSON file that this program wrote itself, whole: other fields than ours are another version's.
    pub fn own_json(path: PathBuf, source: serde_json::Error) -> Self {
        if source.is_data() { Self::OtherVersion { path, what: source.to_string() } } else { Self::Json { path, source } }
    }
}

fn plural(windows: usize) -> String {
    if windows == 1 { "1 window".into() } else { format!("{windows} windows") }
}
