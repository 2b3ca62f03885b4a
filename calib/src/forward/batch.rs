//! Samples as batches of equally long rows.

use burn::tensor::{Tensor, TensorData, backend::Backend};

use super::linear::check;
use crate::arch::Role;
use crate::{Error, Result, Weights};

/// Tokens of a batch: large enough for the matrix products, small enough for one batch's attention on every thread. A
/// single sample may be longer.
pub const BATCH_TOKENS: usize = 2048;

/// Embeds samples: batches `[samples, tokens, hidden]` of consecutive, equally long samples.
///
/// The whole embedding is read for it, in f32, and dropped.
///
/// # Errors
///
/// [`Error::TokenId`] for an id past the vocabulary, [`Error::EmptySample`], or what reading the embedding says.
pub fn embed<B: Backend>(w: &dyn Weights, ids: &[Vec<u32>], device: &B::Device) -> Result<Vec<Tensor<B, 3>>> {
    let spec = w.spec();
    let table = w.matrix(Role::Embedding)?;
    check(Role::Embedding, &[spec.vocab, spec.hidden], table.shape())?;
    cut(ids).into_iter().map(|batch| lookup(&table, batch.first, batch.samples, device)).collect()
}

/// Consecutive samples of one batch.
struct Group<'a> {
    /// Number of the first one.
    first: usize,
    samples: &'a [Vec<u32>],
}

/// Cuts samples into batches by their lengths alone.
fn cut(ids: &[Vec<u32>]) -> Vec<Group<'_>> {
    let mut groups = Vec::new();
    let mut first = 0;
    while first < ids.len() {
        let tokens = ids[first].len().max(1);
        let equal = ids[first..].iter().take_while(|sample| sample.len() == ids[first].len()).count();
        let count = equal.min((BATCH_TOKENS / tokens).max(1));
        groups.push(Group { first, samples: &ids[first..first + count] });
        first += count;
    }
    groups
}

/// Rows of the embedding for equally long samples; `first` is the number of the first one, for messages.
pub(super) fn lookup<B: Backend>(
    table: &ndarray::Array2<f32>,
    first: usize,
    samples: &[Vec<u32>],
    device: &B::Device,
) -> Result<Tensor<B, 3>> {
    let (vocab, hidden) = table.dim();
    let tokens = samples.first().map_or(0, Vec::len);
    let mut values: Vec<f32> = Vec::with_capacity(samples.len() * tokens * hidden);
    for (index, sample) in samples.iter().enumerate() {
        if sample.is_empty() {
            return Err(Error::EmptySample { sample: first + index });
        }
        for (position, &id) in sample.iter().enumerate() {
            if id as usize >= vocab {
                return Err(Error::TokenId { id, sample: first + index, position, vocab });
            }
            values.extend(table.row(id as usize));
        }
    }
    Ok(Tensor::from_data(TensorData::new(values, [samples.len(), tokens, hidden]), device))
}

/// A batch as rows: `[samples, tokens, width]` to `[samples · tokens, width]`.
pub fn rows<B: Backend>(batch: Tensor<B, 3>) -> Tensor<B, 2> {
    let [samples, tokens, width] = batch.dims();
    batch.reshape([samples * tokens, width])
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;
    use crate::device::Cpu;

    #[test]
    fn batches_hold_equally_long_neighbors() {
        let lengths = [3, 3, 5, 5, 5, 3, 5000, 1024, 1024, 1024];
        let ids: Vec<Vec<u32>> = lengths.iter().map(|&n| vec![0; n]).collect();
        let cut: Vec<_> = cut(&ids).iter().map(|g| (g.first, g.samples.len())).collect();
        assert_eq!(cut, [(0, 2), (2, 3), (5, 1), (6, 1), (7, 2), (9, 1)]);
    }

    #[test]
    fn ids_pick_rows_and_strangers_are_named() {
        let table = array![[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]];
        let device = Default::default();
        let batch = lookup::<Cpu>(&table, 0, &[vec![2, 0], vec![1, 1]], &device).unwrap();
        assert_eq!(batch.dims(), [2, 2, 2]);
        assert_eq!(batch.into_data().to_vec::<f32>().unwrap(), [4.0, 5.0, 0.0, 1.0, 2.0, 3.0, 2.0, 3.0]);
        let error = lookup::<Cpu>(&table, 7, &[vec![0, 3]], &device).unwrap_err();
        assert!(matches!(error, Error::TokenId { id: 3, sample: 7, position: 1, vocab: 3 }), "{error}");
        assert!(matches!(lookup::<Cpu>(&table, 7, &[vec![]], &device), Err(Error::EmptySample { sample: 7 })));
    }
}
