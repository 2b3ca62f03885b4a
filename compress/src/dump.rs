//! Everything that a forward pass computes on given token ids, as one safetensors file: what another implementation is compared by.
//!
//! With `B` rows of `T` tokens, width `H`, vocabulary `V`, `E` experts of which `K` are chosen, and `L` the number of a layer:
//! `input_ids [B, T]` (I64), `logits [B, T, V]`, `hidden.embed`, `hidden.L` and `hidden.norm [B, T, H]`, `attn.L [B, T, H]` (before the
//! residual sum); in layers with experts `moe.L.in`, `moe.L.routed_out`, `moe.L.out [B·T, H]`, `moe.L.router_logits [B·T, E]`,
//! `moe.L.topk_index [B·T, K]` (I64), `moe.L.topk_weight [B·T, K]`. All else is F32. All of it is held in memory: a few windows are meant.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use burn::tensor::{Tensor, backend::Backend};
use calib::Weights;
use calib::device::{Device, Job};
use calib::forward::{Head, Options, Routing, Tap, decoder_layer, embed, rows};
use safetensors::tensor::{Dtype, TensorView};

use crate::tensorfile::write_whole;
use crate::{Error, Result};

/// Runs the model on rows of token ids, all of one length, and writes what it computes.
///
/// # Errors
///
/// What running the model says; an IO error.
pub fn write(weights: &dyn Weights, ids: &[Vec<u32>], device: Device, path: &Path) -> Result<()> {
    let recorder = device.run(Dump { weights, ids })?;
    let kept = recorder.kept.into_inner().unwrap_or_else(PoisonError::into_inner);
    let tensors: BTreeMap<String, Kept> = kept.into_iter().map(|(name, parts)| (name, Kept::joined(parts))).collect();
    let wrong = |e: safetensors::SafeTensorError| Error::Stage { path: path.to_owned(), what: e.to_string() };
    let views = tensors.iter().map(|(name, kept)| {
        let shape = kept.shape(name, ids.len());
        Ok((name.as_str(), TensorView::new(kept.dtype, shape, &kept.bytes).map_err(wrong)?))
    });
    let views = views.collect::<Result<Vec<_>>>()?;
    write_whole(path, &safetensors::serialize(views, None).map_err(wrong)?)
}

/// Reads `--tokens`: a JSON list of token ids, or a list of equally long lists.
///
/// # Errors
///
/// [`Error::TokenIds`]; an IO error.
pub fn read_ids(path: &Path) -> Result<Vec<Vec<u32>>> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Ids {
        One(Vec<u32>),
        Many(Vec<Vec<u32>>),
    }
    let wrong = |what: &str| Error::TokenIds { path: path.to_owned(), what: what.to_owned() };
    let ids = match serde_json::from_slice(&fs_err::read(path)?) {
        Ok(Ids::One(ids)) => vec![ids],
        Ok(Ids::Many(ids)) => ids,
        Err(_) => return Err(wrong("these are not token ids")),
    };
    match ids.first().map(Vec::len) {
        None | Some(0) => Err(wrong("there is no token")),
        Some(tokens) if ids.iter().any(|row| row.len() != tokens) => Err(wrong("the rows are not equally long")),
        Some(_) => Ok(ids),
    }
}

/// Values of one tensor, `width` a row.
struct Kept {
    dtype: Dtype,
    width: usize,
    bytes: Vec<u8>,
}

impl Kept {
    fn floats(width: usize, values: &[f32]) -> Self {
        Self { dtype: Dtype::F32, width, bytes: values.iter().flat_map(|x| x.to_le_bytes()).collect() }
    }

    fn ids<'a>(width: usize, ids: impl IntoIterator<Item = &'a u32>) -> Self {
        Self { dtype: Dtype::I64, width, bytes: ids.into_iter().flat_map(|id| i64::from(*id).to_le_bytes()).collect() }
    }

    /// The batches of one tensor, one behind the other.
    fn joined(parts: BTreeMap<usize, Self>) -> Self {
        let mut parts = parts.into_values();
        let first = parts.next().unwrap_or(Self { dtype: Dtype::F32, width: 0, bytes: Vec::new() });
        parts.fold(first, |mut all, part| {
            all.bytes.extend(part.bytes);
            all
        })
    }

    /// MoE tensors are rows over all samples, the others have the samples as an axis of their own.
    fn shape(&self, name: &str, samples: usize) -> Vec<usize> {
        let rows = self.bytes.len() / (self.width * if self.dtype == Dtype::I64 { 8 } else { 4 }).max(1);
        match name {
            "input_ids" => vec![samples, self.width],
            _ if name.starts_with("moe.") => vec![rows, self.width],
            _ => vec![samples, rows / samples, self.width],
        }
    }
}

