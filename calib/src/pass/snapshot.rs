//! Hidden states between two layers, on disk, so that a killed pass goes on.

use std::collections::BTreeMap;
use std::io::{BufReader, Read, Write};
use std::path::PathBuf;

use burn::tensor::{Tensor, TensorData, backend::Backend};
use serde_json::{Value, json};

use crate::forward::values;
use crate::stats::store::write_whole;
use crate::{Error, Result};

/// A safetensors file with the hidden states that enter a layer, bit for bit: one F32 tensor a batch,
/// `[samples, tokens, hidden]`, and in `__metadata__` the layer and what the pass depends on.
#[derive(Clone, Debug)]
pub struct Snapshots {
    path: PathBuf,
    key: BTreeMap<String, String>,
}

/// The header of a snapshot.
struct Header {
    next: usize,
    shapes: Vec<[usize; 3]>,
}

impl Snapshots {
    /// A snapshot at `path`; `key` holds what must not have changed when it is read again (`model`, `samples`, …).
    pub fn new(path: PathBuf, key: BTreeMap<String, String>) -> Self {
        Self { path, key }
    }

    /// The layer that the snapshot's hidden states enter; `None` where there is no snapshot.
    ///
    /// # Errors
    ///
    /// [`Error::Changed`] where it depends on something else, [`Error::Statistics`] where it does not read.
    pub fn next_layer(&self) -> Result<Option<usize>> {
        Ok(self.open()?.map(|(header, _)| header.next))
    }

    /// Writes the hidden states that enter `next`, in place of the snapshot before.
    ///
    /// # Errors
    ///
    /// An IO error, or what reading the device says.
    pub fn save<B: Backend>(&self, next: usize, hidden: &[Tensor<B, 3>]) -> Result<()> {
        let mut header = serde_json::Map::new();
        let state = json!({ "next": next, "key": self.key }).to_string();
        header.insert("__metadata__".into(), json!({ "moepress": state }));
        let mut end = 0;
        for (i, batch) in hidden.iter().enumerate() {
            let shape = batch.dims();
            let (begin, bytes) = (end, 4 * shape.iter().product::<usize>());
            end += bytes;
            header.insert(name(i), json!({ "dtype": "F32", "shape": shape, "data_offsets": [begin, end] }));
        }
        let mut text = Value::Object(header).to_string();
        text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
        write_whole(&self.path, |file| {
            file.write_all(&(text.len() as u64).to_le_bytes())?;
            file.write_all(text.as_bytes())?;
            for batch in hidden {
                let values = values(batch.clone(), "hidden states").map_err(std::io::Error::other)?;
                write_floats(file, &values)?;
            }
            Ok(())
        })
    }

    /// The layer to go on with and the hidden states that enter it; `None` where there is no snapshot.
    ///
    /// # Errors
    ///
    /// As [`Snapshots::next_layer`].
    pub fn load<B: Backend>(&self, device: &B::Device) -> Result<Option<(usize, Vec<Tensor<B, 3>>)>> {
        let Some((header, mut file)) = self.open()? else { return Ok(None) };
        let mut hidden = Vec::with_capacity(header.shapes.len());
        for shape in header.shapes {
            let values = read_floats(&mut file, shape.iter().product())?;
            hidden.push(Tensor::from_data(TensorData::new(values, shape), device));
        }
        Ok(Some((header.next, hidden)))
    }

    /// Deletes the snapshot, if there is one.
    ///
    /// # Errors
    ///
    /// An IO error.
    pub fn remove(&self) -> Result<()> {
        if self.path.is_file() {
            fs_err::remove_file(&self.path)?;
        }
        Ok(())
    }

    /// The header, and the file at the first value.
    fn open(&self) -> Result<Option<(Header, impl Read)>> {
        if !self.path.is_file() {
            return Ok(None);
        }
        let mut file = BufReader::with_capacity(1 << 20, fs_err::File::open(&self.path)?);
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let mut text = Vec::new();
        file.by_ref().take(u64::from_le_bytes(length)).read_to_end(&mut text)?;
        let (found, header) = header(&text).ok_or_else(|| Error::Statistics {
            path: self.path.clone(),
            message: "not hidden states that this program wrote".to_owned(),
        })?;
        let differs = |(name, value): &(&String, &String)| found.get(*name) != Some(value);
        if let Some((what, _)) = self.key.iter().find(differs) {
            return Err(Error::Changed { path: self.path.clone(), what: what.clone() });
        }
        Ok(Some((header, file)))
    }
}

fn name(batch: usize) -> String {
    format!("hidden.{batch:06}")
}

/// The key and what follows it; `None` where the text is not such a header.
fn header(text: &[u8]) -> Option<(BTreeMap<String, String>, Header)> {
    let header: Value = serde_json::from_slice(text).ok()?;
    let state: Value = serde_json::from_str(header["__metadata__"]["moepress"].as_str()?).ok()?;
    let key = serde_json::from_value(state["key"].clone()).ok()?;
    let batches = header.as_object()?.len() - 1;
    let shape = |i: usize| serde_json::from_value(header[name(i)]["shape"].clone()).ok();
    let shapes = (0..batches).map(shape).collect::<Option<_>>()?;
    Some((key, Header { next: state["next"].as_u64()? as usize, shapes }))
}

fn write_floats(file: &mut dyn Write, values: &[f32]) -> std::io::Result<()> {
    let mut bytes = Vec::with_capacity(1 << 16);
    for run in values.chunks(1 << 14) {
        bytes.clear();
        bytes.extend(run.iter().flat_map(|v| v.to_le_bytes()));
        file.write_all(&bytes)?;
    }
    Ok(())
}

fn read_floats(file: &mut impl Read, count: usize) -> Result<Vec<f32>> {
    let mut values = Vec::with_capacity(count);
    let mut bytes = vec![0; 1 << 16];
    while values.len() < count {
        let run = &mut bytes[..4 * (count - values.len()).min(1 << 14)];
        file.read_exact(run)?;
        values.extend(run.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
    }
    Ok(values)
}
