//! Recipes: what is asked for, as a TOML document. Recipe types are the only place where a knob exists.
//!
//! [`load`](load::load) reads a document, lets the command line edit it, and stops at the first thing that is not the form's;
//! [`check`](check::check) then finds every problem of value at once, against the model's shape. Paths in a recipe are relative to the
//! recipe, those on the command line to the working directory.

mod beside;
mod check;
mod invalid;
mod load;
mod schema;
mod set;

use std::path::PathBuf;

use calib::evaluate::Evaluate;
use calib::sample::Calibrate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::allocate::{Allocate, Held};
use crate::export::Exports;
use crate::merge::Merger;
use crate::mtp::Mtp;
use crate::objective::Objective;
use crate::plan::zero_of;
use crate::prune::Pruner;
use crate::quantize::{Grid, Quantizer, Refine};
use crate::repair::{Repair, awq, rotate};

pub use check::{check, check_experts, check_folds, check_values};
pub use invalid::{Invalid, Problem};
pub use load::{Loaded, Overrides, Source, load};
pub use schema::schema;

/// The one version of the form that this program reads.
pub const SCHEMA: u32 = 1;

/// A recipe: which model, what is done to it, where the result goes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Version of the recipe's form: 1.
    pub schema: u32,
    /// Directory of the checkpoint to compress, as the hub stores it. `--model` replaces it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<PathBuf>,
    /// Directory of the result. `--out` replaces it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub out: Option<PathBuf>,
    /// The texts that the model is measured on, for quantizers that need it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibrate: Option<Calibrate>,
    /// Who chooses the routed experts that stay; the others go, before anything else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prune: Option<Pruner>,
    /// Who makes one expert of several, of those that stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merge: Option<Merger>,
    /// What the error of a token counts, for quantizers that solve against calibration tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objective: Option<Objective>,
    /// The quantizer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantize: Option<Quantizer>,
    /// What improves the quantizer's codes afterwards; needs a quantizer that solves against calibration tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refine: Option<Refine>,
    /// The order in which layers are solved, and what is mended beside the codes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repair: Option<Repair>,
    /// How many bits each matrix gets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocate: Option<Allocate>,
    /// The formats to write.
    #[serde(default)]
    pub export: Exports,
    /// The texts that the result is judged by, before and after. Of several outputs the first is judged, the one at the top of `out`;
    /// the report says which that is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluate: Option<Evaluate>,
}

impl Recipe {
    /// Tells the allocation which grids every asked-for format holds.
    fn hold_to_formats(&mut self) {
        let zeros = self.export.zeros();
        if let Some(allocate) = &mut self.allocate {
            allocate.held = Held(Grid::ALL.into_iter().filter(|&grid| zeros.contains(&zero_of(grid))).collect());
        }
    }

    /// Whether experts are pruned or merged.
    pub fn reduces(&self) -> bool {
        self.prune.is_some() || self.merge.is_some()
    }

    /// How input channels are scaled before anything is quantized, if they are.
    pub fn folds(&self) -> Option<&awq::Params> {
        self.repair.as_ref().and_then(|repair| repair.awq.as_ref())
    }

    /// How the residual stream is rotated before anything is quantized, if it is.
    pub fn rotates(&self) -> Option<&rotate::Params> {
        self.repair.as_ref().and_then(|repair| repair.rotate.as_ref())
    }

    /// Whether the checkpoint is written anew with the same outputs before anything is quantized: channels scaled, or the stream rotated.
    pub fn rewrites(&self) -> bool {
        self.folds().is_some() || self.rotates().is_some()
    }

    /// Experts of a layer that are left of `before`.
    pub fn experts_left(&self, before: usize) -> usize {
        let kept = self.prune.as_ref().map_or(before, |pruner| pruner.asked().count(before));
        self.merge.as_ref().map_or(kept, |merger| merger.asked().count(kept))
    }

    /// What becomes of multi-token-prediction layers.
    pub fn mtp(&self) -> Option<Mtp> {
        let pruner = self.prune.as_ref().and_then(|pruner| pruner.asked().mtp);
        pruner.or_else(|| self.merge.as_ref().and_then(|merger| merger.asked().mtp))
    }
}
