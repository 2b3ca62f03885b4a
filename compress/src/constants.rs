//! What dropped experts put out: the mean outputs that a table of costs leaves beside it, and experts that put out a constant.
//!
//! `means/layer-00000.safetensors` beside `sensitivity.json` has that of every routed expert of a layer, `dropped.safetensors` beside
//! `plan.json` those of the experts that the plan drops; a tensor is named `LAYER.EXPERT` and is `[hidden]` in F32.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use calib::Applied;
use kernels::ScaleType;

use crate::tensorfile::{Create, Declared, Element, Open, scale_bytes};
use crate::{Error, Result};

/// Outputs by layer and expert, `[hidden]` each.
pub type Outputs = BTreeMap<(usize, usize), Vec<f32>>;

/// The file of a layer's mean outputs, below the folder of its table of costs.
pub fn layer_path(dir: &Path, layer: usize) -> PathBuf {
    dir.join(format!("means/layer-{layer:05}.safetensors"))
}

/// The file of the outputs of a plan's dropped experts.
pub fn dropped_path(dir: &Path) -> PathBuf {
    dir.join("dropped.safetensors")
}

fn name((layer, expert): (usize, usize)) -> String {
    format!("{layer}.{expert}")
}

/// Writes outputs; the folder is made.
///
/// # Errors
///
/// An IO error.
pub fn write(path: &Path, outputs: &Outputs) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs_err::create_dir_all(folder)?;
    }
    let declared = outputs.iter().map(|(&at, output)| Declared { name: name(at), dtype: Element::F32, shape: vec![output.len()] });
    let file = Create::new(path, declared.collect(), &BTreeMap::from([("moepress".to_owned(), "constants".to_owned())]))?;
    for (&at, output) in outputs {
        file.put(&name(at), &scale_bytes(output, ScaleType::F32))?;
    }
    file.finish()
}

/// Reads the outputs of these experts out of a file that [`write`] wrote.
///
/// # Errors
///
/// [`Error::Stage`] if it is not one, or does not hold one of them; an IO error.
pub fn read(path: &Path, experts: impl Iterator<Item = (usize, usize)>) -> Result<Outputs> {
    let file = Open::new(path)?;
    let output = |at| {
        let bytes = file.bytes(&name(at)).map_err(|_| Error::Stage {
            path: path.to_owned(),
            what: format!("it has no output of expert {} of layer {}; plan again, or keep that expert", at.1, at.0),
        })?;
        Ok((at, bytes.as_chunks().0.iter().map(|&word| f32::from_le_bytes(word)).collect()))
    };
    experts.map(output).collect()
}

/// Values as they are once they are stored in 16 bits.
pub fn rounded(values: &[f32], stored: ScaleType) -> Vec<f32> {
    match stored {
        ScaleType::Bf16 => values.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect(),
        ScaleType::F16 => values.iter().map(|&x| half::f16::from_f32(x).to_f32()).collect(),
        ScaleType::F32 => values.to_vec(),
    }
}

/// An expert that puts out the same for every row.
#[derive(Clone, Debug, PartialEq)]
pub struct Constant {
    /// What it puts out, `[hidden]`.
    pub output: Vec<f32>,
    /// Channels between its projections, as the other experts have them.
    pub inner: usize,
}

impl Applied for Constant {
    fn gates(&self, x: &[f32]) -> [Vec<f32>; 2] {
        let rows = x.len() / self.output.len().max(1);
        [vec![0.0; rows * self.inner], vec![0.0; rows * self.inner]]
    }

    fn down(&self, x: &[f32]) -> Vec<f32> {
        self.output.repeat(x.len() / self.inner.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_what_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = layer_path(dir.path(), 3);
        let outputs = Outputs::from([((3, 1), vec![0.5, -2.0]), ((3, 12), vec![1.25, 0.0])]);
        write(&path, &outputs).unwrap();
        assert_eq!(read(&path, [(3, 12), (3, 1)].into_iter()).unwrap(), outputs);
        let said = read(&path, [(3, 2)].into_iter()).unwrap_err().to_string();
        assert!(said.contains("layer-00003") && said.contains("expert 2 of layer 3"), "{said}");
    }

    #[test]
    fn a_constant_says_the_same_to_every_row() {
        let constant = Constant { output: vec![1.0, -2.0, 0.5], inner: 4 };
        let [gate, up] = constant.gates(&[7.0; 6]);
        assert_eq!((gate.len(), up.len()), (8, 8));
        assert_eq!(constant.down(&gate), [1.0, -2.0, 0.5, 1.0, -2.0, 0.5]);
        assert_eq!(rounded(&[1.001], ScaleType::Bf16), [1.0]);
    }
}