/// Keeps what passes by, batch by batch.
#[derive(Default)]
struct Recorder {
    kept: Mutex<BTreeMap<String, BTreeMap<usize, Kept>>>,
}

impl Recorder {
    fn keep(&self, name: String, batch: usize, kept: Kept) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).entry(name).or_default().insert(batch, kept);
    }

    fn tensor<B: Backend>(&self, name: String, batch: usize, x: Tensor<B, 2>) -> calib::Result<()> {
        let width = x.dims()[1];
        self.keep(name, batch, Kept::floats(width, &calib::forward::values(x, "a dump")?));
        Ok(())
    }
}

impl<B: Backend> Tap<B> for Recorder {
    fn wants_blocks(&self) -> bool {
        true
    }

    fn block(&self, layer: usize, name: &'static str, batch: usize, x: &Tensor<B, 2>) -> calib::Result<()> {
        let name = match name.split_once('.') {
            Some((block, part)) => format!("{block}.{layer}.{part}"),
            None => format!("{name}.{layer}"),
        };
        self.tensor(name, batch, x.clone())
    }

    fn routing(&self, layer: usize, routing: &Routing) -> calib::Result<()> {
        let Routing { first, experts, top_k, .. } = *routing;
        self.keep(format!("moe.{layer}.router_logits"), first, Kept::floats(experts, &routing.logits));
        self.keep(format!("moe.{layer}.topk_index"), first, Kept::ids(top_k, &routing.chosen));
        self.keep(format!("moe.{layer}.topk_weight"), first, Kept::floats(top_k, &routing.weights));
        Ok(())
    }
}

struct Dump<'a> {
    weights: &'a dyn Weights,
    ids: &'a [Vec<u32>],
}

impl Job for Dump<'_> {
    type Output = Result<Recorder>;

    fn run<B: Backend>(self, device: &B::Device) -> Result<Recorder> {
        let recorder = Recorder::default();
        let tokens = self.ids.first().map_or(0, Vec::len);
        recorder.keep("input_ids".to_owned(), 0, Kept::ids(tokens, self.ids.iter().flatten()));
        let mut hidden = embed::<B>(self.weights, self.ids, device)?;
        for (batch, x) in hidden.iter().enumerate() {
            recorder.tensor("hidden.embed".to_owned(), batch, rows(x.clone()))?;
        }
        for layer in 0..self.weights.spec().layers.len() {
            decoder_layer(self.weights, layer, &mut hidden, &recorder, Options::of::<B>())?;
        }
        let head = Head::<B>::load(self.weights, device)?;
        for (batch, x) in hidden.into_iter().enumerate() {
            let normed = head.norm(rows(x));
            recorder.tensor("hidden.norm".to_owned(), batch, normed.clone())?;
            recorder.tensor("logits".to_owned(), batch, head.project(normed))?;
        }
        Ok(recorder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(text: &str) -> Result<Vec<Vec<u32>>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ids.json");
        fs_err::write(&path, text).unwrap();
        read_ids(&path)
    }

    #[test]
    fn ids_are_one_row_or_equally_long_rows() {
        assert_eq!(ids("[1, 2]").unwrap(), [[1, 2]]);
        assert_eq!(ids("[[1, 2], [3, 4]]").unwrap(), [[1, 2], [3, 4]]);
        for (text, said) in [("[[1], [2, 3]]", "equally long"), ("[]", "no token"), ("[-1]", "not token ids"), ("{}", "not token ids")] {
            let error = ids(text).unwrap_err().to_string();
            assert!(error.contains(said) && error.contains("ids.json"), "{error}");
        }
    }

    #[test]
    fn batches_are_joined_in_order_and_shaped_by_name() {
        let part = |values: &[f32]| Kept::floats(2, values);
        let kept = Kept::joined([(4, part(&[5.0, 6.0])), (0, part(&[1.0, 2.0, 3.0, 4.0]))].into());
        let values: Vec<u8> = [1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(kept.bytes, values);
        assert_eq!((kept.shape("moe.0.in", 3), kept.shape("attn.0", 3)), (vec![3, 2], vec![3, 1, 2]));
        assert_eq!(Kept::ids(2, &[7, 8, 9, 10]).shape("input_ids", 2), [2, 2]);
    }
}
