//! The stages of one run.

use std::cell::OnceCell;
use std::path::Path;

use calib::corpus::{Corpus, Tokenizer};
use calib::device::Device;
use calib::evaluate::{Evaluate, Models, Windows, evaluate};
use calib::pass::{self, Complete, Draw, Pass};
use calib::progress::{Progress, Quiet};
use calib::sample::{Sampler, Samples};
use calib::stats::Store;
use calib::{Model, Weights};

use super::folder::{Folder, Stage, remove};
use crate::allocate::sensitivity::{Solver, Table};
use crate::allocate::{Allocate, Substitute};
use crate::constants::{self, Outputs};
use crate::fold::{self, Request};
use crate::objective::{Backwards, TokenWeight, TokenWeights};
use crate::packed::{self, ExpertRounding};
use crate::plan::{self, Experts, Measured, Plan, Shape};
use crate::quantize::Quantizer;
use crate::recipe::Recipe;
use crate::reduce;
use crate::reduce::resample::{self, Sureness};
use crate::repair::rotate;
use crate::report::{self, Balance, Calibration, Cost, ModelRow, OutputRow, Report, markdown_report};
use crate::survey::Survey;
use crate::tensorfile::write_whole;
use crate::{Error, Result, apply};

/// One run: what it works with.
pub(super) struct Work<'a> {
    recipe: &'a Recipe,
    out: &'a Path,
    model: &'a Model,
    shape: &'a Shape,
    folder: &'a Folder,
    device: Device,
    samples: OnceCell<Samples>,
    /// The reduced or scaled model, where one is asked for and made.
    remade: OnceCell<(Model, Shape)>,
}

impl<'a> Work<'a> {
    pub fn new(recipe: &'a Recipe, out: &'a Path, model: &'a Model, shape: &'a Shape, folder: &'a Folder, device: Device) -> Self {
        Self { recipe, out, model, shape, folder, device, samples: OnceCell::new(), remade: OnceCell::new() }
    }

    /// The stages up to `until` that the recipe asks for and that are not done.
    pub fn todo(&self, until: Stage) -> Result<Vec<Stage>> {
        let mut todo = Vec::new();
        for stage in Stage::ALL.into_iter().filter(|stage| *stage <= until) {
            let asked = match stage {
                Stage::Calibrate => self.recipe.calibrate.is_some() && !self.model.checkpoint().is_shape_only(),
                Stage::Reduce => self.recipe.reduces() && !self.model.checkpoint().is_shape_only(),
                Stage::Fold => self.recipe.rewrites() && !self.model.checkpoint().is_shape_only(),
                Stage::Evaluate => self.recipe.evaluate.is_some(),
                _ => true,
            };
            if asked && self.folder.done(stage)?.is_none() {
                todo.push(stage);
            }
        }
        Ok(todo)
    }

    /// Takes back the markers of outputs that somebody has removed.
    pub fn forget_lost_outputs(&self) -> Result<()> {
        let lost = self.output_folders().into_iter().find(|(_, folder)| !self.out.join(folder).join("config.json").is_file());
        match (self.folder.done(Stage::Export)?, lost) {
            (Some(_), Some(_)) => self.folder.undo_from(Stage::Apply),
            _ => Ok(()),
        }
    }

    /// Reads every text that the stages will need, so that a text that is too short is found now. A sampler that runs the model
    /// chooses in its stage.
    pub fn look_ahead(&self, todo: &[Stage]) -> Result<()> {
        let sampled = [Stage::Calibrate, Stage::Reduce, Stage::Fold, Stage::Apply].iter().any(|stage| todo.contains(stage));
        if let Some(asked) = self.recipe.calibrate.as_ref().filter(|_| sampled && !self.model.checkpoint().is_shape_only()) {
            match asked.sampler {
                // What the model is yet to write is read in its stage; its prompts were read by the check.
                _ if asked.generate.is_some() => drop(self.tokenizer()?),
                Sampler::Balanced(_) => drop(Corpus::of(&asked.corpus, &self.tokenizer()?)?),
                Sampler::Ebss(_) | Sampler::Temperature(_) => drop(self.tokenizer()?),
                Sampler::Sequential(_) | Sampler::Random(_) => drop(self.samples(&Quiet)?),
            }
        }
        if let Some(asked) = self.recipe.evaluate.as_ref().filter(|_| todo.contains(&Stage::Evaluate)) {
            self.windows(asked)?;
        }
        Ok(())
    }

