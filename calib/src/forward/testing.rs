//! Small models in memory, for the tests of this module.

use std::collections::HashMap;

use burn::tensor::Tensor;
use ndarray::{Array1, Array2};

use super::{Head, NoTap, Options, Tap, decoder_layer, embed, moe, rows};
use crate::arch::{
    Attention, Grouped, Latent, LayerSpec, Mlp, Moe, Norm, NormKind, Pairing, Part, Projection, QkNorm, Role, Rope, RopeScaling, Router,
    Score, Shared, Spec,
};
use crate::device::Cpu;
use crate::{Error, Result, Weights};

/// Weights by role.
#[derive(Clone, Debug)]
pub struct Table {
    pub spec: Spec,
    pub tensors: HashMap<Role, Array2<f32>>,
}

impl Default for Table {
    fn default() -> Self {
        Self { spec: grouped_spec(), tensors: HashMap::new() }
    }
}

impl Table {
    pub fn put(&mut self, role: Role, values: Array2<f32>) {
        self.tensors.insert(role, values);
    }

    fn get(&self, role: Role) -> Result<&Array2<f32>> {
        self.tensors.get(&role).ok_or_else(|| Error::NoSuchRole { role, model_type: self.spec.model_type.clone() })
    }
}

impl Weights for Table {
    fn spec(&self) -> &Spec {
        &self.spec
    }

    fn matrix(&self, role: Role) -> Result<Array2<f32>> {
        Ok(self.get(role)?.clone())
    }

    fn vector(&self, role: Role) -> Result<Array1<f32>> {
        Ok(self.get(role)?.row(0).to_owned())
    }
}

pub fn moe_of(experts: usize, top_k: usize) -> Moe {
    let router = Router { score: Score::Softmax, correction: false, groups: None, renormalize: Some(0.0), scale: 1.0 };
    Moe { experts, top_k, inner: 12, router, shared: None }
}

/// Two MoE layers, grouped attention with per-head norms.
pub fn grouped_spec() -> Spec {
    let attention = Grouped {
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        qkv_bias: false,
        output_bias: false,
        qk_norm: QkNorm::PerHead,
        clip: None,
        scale: 8.0_f32.powf(-0.5),
    };
    Spec {
        model_type: "test".to_owned(),
        hidden: 24,
        vocab: 32,
        layers: vec![LayerSpec { window: None, mlp: Mlp::Moe(moe_of(6, 2)) }; 2],
        norm: Norm { kind: NormKind::Rms, eps: 1e-6 },
        attention: Attention::Grouped(attention),
        rope: Rope { dim: 8, theta: 1e4, pairing: Pairing::HalfSplit, scaling: RopeScaling::None },
        tied: true,
        head_bias: false,
    }
}

/// A dense and a MoE layer with a shared expert, latent attention with a compressed query.
pub fn latent_spec() -> Spec {
    let mut spec = grouped_spec();
    spec.attention = Attention::Latent(Latent {
        heads: 4,
        q_rank: Some(10),
        kv_rank: 8,
        nope_dim: 6,
        rope_dim: 4,
        value_dim: 5,
        bias: true,
        norm_eps: 1e-6,
        scale: 10.0_f32.powf(-0.5),
    });
    spec.rope = Rope { dim: 4, theta: 1e4, pairing: Pairing::Interleaved, scaling: RopeScaling::None };
    let mut moe = moe_of(6, 2);
    moe.shared = Some(Shared { inner: 7, gated: true });
    spec.layers = vec![LayerSpec { window: None, mlp: Mlp::Dense { inner: 20 } }, LayerSpec { window: Some(5), mlp: Mlp::Moe(moe) }];
    spec
}

