//! The hidden states between two layers as a file, so that a killed run goes on where the last finished layer ended.

use burn::tensor::{Tensor, TensorData, backend::Backend};

use kernels::ScaleType;

use crate::solved::Solved;
use crate::tensorfile::{Create, Declared, Element, scale_bytes};
use crate::{Error, Result};

/// The hidden states that enter a layer, written whole; 4 bytes a value.
pub fn save<B: Backend>(solved: &Solved, layer: usize, hidden: &[Tensor<B, 3>]) -> Result<()> {
    let declared = hidden.iter().enumerate().map(|(batch, x)| Declared { name: name(batch), dtype: Element::F32, shape: x.dims().to_vec() });
    let file = Create::new(&solved.hidden_path(layer), declared.collect(), &solved.metadata("hidden", layer))?;
    for (batch, x) in hidden.iter().enumerate() {
        let values: Vec<f32> = x.to_data().convert::<f32>().into_vec().map_err(|error| lost(solved, layer, &format!("{error:?}")))?;
        file.put(&name(batch), &scale_bytes(&values, ScaleType::F32))?;
    }
    file.finish()
}

/// What [`save`] wrote for a layer.
pub fn load<B: Backend>(solved: &Solved, layer: usize, device: &B::Device) -> Result<Vec<Tensor<B, 3>>> {
    let file = solved.open_file(&solved.hidden_path(layer), "hidden", layer)?;
    let mut batches = Vec::new();
    for batch in 0..file.names().count() {
        let shape = file.entry(&name(batch))?.shape.clone();
        let shape = <[usize; 3]>::try_from(shape).map_err(|shape| lost(solved, layer, &format!("a batch has shape {shape:?}")))?;
        let bytes = file.bytes(&name(batch))?;
        let values: Vec<f32> = bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        batches.push(Tensor::from_data(TensorData::new(values, shape), device));
    }
    Ok(batches)
}

/// Removes the hidden states that enter a layer, if they are there.
pub fn remove(solved: &Solved, layer: usize) -> Result<()> {
    let path = solved.hidden_path(layer);
    if path.exists() {
        fs_err::remove_file(path)?;
    }
    Ok(())
}

fn name(batch: usize) -> String {
    format!("batch-{batch:06}")
}

fn lost(solved: &Solved, layer: usize, what: &str) -> Error {
    Error::Stage { path: solved.hidden_path(layer), what: what.to_owned() }
}
