//! Fills the sensitivity table while a layer's second moments are in memory: in the measuring pass, or in a backward pass after it.
//!
//! One file a layer, `sensitivity/layer-00000.json`, finished by rename, and `sensitivity.json` in the end; beside it what dropped
//! experts would put out ([`constants`](crate::constants)). **Memory**, beside the
//! pass's own: for every site in flight a moment and its factor (`12 · K²` bytes for `K` inputs), the three matrices of its MLP in
//! f32, and one matrix with its working copies (`16` bytes a weight).

mod few;
mod outputs;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use calib::arch::{Kind, Part, Projection, Role, Site};
use calib::backward::Receive;
use calib::forward::Routed;
use calib::pass::{Spread, Watch};
use calib::stats::end_loss::{LayerWeights, SiteLoss};
use calib::stats::{GateSums, LayerStats, Moment, Store, Undercalibrated};
use calib::{Model, Weights};
use ndarray::{Array2, ArrayView2, Axis};
use rayon::prelude::*;

use crate::allocate::sensitivity::{Entry, SCHEMA, Shared, Solver, Table, Wanted, outlier_score, row_weights, scored};
use crate::allocate::{Choice, Cost, Fill, Matrix, drop, pmq};
use crate::apply::boxed;
use crate::blend::{self, LayerRows};
use crate::constants::{self, Outputs};
use crate::objective::Coefficients;
use crate::tensorfile::write_whole;
use crate::{Error, Result};
use few::{Few, too_few};
use outputs::Entered;

/// Of the experts of a layer, every how many-th is solved where the table is estimated.
const SAMPLE: usize = 16;

