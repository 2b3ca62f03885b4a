//! Qwen1.5-MoE and Qwen2-57B-A14B: biases on query, key and value, a shared expert with a gate.

use super::family::*;
use super::{NormKind, QkNorm};
use Literal::{Flag, Float, Int};

/// `model_type = "qwen2_moe"`.
pub static FAMILY: Family = Family {
    model_type: "qwen2_moe",
    names: Names {
        block: "mlp",
        projections: PROJECTIONS,
        shared: Some("shared_expert"),
        shared_gate: Some("shared_expert_gate"),
        correction: None,
    },
    attention: AttentionWords::Grouped {
        qkv_bias: Some("qkv_bias"),
        output_bias: None,
        qk_norm: QkNorm::None,
        clip: None,
        head_dim: HeadDim::Key,
    },
    norm: NormKind::Rms,
    router: RouterWords {
        score: ScoreWords::Softmax,
        renormalize: Renormalize::Key { epsilon: 0.0 },
        groups: GroupWords::None,
        scale: None,
    },
    sparse: Sparse::Stepped,
    experts: "num_experts",
    expert_width: "moe_intermediate_size",
    shared: SharedWords::Gated("shared_expert_intermediate_size"),
    window: WindowWords::Listed,
    ropes: &[RopeWord::Yarn, RopeWord::LongRope],
    head_bias: None,
    beyond: Beyond::Nothing,
    defaults: &[
        ("vocab_size", Int(151_936)),
        ("hidden_size", Int(2048)),
        ("intermediate_size", Int(5632)),
        ("num_hidden_layers", Int(24)),
        ("num_attention_heads", Int(16)),
        ("num_key_value_heads", Int(16)),
        ("num_experts", Int(60)),
        ("num_experts_per_tok", Int(4)),
        ("moe_intermediate_size", Int(1408)),
        ("shared_expert_intermediate_size", Int(5632)),
        ("decoder_sparse_step", Int(1)),
        ("norm_topk_prob", Flag(false)),
        ("qkv_bias", Flag(true)),
        ("use_sliding_window", Flag(false)),
        ("sliding_window", Int(4096)),
        ("max_position_embeddings", Int(32768)),
        ("rms_norm_eps", Float(1e-6)),
        ("rope_theta", Float(10_000.0)),
        ("tie_word_embeddings", Flag(false)),
    ],
    only: &[],
    unread: &[],
    // Decides layer_types where they are left out, and there sliding windows are refused.
    inert: &["max_window_layers"],
};
