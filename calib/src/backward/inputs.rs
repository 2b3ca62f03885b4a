//! What entered each layer, kept until the pass comes back to it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::tensor::{Tensor, backend::Backend};

use super::{Params, Scratch, Targets};
use crate::pass::Snapshots;
use crate::{Error, Result};

/// Hidden states by layer, and on disk the gradient that the pass has come to.
pub(super) enum Inputs<B: Backend> {
    Memory(BTreeMap<usize, Vec<Tensor<B, 3>>>),
    Disk { dir: PathBuf, key: BTreeMap<String, String> },
}

impl<B: Backend> Inputs<B> {
    pub fn new(scratch: &Scratch<'_>, params: &Params) -> Self {
        match scratch {
            Scratch::Memory => Self::Memory(BTreeMap::new()),
            Scratch::Disk(dir, key) => {
                let targets = match params.targets {
                    Targets::Own => format!("own, seed {}", params.seed),
                    Targets::Text => "text".to_owned(),
                };
                let mut key = key.clone();
                key.insert("end_loss targets".to_owned(), targets);
                Self::Disk { dir: dir.to_path_buf(), key }
            }
        }
    }

    /// Keeps what enters a layer.
    pub fn put(&mut self, layer: usize, hidden: &[Tensor<B, 3>]) -> Result<()> {
        match self {
            Self::Memory(kept) => {
                kept.insert(layer, hidden.to_vec());
                Ok(())
            }
            Self::Disk { dir, key } => file(dir, key, &input(layer)).save(layer, hidden),
        }
    }

    /// What entered a layer; in memory it is kept no longer.
    pub fn take(&mut self, layer: usize, device: &B::Device) -> Result<Vec<Tensor<B, 3>>> {
        match self {
            Self::Memory(kept) => kept.remove(&layer).ok_or_else(|| missing(&input(layer))),
            Self::Disk { dir, key } => match file(dir, key, &input(layer)).load(device)? {
                Some((_, hidden)) => Ok(hidden),
                None => Err(missing(&dir.join(input(layer)).display().to_string())),
            },
        }
    }

    /// The last of `layers` layers whose input is kept by an earlier run, with all before it.
    pub fn last(&self, layers: usize, device: &B::Device) -> Result<Option<(usize, Vec<Tensor<B, 3>>)>> {
        let Self::Disk { dir, key } = self else { return Ok(None) };
        let mut last = None;
        for layer in 0..layers {
            if file(dir, key, &input(layer)).next_layer()?.is_none() {
                break;
            }
            last = Some(layer);
        }
        match last {
            Some(layer) => file(dir, key, &input(layer)).load(device),
            None => Ok(None),
        }
    }

    /// The layer whose output an earlier run has the gradient at (its number plus one), and that gradient.
    pub fn gradient(&self, device: &B::Device) -> Result<Option<(usize, Vec<Tensor<B, 3>>)>> {
        match self {
            Self::Memory(_) => Ok(None),
            Self::Disk { dir, key } => file(dir, key, GRADIENT).load(device),
        }
    }

    /// The pass has the gradient at the input of `layer`, and all layers from there on are done.
    pub fn finish(&mut self, layer: usize, gradient: &[Tensor<B, 3>]) -> Result<()> {
        let Self::Disk { dir, key } = self else { return Ok(()) };
        file(dir, key, GRADIENT).save(layer, gradient)?;
        file(dir, key, &input(layer)).remove()
    }

    /// Deletes what is left.
    pub fn remove(&mut self) -> Result<()> {
        match self {
            Self::Memory(kept) => {
                kept.clear();
                Ok(())
            }
            Self::Disk { dir, key } => file(dir, key, GRADIENT).remove(),
        }
    }
}

const GRADIENT: &str = "gradient.safetensors";

fn input(layer: usize) -> String {
    format!("input-{layer:05}.safetensors")
}

fn file(dir: &std::path::Path, key: &BTreeMap<String, String>, name: &str) -> Snapshots {
    Snapshots::new(dir.join(name), key.clone())
}

/// An input that was deleted under the pass.
fn missing(name: &str) -> Error {
    Error::Statistics { path: name.into(), message: "what entered this layer is not there any more".to_owned() }
}
