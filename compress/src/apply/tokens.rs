//! What one layer's matrices need from the tokens that pass through it: second moments, one site at a time.
//!
//! A site's moment `Σ x xᵀ` grows while its rows arrive, is factorized once when they have all been seen, serves every matrix of the
//! site (gate and up share one), and is dropped. So as many moments are held as sites are in flight: the experts that run at the
//! same time, and one attention site.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, OnceLock, PoisonError};

use burn::tensor::{Tensor, backend::Backend};
use calib::arch::{Role, Site};
use calib::backward::OutputMoments;
use calib::forward::{Routed, Tap, spread, values};
use calib::linalg::product;
use calib::sample::Through;
use calib::stats::Moment;
use calib::{Model, Weights};
use kernels::Group;
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::aim::Original;
use super::learned::Waiting;
use super::moments::{Moments, Write as WriteMoments};
use super::work::Job;
use crate::blend::{self, LayerRows};
use crate::objective::{Rows, TokenWeights};
use crate::plan::Plan;
use crate::quantize::factor::{Factor, factorize};
use crate::quantize::rtn::{self, rtn};
use crate::quantize::{Kept, Quantizer, Refine, Solved, both, descent, gptq, pmq};
use crate::repair::propagate::toward;
use crate::repair::{Order, Repair};
use crate::solved::{Account, By, LayerFile, Report};
use crate::{Error, Result};

/// Solves the matrices of one layer while tokens pass through it.
pub struct Solver<'a> {
    model: &'a Model,
    method: Method<'a>,
    refine: Option<&'a Refine>,
    /// Which tokens the experts' moments are over.
    experts: Through,
    file: &'a LayerFile,
    rows: Rows<'a>,
    jobs: BTreeMap<Site, Vec<&'a Job<'a>>>,
    moments: Mutex<HashMap<Site, Moment>>,
    /// What enters the layer's experts, where the plan blends one. Set before any expert runs.
    layer_rows: OnceLock<LayerRows>,
    /// With `sequential`: how codes of experts that no token reaches any more are chosen, and how far a solver aims.
    repair: &'a Repair,
    /// What the original model does here, where solvers aim at it.
    aim: Option<&'a Original>,
    /// `Σ v (x − x̂) x̂ᵀ`, and the row that comes next, of sites where a solver aims.
    crosses: Mutex<HashMap<Site, Cross>>,
    /// What was solved, dequantized, where it is wanted.
    kept: Option<Mutex<BTreeMap<Role, Array2<f32>>>>,
    /// Second moments of the gradients at outputs, where they count.
    outputs: Option<&'a OutputMoments>,
    /// Where matrices wait that are to be learned from.
    waiting: Option<&'a Waiting>,
    /// Where moments stay for another plan.
    store: Option<&'a WriteMoments>,
}

/// Who solves.
#[derive(Clone, Copy)]
enum Method<'a> {
    Gptq(&'a gptq::Params),
    Pmq,
}

