//! The stages, strung together: calibrate, reduce, fold, plan, apply, export, evaluate.
//!
//! A run on a directory goes on where an earlier one of the same recipe, model and texts stopped, however it stopped: a stage is
//! done when its marker has its name, and within a stage a layer when its file has. Everything gets its name by rename.

mod ahead;
mod curve;
mod estimate;
mod folder;
mod identity;
mod levers;
mod memory;
mod stages;

use std::path::{Path, PathBuf};

use calib::device::Device;
use calib::progress::Progress;
use calib::{Model, Weights};

use crate::plan::Shape;
use crate::recipe::{self, Loaded, Recipe};
use crate::reduce::resample::Sureness;
use crate::report::{Cost, Meter};
use crate::tensorfile::write_whole;
use crate::{Error, Result};

pub use ahead::{check_space, left};
pub use curve::{Compared, calibrate_curve, pareto, plan_for};
pub use estimate::{Item, estimate};
pub use folder::{Earlier, Folder, Stage};
pub use identity::Identity;
pub use levers::{Lever, levers};
pub use memory::{Fit, fit};
use stages::Work;

/// How far to go, and how.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The last stage.
    pub until: Stage,
    /// What happens to earlier work.
    pub earlier: Earlier,
    /// Where the model runs.
    pub device: Device,
    /// Most bytes to hold.
    pub memory: Option<u64>,
}

/// What a run came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// The stages that this run did; none if all had been done before.
    pub ran: Vec<Stage>,
    /// What every finished stage cost, also those of earlier runs.
    pub costs: Vec<(Stage, Cost)>,
    /// The output directory.
    pub out: PathBuf,
}

/// A recipe with nothing wrong, and its model.
pub struct Prepared {
    /// The model.
    pub model: Model,
    /// Its shape.
    pub shape: Shape,
}

/// Opens the model and checks the recipe against it: every problem of value at once.
///
/// # Errors
///
/// [`Error::Recipe`] with the problems; if there are none but the model cannot be opened, why.
pub fn prepare(loaded: &Loaded) -> Result<Prepared> {
    let mut problems = recipe::check_values(loaded);
    match loaded.recipe.model.as_deref().map(Model::open) {
        Some(Ok(model)) => {
            let shape = Shape::of(&model);
            problems.extend(recipe::check_experts(loaded, &model));
            problems.extend(recipe::check_folds(loaded, &model));
            if problems.is_empty() {
                let left = ahead::left(&loaded.recipe, &model, &shape);
                problems.extend(recipe::check(loaded, &left));
                if problems.is_empty() {
                    problems.extend(ahead::check_exports(loaded, &model, &left)?);
                }
            }
            if problems.is_empty() {
                return Ok(Prepared { model, shape });
            }
        }
        Some(Err(error)) if problems.is_empty() => return Err(error.into()),
        Some(Err(error)) => problems.push(loaded.source.problem("model", error.to_string(), None)),
        None => {}
    }
    Err(loaded.source.invalid(problems).into())
}

/// Does what the recipe says up to a stage, skipping what is done.
///
/// # Errors
///
/// As [`prepare`] and [`Folder::open`]; [`Error::ShapeOnly`]; [`Error::ModelInside`]; [`Error::Memory`]; whatever a stage brings up.
pub fn run(loaded: &Loaded, options: &Options, progress: &dyn Progress) -> Result<Finished> {
    let Prepared { model, shape } = prepare(loaded)?;
    let recipe = &loaded.recipe;
    let out = recipe.out.clone().unwrap_or_default();
    if model.checkpoint().is_shape_only() && options.until != Stage::Plan {
        return Err(Error::ShapeOnly { dir: model.checkpoint().dir().to_owned() });
    }
    refuse_inside(model.checkpoint().dir(), &out)?;
    if let Some(budget) = options.memory {
        limit(&memory::fit(recipe, model.spec(), rayon::current_num_threads(), budget)?);
    }
    let identity = Identity::of(recipe, &shape.fingerprint)?;
    let folder = Folder::open(&out, &identity, options.earlier)?;
    write_whole(&folder.path("recipe.toml"), resolved(recipe, folder.dir())?.as_bytes())?;
    let work = Work::new(recipe, &out, &model, &shape, &folder, options.device);
    work.forget_lost_outputs()?;
    let todo = work.todo(options.until)?;
    if todo.contains(&Stage::Apply) {
        let problems = check_space(loaded, &ahead::left(recipe, &model, &shape))?;
        if !problems.is_empty() {
            return Err(loaded.source.invalid(problems).into());
        }
    }
    work.look_ahead(&todo)?;
    for &stage in &todo {
        tracing::debug!("{} begins", stage.name());
        let meter = Meter::start();
        work.stage(stage, &Named { stage, inner: progress })?;
        work.mark(stage, &meter.read())?;
    }
    work.clean_up()?;
    let mut costs = Vec::new();
    for stage in Stage::ALL {
        costs.extend(folder.done(stage)?.map(|cost| (stage, cost)));
    }
    Ok(Finished { ran: todo, costs, out })
}

