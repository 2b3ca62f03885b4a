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
    #[error("the corpus is empty: name at least one .txt or .jsonl file")]
    EmptyCorpus,

    /// A text of no token.
    #[error("{}: the text is empty", path.display())]
    EmptyText {
        /// The file.
        path: PathBuf,
    },

    /// A file whose name does not say how to read it.
    #[error("{}: a text is a .txt or a .jsonl file", path.display())]
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

    /// A line of a .jsonl file without the fields that make a document.
    #[error("{}, line {line}: a document has `text`, or `prompt` and `completion`, as strings", path.display())]
    JsonFields {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },

    /// Two texts would be one domain.
    #[error("{} and {} are both the domain `{domain}`; a text is named by its file stem, so rename one", first.display(), second.display())]
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

    // ---- pass, stats, evaluate ----

    // ---- linalg ----
    /// Whatever a [`Tap`](crate::forward::Tap) found wrong, from outside this crate.
    #[error(transparent)]
    Tap(Box<dyn std::error::Error + Send + Sync>),
}

fn plural(windows: usize) -> String {
    if windows == 1 { "1 window".into() } else { format!("{windows} windows") }
}