    /// Does one stage.
    pub fn stage(&self, stage: Stage, progress: &dyn Progress) -> Result<()> {
        match stage {
            Stage::Calibrate => self.calibrate(progress),
            Stage::Reduce => self.reduce(progress),
            Stage::Fold => self.fold(progress),
            Stage::Plan => self.plan(),
            Stage::Apply => self.apply(progress),
            Stage::Export => self.export(progress),
            Stage::Evaluate => self.evaluate(progress),
        }
    }

    /// Marks a stage as done. A plan without data is nothing that a run could go on from: it knows no tokens.
    pub fn mark(&self, stage: Stage, cost: &Cost) -> Result<()> {
        if self.model.checkpoint().is_shape_only() { Ok(()) } else { self.folder.mark(stage, cost) }
    }

    /// Removes what only stages in between need.
    pub fn clean_up(&self) -> Result<()> {
        if self.folder.done(Stage::Export)?.is_some() {
            remove(&self.folder.path("solved"))?;
        }
        Ok(())
    }

    fn tokenizer(&self) -> Result<Tokenizer> {
        Ok(Tokenizer::open(self.model.checkpoint().dir(), self.model.spec().vocab)?)
    }

    /// The calibration samples, drawn once; `None` where the recipe asks for none.
    fn samples(&self, progress: &dyn Progress) -> Result<Option<&Samples>> {
        let Some(asked) = &self.recipe.calibrate else { return Ok(None) };
        if self.samples.get().is_none() {
            let tokenizer = &self.tokenizer()?;
            let (dir, fingerprint) = (&self.folder.path("stats"), self.shape.fingerprint.as_str());
            let sources = match &asked.generate {
                Some(params) => {
                    let (dir, seed) = (&dir.join("demonstrations"), asked.seed);
                    let how = Complete { weights: self.model, fingerprint, tokenizer, params, seed, dir, progress };
                    &pass::complete(&how, &asked.corpus, self.device)?
                }
                None => &asked.corpus,
            };
            let corpus = if asked.sampler.writes() { None } else { Some(Corpus::of(sources, tokenizer)?) };
            let draw = Draw { weights: self.model, fingerprint, calibrate: asked, corpus: corpus.as_ref(), tokenizer, dir, progress };
            // Nobody else can have filled it: the cell is this thread's own.
            let _ = self.samples.set(pass::draw(&draw, self.device)?);
        }
        Ok(self.samples.get())
    }

    fn windows(&self, asked: &Evaluate) -> Result<Vec<Windows>> {
        let corpus = Corpus::read(&asked.text, &self.tokenizer()?)?;
        Ok(Windows::of(&corpus, asked.context, asked.max_tokens)?)
    }

    fn store(&self) -> Store {
        Store::new(self.folder.path("stats"))
    }

    fn calibrate(&self, progress: &dyn Progress) -> Result<()> {
        // A reduced or scaled model is surveyed itself, once it is there.
        let survey = if self.remakes() { None } else { self.mixed() };
        self.measure((self.model, self.shape), &self.store(), survey, self.folder.dir(), progress)
    }

    /// Measures a model on the samples, and fills a table of losses in `dir` where widths are shared out.
    fn measure(
        &self,
        (model, shape): (&Model, &Shape),
        store: &Store,
        mixed: Option<(&Quantizer, &Allocate)>,
        dir: &Path,
        progress: &dyn Progress,
    ) -> Result<()> {
        let (Some(asked), Some(samples)) = (&self.recipe.calibrate, self.samples(progress)?) else { return Ok(()) };
        let (fingerprint, tokens) = (shape.fingerprint.as_str(), samples.total_tokens() as u64);
        let matrices = mixed.map(|(_, allocate)| plan::matrices(allocate, shape)).unwrap_or_default();
        let survey = mixed.map(|(quantizer, allocate)| {
            let what = (allocate.cost, allocate.fill, allocate.options());
            let solver = Solver { quantizer, refine: self.recipe.refine.as_ref() };
            let survey = Survey::new(model, solver, &matrices, what, (tokens, asked.undercalibrated), dir);
            survey.with_pmq(allocate.pmq.unwrap_or_default(), samples.tokens)
        });
        let watch = survey.as_ref().and_then(Survey::watch);
        let pass = Pass { weights: model, fingerprint, samples, calibrate: asked, store, watch, progress };
        let layers = pass::run(&pass, self.device)?.layers;
        let end_loss = &asked.end_loss.clone().unwrap_or_default();
        let weights = TokenWeights::new(self.folder.dir(), fingerprint, &samples.hash(), end_loss);
        let asked = self.recipe.objective.as_ref().is_some_and(|objective| objective.token_weight == TokenWeight::EndLoss);
        // Tokens are weighed where codes will be chosen.
        let compressed = !self.remakes() || fingerprint != self.shape.fingerprint;
        let backwards = Backwards { survey: survey.as_ref(), weights: (asked && compressed).then_some(&weights), end_loss };
        backwards.run(model, samples, dir, self.device, progress)?;
        survey.map_or(Ok(()), |survey| survey.finish(layers, samples.hash()))
    }

