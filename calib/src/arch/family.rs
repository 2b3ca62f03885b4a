//! The words a family is described in: constants that say where its tensors stand and which config keys decide its arithmetic.
//!
//! A family file holds one [`Family`] and nothing else. What these words cannot say is a new mechanism: a variant here, its
//! value in [`Spec`](super::Spec), its arithmetic in `forward/`.

use super::{NormKind, Part, Projection, QkNorm, Role};

/// One family of checkpoints on the Hugging Face hub.
#[derive(Debug)]
pub struct Family {
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// How its tensors are called.
    pub names: Names,
    /// Its attention.
    pub attention: AttentionWords,
    /// Its norms.
    pub norm: NormKind,
    /// Its router.
    pub router: RouterWords,
    /// Which layers have experts.
    pub sparse: Sparse,
    /// Key of the number of routed experts in this family's own config class (all spellings are read).
    pub experts: &'static str,
    /// Key of one routed expert's intermediate width.
    pub expert_width: &'static str,
    /// Its shared experts.
    pub shared: SharedWords,
    /// Which layers slide.
    pub window: WindowWords,
    /// Rope scalings of this family, beside none.
    pub ropes: &'static [RopeWord],
    /// Key that gives the head a bias.
    pub head_bias: Option<&'static str>,
    /// What stands in layers at and beyond `num_hidden_layers`.
    pub beyond: Beyond,
    /// What the Hugging Face config class takes for a key that is left out.
    pub defaults: &'static [(&'static str, Literal)],
    /// Keys of which one value alone is implemented: any other is refused. Left out, they have that value.
    pub only: &'static [(&'static str, Literal)],
    /// Keys that the reference does not read: `inspect` lists them only where they are not this value.
    pub unread: &'static [(&'static str, Literal)],
    /// Keys that do not change evaluation.
    pub inert: &'static [&'static str],
}

/// A value in a family's constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Literal {
    /// A whole number.
    Int(u64),
    /// A number.
    Float(f64),
    /// `true` or `false`.
    Flag(bool),
    /// A string.
    Text(&'static str),
}

/// How tensors are called. Layers are `model.layers.{layer}.`, everything ends in `.weight` or `.bias`.
#[derive(Debug)]
pub struct Names {
    /// The MoE block, and in layers without experts the MLP.
    pub block: &'static str,
    /// Gate, up, down.
    pub projections: [&'static str; 3],
    /// The shared expert inside the block.
    pub shared: Option<&'static str>,
    /// Gate of the shared expert inside the block.
    pub shared_gate: Option<&'static str>,
    /// Selection bias of the router, inside the router; the family has one exactly if it is named here.
    pub correction: Option<&'static str>,
}

/// Attention of a family.
#[derive(Debug)]
pub enum AttentionWords {
    /// Multi-head or grouped-query attention.
    Grouped {
        /// Key that gives query, key and value biases.
        qkv_bias: Option<&'static str>,
        /// Key that gives the output projection a bias.
        output_bias: Option<&'static str>,
        /// Norms on queries and keys.
        qk_norm: QkNorm,
        /// Key of the clamp on queries, keys and values.
        clip: Option<&'static str>,
        /// Where the width of a head comes from.
        head_dim: HeadDim,
    },
    /// Multi-head latent attention; its biases are under `attention_bias`.
    Latent {
        /// Key that chooses interleaved pairs; without one they always are.
        interleave: Option<&'static str>,
        /// eps of the norms on the two compressed vectors, whatever `rms_norm_eps` says.
        norm_eps: f64,
    },
}

/// Where the width of a head comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadDim {
    /// `head_dim`, and without it `hidden_size / num_attention_heads`.
    Key,
    /// Always `hidden_size / num_attention_heads`: another `head_dim` is refused.
    Derived,
}

/// Router of a family.
#[derive(Debug)]
pub struct RouterWords {
    /// From logits to scores.
    pub score: ScoreWords,
    /// Whether the chosen weights are divided by their sum.
    pub renormalize: Renormalize,
    /// Group-limited selection.
    pub groups: GroupWords,
    /// Key of the factor on the weights.
    pub scale: Option<&'static str>,
}

/// From logits to scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScoreWords {
    /// Softmax over all experts.
    Softmax,
    /// A sigmoid each.
    Sigmoid,
    /// SparseMixer with the jitter of `router_jitter_noise`; two experts a token.
    SparseMixer,
}

/// Whether the chosen weights are divided by their sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Renormalize {
    /// Never.
    Never,
    /// Always.
    Always,
    /// Where `norm_topk_prob` says so, by the sum plus `epsilon`.
    Key {
        /// Added to the sum.
        epsilon: f32,
    },
    /// Where `norm_topk_prob` says so and a token has more than one expert, by the sum plus `epsilon`.
    KeyBeyondOne {
        /// Added to the sum.
        epsilon: f32,
    },
}

/// Group-limited selection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupWords {
    /// None.
    None,
    /// `topk_method`: `greedy` for none, `group_limited_greedy` for groups judged by their best score; scores outside become 0.
    Method,
    /// `n_group` and `topk_group`, judged by the sum of their two best biased scores; scores outside become −∞.
    TopTwo,
}

