//! DeepSeek-MoE-16B, by the code that stands beside it on the hub: plain attention, shared experts without a gate.

use super::family::*;
use super::{NormKind, QkNorm};
use Literal::{Flag, Float, Int, Text};

/// `model_type = "deepseek"`.
pub static FAMILY: Family = Family {
    model_type: "deepseek",
    names: Names { block: "mlp", projections: PROJECTIONS, shared: Some("shared_experts"), shared_gate: None, correction: None },
    attention: AttentionWords::Grouped {
        qkv_bias: Some("attention_bias"),
        output_bias: Some("attention_bias"),
        qk_norm: QkNorm::None,
        clip: None,
        head_dim: HeadDim::Derived,
    },
    norm: NormKind::Rms,
    router: RouterWords {
        score: ScoreWords::Softmax,
        renormalize: Renormalize::KeyBeyondOne { epsilon: 1e-20 },
        groups: GroupWords::None,
        scale: None,
    },
    sparse: Sparse::LeadingMultiples,
    experts: "n_routed_experts",
    expert_width: "moe_intermediate_size",
    shared: SharedWords::Counted,
    window: WindowWords::Never,
    ropes: &[],
    head_bias: None,
    beyond: Beyond::Nothing,
    // n_routed_experts and num_experts_per_tok have no default: without them it is no MoE.
    defaults: &[
        ("vocab_size", Int(102_400)),
        ("hidden_size", Int(4096)),
        ("intermediate_size", Int(11008)),
        ("moe_intermediate_size", Int(1407)),
        ("num_hidden_layers", Int(30)),
        ("num_attention_heads", Int(32)),
        ("num_key_value_heads", Int(32)),
        ("moe_layer_freq", Int(1)),
        ("first_k_dense_replace", Int(0)),
        ("norm_topk_prob", Flag(false)),
        ("attention_bias", Flag(false)),
        ("max_position_embeddings", Int(2048)),
        ("rms_norm_eps", Float(1e-6)),
        ("rope_theta", Float(10_000.0)),
        ("tie_word_embeddings", Flag(false)),
    ],
    only: &[("scoring_func", Text("softmax"))],
    unread: &[],
    inert: &["aux_loss_alpha", "ep_size", "seq_aux"],
};