    /// Chooses the experts that stay; where quantizers need to know what enters the matrices of the model that is left, measures it too.
    fn reduce(&self, progress: &dyn Progress) -> Result<()> {
        let Some(samples) = self.samples(progress)? else { return Ok(()) };
        // What an interrupted run left is of the same recipe, but no part of it is known to be whole.
        let dir = self.remade_dir();
        if !self.folder.path("experts.json").is_file() {
            remove(&dir)?;
            reduce::run(&self.request(samples, &self.store(), progress))?;
        }
        self.measure_again(&dir, progress)
    }

    /// Measures the reduced or scaled model, where quantizers need to know what enters its matrices.
    fn measure_again(&self, dir: &Path, progress: &dyn Progress) -> Result<()> {
        let asked = self.mixed().is_some() || self.recipe.quantize.as_ref().is_some_and(Quantizer::needs_calibration);
        let subject = self.subject()?;
        if asked { self.measure(subject, &Store::new(dir.join("stats")), self.mixed(), dir, progress) } else { Ok(()) }
    }

    /// Scales input channels or rotates the residual stream, and measures the model that this makes.
    fn fold(&self, progress: &dyn Progress) -> Result<()> {
        if let Some(params) = self.recipe.rotates() {
            return self.rotate(params, progress);
        }
        let Recipe { quantize: Some(quantizer), allocate: Some(allocate), .. } = self.recipe else { return Ok(()) };
        let Some(params) = self.recipe.folds() else { return Ok(()) };
        let dir = self.remade_dir();
        if !self.folder.path("awq.json").is_file() {
            // What an interrupted run left is not known to be whole.
            remove(&dir)?;
            let (model, shape, store, folder) = (self.model, self.shape, &self.store(), self.folder.dir());
            let account = fold::run(&Request { model, shape, allocate, quantizer, params, store, dir: folder, progress })?;
            let (scaled, share) = account.gain();
            tracing::info!(
                "{scaled} vectors of scales, {} left out; the error of rounding is {share:.3} of what it was",
                account.left_out.len()
            );
        }
        self.measure_again(&dir, progress)
    }

    fn rotate(&self, params: &rotate::Params, progress: &dyn Progress) -> Result<()> {
        let dir = self.remade_dir();
        if !self.folder.path("rotated.json").is_file() {
            remove(&dir)?;
            let rotated = fold::rotate::run(self.model, params, self.folder.dir(), progress)?;
            let (mix, hadamard) = rotated.sides;
            let untied = rotated.untied.map(|bytes| format!("; the head was the embedding and takes {} of its own", report::bytes(bytes)));
            let untied = untied.unwrap_or_default();
            tracing::info!("rotated by {hadamard} channels a Hadamard block, {mix} blocks mixed orthogonally{untied}");
        }
        self.measure_again(&dir, progress)
    }

    /// Whether what is compressed is not the checkpoint as it stands.
    fn remakes(&self) -> bool {
        self.recipe.reduces() || self.recipe.rewrites()
    }

    fn request<'b>(&'b self, samples: &'b Samples, store: &'b Store, progress: &'b dyn Progress) -> reduce::Request<'b> {
        reduce::Request {
            model: self.model,
            pruner: self.recipe.prune.as_ref(),
            merger: self.recipe.merge.as_ref(),
            repair: self.recipe.repair.as_ref().and_then(|repair| repair.removal.as_ref()),
            samples,
            device: self.device,
            progress,
            store,
            dir: self.folder.dir(),
        }
    }