/// Fills a table.
pub struct Survey<'a> {
    model: &'a Model,
    solver: Solver<'a>,
    cost: Cost,
    fill: Fill,
    choices: Vec<Choice>,
    /// Calibration tokens.
    tokens: u64,
    /// What becomes of experts that too few of them reached.
    rule: Undercalibrated,
    few: Few,
    /// Matrices by layer and site.
    jobs: BTreeMap<(usize, Site), Vec<&'a Matrix>>,
    /// `OUT/moepress`.
    dir: PathBuf,
    moments: Mutex<HashMap<Site, Moment>>,
    /// What gate and up gave, by the site of down.
    gates: Mutex<HashMap<Site, GateSums>>,
    entries: Mutex<BTreeMap<String, Entry>>,
    /// What the experts of the layer in flight put out on average.
    means: Mutex<Outputs>,
    coefficients: Coefficients<'a>,
    /// Rows that entered the MLPs in flight, for the costs that run them again.
    entered: Mutex<HashMap<Site, Entered>>,
    /// PMQ's knobs, and the tokens of one of its batches.
    pmq: (pmq::Params, usize),
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Survey<'a> {
    /// A table over `matrices` as far as the cost covers them.
    pub fn new(
        model: &'a Model,
        solver: Solver<'a>,
        matrices: &'a [Matrix],
        (cost, fill, choices): (Cost, Fill, Vec<Choice>),
        (tokens, rule): (u64, Undercalibrated),
        dir: &Path,
    ) -> Self {
        let mut jobs: BTreeMap<(usize, Site), Vec<&Matrix>> = BTreeMap::new();
        for matrix in matrices.iter().filter(|m| cost.covers(m.kind())) {
            if let Some(site) = matrix.part.site() {
                jobs.entry((matrix.layer, site)).or_default().push(matrix);
            }
        }
        Self {
            model,
            solver,
            cost,
            fill,
            choices,
            tokens,
            rule,
            few: Few::default(),
            jobs,
            dir: dir.to_owned(),
            moments: Mutex::default(),
            gates: Mutex::default(),
            entries: Mutex::default(),
            means: Mutex::default(),
            coefficients: Coefficients::new(model),
            entered: Mutex::default(),
            pmq: (pmq::Params::default(), usize::MAX),
        }
    }

    /// PMQ's knobs, for samples of so many tokens.
    #[must_use]
    pub fn with_pmq(self, params: pmq::Params, tokens: usize) -> Self {
        Self { pmq: (params, params.batch * tokens), ..self }
    }

    fn layer_path(&self, layer: usize) -> PathBuf {
        self.dir.join(format!("sensitivity/layer-{layer:05}.json"))
    }

    /// Whether the table waits for a backward pass.
    pub fn goes_backward(&self) -> bool {
        self.cost == Cost::EndLoss && !self.dir.join("sensitivity.json").is_file()
    }

    /// The watcher of the measuring pass, for the costs that need no other.
    pub fn watch(&self) -> Option<&dyn Watch> {
        matches!(self.cost, Cost::Hessian | Cost::Output | Cost::Pmq).then_some(self)
    }

    /// Joins the layers' files into `sensitivity.json` and removes them.
    ///
    /// # Errors
    ///
    /// [`Error::Stage`] where a layer is missing, an IO error.
    pub fn finish(&self, layers: usize, corpus: String) -> Result<()> {
        let path = self.dir.join("sensitivity.json");
        if !path.is_file() {
            let mut entries = BTreeMap::new();
            if matches!(self.cost, Cost::Outlier | Cost::BlockImportance) {
                entries = self.scores()?;
            }
            let filled = matches!(self.cost, Cost::Hessian | Cost::Output | Cost::Pmq | Cost::EndLoss);
            for layer in (0..layers).filter(|_| filled) {
                let path = self.layer_path(layer);
                if !path.is_file() {
                    return Err(Error::Stage { path, what: "the losses of this layer are missing".into() });
                }
                let text = fs_err::read(&path)?;
                let found: BTreeMap<String, Entry> =
                    serde_json::from_slice(&text).map_err(|source| calib::Error::own_json(path, source))?;
                entries.extend(found);
            }
            if self.cost == Cost::Pmq {
                self.weigh(&mut entries)?;
            }
            let model = self.model.checkpoint().fingerprint().to_owned();
            let (cost, fill, choices) = (self.cost, self.fill, self.choices.clone());
            let mut table = Table { schema: SCHEMA, model, corpus, cost, fill, choices, ..Table::default() };
            table.set(entries);
            write_whole(&path, (serde_json::to_string(&table).map_err(std::io::Error::from)? + "\n").as_bytes())?;
        }
        let parts = self.dir.join("sensitivity");
        if parts.is_dir() {
            fs_err::remove_dir_all(parts)?;
        }
        Ok(())
    }

    /// Scores that need no pass of their own, as losses.
    fn scores(&self) -> Result<BTreeMap<String, Entry>> {
        let store = Store::new(self.dir.join("stats"));
        let mut entries = BTreeMap::new();
        for job in self.jobs.values().flatten() {
            let score = match self.cost {
                Cost::Outlier => outlier_score(self.model.matrix(Role::Layer(job.layer, job.part))?.view()),
                _ => importance(&store, job.layer)?,
            };
            let fits = |(choice, loss): (&Choice, f64)| choice.width(job.scale).group_len(job.shape[1]).is_ok().then_some(loss);
            let solved = self.choices.iter().zip(scored(score, job.weights(), &self.choices)).map(fits).collect();
            entries.insert(job.name.clone(), Entry { like: like(job), rounded: Vec::new(), solved, dropped: None });
        }
        Ok(entries)
    }

    /// Turns every expert's ε into PMQ's cost, a third for each of its matrices.
    fn weigh(&self, entries: &mut BTreeMap<String, Entry>) -> Result<()> {
        let store = Store::new(self.dir.join("stats"));
        let mut read: Option<(usize, LayerStats)> = None;
        for job in self.jobs.values().flatten() {
            let (Part::Expert(expert, _), Some(entry)) = (job.part, entries.get_mut(&job.name)) else { continue };
            if read.as_ref().is_none_or(|(layer, _)| *layer != job.layer) {
                read = Some((job.layer, store.get(job.layer)?));
            }
            let Some(experts) = read.as_ref().and_then(|(_, stats)| stats.experts.as_ref()) else { continue };
            let share = |sums: Vec<f64>| sums[expert] / sums.iter().sum::<f64>().max(f64::MIN_POSITIVE);
            let phi = share(experts.router.load().iter().map(|&n| n as f64).collect());
            let w = share(experts.router.mass.sum_axis(Axis(0)).to_vec());
            for loss in entry.solved.iter_mut().flatten() {
                *loss = self.pmq.0.cost(phi, w, *loss) / 3.0;
            }
        }
        Ok(())
    }

    /// Losses of an MLP's matrices when all the rows that enter it have been seen.
    fn judge_mlp(&self, layer: usize, enter: Site) -> Result<()> {
        let entered = held(&self.entered).remove(&enter).unwrap_or_default();
        let parts = Projection::ALL.map(|p| outputs::part(enter, p));
        let read = |part: Option<Part>| -> Result<Array2<f32>> {
            Ok(part.map(|part| self.model.matrix(Role::Layer(layer, part))).transpose()?.unwrap_or_default())
        };
        let [gate, up, down] = [read(parts[0])?, read(parts[1])?, read(parts[2])?];
        let mlp = outputs::Mlp { gate, up, down };
        let wanted = self.wanted(enter);
        let judge = outputs::Judge { choices: &self.choices, solver: self.solver, unit: 1.0 / self.tokens.max(1) as f64, wanted };
        let epsilon = match self.cost {
            Cost::Pmq => Some(outputs::epsilon(&self.choices, &mlp, &entered, self.pmq.1)?),
            _ => None,
        };
        for which in Projection::ALL {
            let Some((part, site)) = outputs::part(enter, which).and_then(|part| Some((part, part.site()?))) else { continue };
            let Some(job) = self.jobs.get(&(layer, site)).and_then(|jobs| jobs.iter().find(|job| job.part == part)) else { continue };
            let (rounded, solved) = match &epsilon {
                Some(epsilon) => (Vec::new(), epsilon.clone()),
                None => outputs::output(&judge, &mlp, &entered, which, job.scale)?,
            };
            let dropped = match part {
                Part::Expert(expert, Projection::Down) if self.cost == Cost::Output => {
                    let (costs, mean) = outputs::dropped(&mlp, &entered, judge.unit);
                    held(&self.means).insert((layer, expert), mean);
                    Some(costs)
                }
                _ => None,
            };
            held(&self.entries).insert(job.name.clone(), Entry { like: like(job), rounded, solved, dropped });
        }
        Ok(())
    }

    /// Whether MLPs are run again, and which site their rows are kept at.
    fn reruns(&self) -> bool {
        matches!(self.cost, Cost::Output | Cost::Pmq)
    }

    /// Whether rows that enter an MLP here are kept.
    fn keeps(&self, layer: usize, site: Site) -> bool {
        let of = |p| outputs::part(site, p).and_then(Part::site);
        self.reruns() && Projection::ALL.into_iter().filter_map(of).any(|site| self.jobs.contains_key(&(layer, site)))
    }

    fn keep(&self, layer: usize, site: Site, rows: ArrayView2<'_, f32>, routed: Option<&Routed>) -> Result<()> {
        let weights = self.coefficients.of(layer, site, rows, routed)?;
        let mut entered = held(&self.entered).remove(&site).unwrap_or_default();
        entered.rows.extend(rows.iter());
        entered.weights.extend(weights);
        entered.tokens.extend(routed.iter().flat_map(|routed| &routed.tokens));
        held(&self.entered).insert(site, entered);
        Ok(())
    }

    fn add(&self, layer: usize, site: Site, rows: ArrayView2<'_, f32>, routed: Option<&Routed>) -> Result<()> {
        let weights: Vec<f32> = self.coefficients.of(layer, site, rows, routed)?.iter().map(|c| c * c).collect();
        if !self.jobs.contains_key(&(layer, site)) {
            return Ok(());
        }
        self.few.weigh(site, &weights);
        // Taken out while it grows, so that other sites are not kept waiting.
        let mut moment = held(&self.moments).remove(&site).unwrap_or_else(|| Moment::new(rows.ncols()));
        moment.add(rows, Some(&weights));
        held(&self.moments).insert(site, moment);
        Ok(())
    }

    /// What is wanted of the matrices of a site.
    fn wanted(&self, site: Site) -> Wanted {
        match (self.fill, site) {
            (Fill::Solve, _) => Wanted::Solved,
            (Fill::Estimate, Site::ExpertIn(e) | Site::ExpertDown(e)) if e % SAMPLE != 0 => Wanted::Rounded,
            (Fill::Estimate, _) => Wanted::Both,
        }
    }

    /// Losses of a site's matrices, with the row weights of each; sums over tokens are multiplied by `unit`. Where too few tokens
    /// came, the moment is blended first; where none did, this waits for the layer's end.
    fn judge<'r>(
        &self,
        (layer, site): (usize, Site),
        mut moment: Moment,
        unit: f64,
        rows: impl Fn(Part) -> Option<&'r [f64]>,
    ) -> Result<()> {
        if too_few(self.rule, site, moment.tokens(), moment.width()) {
            if moment.tokens() == 0 {
                self.few.unseen(site);
                return Ok(());
            }
            if let Some(all) = self.few.layer() {
                all.blend(self.model, layer, site, &mut moment)?;
            }
            return self.losses((layer, site), moment, unit, self.wanted_of_few(site), rows);
        }
        self.losses((layer, site), moment, unit, self.wanted(site), rows)
    }

    /// What is wanted where too few tokens came: with the rule `rtn`, the losses of rounding as they are.
    fn wanted_of_few(&self, site: Site) -> Wanted {
        if matches!(self.rule, Undercalibrated::Rtn(_)) { Wanted::Rounded } else { self.wanted(site) }
    }

    fn losses<'r>(
        &self,
        (layer, site): (usize, Site),
        moment: Moment,
        unit: f64,
        wanted: Wanted,
        rows: impl Fn(Part) -> Option<&'r [f64]>,
    ) -> Result<()> {
        let Some(jobs) = self.jobs.get(&(layer, site)) else { return Ok(()) };
        let first = moment.first().clone();
        let shared = Shared::new(moment.into_matrix(), &self.choices, self.solver, unit, wanted)?;
        for job in jobs {
            let w = self.model.matrix(Role::Layer(job.layer, job.part))?;
            let rows_of = rows(job.part);
            let (mut rounded, mut solved) = shared.losses(w.view(), rows_of, job.scale, wanted)?;
            // Rounded for good: no ratio of what solving makes of it.
            if wanted == Wanted::Rounded && self.wanted(site) != wanted {
                std::mem::swap(&mut rounded, &mut solved);
            }
            let dropped = match job.part {
                Part::Expert(expert, Projection::Down) => {
                    held(&self.means).insert((layer, expert), drop::mean_output(w.view(), &first));
                    Some(shared.dropped(w.view(), rows_of, &first))
                }
                _ => None,
            };
            held(&self.entries).insert(job.name.clone(), Entry { like: like(job), rounded, solved, dropped });
        }
        Ok(())
    }

    /// Losses of the matrices that no token reached: those of one token of the layer's average; a sum over tokens is multiplied by
    /// `unit`.
    fn judge_unseen(&self, layer: usize, unit: f64) -> Result<()> {
        let (unseen, all) = self.few.finish();
        let Some(all) = all else { return Ok(()) };
        unseen.into_par_iter().try_for_each(|(site, weight)| {
            let (Site::ExpertIn(expert) | Site::ExpertDown(expert)) = site else { return Ok(()) };
            let Some(first) = self.jobs.get(&(layer, site)).and_then(|jobs| jobs.first()) else { return Ok(()) };
            let mut moment = Moment::new(first.shape[1]);
            all.blend(self.model, layer, site, &mut moment)?;
            moment.scale(weight as f32);
            let rows = match (self.cost, before_down(site)) {
                (Cost::Hessian, Some((_, part))) => {
                    let down = self.model.matrix(Role::Layer(layer, part))?;
                    Some(row_weights(&all.inner(self.model, layer, expert)?.gates, down.view()))
                }
                _ => None,
            };
            self.losses((layer, site), moment, unit, self.wanted_of_few(site), |part| of_part(rows.as_ref(), part))
        })
    }

    /// Losses of a site's matrices when all its rows have been seen going forward.
    fn judge_outputs(&self, layer: usize, site: Site) -> Result<()> {
        let Some(first) = self.jobs.get(&(layer, site)).and_then(|jobs| jobs.first()) else { return Ok(()) };
        let moment = held(&self.moments).remove(&site).unwrap_or_else(|| Moment::new(first.shape[1]));
        let rows = match before_down(site) {
            Some((down, part)) => {
                let down_matrix = self.model.matrix(Role::Layer(layer, part))?;
                let sums = held(&self.gates).remove(&down).unwrap_or_else(|| GateSums::new(down_matrix.ncols()));
                Some(row_weights(&sums, down_matrix.view()))
            }
            None => None,
        };
        self.judge((layer, site), moment, self.unit(), |part| of_part(rows.as_ref(), part))
    }

    /// What a sum over tokens is multiplied by: the squared error a token, or half of the nats.
    fn unit(&self) -> f64 {
        let share = if self.cost == Cost::EndLoss { 0.5 } else { 1.0 };
        share / self.tokens.max(1) as f64
    }

    /// Keeps what enters a layer's experts, if one of them that is wanted was given too few rows.
    fn enter(&self, layer: usize, rows: &Spread<'_>, loads: &[u64]) -> calib::Result<()> {
        if self.reruns() {
            return Ok(());
        }
        let few = |site, rows| self.jobs.get(&(layer, site)).is_some_and(|jobs| too_few(self.rule, site, rows, jobs[0].shape[1]));
        if loads.iter().enumerate().any(|(e, &rows)| few(Site::ExpertIn(e), rows) || few(Site::ExpertDown(e), rows)) {
            let spec = self.model.spec();
            let most = blend::rows(spec.hidden, spec.moe(layer).map_or(0, |moe| moe.inner));
            self.few.enter(LayerRows::new(rows(most)?));
        }
        Ok(())
    }

    fn put(&self, layer: usize) -> Result<()> {
        let entries = std::mem::take(&mut *held(&self.entries));
        let means = std::mem::take(&mut *held(&self.means));
        if !means.is_empty() {
            constants::write(&constants::layer_path(&self.dir, layer), &means)?;
        }
        fs_err::create_dir_all(self.dir.join("sensitivity"))?;
        let text = serde_json::to_string(&entries).map_err(std::io::Error::from)? + "\n";
        write_whole(&self.layer_path(layer), text.as_bytes())
    }
}

