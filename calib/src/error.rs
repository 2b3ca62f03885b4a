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

    // ---- forward, device ----

    // ---- pass, stats, evaluate ----

    // ---- linalg ----
    /// Whatever a [`Tap`](crate::forward::Tap) found wrong, from outside this crate.
    #[error(transparent)]
    Tap(Box<dyn std::error::Error + Send + Sync>),
}
