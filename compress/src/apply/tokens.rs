//! What one layer's matrices need from the tokens that pass through it: second moments, one site at a time.
//!
//! A site's moment `Σ x xᵀ` grows while its rows arrive, is factorized once when they have all been seen, serves every matrix of the
//! site (gate and up share one), and is dropped. So as many moments are held as sites are in flight: the experts that run at the
//! same time, and one attention site.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};

use burn::tensor::{Tensor, backend::Backend};
use calib::arch::Site;
use calib::forward::{Routed, Tap, values};
use calib::stats::Moment;
use calib::{Model, Weights};
use kernels::Group;
use ndarray::ArrayView2;

use super::work::Job;
use crate::objective::{Rows, TokenWeights};
use crate::plan::Plan;
use crate::quantize::factor::factorize;
use crate::quantize::{Kept, Quantizer, Refine, descent, gptq};
use crate::solved::{Account, By, LayerFile, Report};
use crate::{Error, Result};

/// Solves the matrices of one layer while tokens pass through it.
pub struct Solver<'a> {
    model: &'a Model,
    params: &'a gptq::Params,
    refine: Option<&'a Refine>,
    file: &'a LayerFile,
    rows: Rows<'a>,
    jobs: BTreeMap<Site, Vec<&'a Job<'a>>>,
    moments: Mutex<HashMap<Site, Moment>>,
}

impl<'a> Solver<'a> {
    /// Those of `jobs` that need tokens.
    ///
    /// # Errors
    ///
    /// As [`Rows::new`].
    pub fn new(
        model: &'a Model,
        plan: &'a Plan,
        (layer, jobs): (usize, &'a [Job<'a>]),
        file: &'a LayerFile,
        weights: &TokenWeights,
    ) -> Result<Option<Self>> {
        let Some(Quantizer::Gptq(params)) = &plan.quantizer else { return Ok(None) };
        let mut by_site: BTreeMap<Site, Vec<&Job<'_>>> = BTreeMap::new();
        for job in jobs.iter().filter(|job| job.needs_tokens(plan)) {
            by_site.entry(job.site).or_default().push(job);
        }
        let rows = Rows::new(&plan.objective, model, layer, weights)?;
        Ok(Some(Self { model, params, refine: plan.refine.as_ref(), file, rows, jobs: by_site, moments: Mutex::default() }))
    }

    fn take(&self, site: Site) -> Option<Moment> {
        self.moments.lock().unwrap_or_else(PoisonError::into_inner).remove(&site)
    }

    fn add<B: Backend>(&self, (layer, site): (usize, Site), rows: &Tensor<B, 2>, routed: Option<&Routed>) -> Result<()> {
        let [count, width] = rows.dims();
        let values = values(rows.clone(), "inputs of a site")?;
        let Ok(rows) = ArrayView2::from_shape((count, width), &values) else { return Ok(()) };
        let weights = self.rows.take(layer, site, rows, routed)?;
        if !self.jobs.contains_key(&site) {
            return Ok(());
        }
        let mut moment = self.take(site).unwrap_or_else(|| Moment::new(width));
        moment.add(rows, weights.as_deref());
        self.moments.lock().unwrap_or_else(PoisonError::into_inner).insert(site, moment);
        Ok(())
    }

    fn solve(&self, site: Site) -> Result<()> {
        let Some(jobs) = self.jobs.get(&site) else { return Ok(()) };
        let Some(moment) = self.take(site).filter(|moment| moment.tokens() > 0) else {
            return Err(Error::Unreached { name: jobs.first().map_or_else(String::new, |job| job.name.to_owned()) });
        };
        let groups: Vec<Group> = jobs.iter().map(|job| job.how.group).collect();
        let moment = moment.into_matrix();
        let factor = factorize(moment.view(), &groups, self.params)?;
        for job in jobs {
            let w = self.model.matrix(job.role)?;
            let mut solved = gptq::gptq(w.view(), &factor, &job.how.width(), self.params)?;
            let mut by = if solved.kept == Kept::Gptq { By::Gptq } else { By::GptqKeptRtn };
            if let Some(Refine::Descent(params)) = self.refine {
                let descended = descent::descent(w.view(), &solved.matrix, moment.view(), factor.lambda(), params)?;
                (solved.matrix, solved.loss, by) = (descended.matrix, descended.after, By::GptqDescent);
            }
            let account = Account { loss: solved.loss, damping: solved.damping, dead_channels: solved.dead_channels };
            self.file.put(job.name, &solved.matrix, &Report { by, solved: Some(account) })?;
        }
        Ok(())
    }
}

/// An error of ours on its way through the forward pass.
pub(crate) fn boxed(error: Error) -> calib::Error {
    match error {
        Error::Calib(error) => error,
        other => calib::Error::Tap(Box::new(other)),
    }
}

impl<B: Backend> Tap<B> for Solver<'_> {
    fn wants(&self, layer: usize, site: Site) -> bool {
        let wanted = |site| self.jobs.contains_key(&site);
        wanted(site) || self.rows.needs(layer, site, wanted)
    }

    fn rows(&self, layer: usize, site: Site, rows: &Tensor<B, 2>, routed: Option<&Routed>) -> calib::Result<()> {
        self.add((layer, site), rows, routed).map_err(boxed)
    }

    fn done(&self, _: usize, site: Site) -> calib::Result<()> {
        self.solve(site).map_err(boxed)
    }
}
