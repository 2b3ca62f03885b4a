//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): queries and key-values pass through a narrow
//! compressed form, and position enters through a few extra elements, whose key is shared by all heads.
//!
//! The cache holds the expanded keys and values: more memory than the compressed form, no product repeated a token.

use burn::tensor::{Tensor, backend::Backend};

use super::adjoint::{Adjoint, Frame, SiteRows};
use super::attention::{Pass, attend, attend_backward, swapped};
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

/// Gradients on the way back through the queries, or through keys and values.
struct Path<B: Backend> {
    /// At the rows that entered attention.
    input: Tensor<B, 2>,
    /// At the output of the matrix that reads them.
    first: (Part, Tensor<B, 2>),
    /// At the output of the matrix behind the norm, if there is one.
    expanded: Option<(Part, Tensor<B, 2>)>,
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
        let y = swapped(y.reshape([samples, tokens, heads, nope_dim + rope_dim]));
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
        let y = swapped(self.kv_b.apply(compressed).reshape([samples, tokens, heads, nope_dim + value_dim]));
        let key = Tensor::cat(vec![y.clone().narrow(3, 0, nope_dim), turned], 3);
        (key, y.narrow(3, nope_dim, value_dim))
    }

    /// From the rows `x` that entered and `dy`, the gradient at the output, both `[rows, hidden]`.
    pub fn backward(&self, x: Tensor<B, 2>, dy: Tensor<B, 2>, frame: &Frame<'_, B>) -> Adjoint<B> {
        let mut pass = Pass { rotary: frame.rotary, window: frame.window, cache: None, wants: &|_| true, seen: Vec::new() };
        let query = self.queries(x.clone(), frame.shape, &mut pass) * self.shape.scale;
        let (key, value) = self.keys_and_values(x.clone(), frame.shape, &mut pass);
        let mixed = attend(query.clone(), key.clone(), value.clone(), frame.window);
        let [query, key, value] = attend_backward([query, key, value], self.output.backward(dy.clone()), frame.window);
        let query = self.queries_backward(&x, query * self.shape.scale, frame);
        let kv = self.keys_and_values_backward(&x, [key, value], frame);
        let expanded = query.expanded.into_iter().chain(kv.expanded);
        let mut sites: Vec<_> =
            pass.seen.into_iter().zip(expanded).map(|((site, rows), output)| SiteRows { site, rows, outputs: vec![output] }).collect();
        sites.push(SiteRows { site: Site::AttentionIn, rows: x, outputs: vec![query.first, kv.first] });
        sites.push(SiteRows { site: Site::AttentionOut, rows: mixed, outputs: vec![(Part::Output, dy)] });
        Adjoint { input: query.input + kv.input, sites }
    }

    /// From `dy`, the gradient at the queries, `[samples, heads, tokens, nope + rope]`.
    fn queries_backward(&self, x: &Tensor<B, 2>, dy: Tensor<B, 4>, frame: &Frame<'_, B>) -> Path<B> {
        let Latent { heads, nope_dim, rope_dim, .. } = self.shape;
        let turned = frame.rotary.backward(dy.clone().narrow(3, nope_dim, rope_dim));
        let dz = swapped(Tensor::cat(vec![dy.narrow(3, 0, nope_dim), turned], 3));
        let dz = dz.reshape([x.dims()[0], heads * (nope_dim + rope_dim)]);
        match &self.query {
            Query::Direct(query) => Path { input: query.backward(dz.clone()), first: (Part::Query, dz), expanded: None },
            Query::Compressed { a, norm, b } => {
                let first = norm.backward(a.apply(x.clone()), b.backward(dz.clone()));
                Path { input: a.backward(first.clone()), first: (Part::QueryA, first), expanded: Some((Part::QueryB, dz)) }
            }
        }
    }

    /// From the gradients at keys, `[samples, heads, tokens, nope + rope]`, and values, `[samples, heads, tokens, value]`.
    fn keys_and_values_backward(&self, x: &Tensor<B, 2>, [key, value]: [Tensor<B, 4>; 2], frame: &Frame<'_, B>) -> Path<B> {
        let Latent { heads, kv_rank, nope_dim, rope_dim, value_dim, .. } = self.shape;
        let rows = x.dims()[0];
        // The rotary key is one for all heads, so its gradient is the sum of theirs.
        let turned = frame.rotary.backward(key.clone().narrow(3, nope_dim, rope_dim).sum_dim(1)).reshape([rows, rope_dim]);
        let dz = swapped(Tensor::cat(vec![key.narrow(3, 0, nope_dim), value], 3));
        let dz = dz.reshape([rows, heads * (nope_dim + value_dim)]);
        let compressed = self.kv_a.apply(x.clone()).narrow(1, 0, kv_rank);
        let d_compressed = self.kv_norm.backward(compressed, self.kv_b.backward(dz.clone()));
        let first = Tensor::cat(vec![d_compressed, turned], 1);
        Path { input: self.kv_a.backward(first.clone()), first: (Part::KvA, first), expanded: Some((Part::KvB, dz)) }
    }
}
