//! A plan read against its model: the matrices to solve, layer by layer.

use std::collections::BTreeMap;
use std::path::Path;

use calib::arch::{Part, Projection, Role, Site};
use calib::tensor::Dtype;
use calib::{Model, Weights};
use kernels::ScaleType;

use crate::allocate::Substitute;
use crate::constants::{self, Outputs};
use crate::plan::{Action, Plan, Quantize, Solver};
use crate::{Error, Result};

/// One matrix to solve.
#[derive(Clone, Debug)]
pub struct Job<'a> {
    /// The tensor's name.
    pub name: &'a str,
    /// Its role.
    pub role: Role,
    /// Where its inputs come from; `None` for the embedding and the head.
    pub site: Option<Site>,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// What the plan says.
    pub how: &'a Quantize,
}

impl Job<'_> {
    /// Whether its codes are chosen against calibration tokens.
    pub fn needs_tokens(&self, plan: &Plan) -> bool {
        matches!(self.how.solver, Solver::Planned | Solver::Blended { .. })
            && plan.quantizer.as_ref().is_some_and(|q| q.needs_calibration())
    }

    /// Whether it is solved against its layer's tokens too.
    pub fn is_blended(&self) -> bool {
        matches!(self.how.solver, Solver::Blended { .. })
    }

    /// Whether it is a matrix of attention.
    pub fn is_attention(&self) -> bool {
        matches!(self.site, Some(Site::AttentionIn | Site::QueryB | Site::KvB | Site::AttentionOut))
    }

    /// Weights.
    pub fn weights(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The matrices of every layer, by name within a layer, after plan and model were held to one another.
///
/// # Errors
///
/// [`Error::OtherModel`]; [`Error::PlanMisfit`] for a tensor that only one of the two knows, or that cannot be quantized.
pub fn by_layer<'a>(model: &Model, plan: &'a Plan) -> Result<Vec<Vec<Job<'a>>>> {
    let checkpoint = model.checkpoint();
    if plan.model != checkpoint.fingerprint() {
        return Err(Error::OtherModel { planned: plan.model.clone(), found: checkpoint.fingerprint().to_owned() });
    }
    let logical = checkpoint.logical();
    if let Some((name, _)) = logical.iter().find(|(name, _)| !plan.tensors.contains_key(name)) {
        return Err(misfit(name, "the model has it, the plan does not"));
    }
    let mut layers = vec![Vec::new(); model.spec().layers.len()];
    for (name, action) in &plan.tensors {
        let Ok(at) = logical.binary_search_by(|(n, _)| n.as_str().cmp(name)) else {
            return Err(misfit(name, "the plan has it, the model does not"));
        };
        let Action::Quantize(how) = action else { continue };
        let shape = &logical[at].1;
        let shape = <[usize; 2]>::try_from(shape.as_slice()).map_err(|_| Error::NotAMatrix { name: name.clone(), shape: shape.clone() })?;
        let role = model.layout().role(name);
        let (Some(role), Some(layer)) = (role, role.and_then(|role| file_of(role, layers.len()))) else {
            return Err(misfit(name, "the plan quantizes it, but it is no matrix of a decoder layer, nor the embedding or the head"));
        };
        let site = match role {
            Role::Layer(_, part) => {
                let stranger = || misfit(name, "the plan quantizes it, but it is no Linear matrix of a decoder layer");
                Some(part.site().ok_or_else(stranger)?)
            }
            _ if how.solver == Solver::Planned => return Err(misfit(name, "the plan solves it, but it has no second moments")),
            _ => None,
        };
        layers[layer].push(Job { name, role, site, shape, how });
    }
    Ok(layers)
}

