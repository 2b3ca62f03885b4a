//! Qwen3-30B-A3B and Qwen3-235B-A22B: norms on each query and key head, a head width of its own.

use super::family::*;
use super::{NormKind, QkNorm};
use Literal::{Flag, Float, Int};

/// `model_type = "qwen3_moe"`.
pub static FAMILY: Family = Family {
    model_type: "qwen3_moe",
    names: Names { block: "mlp", projections: PROJECTIONS, shared: None, shared_gate: None, correction: None },
    attention: AttentionWords::Grouped {
        qkv_bias: Some("attention_bias"),
        output_bias: Some("attention_bias"),
        qk_norm: QkNorm::PerHead,
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
    shared: SharedWords::None,
    window: WindowWords::ListedAlike,
    ropes: &[RopeWord::Yarn, RopeWord::LongRope],
    head_bias: None,
    beyond: Beyond::Nothing,
    defaults: &[
        ("vocab_size", Int(151_936)),
        ("hidden_size", Int(2048)),
        ("intermediate_size", Int(6144)),
        ("num_hidden_layers", Int(24)),
        ("num_attention_heads", Int(32)),
        ("num_key_value_heads", Int(4)),
        ("num_experts", Int(128)),
        ("num_experts_per_tok", Int(8)),
        ("moe_intermediate_size", Int(768)),
        ("decoder_sparse_step", Int(1)),
        ("norm_topk_prob", Flag(false)),
        ("attention_bias", Flag(false)),
        ("use_sliding_window", Flag(false)),
        ("sliding_window", Int(4096)),
        ("max_position_embeddings", Int(32768)),
        ("rms_norm_eps", Float(1e-6)),
        ("rope_theta", Float(10_000.0)),
        ("tie_word_embeddings", Flag(false)),
    ],
    only: &[],
    unread: &[],
    inert: &["max_window_layers"],
};