/// Which layers have experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sparse {
    /// All.
    Every,
    /// Every `decoder_sparse_step`-th but those in `mlp_only_layers`.
    Stepped,
    /// From `first_k_dense_replace` on.
    Leading,
    /// From `first_k_dense_replace` on, the multiples of `moe_layer_freq`.
    LeadingMultiples,
}

/// Shared experts of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SharedWords {
    /// None.
    None,
    /// One with a gate, its width under this key.
    Gated(&'static str),
    /// `n_shared_experts` of the routed experts' width in one MLP, no gate.
    Counted,
}

/// Which layers slide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WindowWords {
    /// None; a config that asks for a window is refused.
    Never,
    /// All, if `sliding_window` is a number.
    Every,
    /// Those that `layer_types` lists, if `use_sliding_window`.
    Listed,
    /// As [`WindowWords::Listed`], but the reference slides all layers or none: a mixed list is refused.
    ListedAlike,
}

/// Rope scaling that a family can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeWord {
    /// `yarn`.
    Yarn,
    /// `longrope`, one factor on cosine and sine.
    LongRope,
    /// `longrope`, with `short_mscale` and `long_mscale`.
    LongRopeMscale,
}

/// What stands in layers at and beyond `num_hidden_layers`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beyond {
    /// Nothing.
    Nothing,
    /// Multi-token-prediction layers: an ordinary layer with `enorm`, `hnorm`, `eh_proj`, `shared_head` and `embed_tokens` beside it.
    Mtp,
}

/// The projections' names that most families use.
pub(super) const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

impl Names {
    /// The name of the tensor with this role; `None` for roles that are told apart by name alone or that the family never has.
    pub fn of(&self, role: Role) -> Option<String> {
        Some(match role {
            Role::Embedding => "model.embed_tokens.weight".into(),
            Role::FinalNorm => "model.norm.weight".into(),
            Role::FinalNormBias => "model.norm.bias".into(),
            Role::Head => "lm_head.weight".into(),
            Role::HeadBias => "lm_head.bias".into(),
            Role::Layer(layer, part) => format!("model.layers.{layer}.{}", self.part(part)?),
            Role::Mtp | Role::Buffer => return None,
        })
    }

    /// A part's name inside its layer.
    fn part(&self, part: Part) -> Option<String> {
        let block = self.block;
        Some(match part {
            Part::InputNorm => "input_layernorm.weight".into(),
            Part::InputNormBias => "input_layernorm.bias".into(),
            Part::PostNorm => "post_attention_layernorm.weight".into(),
            Part::PostNormBias => "post_attention_layernorm.bias".into(),
            Part::Router => format!("{block}.gate.weight"),
            Part::RouterCorrection => format!("{block}.gate.{}", self.correction?),
            Part::Expert(expert, projection) => format!("{block}.experts.{expert}.{}.weight", self.projection(projection)),
            Part::Shared(projection) => format!("{block}.{}.{}.weight", self.shared?, self.projection(projection)),
            Part::SharedGate => format!("{block}.{}.weight", self.shared_gate?),
            Part::Dense(projection) => format!("{block}.{}.weight", self.projection(projection)),
            attention => format!("self_attn.{}", attention_name(attention)?),
        })
    }

    fn projection(&self, projection: Projection) -> &'static str {
        let [gate, up, down] = self.projections;
        match projection {
            Projection::Gate => gate,
            Projection::Up => up,
            Projection::Down => down,
        }
    }
}

/// A part's name inside attention, the same in every family.
fn attention_name(part: Part) -> Option<&'static str> {
    Some(match part {
        Part::Query => "q_proj.weight",
        Part::QueryBias => "q_proj.bias",
        Part::Key => "k_proj.weight",
        Part::KeyBias => "k_proj.bias",
        Part::Value => "v_proj.weight",
        Part::ValueBias => "v_proj.bias",
        Part::Output => "o_proj.weight",
        Part::OutputBias => "o_proj.bias",
        Part::QueryNorm => "q_norm.weight",
        Part::KeyNorm => "k_norm.weight",
        Part::QueryA => "q_a_proj.weight",
        Part::QueryABias => "q_a_proj.bias",
        Part::QueryANorm => "q_a_layernorm.weight",
        Part::QueryB => "q_b_proj.weight",
        Part::KvA => "kv_a_proj_with_mqa.weight",
        Part::KvABias => "kv_a_proj_with_mqa.bias",
        Part::KvANorm => "kv_a_layernorm.weight",
        Part::KvB => "kv_b_proj.weight",
        _ => return None,
    })
}

#[test]
fn a_role_has_one_name() {
    let names = Names { block: "block_sparse_moe", projections: ["w1", "w3", "w2"], shared: None, shared_gate: None, correction: None };
    let down = Role::Layer(3, Part::Expert(5, Projection::Down));
    assert_eq!(names.of(down).as_deref(), Some("model.layers.3.block_sparse_moe.experts.5.w2.weight"));
    assert_eq!(names.of(Role::Layer(0, Part::KvA)).as_deref(), Some("model.layers.0.self_attn.kv_a_proj_with_mqa.weight"));
    assert_eq!(names.of(Role::Layer(0, Part::SharedGate)), None);
}