/// Phi-MoE's: LayerNorm, biases everywhere, SparseMixer.
pub fn layer_norm_spec() -> Spec {
    let mut spec = grouped_spec();
    spec.norm.kind = NormKind::Layer;
    if let Attention::Grouped(a) = &mut spec.attention {
        (a.qkv_bias, a.output_bias, a.qk_norm) = (true, true, QkNorm::None);
    }
    for layer in &mut spec.layers {
        layer.window = Some(4);
        if let Mlp::Moe(moe) = &mut layer.mlp {
            moe.router.score = Score::SparseMixer { jitter: 0.2 };
        }
    }
    (spec.tied, spec.head_bias) = (false, true);
    spec
}

/// OLMoE's: norms over the full width, clamped queries, keys and values.
pub fn full_width_spec() -> Spec {
    let mut spec = grouped_spec();
    if let Attention::Grouped(a) = &mut spec.attention {
        (a.qk_norm, a.clip) = (QkNorm::FullWidth, Some(0.9));
    }
    spec
}

/// Every spec above, by name.
pub fn specs() -> [(&'static str, Spec); 4] {
    [("grouped", grouped_spec()), ("latent", latent_spec()), ("layer norm", layer_norm_spec()), ("full width", full_width_spec())]
}

/// Reproducible values around zero, about normal with deviation `scale`.
pub struct Noise(pub u64);

impl Noise {
    pub fn next(&mut self) -> f32 {
        let mut uniform = || {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (self.0 >> 40) as f32 / (1 << 24) as f32
        };
        (0..4).map(|_| uniform() - 0.5).sum::<f32>() * 3.0_f32.sqrt()
    }

    pub fn matrix(&mut self, rows: usize, columns: usize, scale: f32) -> Array2<f32> {
        Array2::from_shape_simple_fn((rows, columns), || self.next() * scale)
    }
}

/// Random weights for a spec: whatever role its forward pass asks for.
pub fn random(spec: Spec, seed: u64) -> Table {
    let mut noise = Noise(seed);
    let mut table = Table { spec: spec.clone(), tensors: HashMap::new() };
    let hidden = spec.hidden;
    let mut roles = vec![(Role::Embedding, spec.vocab, hidden), (Role::FinalNorm, 1, hidden), (Role::FinalNormBias, 1, hidden)];
    roles.extend([(Role::Head, spec.vocab, hidden), (Role::HeadBias, 1, spec.vocab)]);
    for (index, layer) in spec.layers.iter().enumerate() {
        let parts = attention_parts(&spec).into_iter().chain(mlp_parts(&layer.mlp, hidden));
        roles.extend(parts.map(|(part, rows, columns)| (Role::Layer(index, part), rows, columns)));
    }
    for (role, rows, columns) in roles {
        let scale = if rows == 1 { 0.3 } else { 1.5 / (columns as f32).sqrt() };
        let offset = if matches!(role.kind(), crate::arch::Kind::Norm) { 1.0 } else { 0.0 };
        table.put(role, noise.matrix(rows, columns, scale) + offset);
    }
    table
}

fn attention_parts(spec: &Spec) -> Vec<(Part, usize, usize)> {
    let hidden = spec.hidden;
    let mut parts = vec![(Part::InputNorm, 1, hidden), (Part::InputNormBias, 1, hidden)];
    parts.extend([(Part::PostNorm, 1, hidden), (Part::PostNormBias, 1, hidden), (Part::OutputBias, 1, hidden)]);
    match &spec.attention {
        Attention::Grouped(a) => {
            let (wide, narrow) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
            parts.extend([(Part::Query, wide, hidden), (Part::Key, narrow, hidden), (Part::Value, narrow, hidden)]);
            parts.extend([(Part::QueryBias, 1, wide), (Part::KeyBias, 1, narrow), (Part::ValueBias, 1, narrow)]);
            let full = a.qk_norm == QkNorm::FullWidth;
            parts.push((Part::QueryNorm, 1, if full { wide } else { a.head_dim }));
            parts.push((Part::KeyNorm, 1, if full { narrow } else { a.head_dim }));
            parts.push((Part::Output, hidden, wide));
        }
        Attention::Latent(a) => {
            let (queries, rank) = (a.heads * (a.nope_dim + a.rope_dim), a.q_rank.unwrap_or(1));
            parts.extend([(Part::Query, queries, hidden), (Part::QueryA, rank, hidden), (Part::QueryABias, 1, rank)]);
            parts.extend([(Part::QueryANorm, 1, rank), (Part::QueryB, queries, rank), (Part::KvANorm, 1, a.kv_rank)]);
            parts.extend([(Part::KvA, a.kv_rank + a.rope_dim, hidden), (Part::KvABias, 1, a.kv_rank + a.rope_dim)]);
            parts.push((Part::KvB, a.heads * (a.nope_dim + a.value_dim), a.kv_rank));
            parts.push((Part::Output, hidden, a.heads * a.value_dim));
        }
    }
    parts
}

fn mlp_parts(mlp: &Mlp, hidden: usize) -> Vec<(Part, usize, usize)> {
    let shape = |projection, inner| match projection {
        Projection::Down => (hidden, inner),
        Projection::Gate | Projection::Up => (inner, hidden),
    };
    let gated =
        |part: &dyn Fn(Projection) -> Part, inner: usize| Projection::ALL.map(|p| (part(p), shape(p, inner).0, shape(p, inner).1)).to_vec();
    match mlp {
        Mlp::Dense { inner } => gated(&Part::Dense, *inner),
        Mlp::Moe(moe) => {
            let mut parts = vec![(Part::Router, moe.experts, hidden), (Part::RouterCorrection, 1, moe.experts)];
            parts.extend((0..moe.experts).flat_map(|e| gated(&|p| Part::Expert(e, p), moe.inner)));
            if let Some(shared) = &moe.shared {
                parts.extend(gated(&Part::Shared, shared.inner));
                parts.push((Part::SharedGate, 1, hidden));
            }
            parts
        }
    }
}

/// Reproducible samples of these lengths.
pub fn samples(lengths: &[usize], vocab: usize) -> Vec<Vec<u32>> {
    let mut noise = Noise(77);
    lengths.iter().map(|&n| (0..n).map(|_| ((noise.next() + 3.0) * 1e4) as u32 % vocab as u32).collect()).collect()
}

/// The last layer's output of all samples, `[rows · hidden]`.
pub fn hidden_with(table: &Table, batches: &[&[Vec<u32>]], tap: &dyn Tap<Cpu>, in_flight: usize) -> Vec<f32> {
    let mut hidden = Vec::new();
    for ids in batches {
        hidden.extend(embed::<Cpu>(table, ids, &Default::default()).unwrap());
    }
    for layer in 0..table.spec.layers.len() {
        decoder_layer(table, layer, &mut hidden, tap, Options { in_flight }).unwrap();
    }
    hidden.into_iter().flat_map(|x| moe::values(x, "test").unwrap()).collect()
}

/// The same, all samples embedded at once and nobody looking.
pub fn hidden(table: &Table, ids: &[Vec<u32>]) -> Vec<f32> {
    hidden_with(table, &[ids], &NoTap, 2)
}

/// Logits of all tokens of one sample, one row a token.
pub fn logits(table: &Table, sample: &[u32]) -> Vec<Vec<f32>> {
    let values = hidden(table, &[sample.to_vec()]);
    let head = Head::<Cpu>::load(table, &Default::default()).unwrap();
    let x = Tensor::<Cpu, 1>::from_floats(values.as_slice(), &Default::default());
    let logits = head.logits(rows(x.reshape([1, sample.len(), table.spec.hidden])));
    moe::values(logits, "test").unwrap().chunks_exact(table.spec.vocab).map(<[f32]>::to_vec).collect()
}

/// `‖a − b‖ / ‖b‖`.
pub fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / norm(&mut b.iter().map(|&b| f64::from(b)))
}