/// What the plan's dropped experts put out, `[hidden]` each, as it is stored; `dir` holds the means that were kept with the plan.
///
/// # Errors
///
/// [`Error::PlanMisfit`] for an expert of which the plan drops a part, or a tensor that is no matrix of one; as [`constants::read`].
pub fn dropped(model: &Model, plan: &Plan, dir: &Path) -> Result<Outputs> {
    let mut found = Outputs::new();
    let (mut means, hidden) = (BTreeMap::new(), model.spec().hidden);
    for (at, Gone { by, down }) in gone(model, plan)? {
        match by {
            Substitute::Zero => _ = found.insert(at, vec![0.0; hidden]),
            Substitute::Mean => _ = means.insert(at, mean_type(model, down)),
        }
    }
    if means.is_empty() {
        return Ok(found);
    }
    let path = constants::dropped_path(dir);
    for (at, output) in constants::read(&path, means.keys().copied())? {
        if output.len() != hidden {
            let what = format!("the output of expert {} of layer {} has {} channels, not {hidden}", at.1, at.0, output.len());
            return Err(Error::Stage { path, what });
        }
        found.insert(at, constants::rounded(&output, means[&at]));
    }
    Ok(found)
}

/// A dropped expert.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gone<'a> {
    /// What it puts out.
    pub by: Substitute,
    /// The name of its down projection.
    pub down: &'a str,
}

/// Dropped experts by layer and number.
///
/// # Errors
///
/// As [`dropped`].
pub fn gone<'a>(model: &Model, plan: &'a Plan) -> Result<BTreeMap<(usize, usize), Gone<'a>>> {
    let mut matrices: BTreeMap<(usize, usize), BTreeMap<Projection, Gone<'a>>> = BTreeMap::new();
    for (name, action) in &plan.tensors {
        let Action::Substitute(by) = action else { continue };
        let Some(Role::Layer(layer, Part::Expert(expert, projection))) = model.layout().role(name) else {
            return Err(misfit(name, "the plan lets a constant stand for it, but it is no matrix of a routed expert"));
        };
        matrices.entry((layer, expert)).or_default().insert(projection, Gone { by: *by, down: name });
    }
    let mut found = BTreeMap::new();
    for (at, parts) in matrices {
        let same = parts.values().all(|part| parts.values().next().is_some_and(|first| first.by == part.by));
        let any = parts.values().next().map_or("", |part| part.down);
        match parts.get(&Projection::Down).filter(|_| same && parts.len() == Projection::ALL.len()) {
            Some(down) => _ = found.insert(at, *down),
            None => return Err(misfit(any, "the plan drops a part of its expert; all three matrices go, and one thing stands for them")),
        }
    }
    Ok(found)
}

/// The 16 bits in which the mean output of an expert is stored: the checkpoint's own, or bf16.
pub fn mean_type(model: &Model, down: &str) -> ScaleType {
    match model.checkpoint().info(down).map(|info| info.dtype) {
        Some(Dtype::F16) => ScaleType::F16,
        _ => ScaleType::Bf16,
    }
}

/// The layer whose file holds a matrix: its own, the first for the embedding, the last for the head.
pub fn file_of(role: Role, layers: usize) -> Option<usize> {
    match role {
        Role::Layer(layer, _) => Some(layer),
        Role::Embedding => Some(0),
        Role::Head => layers.checked_sub(1),
        _ => None,
    }
}

fn misfit(name: &str, what: &'static str) -> Error {
    Error::PlanMisfit { name: name.to_owned(), what }
}

/// Cuts jobs into runs whose weights add up to at most `budget`; a matrix beyond it makes a run of its own.
pub fn runs<'a, 'b>(jobs: &'b [Job<'a>], budget: usize) -> Vec<&'b [Job<'a>]> {
    let mut found = Vec::new();
    let (mut start, mut sum) = (0, 0);
    for (at, job) in jobs.iter().enumerate() {
        if at > start && sum + job.weights() > budget {
            found.push(&jobs[start..at]);
            (start, sum) = (at, 0);
        }
        sum += job.weights();
    }
    if start < jobs.len() {
        found.push(&jobs[start..]);
    }
    found
}
