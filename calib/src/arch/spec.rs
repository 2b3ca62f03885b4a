//! What one checkpoint's config says, resolved: every number and every choice the forward pass needs.

/// The arithmetic of one model, read from its `config.json` through its family. No key is left to interpret.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// `model_type` of the config.
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// The decoder layers in order (MTP layers are not among them).
    pub layers: Vec<LayerSpec>,
    /// The norms of the residual stream.
    pub norm: Norm,
    /// Attention, the same in every layer.
    pub attention: Attention,
    /// Rotary position embedding.
    pub rope: Rope,
    /// The head is the embedding.
    pub tied: bool,
    /// The head has a bias.
    pub head_bias: bool,
}

impl Spec {
    /// The MoE block of a layer, if it has one.
    pub fn moe(&self, layer: usize) -> Option<&Moe> {
        match &self.layers[layer].mlp {
            Mlp::Moe(moe) => Some(moe),
            Mlp::Dense { .. } => None,
        }
    }
}

/// One decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// Sliding window in tokens: a query sees itself and the `window − 1` keys before it. `None`: all.
    pub window: Option<usize>,
    /// What follows attention.
    pub mlp: Mlp,
}

/// The second half of a decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Mlp {
    /// One gated MLP for every token.
    Dense {
        /// Intermediate width.
        inner: usize,
    },
    /// Routed experts.
    Moe(Moe),
}

/// A block of routed experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Moe {
    /// Routed experts.
    pub experts: usize,
    /// Experts a token.
    pub top_k: usize,
    /// Intermediate width of one expert.
    pub inner: usize,
    /// How experts are chosen and weighed.
    pub router: Router,
    /// The shared expert, if any.
    pub shared: Option<Shared>,
}

/// A shared expert: one MLP that every token passes.
#[derive(Clone, Debug, PartialEq)]
pub struct Shared {
    /// Intermediate width (of all shared experts together).
    pub inner: usize,
    /// Multiplied by `sigmoid(w · x)`.
    pub gated: bool,
}

/// How a router turns logits into chosen experts and their weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Router {
    /// From logits to scores.
    pub score: Score,
    /// A selection bias is added to the scores for choosing, not for weighing.
    pub correction: bool,
    /// Group-limited selection.
    pub groups: Option<Groups>,
    /// `Some(epsilon)`: the chosen weights are divided by their sum plus epsilon.
    pub renormalize: Option<f32>,
    /// The weights are multiplied by this (`routed_scaling_factor`).
    pub scale: f32,
}

/// From logits to scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Score {
    /// Softmax over all experts.
    Softmax,
    /// A sigmoid each.
    Sigmoid,
    /// Phi-MoE's SparseMixer at evaluation (specs: the threshold is `2 · jitter`); two experts, weights are not renormalized.
    SparseMixer {
        /// `router_jitter_noise`.
        jitter: f32,
    },
}

/// Experts are chosen only within the best groups of consecutive experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Groups {
    /// Number of groups.
    pub count: usize,
    /// Groups that stay.
    pub keep: usize,
    /// What a group is judged by.
    pub by: GroupScore,
    /// What scores of experts outside the kept groups become before the choice.
    pub masked: f32,
}

/// What a group of experts is judged by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum GroupScore {
    /// Its largest score.
    Max,
    /// The sum of its two largest (biased) scores.
    TopTwo,
}

/// A norm over the last axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// RMSNorm, or LayerNorm with bias.
    pub kind: NormKind,
    /// Added to the variance.
    pub eps: f64,
}

/// Which norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormKind {
    /// `x / rms(x) · gain`.
    Rms,
    /// `(x − mean) / std · gain + bias`.
    Layer,
}

/// Attention.
#[derive(Clone, Debug, PartialEq)]
pub enum Attention {
    /// Multi-head or grouped-query attention.
    Grouped(Grouped),
    /// Multi-head latent attention (DeepSeek).
    Latent(Latent),
}

