//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): queries and key-values pass through a narrow
//! compressed form, and position enters through a few extra elements, whose key is shared by all heads.
//!
//! The cache holds the expanded keys and values: more memory than the compressed form, no product repeated a token.

use burn::tensor::{Tensor, backend::Backend};

use super::attention::{Pass, attend};
use super::linear::{Linear, Source};
use super::norm::NormLayer;
use crate::Result;
use crate::arch::{Latent, Part, Site, Spec};

/// Latent attention of one layer.
#[derive(Clone, Debug)]
pub(super) struct LatentAttention<B: Backend> {
    shape: Latent,
    query: Query<B>,
    kv_a: Linear<B>,
    kv_norm: NormLayer<B>,
    kv_b: Linear<B>,
    output: Linear<B>,
}

/// From the hidden state to the queries.
#[derive(Clone, Debug)]
enum Query<B: Backend> {
    Direct(Linear<B>),
    Compressed { a: Linear<B>, norm: NormLayer<B>, b: Linear<B> },
}

impl<B: Backend> LatentAttention<B> {
    pub fn load(source: &Source<'_, B>, spec: &Spec, shape: &Latent) -> Result<Self> {
        let (hidden, heads) = (spec.hidden, shape.heads);
        let bias = |part| shape.bias.then_some(part);
        let queries = heads * (shape.nope_dim + shape.rope_dim);
        let query = match shape.q_rank {
            None => Query::Direct(source.linear(Part::Query, None, [queries, hidden])?),
            Some(rank) => Query::Compressed {
                a: source.linear(Part::QueryA, bias(Part::QueryABias), [rank, hidden])?,
                norm: source.rms(Part::QueryANorm, rank, shape.norm_eps)?,
                b: source.linear(Part::QueryB, None, [queries, rank])?,
            },
        };
        Ok(Self {
            query,
            kv_a: source.linear(Part::KvA, bias(Part::KvABias), [shape.kv_rank + shape.rope_dim, hidden])?,
            kv_norm: source.rms(Part::KvANorm, shape.kv_rank, shape.norm_eps)?,
            kv_b: source.linear(Part::KvB, None, [heads * (shape.nope_dim + shape.value_dim), shape.kv_rank])?,
            output: source.linear(Part::Output, bias(Part::OutputBias), [hidden, heads * shape.value_dim])?,
            shape: shape.clone(),
        })
    }

    /// Whether queries pass through a compressed form.
    pub fn compresses_queries(&self) -> bool {
        self.shape.q_rank.is_some()
    }

    /// `[samples, tokens, hidden]` to the same, before the residual sum.
    pub fn forward(&self, x: Tensor<B, 3>, pass: &mut Pass<'_, B>) -> Tensor<B, 3> {
        let [samples, tokens, hidden] = x.dims();
        let x = x.reshape([samples * tokens, hidden]);
        pass.show(Site::AttentionIn, &x);
        let query = self.queries(x.clone(), [samples, tokens], pass);
        let (key, value) = self.keys_and_values(x, [samples, tokens], pass);
        let (key, value) = pass.with_cached(key, value);
        let y = attend(query * self.shape.scale, key, value, pass.window);
        pass.show(Site::AttentionOut, &y);
        self.output.apply(y).reshape([samples, tokens, hidden])
    }

    /// `[samples, heads, tokens, nope + rope]`.
    fn queries(&self, x: Tensor<B, 2>, [samples, tokens]: [usize; 2], pass: &mut Pass<'_, B>) -> Tensor<B, 4> {
        let Latent { heads, nope_dim, rope_dim, .. } = self.shape;
        let y = match &self.query {
            Query::Direct(query) => query.apply(x),
            Query::Compressed { a, norm, b } => {
                let compressed = norm.apply(a.apply(x));
                pass.show(Site::QueryB, &compressed);
                b.apply(compressed)
            }
        };
        let y = y.reshape([samples, tokens, heads, nope_dim + rope_dim]).swap_dims(1, 2);
        let turned = pass.rotary.apply(y.clone().narrow(3, nope_dim, rope_dim));
        Tensor::cat(vec![y.narrow(3, 0, nope_dim), turned], 3)
    }

    /// Keys `[samples, heads, tokens, nope + rope]` and values `[samples, heads, tokens, value]`.
    fn keys_and_values(&self, x: Tensor<B, 2>, [samples, tokens]: [usize; 2], pass: &mut Pass<'_, B>) -> (Tensor<B, 4>, Tensor<B, 4>) {
        let Latent { heads, kv_rank, nope_dim, rope_dim, value_dim, .. } = self.shape;
        let both = self.kv_a.apply(x);
        let turned = both.clone().narrow(1, kv_rank, rope_dim).reshape([samples, 1, tokens, rope_dim]);
        let turned = pass.rotary.apply(turned).expand([samples, heads, tokens, rope_dim]);
        let compressed = self.kv_norm.apply(both.narrow(1, 0, kv_rank));
        pass.show(Site::KvB, &compressed);
        let y = self.kv_b.apply(compressed).reshape([samples, tokens, heads, nope_dim + value_dim]).swap_dims(1, 2);
        let key = Tensor::cat(vec![y.clone().narrow(3, 0, nope_dim), turned], 3);
        (key, y.narrow(3, nope_dim, value_dim))
    }
}
