//! Phi-3.5-MoE: LayerNorm and biases throughout, SparseMixer routing, long-factor rope with two factors on cosine and sine.

use super::family::*;
use super::{NormKind, QkNorm};
use Literal::{Flag, Float, Int};

/// `model_type = "phimoe"`.
pub static FAMILY: Family = Family {
    model_type: "phimoe",
    names: Names { block: "block_sparse_moe", projections: ["w1", "w3", "w2"], shared: None, shared_gate: None, correction: None },
    attention: AttentionWords::Grouped {
        qkv_bias: Some("attention_bias"),
        output_bias: Some("attention_bias"),
        qk_norm: QkNorm::None,
        clip: None,
        head_dim: HeadDim::Key,
    },
    norm: NormKind::Layer,
    router: RouterWords { score: ScoreWords::SparseMixer, renormalize: Renormalize::Never, groups: GroupWords::None, scale: None },
    sparse: Sparse::Every,
    experts: "num_local_experts",
    expert_width: "intermediate_size",
    shared: SharedWords::None,
    window: WindowWords::Every,
    ropes: &[RopeWord::LongRopeMscale],
    head_bias: Some("lm_head_bias"),
    beyond: Beyond::Nothing,
    defaults: &[
        ("vocab_size", Int(32064)),
        ("hidden_size", Int(4096)),
        ("intermediate_size", Int(6400)),
        ("num_hidden_layers", Int(32)),
        ("num_attention_heads", Int(32)),
        ("num_key_value_heads", Int(8)),
        ("num_local_experts", Int(16)),
        ("num_experts_per_tok", Int(2)),
        ("router_jitter_noise", Float(0.01)),
        ("attention_bias", Flag(false)),
        ("lm_head_bias", Flag(false)),
        ("max_position_embeddings", Int(131_072)),
        ("rms_norm_eps", Float(1e-5)),
        ("rope_theta", Float(1e6)),
        ("tie_word_embeddings", Flag(false)),
    ],
    only: &[],
    unread: &[],
    // Noise and dropout of training only.
    inert: &["input_jitter_noise", "hidden_dropout"],
};