/// Multi-head or grouped-query attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Grouped {
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Query, key and value have biases.
    pub qkv_bias: bool,
    /// The output projection has a bias.
    pub output_bias: bool,
    /// Norms on queries and keys.
    pub qk_norm: QkNorm,
    /// `clip_qkv`: queries, keys and values are clamped to ± this, after projection (and norm where the family does so).
    pub clip: Option<f32>,
    /// Softmax scale.
    pub scale: f32,
}

/// RMS norms on queries and keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum QkNorm {
    /// None.
    None,
    /// Over each head.
    PerHead,
    /// Over the full width of the projection.
    FullWidth,
}

/// Multi-head latent attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Latent {
    /// Heads.
    pub heads: usize,
    /// Rank of the query compression; `None`: one query matrix.
    pub q_rank: Option<usize>,
    /// Rank of the key-value compression.
    pub kv_rank: usize,
    /// Width of a head's part without position.
    pub nope_dim: usize,
    /// Width of a head's rotary part.
    pub rope_dim: usize,
    /// Width of a head's value.
    pub value_dim: usize,
    /// `attention_bias`: query A, kv A and the output projection have biases.
    pub bias: bool,
    /// eps of the two norms inside.
    pub norm_eps: f64,
    /// Softmax scale, YaRN's mscale² included.
    pub scale: f32,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Rotated width of a head.
    pub dim: usize,
    /// Base.
    pub theta: f64,
    /// Which elements form a pair.
    pub pairing: Pairing,
    /// Scaling beyond the trained context.
    pub scaling: RopeScaling,
}

/// Which elements are rotated together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pairing {
    /// `i` and `i + dim/2`.
    HalfSplit,
    /// `2i` and `2i + 1`.
    Interleaved,
}

/// Scaling of rotary frequencies.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// YaRN.
    Yarn {
        /// Stretch of the context.
        factor: f64,
        /// Context of training.
        original: usize,
        /// Rotations above which a frequency stays.
        beta_fast: f64,
        /// Rotations below which a frequency is divided by the factor.
        beta_slow: f64,
        /// Bounds of the ramp are rounded to whole dimensions.
        truncate: bool,
        /// Cosine and sine are multiplied by this.
        attention_factor: f64,
    },
    /// Phi's short and long factors, chosen by the length of the input.
    LongRope {
        /// Context up to which the short factors hold.
        original: usize,
        /// One factor a pair, `[dim / 2]`.
        short: Vec<f64>,
        /// One factor a pair, `[dim / 2]`.
        long: Vec<f64>,
        /// Multiplies cosine and sine with the short factors.
        short_mscale: f64,
        /// Multiplies cosine and sine with the long factors.
        long_mscale: f64,
    },
}

impl Rope {
    /// Inverse frequencies `[dim / 2]` and the factor on cosine and sine, for an input of `length` tokens.
    pub fn frequencies(&self, length: usize) -> (Vec<f64>, f64) {
        let base = (0..self.dim / 2).map(|i| self.theta.powf(-((2 * i) as f64) / self.dim as f64));
        match &self.scaling {
            RopeScaling::None => (base.collect(), 1.0),
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, truncate, attention_factor } => {
                let bound = |rotations: f64| {
                    self.dim as f64 * (*original as f64 / (rotations * std::f64::consts::TAU)).ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (bound(*beta_fast), bound(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(self.dim as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                let scaled = base.enumerate().map(|(i, f)| {
                    let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    f / factor * ramp + f * (1.0 - ramp)
                });
                (scaled.collect(), *attention_factor)
            }
            RopeScaling::LongRope { original, short, long, short_mscale, long_mscale } => {
                let (factors, mscale) = if length > *original { (long, long_mscale) } else { (short, short_mscale) };
                (base.zip(factors).map(|(f, by)| f / by).collect(), *mscale)
            }
        }
    }
}