    /// How sure the choice of experts is; `None` where the recipe has no calibration.
    pub fn sureness(&self, progress: &dyn Progress) -> Result<Option<Sureness>> {
        let (Some(asked), Some(samples)) = (&self.recipe.calibrate, self.samples(progress)?) else { return Ok(None) };
        let (store, experts) = (self.store(), Experts::read(&self.folder.path("experts.json"))?);
        let request = self.request(samples, &store, progress);
        resample::sureness(&request, &experts, asked, &self.folder.path("resampled")).map(Some)
    }

    /// The model that is compressed: the reduced one where experts go, the scaled or rotated one where it is made, else the original.
    fn subject(&self) -> Result<(&Model, &Shape)> {
        if !self.remakes() || self.model.checkpoint().is_shape_only() {
            return Ok((self.model, self.shape));
        }
        if self.remade.get().is_none() {
            let open = match (self.recipe.reduces(), self.recipe.rotates()) {
                (true, _) => reduce::open,
                (false, Some(_)) => fold::rotate::open,
                (false, None) => fold::open,
            };
            let model = open(self.model, self.folder.dir())?;
            let shape = Shape::of(&model);
            // Nobody else can have filled it: the cell is this thread's own.
            let _ = self.remade.set((model, shape));
        }
        Ok(self.remade.get().map_or((self.model, self.shape), |(model, shape)| (model, shape)))
    }

    /// Where the reduced, scaled or rotated model lies: a recipe that asks for two of them is refused.
    fn remade_dir(&self) -> std::path::PathBuf {
        self.folder.path(if self.recipe.reduces() { "reduced" } else { "folded" })
    }

    /// The quantizer and the budget, where widths are shared out.
    fn mixed(&self) -> Option<(&'a Quantizer, &'a Allocate)> {
        self.recipe.quantize.as_ref().zip(self.recipe.allocate.as_ref().filter(|allocate| allocate.is_mixed()))
    }

    /// The table of losses, where widths are shared out.
    fn table(&self, dir: &Path) -> Result<Option<Table>> {
        let path = dir.join("sensitivity.json");
        let read = |_| serde_json::from_slice(&fs_err::read(&path)?).map_err(|source| calib::Error::own_json(path.clone(), source).into());
        self.mixed().map(read).transpose()
    }

    fn plan(&self) -> Result<()> {
        let whole = !self.model.checkpoint().is_shape_only();
        let (_, shape) = self.subject()?;
        let left = if whole { shape.clone() } else { super::ahead::left(self.recipe, self.model, shape) };
        let mut plan = plan::make(self.recipe, &left, self.measured()?.as_ref())?;
        if self.recipe.reduces() && whole {
            plan.experts = Some(Experts::read(&self.folder.path("experts.json"))?);
        }
        if whole {
            self.keep_means(&plan)?;
        }
        let text = serde_json::to_string_pretty(&plan).map_err(std::io::Error::from)? + "\n";
        write_whole(&self.folder.path("plan.json"), text.as_bytes())
    }

    /// Keeps the mean outputs of the experts that the plan drops beside it: those of the others go with the table of costs.
    fn keep_means(&self, plan: &Plan) -> Result<()> {
        let dir = if self.remakes() { self.remade_dir() } else { self.folder.dir().to_owned() };
        let mut means = Outputs::new();
        for ((layer, expert), gone) in apply::gone(self.subject()?.0, plan)? {
            if gone.by == Substitute::Mean {
                means.extend(constants::read(&constants::layer_path(&dir, layer), std::iter::once((layer, expert)))?);
            }
        }
        let path = constants::dropped_path(self.folder.dir());
        if means.is_empty() { remove(&path) } else { constants::write(&path, &means) }
    }

    /// What was measured of the model that is compressed; `None` where nothing was.
    fn measured(&self) -> Result<Option<Measured>> {
        if self.recipe.calibrate.is_none() || self.model.checkpoint().is_shape_only() {
            return Ok(None);
        }
        let remade = Store::new(self.remade_dir().join("stats"));
        match self.remakes() {
            true if remade.manifest()?.is_none() => Ok(None),
            true => Ok(Some(Measured::read(&remade, self.table(&self.remade_dir())?)?)),
            false => Ok(Some(Measured::read(&self.store(), self.table(self.folder.dir())?)?)),
        }
    }

    /// What solving came to.
    fn outcome(&self) -> Result<apply::Outcome> {
        let path = self.folder.path("outcome.json");
        serde_json::from_slice(&fs_err::read(&path)?).map_err(|source| Error::Json { path, source })
    }

