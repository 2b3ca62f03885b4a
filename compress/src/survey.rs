//! Fills the sensitivity table while the measuring pass runs: a layer's second moments are in memory then, and are dropped after.
//!
//! One file a layer, `sensitivity/layer-00000.json`, finished by rename, and `sensitivity.json` in the end. **Memory**, beside the
//! pass's own: for every site in flight a moment and its factor (`12 · K²` bytes for `K` inputs), the three matrices of its MLP in
//! f32, and one matrix with its working copies (`16` bytes a weight).

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use calib::arch::{Kind, Part, Projection, Role, Site};
use calib::forward::Routed;
use calib::linalg::product;
use calib::pass::Watch;
use calib::stats::Moment;
use calib::{Model, Weights};
use ndarray::{Array2, ArrayView2};

use crate::allocate::sensitivity::{Activations, Entry, SCHEMA, Shared, Table, Wanted};
use crate::allocate::{Choice, Cost, Fill, Matrix};
use crate::apply::boxed;
use crate::quantize::Quantizer;
use crate::tensorfile::write_whole;
use crate::{Error, Result};

/// Of the experts of a layer, every how many-th is solved where the table is estimated.
const SAMPLE: usize = 16;

/// Fills a table.
pub struct Survey<'a> {
    model: &'a Model,
    quantizer: &'a Quantizer,
    cost: Cost,
    fill: Fill,
    choices: Vec<Choice>,
    /// Calibration tokens.
    tokens: u64,
    /// Matrices by layer and site.
    jobs: BTreeMap<(usize, Site), Vec<&'a Matrix>>,
    /// `OUT/moepress`.
    dir: PathBuf,
    states: Mutex<HashMap<Site, State>>,
    entries: Mutex<BTreeMap<String, Entry>>,
    /// Weights that the shared expert's gate gave the last rows: those that enter its down next.
    gated: Mutex<Vec<f32>>,
}

/// What is known of one site so far.
struct State {
    moment: Moment,
    /// Where gate and up enter: what their errors are multiplied by.
    mlp: Option<Mlp>,
}