/// How sure the choice of experts is that a finished run up to [`Stage::Reduce`] made.
///
/// # Errors
///
/// As [`run`]; [`Error::Prune`] for a pruner that scores no statistics.
pub fn sureness(loaded: &Loaded, device: Device, progress: &dyn Progress) -> Result<Option<Sureness>> {
    let Prepared { model, shape } = prepare(loaded)?;
    let out = loaded.recipe.out.clone().unwrap_or_default();
    let folder = Folder::open(&out, &Identity::of(&loaded.recipe, &shape.fingerprint)?, Earlier::Resume)?;
    Work::new(&loaded.recipe, &out, &model, &shape, &folder, device).sureness(progress)
}

/// Holds this process to what fits.
fn limit(fit: &Fit) {
    if let Some(tasks) = std::num::NonZeroUsize::new(fit.in_flight) {
        calib::forward::limit_in_flight(tasks);
    }
    let peak = crate::report::memory(fit.peak);
    tracing::info!("memory: {} batches or experts in flight; {} holds most, {peak}", fit.in_flight, fit.stage);
}

/// Progress with the stage's name before what it counts: `calibrate: layers`.
struct Named<'a> {
    stage: Stage,
    inner: &'a dyn Progress,
}

impl Progress for Named<'_> {
    fn start(&self, what: &str, total: u64) {
        let stage = self.stage.name();
        self.inner.start(&if what == stage { stage.to_owned() } else { format!("{stage}: {what}") }, total);
    }

    fn tick(&self, steps: u64) {
        self.inner.tick(steps);
    }

    fn finish(&self) {
        self.inner.finish();
    }
}

/// The model must not lie where an output would be written over it or discarded.
fn refuse_inside(model: &Path, out: &Path) -> Result<()> {
    let (Ok(inner), Ok(outer)) = (fs_err::canonicalize(model), fs_err::canonicalize(out)) else { return Ok(()) };
    if inner.starts_with(outer) {
        return Err(Error::ModelInside { model: model.to_owned(), out: out.to_owned() });
    }
    Ok(())
}

/// The recipe with every default written out and its paths relative to the folder that it is written into.
fn resolved(recipe: &Recipe, dir: &Path) -> Result<String> {
    let here = fs_err::canonicalize(dir)?;
    let mut recipe = recipe.clone();
    let mut failed = None;
    recipe.each_path(|path| match fs_err::canonicalize(&*path) {
        Ok(there) => *path = relative(&here, &there),
        Err(error) => failed = Some(error),
    });
    match failed {
        Some(error) => Err(error.into()),
        None => Ok(toml::to_string(&recipe).map_err(|e| Error::Stage { path: dir.join("recipe.toml"), what: e.to_string() })?),
    }
}

/// The way from one absolute path to another.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let shared = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(shared).map(|_| std::path::Component::ParentDir);
    let way: PathBuf = up.chain(to.components().skip(shared)).collect();
    if way.as_os_str().is_empty() { ".".into() } else { way }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_from_here_to_there() {
        let way = |from: &str, to: &str| relative(Path::new(from), Path::new(to));
        assert_eq!(way("/a/b/c", "/a/d"), Path::new("../../d"));
        assert_eq!(way("/a/b", "/a/b/c/d"), Path::new("c/d"));
        assert_eq!(way("/a/b/moepress", "/a/b"), Path::new(".."));
        assert_eq!(way("/a", "/a"), Path::new("."));
    }

    #[test]
    fn a_resolved_recipe_is_a_recipe_and_says_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("out/moepress");
        fs_err::create_dir_all(&inner).unwrap();
        fs_err::create_dir(dir.path().join("m")).unwrap();
        fs_err::write(dir.path().join("en.txt"), "x").unwrap();
        let text = "schema = 1\nmodel = \"m\"\nout = \"out\"\n[calibrate]\ncorpus = [\"en.txt\"]\n[quantize.gptq]\n[allocate]\nbits = 3\ngroup = \"channel\"\n[export.dense]\n";
        let recipe = dir.path().join("r.toml");
        fs_err::write(&recipe, text).unwrap();
        let first = recipe::load(&recipe, &recipe::Overrides::default()).unwrap().recipe;
        let said = resolved(&first, &inner).unwrap();
        assert!(said.contains("model = \"../../m\"") && said.contains("out = \"..\"") && said.contains("samples = 128"), "{said}");
        fs_err::write(inner.join("recipe.toml"), &said).unwrap();
        let again = recipe::load(&inner.join("recipe.toml"), &recipe::Overrides::default()).unwrap().recipe;
        assert_eq!(Identity::of(&first, "m").unwrap(), Identity::of(&again, "m").unwrap());
        assert_eq!(resolved(&again, &inner).unwrap(), said);
    }

    #[test]
    fn a_model_inside_the_output_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (out, model) = (dir.path().join("out"), dir.path().join("out/dense"));
        fs_err::create_dir_all(&model).unwrap();
        assert!(refuse_inside(&model, &out).unwrap_err().to_string().contains("out/dense"));
        assert!(refuse_inside(&out, &out).is_err());
        refuse_inside(&out, &model).unwrap();
    }
}