    fn read_plan(&self) -> Result<Plan> {
        plan::read(&self.folder.path("plan.json"))
    }

    fn apply(&self, progress: &dyn Progress) -> Result<()> {
        let plan = self.read_plan()?;
        let samples = self.samples(progress)?.map(|samples| samples.ids.as_slice());
        let outcome = apply::solve(self.subject()?.0, &plan, samples, self.folder.dir(), self.device, progress)?;
        let text = serde_json::to_string_pretty(&outcome).map_err(std::io::Error::from)? + "\n";
        write_whole(&self.folder.path("outcome.json"), text.as_bytes())
    }

    fn export(&self, progress: &dyn Progress) -> Result<()> {
        let plan = self.read_plan()?;
        for written in apply::write(self.subject()?.0, &plan, self.folder.dir(), &self.recipe.export, self.out, progress)? {
            written.notes.iter().for_each(|note| tracing::warn!("{}: {note}", written.format));
            if written.format != "native" {
                continue;
            }
            if let Some(knobs) = &self.recipe.export.kernels {
                let emitted = packed::emit::emit_beside(&written.dir, knobs)?;
                match emitted.not_compiled.is_some() {
                    true => tracing::warn!("{emitted}"),
                    false => tracing::info!("{emitted}"),
                }
            } else if packed::emit::remove(&written.dir)? {
                tracing::warn!("the kernels of earlier weights are taken away; `moepress emit` writes new ones");
            }
        }
        self.write_report(None)
    }

    fn evaluate(&self, progress: &dyn Progress) -> Result<()> {
        let Some(asked) = &self.recipe.evaluate else { return Ok(()) };
        let candidate = packed::open(self.out, ExpertRounding::None)?;
        let models = Models { candidate: candidate.as_ref(), reference: Some(self.model) };
        let scores = evaluate(models, &self.windows(asked)?, self.device, progress)?;
        self.write_report(Some(scores))
    }

    /// Formats and where they lie below the output directory.
    fn output_folders(&self) -> Vec<(&'static str, &'static str)> {
        let place = |(i, name)| if i == 0 { (name, ".") } else { (name, name) };
        self.recipe.export.formats().into_iter().map(|format| format.name()).enumerate().map(place).collect()
    }

    /// What the samples were and reached, where there was a calibration.
    fn calibration(&self) -> Result<Option<Calibration>> {
        let store = self.store();
        let Some(manifest) = store.manifest()?.filter(|_| self.recipe.calibrate.is_some()) else { return Ok(None) };
        let layers = (0..manifest.layers).map(|layer| store.get(layer)).collect::<calib::Result<Vec<_>>>()?;
        Ok(Some(Calibration { balance: Balance::of(&layers), parts: manifest.parts }))
    }

    fn write_report(&self, evaluation: Option<calib::evaluate::Report>) -> Result<()> {
        let plan = self.read_plan()?.summary(self.subject()?.1);
        let mut outputs = Vec::new();
        for (format, folder) in self.output_folders() {
            outputs.push(OutputRow { format: format.to_owned(), folder: folder.to_owned(), bytes: weight_bytes(&self.out.join(folder))? });
        }
        let dir = self.model.checkpoint().dir();
        let parameters = self.model.parameters();
        let model = ModelRow {
            name: fs_err::canonicalize(dir)?.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            family: self.model.spec().model_type.clone(),
            parameters: parameters.total,
            active: parameters.active,
            fingerprint: self.shape.fingerprint.clone(),
            bytes: weight_bytes(dir)?,
        };
        let calibration = self.calibration()?;
        let evaluated = evaluation.is_some().then(|| outputs.first().map(|output| output.format.clone())).flatten();
        let bits_per_weight = plan.bits_per_weight();
        let report =
            Report { schema: 1, model, calibration, bits_per_weight, plan, outputs, evaluated, solved: self.outcome()?, evaluation };
        let json = serde_json::to_string_pretty(&report).map_err(std::io::Error::from)? + "\n";
        write_whole(&self.folder.path("report.md"), markdown_report(&report).as_bytes())?;
        write_whole(&self.folder.path("report.json"), json.as_bytes())
    }
}

/// Bytes of the weight files in a directory.
fn weight_bytes(dir: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|e| e == "safetensors") {
            sum += entry.metadata()?.len();
        }
    }
    Ok(sum)
}
