//! What becomes of the routed experts: which stay, under which number, and why the others go.

use std::collections::BTreeMap;
use std::path::Path;

use calib::arch::{Mlp, Part, Role, Spec};
use calib::{Model, Weights};
use serde::{Deserialize, Serialize};

use super::{Shape, Tensor};
use crate::mtp::Mtp;
use crate::{Error, Result};

/// What becomes of the routed experts of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    /// Fingerprint of the checkpoint that they stand in.
    pub model: String,
    /// Hash of the calibration samples.
    pub corpus: String,
    /// Who decided: `prune.easy_ep`.
    pub by: String,
    /// Texts that counted, by file stem.
    pub domains: Vec<String>,
    /// Routed experts a layer before.
    pub before: usize,
    /// And after.
    pub after: usize,
    /// What becomes of multi-token-prediction layers, where there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtp: Option<Mtp>,
    /// Every layer of experts.
    pub layers: BTreeMap<usize, Fate>,
}

/// What becomes of one layer's experts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fate {
    /// Every expert's score, `[before]`.
    pub scores: Vec<f64>,
    /// The experts of the result, in order: each one old expert, or several that are merged into one.
    pub experts: Vec<Vec<usize>>,
    /// The experts that go, and why.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub dropped: BTreeMap<usize, String>,
    /// The lowest score that stays and the highest that goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub edge: Option<(f64, f64)>,
    /// Experts that stay whatever their score.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub protected: Vec<usize>,
    /// What repair came to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repaired: Option<Repaired>,
}

/// Error of a block's routed output against the whole block's, as a share of its energy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Repaired {
    /// Before the repair.
    pub before: f64,
    /// After it.
    pub after: f64,
}

impl Fate {
    /// Every expert stays what and where it is.
    pub fn nothing(scores: Vec<f64>) -> Self {
        Self { experts: (0..scores.len()).map(|e| vec![e]).collect(), scores, ..Self::default() }
    }

    /// Whether every expert stays what and where it is.
    pub fn is_nothing(&self) -> bool {
        self.experts.len() == self.scores.len() && self.experts.iter().enumerate().all(|(new, old)| old[..] == [new])
    }
}

impl Experts {
    /// Reads what a finished stage left.
    ///
    /// # Errors
    ///
    /// An IO error; [`Error::Json`].
    pub fn read(path: &Path) -> Result<Self> {
        serde_json::from_slice(&fs_err::read(path)?).map_err(|source| Error::Json { path: path.to_owned(), source })
    }

    /// The tensors that the result takes over, by new name, but for the routers of layers that lose experts and for merged experts,
    /// which are made anew.
    ///
    /// # Errors
    ///
    /// [`Error::OtherModel`].
    pub fn renamed(&self, model: &Model) -> Result<BTreeMap<String, String>> {
        let found = model.checkpoint().fingerprint();
        if self.model != found {
            return Err(Error::OtherModel { planned: self.model.clone(), found: found.to_owned() });
        }
        let mut renamed = BTreeMap::new();
        for tensor in model.layout().tensors() {
            let same = || Some(tensor.name.clone());
            let new = match tensor.role {
                Role::Mtp if self.mtp.is_some() => None,
                Role::Layer(layer, part) => match (self.layers.get(&layer).filter(|fate| !fate.is_nothing()), part) {
                    (Some(_), Part::Router | Part::RouterCorrection) => None,
                    (Some(fate), Part::Expert(expert, projection)) => {
                        let new = fate.experts.iter().position(|old| old[..] == [expert]);
                        new.and_then(|new| model.family().names.of(Role::Layer(layer, Part::Expert(new, projection))))
                    }
                    _ => same(),
                },
                _ => same(),
            };
            if let Some(new) = new {
                renamed.insert(new, tensor.name.clone());
            }
        }
        Ok(renamed)
    }
}

/// The shape of a model after `after` of its experts a layer stay, as far as it is known before they are chosen: the first stand for
/// those that will.
pub fn shape_with(shape: &Shape, after: usize, mtp: Option<Mtp>) -> Shape {
    let of = |tensor: &Tensor| match tensor.role {
        Role::Mtp if mtp.is_some() => None,
        Role::Layer(_, Part::Expert(expert, _)) if expert >= after => None,
        Role::Layer(_, Part::Router | Part::RouterCorrection) => {
            let mut cut = tensor.clone();
            let before = cut.shape.first().copied().unwrap_or(after).max(1);
            cut.bytes = cut.bytes / before as u64 * after.min(before) as u64;
            cut.shape.iter_mut().take(1).for_each(|rows| *rows = after.min(before));
            Some(cut)
        }
        _ => Some(tensor.clone()),
    };
    Shape { fingerprint: shape.fingerprint.clone(), tensors: shape.tensors.iter().filter_map(of).collect() }
}

/// A model's arithmetic with another number of experts.
pub fn spec_with(spec: &Spec, after: usize) -> Spec {
    let mut spec = spec.clone();
    for layer in &mut spec.layers {
        if let Mlp::Moe(moe) = &mut layer.mlp {
            moe.experts = after;
        }
    }
    spec
}

/// Routed experts a layer, the same in all; 0 for a model without.
pub fn count(model: &Model) -> usize {
    let spec = model.spec();
    (0..spec.layers.len()).find_map(|layer| spec.moe(layer)).map_or(0, |moe| moe.experts)
}