/// The cross moment of one site.
struct Cross {
    sums: Array2<f32>,
    next: usize,
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
        let method = match &plan.quantizer {
            Some(Quantizer::Gptq(params)) => Method::Gptq(params),
            Some(Quantizer::Pmq(_)) => Method::Pmq,
            Some(Quantizer::Rtn(_) | Quantizer::Hqq(_)) | None => return Ok(None),
        };
        let mut by_site: BTreeMap<Site, Vec<&Job<'_>>> = BTreeMap::new();
        for job in jobs.iter().filter(|job| job.needs_tokens(plan)) {
            if let Some(site) = job.site {
                by_site.entry(site).or_default().push(job);
            }
        }
        if by_site.is_empty() {
            return Ok(None);
        }
        let rows = Rows::new(&plan.objective, model, layer, weights)?;
        Ok(Some(Self {
            model,
            method,
            refine: plan.refine.as_ref(),
            experts: plan.through,
            file,
            rows,
            jobs: by_site,
            moments: Mutex::default(),
            layer_rows: OnceLock::new(),
            repair: &plan.repair,
            aim: None,
            crosses: Mutex::default(),
            kept: None,
            waiting: None,
            outputs: None,
            store: None,
        }))
    }

    /// Keeps the moments that are solved against.
    pub fn storing(self, store: Option<&'a WriteMoments>) -> Self {
        Self { store, ..self }
    }

    /// Solves everything against moments that an earlier plan has kept, `in_flight` sites at a time.
    ///
    /// # Errors
    ///
    /// As the passing of tokens.
    pub fn solve_kept(&self, moments: &Moments, in_flight: usize) -> Result<()> {
        let sites: Vec<_> = self.jobs.iter().collect();
        sites.chunks(in_flight.max(1)).try_for_each(|sites| {
            sites.par_iter().try_for_each(|(site, jobs)| {
                let moment = moments.get(**site, jobs.first().map_or(0, |job| job.shape[1]))?;
                moment.map_or_else(|| self.unreached(jobs), |moment| self.solve_at(**site, jobs, moment))
            })
        })
    }

    /// Aims at the original model's outputs.
    pub fn aiming(self, aim: Option<&'a Original>) -> Self {
        Self { aim, ..self }
    }

    /// Lets the outputs of a matrix make up for one another.
    pub fn with_outputs(self, outputs: Option<&'a OutputMoments>) -> Self {
        Self { outputs, ..self }
    }

    /// Hands what is solved on to be learned from, instead of writing it.
    pub fn handing(self, waiting: Option<&'a Waiting>) -> Self {
        Self { waiting, ..self }
    }

    /// Keeps what is solved, dequantized.
    pub fn keeping(self) -> Self {
        Self { kept: Some(Mutex::default()), ..self }
    }

    /// What was solved, if it was kept.
    pub fn into_kept(self) -> BTreeMap<Role, Array2<f32>> {
        self.kept.map(|kept| kept.into_inner().unwrap_or_else(PoisonError::into_inner)).unwrap_or_default()
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
        self.add_cross(site, rows, weights.as_deref(), routed);
        self.moments.lock().unwrap_or_else(PoisonError::into_inner).insert(site, moment);
        Ok(())
    }

    /// A site's whole moment, blended where the plan says so; `None` where no token came and nothing is blended.
    fn moment(&self, layer: usize, site: Site, jobs: &[&Job<'_>]) -> Result<Option<Moment>> {
        let own = self.take(site).filter(|moment| moment.tokens() > 0);
        let Some(rows) = self.layer_rows.get().filter(|_| jobs.iter().any(|job| job.is_blended())) else { return Ok(own) };
        let mut moment = own.unwrap_or_else(|| Moment::new(jobs.first().map_or(0, |job| job.shape[1])));
        rows.blend(self.model, layer, site, &mut moment)?;
        Ok(Some(moment))
    }

    fn solve(&self, layer: usize, site: Site) -> Result<()> {
        let Some(jobs) = self.jobs.get(&site) else { return Ok(()) };
        let moment = self.moment(layer, site, jobs)?;
        if let Some(store) = self.store {
            let about = (jobs.first().map_or(0, |job| job.shape[1]), jobs.iter().any(|job| job.is_blended()));
            store.put(site, moment.as_ref(), about)?;
        }
        moment.map_or_else(|| self.unreached(jobs), |moment| self.solve_at(site, jobs, moment))
    }

    /// Solves the matrices of one site against its moment.
    fn solve_at(&self, site: Site, jobs: &[&Job<'_>], moment: Moment) -> Result<()> {
        let groups: Vec<Group> = jobs.iter().map(|job| job.how.group).collect();
        // What is missing was summed over the expert's own tokens alone.
        let cross = self.cross(site, &moment).filter(|_| !jobs.iter().any(|job| job.is_blended()));
        let moment = moment.into_matrix();
        let first = jobs.first().map_or("", |job| job.name);
        let factor = match self.method {
            Method::Gptq(params) => Some((params, factorize(moment.view(), &groups, params).map_err(|source| named(first, source))?)),
            Method::Pmq => None,
        };
        for job in jobs {
            let mut w = self.model.matrix(job.role)?;
            if let Some((cross, alpha)) = &cross {
                w = toward(w.view(), cross.view(), moment.view(), *alpha)?;
            }
            let (solved, by) = self.codes(w.view(), moment.view(), factor.as_ref(), job).map_err(|source| named(job.name, source))?;
            if let Some(kept) = &self.kept {
                kept.lock().unwrap_or_else(PoisonError::into_inner).insert(job.role, solved.matrix.dequantize());
            }
            let account = Account { loss: solved.loss, damping: solved.damping, dead_channels: solved.dead_channels };
            match (self.waiting, job.role) {
                (Some(waiting), Role::Layer(_, part)) => waiting.put(part, job.name, solved.matrix, account),
                _ => self.file.put(job.name, &solved.matrix, &Report { by, solved: Some(account), learned: None })?,
            }
        }
        Ok(())
    }
}

/// What GPTQ needs, where it is who solves.
type Shared<'a> = (&'a gptq::Params, Factor);

