//! The token weights of a backward pass, one file a layer: `DIR/token_weights/layer-00000.safetensors`.

use std::path::{Path, PathBuf};

use calib::Model;
use calib::arch::Site;
use calib::backward::{self, Backward, Receive, Scratch};
use calib::device::Device;
use calib::progress::Progress;
use calib::sample::Samples;
use calib::stats::end_loss::{LayerWeights, SiteLoss};
use serde::{Deserialize, Serialize};

use crate::apply::boxed;
use crate::survey::Survey;
use crate::tensorfile::write_whole;
use crate::{Error, Result};

/// Version of the files' form.
const SCHEMA: u32 = 1;

/// What the weights are of; written when the last layer is.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    schema: u32,
    model: String,
    corpus: String,
    #[serde(default)]
    end_loss: backward::Params,
}

/// The folder of token weights, one file a layer and a manifest at its end.
#[derive(Clone, Debug)]
pub struct TokenWeights {
    dir: PathBuf,
    model: String,
    corpus: String,
    end_loss: backward::Params,
}

impl TokenWeights {
    /// That of `dir` (`OUT/moepress`), for a model's fingerprint, the hash of the calibration samples, and how the loss is made.
    pub fn new(dir: &Path, model: &str, corpus: &str, end_loss: &backward::Params) -> Self {
        Self { dir: dir.join("token_weights"), model: model.to_owned(), corpus: corpus.to_owned(), end_loss: end_loss.clone() }
    }

    fn path(&self, layer: usize) -> PathBuf {
        self.dir.join(format!("layer-{layer:05}.safetensors"))
    }

    fn manifest(&self) -> Manifest {
        Manifest { schema: SCHEMA, model: self.model.clone(), corpus: self.corpus.clone(), end_loss: self.end_loss.clone() }
    }

    /// Whether every layer is there.
    ///
    /// # Errors
    ///
    /// [`Error::Stage`] if they are of another model, other samples or another loss, [`calib::Error::OtherVersion`], an IO error.
    pub fn is_finished(&self) -> Result<bool> {
        let path = self.dir.join("manifest.json");
        if !path.is_file() {
            return Ok(false);
        }
        let text = fs_err::read(&path)?;
        let found: Manifest = serde_json::from_slice(&text).map_err(|source| calib::Error::own_json(path.clone(), source))?;
        if found == self.manifest() {
            return Ok(true);
        }
        Err(Error::Stage {
            path,
            what: "these token weights are of another model, other calibration samples or another end_loss".to_owned(),
        })
    }

    /// The weights of one layer.
    ///
    /// # Errors
    ///
    /// [`Error::Stage`] where the pass is not finished; as [`TokenWeights::is_finished`].
    pub fn layer(&self, layer: usize) -> Result<LayerWeights> {
        if !self.is_finished()? {
            let what = "the token weights of the backward pass are missing, which belongs to the stage calibrate".to_owned();
            return Err(Error::Stage { path: self.dir.clone(), what });
        }
        Ok(LayerWeights::read(&self.path(layer))?)
    }

    fn put(&self, layer: usize, weights: &LayerWeights) -> Result<()> {
        fs_err::create_dir_all(&self.dir)?;
        Ok(weights.write(&self.path(layer))?)
    }

    fn finish(&self) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.manifest()).map_err(std::io::Error::from)? + "\n";
        write_whole(&self.dir.join("manifest.json"), text.as_bytes())
    }
}

/// One backward pass for whoever needs one: the table of costs, and the token weights of the objective.
pub struct Backwards<'a> {
    /// Fills its table.
    pub survey: Option<&'a Survey<'a>>,
    /// Keeps the token weights.
    pub weights: Option<&'a TokenWeights>,
    /// How the loss is made.
    pub end_loss: &'a backward::Params,
}

impl Backwards<'_> {
    /// Runs the pass; what an earlier run finished is not done again. `dir` is `OUT/moepress`.
    ///
    /// # Errors
    ///
    /// As [`backward::run`] and [`TokenWeights::is_finished`].
    pub fn run(&self, model: &Model, samples: &Samples, dir: &Path, device: Device, progress: &dyn Progress) -> Result<()> {
        let survey = self.survey.filter(|survey| survey.goes_backward());
        let weights = match self.weights {
            Some(weights) if !weights.is_finished()? => Some(weights),
            _ => None,
        };
        let folder = dir.join("backward");
        if survey.is_some() || weights.is_some() {
            fs_err::create_dir_all(&folder)?;
            let fingerprint = model.checkpoint().fingerprint().to_owned();
            let key = [("model files".to_owned(), fingerprint), ("calibration samples".to_owned(), samples.hash())];
            let scratch = Scratch::Disk(&folder, key.into());
            let pass = Backward { weights: model, ids: &samples.ids, params: self.end_loss, scratch: &scratch, progress };
            backward::run(&pass, &Backwards { survey, weights, end_loss: self.end_loss }, device)?;
            weights.map_or(Ok(()), TokenWeights::finish)?;
        }
        if folder.is_dir() {
            fs_err::remove_dir_all(folder)?;
        }
        Ok(())
    }
}

impl Receive for Backwards<'_> {
    fn wants(&self, layer: usize, site: Site) -> bool {
        self.survey.is_some_and(|survey| Receive::wants(survey, layer, site))
    }

    fn site(&self, layer: usize, loss: SiteLoss) -> calib::Result<()> {
        self.survey.map_or(Ok(()), |survey| survey.site(layer, loss))
    }

    fn layer(&self, layer: usize, weights: LayerWeights) -> calib::Result<()> {
        if let Some(store) = self.weights {
            store.put(layer, &weights).map_err(boxed)?;
        }
        self.survey.map_or(Ok(()), |survey| survey.layer(layer, weights))
    }
}
