//! Mixtral 8x7B and 8x22B: grouped-query attention, two of eight experts, weights renormalized.

use super::family::*;
use super::{NormKind, QkNorm};
use Literal::{Flag, Float, Int};

/// `model_type = "mixtral"`.
pub static FAMILY: Family = Family {
    model_type: "mixtral",
    names: Names { block: "block_sparse_moe", projections: ["w1", "w3", "w2"], shared: None, shared_gate: None, correction: None },
    attention: AttentionWords::Grouped { qkv_bias: None, output_bias: None, qk_norm: QkNorm::None, clip: None, head_dim: HeadDim::Key },
    norm: NormKind::Rms,
    router: RouterWords { score: ScoreWords::Softmax, renormalize: Renormalize::Always, groups: GroupWords::None, scale: None },
    sparse: Sparse::Every,
    experts: "num_local_experts",
    expert_width: "intermediate_size",
    shared: SharedWords::None,
    window: WindowWords::Every,
    ropes: &[RopeWord::Yarn, RopeWord::LongRope],
    head_bias: None,
    beyond: Beyond::Nothing,
    defaults: &[
        ("vocab_size", Int(32000)),
        ("hidden_size", Int(4096)),
        ("intermediate_size", Int(14336)),
        ("num_hidden_layers", Int(32)),
        ("num_attention_heads", Int(32)),
        ("num_key_value_heads", Int(8)),
        ("num_local_experts", Int(8)),
        ("num_experts_per_tok", Int(2)),
        ("max_position_embeddings", Int(131_072)),
        ("rms_norm_eps", Float(1e-5)),
        ("rope_theta", Float(1e6)),
        ("tie_word_embeddings", Flag(false)),
    ],
    only: &[],
    unread: &[],
    // Jitter is noise of training only.
    inert: &["router_jitter_noise"],
};
