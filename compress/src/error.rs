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

    // ---- quantize ----

    // ---- apply, export, packed ----

    // ---- run, cli ----
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
