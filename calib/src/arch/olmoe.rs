//! OLMoE-1B-7B: norms over the full width of queries and keys, then `clip_qkv` on queries, keys and values.

use super::family::*;
use super::{NormKind, QkNorm};
use Literal::{Flag, Float, Int};

/// `model_type = "olmoe"`.
pub static FAMILY: Family = Family {
    model_type: "olmoe",
    names: Names { block: "mlp", projections: PROJECTIONS, shared: None, shared_gate: None, correction: None },
    attention: AttentionWords::Grouped {
        qkv_bias: Some("attention_bias"),
        output_bias: Some("attention_bias"),
        qk_norm: QkNorm::FullWidth,
        clip: Some("clip_qkv"),
        // The norms are hidden_size wide.
        head_dim: HeadDim::Derived,
    },
    norm: NormKind::Rms,
    router: RouterWords {
        score: ScoreWords::Softmax,
        renormalize: Renormalize::Key { epsilon: 0.0 },
        groups: GroupWords::None,
        scale: None,
    },
    sparse: Sparse::Every,
    experts: "num_experts",
    expert_width: "intermediate_size",
    shared: SharedWords::None,
    window: WindowWords::Never,
    ropes: &[RopeWord::Yarn, RopeWord::LongRope],
    head_bias: None,
    beyond: Beyond::Nothing,
    defaults: &[
        ("vocab_size", Int(50304)),
        ("hidden_size", Int(2048)),
        ("intermediate_size", Int(2048)),
        ("num_hidden_layers", Int(16)),
        ("num_attention_heads", Int(16)),
        ("num_experts", Int(64)),
        ("num_experts_per_tok", Int(8)),
        ("norm_topk_prob", Flag(false)),
        ("attention_bias", Flag(false)),
        ("max_position_embeddings", Int(4096)),
        ("rms_norm_eps", Float(1e-5)),
        ("rope_theta", Float(10_000.0)),
        ("tie_word_embeddings", Flag(false)),
    ],
    only: &[],
    unread: &[],
    inert: &[],
};
