//! What is told at the end: tables for people, the same rows as JSON.
//!
//! `report.json` and `report.md` hold nothing that depends on the clock or the machine: the same inputs give the same bytes.
//! What a stage cost stands in its marker, and is shown beside the report.

pub mod curve;
mod experts;
mod levers;
mod render;
mod sampler;
mod stats;
mod table;
mod usage;

use std::path::Path;

use calib::stats::Part;
use serde::{Deserialize, Serialize};

use crate::apply::Outcome;
use crate::plan::Summary;
use crate::{Error, Result};

pub use experts::experts;
pub use levers::{levers, levers_csv};
pub use render::{coverage, estimate, evaluation, markdown_report, plan, text_report};
pub use sampler::{Balance, sampler};
pub use stats::{DomainReport, LayerReport, StatsReport, read_stats, stats_csv, stats_svg, stats_text};
pub use table::{bytes, count, markdown, memory, seconds, table};
pub use usage::{Cost, Meter};

/// Everything that is known of a finished output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of `report.json`'s form.
    pub schema: u32,
    /// The model that was compressed.
    pub model: ModelRow,
    /// The samples that it was measured on, and how evenly they fell on the experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
    /// What was done to it.
    pub plan: Summary,
    /// Stored bits a quantized weight, scales counted.
    pub bits_per_weight: Option<f64>,
    /// What was written.
    pub outputs: Vec<OutputRow>,
    /// Which output was evaluated: the first. `moepress eval` judges the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluated: Option<String>,
    /// What solving came to.
    #[serde(default)]
    pub solved: Outcome,
    /// How it does on the recipe's texts, beside the original.
    pub evaluation: Option<calib::evaluate::Report>,
}

/// What a model was measured on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// The passes: sampler, cost, how the samples came about.
    pub parts: Vec<Part>,
    /// Tokens of the experts.
    pub balance: Balance,
}

/// The model that was compressed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelRow {
    /// Name of its directory.
    pub name: String,
    /// Its family.
    pub family: String,
    /// Weights, all of them.
    pub parameters: u64,
    /// Weights that work on one token.
    pub active: u64,
    /// Its fingerprint.
    pub fingerprint: String,
    /// Bytes of its weight files.
    pub bytes: u64,
}

/// One output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OutputRow {
    /// Its format.
    pub format: String,
    /// Its folder, relative to the output directory.
    pub folder: String,
    /// Bytes of its weight files.
    pub bytes: u64,
}

/// Reads a `report.json`.
///
/// # Errors
///
/// An IO error; [`Error::Json`].
pub fn read(path: &Path) -> Result<Report> {
    serde_json::from_slice(&fs_err::read(path)?).map_err(|source| Error::Json { path: path.to_owned(), source })
}
