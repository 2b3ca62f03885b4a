//! A plan read against its model: the matrices to solve, layer by layer.

use calib::arch::{Role, Site};
use calib::{Model, Weights};

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