impl Solver<'_> {
    /// The codes of one matrix, and whose they are.
    fn codes(
        &self,
        w: ArrayView2<'_, f32>,
        moment: ArrayView2<'_, f32>,
        shared: Option<&Shared<'_>>,
        job: &Job<'_>,
    ) -> Result<(Solved, By)> {
        let width = job.how.width();
        let Some((params, factor)) = shared else { return Ok((pmq::gptq(w, moment, &width)?, By::Pmq)) };
        let solved = gptq::gptq(w, factor, &width, params)?;
        let Some(params) = self.refine.and_then(Refine::descent) else {
            let by = if solved.kept == Kept::Gptq { By::Gptq } else { By::GptqKeptRtn };
            return Ok((solved, by));
        };
        let descended = descent::descent(w, &solved.matrix, moment, factor.lambda(), &params)?;
        let (mut matrix, mut loss) = (descended.matrix, descended.after);
        let outputs = match job.role {
            Role::Layer(layer, part) => self.outputs.and_then(|outputs| outputs.get(&(layer, part))),
            _ => None,
        };
        // Fewer tokens than outputs leave directions of which nothing is known.
        if let Some((outputs, _)) = outputs.filter(|(outputs, tokens)| *tokens >= outputs.nrows() as u64) {
            let found = both::both(w, &matrix, (moment, factor.lambda()), (outputs.view(), both::DAMPING), &params)?;
            (matrix, loss) = (found.matrix, found.loss);
        }
        Ok((Solved { matrix, loss, ..solved }, By::GptqDescent))
    }
}

/// Says of which matrix an error is.
fn named(name: &str, source: Error) -> Error {
    Error::InMatrix { name: name.to_owned(), source: Box::new(source) }
}

impl Solver<'_> {
    /// No token came. In the independent order the plan was made from the same tokens, so there is none to blame but the caller; behind
    /// compressed layers an expert may lose its last one, and is rounded.
    fn unreached(&self, jobs: &[&Job<'_>]) -> Result<()> {
        if self.repair.order == Order::Independent {
            return Err(Error::Unreached { name: jobs.first().map_or_else(String::new, |job| job.name.to_owned()) });
        }
        let params = match self.method {
            Method::Gptq(params) => rtn::Params { clips: params.clips },
            Method::Pmq => rtn::Params::default(),
        };
        for job in jobs {
            let matrix = rtn(self.model.matrix(job.role)?.view(), &job.how.width(), &params)?;
            self.file.put(job.name, &matrix, &Report { by: By::RtnUnreached, solved: None, learned: None })?;
        }
        Ok(())
    }

    /// Adds to a site's cross moment, where a solver aims.
    fn add_cross(&self, site: Site, rows: ArrayView2<'_, f32>, weights: Option<&[f32]>, routed: Option<&Routed>) {
        let Some(original) = self.aim.filter(|_| Original::covers(site)) else { return };
        let held = || self.crosses.lock().unwrap_or_else(PoisonError::into_inner);
        let width = rows.ncols();
        let mut cross = held().remove(&site).unwrap_or_else(|| Cross { sums: Array2::zeros((width, width)), next: 0 });
        let mut missing = original.missing(site, rows, cross.next, routed);
        if let Some(weights) = weights {
            missing.rows_mut().into_iter().zip(weights).for_each(|(mut row, &v)| row *= v);
        }
        cross.sums += &product(missing.t(), rows);
        cross.next += rows.nrows();
        held().insert(site, cross);
    }

    /// A site's cross moment and how far to aim with it; `None` where nothing aims, or too few tokens came to say where.
    fn cross(&self, site: Site, moment: &Moment) -> Option<(Array2<f32>, f64)> {
        let cross = self.crosses.lock().unwrap_or_else(PoisonError::into_inner).remove(&site)?;
        let covered = 2 * moment.tokens() as usize >= moment.width();
        self.repair.propagate.filter(|_| covered).map(|alpha| (cross.sums, alpha))
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
    fn wants_every_row(&self) -> bool {
        self.experts == Through::All
    }

    fn wants(&self, layer: usize, site: Site) -> bool {
        let wanted = |site| self.jobs.contains_key(&site);
        wanted(site) || self.rows.needs(layer, site, wanted)
    }

    fn rows(&self, layer: usize, site: Site, rows: &Tensor<B, 2>, routed: Option<&Routed>) -> calib::Result<()> {
        self.add((layer, site), rows, routed).map_err(boxed)
    }

    fn entered(&self, layer: usize, x: &[Tensor<B, 2>], _: &[u64]) -> calib::Result<()> {
        if self.jobs.values().flatten().any(|job| job.is_blended()) {
            let spec = self.model.spec();
            let most = blend::rows(spec.hidden, spec.moe(layer).map_or(0, |moe| moe.inner));
            // Set once: a layer is entered once.
            let _ = self.layer_rows.set(LayerRows::new(spread(x, most)?));
        }
        Ok(())
    }

    fn done(&self, layer: usize, site: Site) -> calib::Result<()> {
        self.solve(layer, site).map_err(boxed)
    }
}
