//! From the last hidden state to logits.

use burn::tensor::{Tensor, backend::Backend};

use super::linear::{as_stored, check, load_vector};
use super::norm::NormLayer;
use crate::arch::{NormKind, Role};
use crate::{Result, Weights};

/// The last norm and the output head.
#[derive(Clone, Debug)]
pub struct Head<B: Backend> {
    norm: NormLayer<B>,
    /// `[vocab, hidden]` as it is stored.
    weight: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
}

impl<B: Backend> Head<B> {
    /// Reads the last norm and the head, which may be the embedding.
    ///
    /// # Errors
    ///
    /// What reading a weight says, or [`Error::WeightShape`](crate::Error::WeightShape).
    pub fn load(w: &dyn Weights, device: &B::Device) -> Result<Self> {
        let spec = w.spec();
        let gain = load_vector(w, Role::FinalNorm, spec.hidden, device)?;
        let norm = match spec.norm.kind {
            NormKind::Rms => NormLayer::rms(gain, spec.norm.eps),
            NormKind::Layer => NormLayer::layer(gain, load_vector(w, Role::FinalNormBias, spec.hidden, device)?, spec.norm.eps),
        };
        let role = if spec.tied { Role::Embedding } else { Role::Head };
        let matrix = w.matrix(role)?;
        check(role, &[spec.vocab, spec.hidden], matrix.shape())?;
        let bias = spec.head_bias.then(|| load_vector(w, Role::HeadBias, spec.vocab, device)).transpose()?;
        Ok(Self { norm, weight: as_stored(matrix, device), bias })
    }

    /// Logits a row.
    pub(crate) fn vocab(&self) -> usize {
        self.weight.dims()[0]
    }

    /// The last norm, `[rows, hidden]`.
    pub fn norm(&self, hidden: Tensor<B, 2>) -> Tensor<B, 2> {
        self.norm.apply(hidden)
    }

    /// Logits of rows that are already normed, `[rows, vocab]`.
    pub fn project(&self, normed: Tensor<B, 2>) -> Tensor<B, 2> {
        let logits = normed.matmul(self.weight.clone().transpose());
        match &self.bias {
            Some(bias) => logits + bias.clone().unsqueeze(),
            None => logits,
        }
    }

    /// The gradient at the last layer's output, `[rows, hidden]`, from that at its logits, `[rows, vocab]`.
    pub(crate) fn backward(&self, hidden: Tensor<B, 2>, logits: Tensor<B, 2>) -> Tensor<B, 2> {
        self.norm.backward(hidden, logits.matmul(self.weight.clone()))
    }

    /// Logits of the last layer's output, `[rows, hidden]` to `[rows, vocab]`.
    pub fn logits(&self, hidden: Tensor<B, 2>) -> Tensor<B, 2> {
        self.project(self.norm(hidden))
    }
}