/// Where gate and up enter: the site and the matrix of the down projection behind them.
fn before_down(site: Site) -> Option<(Site, Part)> {
    match site {
        Site::ExpertIn(e) => Some((Site::ExpertDown(e), Part::Expert(e, Projection::Down))),
        Site::SharedIn => Some((Site::SharedDown, Part::Shared(Projection::Down))),
        Site::DenseIn => Some((Site::DenseDown, Part::Dense(Projection::Down))),
        _ => None,
    }
}

/// QuantMoE-Bench's importance of a layer's block of experts, by the mean cosine itself instead of a predictor of it; 0 without experts.
fn importance(store: &Store, layer: usize) -> Result<f64> {
    let Some(experts) = store.get(layer)?.experts else { return Ok(0.0) };
    let tokens = experts.block.tokens.sum().max(1) as f64;
    Ok(1.0 - experts.block.residual.sum() / tokens)
}

/// Row weights of gate or of up.
fn of_part(rows: Option<&[Vec<f64>; 2]>, part: Part) -> Option<&[f64]> {
    rows.map(|[gate, up]| if projection(part) == Some(Projection::Gate) { gate.as_slice() } else { up })
}

fn projection(part: Part) -> Option<Projection> {
    match part {
        Part::Expert(_, p) | Part::Shared(p) | Part::Dense(p) => Some(p),
        _ => None,
    }
}