/// The matrices around a site of gate and up.
struct Mlp {
    gate: Array2<f32>,
    up: Array2<f32>,
    seen: Activations,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Survey<'a> {
    /// A table over `matrices` as far as the cost covers them.
    pub fn new(
        model: &'a Model,
        quantizer: &'a Quantizer,
        matrices: &'a [Matrix],
        (cost, fill, choices): (Cost, Fill, Vec<Choice>),
        tokens: u64,
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
            quantizer,
            cost,
            fill,
            choices,
            tokens,
            jobs,
            dir: dir.to_owned(),
            states: Mutex::default(),
            entries: Mutex::default(),
            gated: Mutex::default(),
        }
    }

    fn layer_path(&self, layer: usize) -> PathBuf {
        self.dir.join(format!("sensitivity/layer-{layer:05}.json"))
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
            for layer in 0..layers {
                let path = self.layer_path(layer);
                if !path.is_file() {
                    return Err(Error::Stage { path, what: "the losses of this layer are missing".into() });
                }
                let text = fs_err::read(&path)?;
                let found: BTreeMap<String, Entry> = serde_json::from_slice(&text).map_err(|source| Error::Json { path, source })?;
                entries.extend(found);
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

    /// Three roles of the MLP that a site belongs to; `None` for attention.
    fn mlp_of(site: Site) -> Option<fn(Site, Projection) -> Part> {
        match site {
            Site::ExpertIn(_) => Some(|site, p| if let Site::ExpertIn(e) = site { Part::Expert(e, p) } else { Part::Dense(p) }),
            Site::SharedIn => Some(|_, p| Part::Shared(p)),
            Site::DenseIn => Some(|_, p| Part::Dense(p)),
            _ => None,
        }
    }

    fn state(&self, layer: usize, site: Site, width: usize) -> Result<State> {
        if let Some(state) = held(&self.states).remove(&site) {
            return Ok(state);
        }
        let mlp = match Self::mlp_of(site) {
            Some(part) => {
                let matrix = |p| self.model.matrix(Role::Layer(layer, part(site, p)));
                let (gate, up) = (matrix(Projection::Gate)?, matrix(Projection::Up)?);
                let seen = Activations::new(gate.nrows());
                Some(Mlp { gate, up, seen })
            }
            None => None,
        };
        Ok(State { moment: Moment::new(width), mlp })
    }

    /// The weight of every row: what multiplies the MLP's output.
    fn weights(&self, layer: usize, site: Site, rows: ArrayView2<'_, f32>, routed: Option<&Routed>) -> Result<Vec<f32>> {
        let gate = Role::Layer(layer, Part::SharedGate);
        Ok(match (routed, site) {
            (Some(routed), _) => routed.weights.clone(),
            (None, Site::SharedIn) if self.model.layout().name(gate).is_some() => {
                let logits = product(rows, self.model.matrix(gate)?.t());
                let weights: Vec<f32> = logits.iter().map(|z| 1.0 / (1.0 + (-z).exp())).collect();
                held(&self.gated).clone_from(&weights);
                weights
            }
            (None, Site::SharedDown) if self.model.layout().name(gate).is_some() => std::mem::take(&mut held(&self.gated)),
            _ => vec![1.0; rows.nrows()],
        })
    }

    fn add(&self, layer: usize, site: Site, rows: ArrayView2<'_, f32>, routed: Option<&Routed>) -> Result<()> {
        let weights: Vec<f32> = self.weights(layer, site, rows, routed)?.iter().map(|c| c * c).collect();
        let mut state = self.state(layer, site, rows.ncols())?;
        state.moment.add(rows, Some(&weights));
        if let Some(Mlp { gate, up, seen }) = &mut state.mlp {
            seen.add(&product(rows, gate.t()), &product(rows, up.t()), &weights);
        }
        held(&self.states).insert(site, state);
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

    fn judge(&self, layer: usize, site: Site) -> Result<()> {
        let Some(jobs) = self.jobs.get(&(layer, site)) else { return Ok(()) };
        let state = held(&self.states).remove(&site);
        let wanted = self.wanted(site);
        let mut found = BTreeMap::new();
        if let Some(State { moment, mlp }) = state {
            let shared = Shared::new(moment.into_matrix(), &self.choices, self.quantizer, self.tokens, wanted)?;
            let rows = match (&mlp, Self::mlp_of(site)) {
                (Some(mlp), Some(part)) => {
                    let down = self.model.matrix(Role::Layer(layer, part(site, Projection::Down)))?;
                    let [gate, up] = mlp.seen.row_weights(down.view());
                    Some((gate, up))
                }
                _ => None,
            };
            for job in jobs {
                let w = self.model.matrix(Role::Layer(job.layer, job.part))?;
                let rows = rows.as_ref().map(|(gate, up)| if projection(job.part) == Some(Projection::Gate) { gate } else { up });
                let (rounded, solved) = shared.losses(w.view(), rows.map(Vec::as_slice), job.scale, wanted)?;
                found.insert(job.name.clone(), Entry { like: like(job), rounded, solved });
            }
        } else {
            // No token reached it: no width costs anything on these texts.
            for job in jobs {
                let fits = |c: &Choice| c.width(job.scale).group_len(job.shape[1]).is_ok().then_some(0.0);
                let solved = self.choices.iter().map(fits).collect();
                found.insert(job.name.clone(), Entry { like: like(job), rounded: Vec::new(), solved });
            }
        }
        held(&self.entries).extend(found);
        Ok(())
    }
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
        self.jobs.contains_key(&(layer, site))
    }

    fn rows(&self, layer: usize, site: Site, rows: &[f32], width: usize, routed: Option<&Routed>) -> calib::Result<()> {
        let count = rows.len() / width.max(1);
        match ArrayView2::from_shape((count, width), rows) {
            Ok(rows) => self.add(layer, site, rows, routed).map_err(boxed),
            Err(_) => Ok(()),
        }
    }

    fn done(&self, layer: usize, site: Site) -> calib::Result<()> {
        self.judge(layer, site).map_err(boxed)
    }

    fn layer_done(&self, layer: usize) -> calib::Result<()> {
        let entries = std::mem::take(&mut *held(&self.entries));
        fs_err::create_dir_all(self.dir.join("sensitivity"))?;
        let text = serde_json::to_string(&entries).map_err(std::io::Error::from)? + "\n";
        write_whole(&self.layer_path(layer), text.as_bytes()).map_err(boxed)
    }

    fn has(&self, layer: usize) -> bool {
        self.layer_path(layer).is_file()
    }
}