fn like(matrix: &Matrix) -> String {
    let kind: Kind = matrix.kind();
    projection(matrix.part).map_or_else(|| kind.to_string(), |p| format!("{kind} {p:?}").to_lowercase())
}

impl Watch for Survey<'_> {
    fn wants(&self, layer: usize, site: Site) -> bool {
        if self.reruns() {
            return self.keeps(layer, site);
        }
        let wanted = |site| self.jobs.contains_key(&(layer, site));
        wanted(site) || self.coefficients.needs(layer, site, wanted)
    }

    fn rows(&self, layer: usize, site: Site, rows: &[f32], width: usize, routed: Option<&Routed>) -> calib::Result<()> {
        let count = rows.len() / width.max(1);
        match ArrayView2::from_shape((count, width), rows) {
            Ok(rows) if self.reruns() => self.keep(layer, site, rows, routed).map_err(boxed),
            Ok(rows) => self.add(layer, site, rows, routed).map_err(boxed),
            Err(_) => Ok(()),
        }
    }

    fn gates(&self, _: usize, down: Site, gate: &[f32], up: &[f32], inner: usize, routed: Option<&Routed>) -> calib::Result<()> {
        if self.reruns() {
            return Ok(());
        }
        let sums = GateSums::of(gate, up, inner, routed.map(|r| r.weights.as_slice()));
        held(&self.gates).entry(down).or_insert_with(|| GateSums::new(inner)).merge(&sums)
    }

    fn entered(&self, layer: usize, rows: &Spread<'_>, loads: &[u64]) -> calib::Result<()> {
        self.enter(layer, rows, loads)
    }

    fn done(&self, layer: usize, site: Site) -> calib::Result<()> {
        if self.reruns() { self.judge_mlp(layer, site) } else { self.judge_outputs(layer, site) }.map_err(boxed)
    }

    fn layer_done(&self, layer: usize) -> calib::Result<()> {
        self.judge_unseen(layer, self.unit()).and_then(|()| self.put(layer)).map_err(boxed)
    }

    fn has(&self, layer: usize) -> bool {
        self.layer_path(layer).is_file()
    }
}

impl Receive for Survey<'_> {
    fn wants(&self, layer: usize, site: Site) -> bool {
        self.jobs.contains_key(&(layer, site))
    }

    fn entered(&self, layer: usize, rows: &Spread<'_>, loads: &[u64]) -> calib::Result<()> {
        self.enter(layer, rows, loads)
    }

    fn site(&self, layer: usize, loss: SiteLoss) -> calib::Result<()> {
        // Half of a sum over tokens, in nats a token.
        let unit = 0.5 / loss.tokens.max(1) as f64;
        let rows = |part| loss.outputs.iter().find(|(p, _)| *p == part).and_then(|(_, r)| r.as_slice());
        self.judge((layer, loss.site), Moment::from_sums(loss.moment, loss.first, loss.rows), unit, rows).map_err(boxed)
    }

    fn layer(&self, layer: usize, weights: LayerWeights) -> calib::Result<()> {
        weights.sites.iter().for_each(|(site, weights)| self.few.weigh(*site, &weights.v));
        self.judge_unseen(layer, self.unit()).and_then(|()| self.put(layer)).map_err(boxed)
    }
}
