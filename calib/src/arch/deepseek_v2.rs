//! DeepSeek-V2 and V2-Lite: latent attention, softmax routing, for the large one limited to the best groups.

use super::NormKind;
use super::family::*;
use Literal::{Flag, Float, Int, Text};

/// `model_type = "deepseek_v2"`.
pub static FAMILY: Family = Family {
    model_type: "deepseek_v2",
    names: Names { block: "mlp", projections: PROJECTIONS, shared: Some("shared_experts"), shared_gate: None, correction: None },
    attention: AttentionWords::Latent { interleave: None, norm_eps: 1e-6 },
    norm: NormKind::Rms,
    router: RouterWords {
        score: ScoreWords::Softmax,
        renormalize: Renormalize::Never,
        groups: GroupWords::Method,
        scale: Some("routed_scaling_factor"),
    },
    sparse: Sparse::Leading,
    experts: "n_routed_experts",
    expert_width: "moe_intermediate_size",
    shared: SharedWords::Counted,
    window: WindowWords::Never,
    ropes: &[RopeWord::Yarn],
    head_bias: None,
    beyond: Beyond::Nothing,
    // num_experts_per_tok has no default.
    defaults: &[
        ("vocab_size", Int(102_400)),
        ("hidden_size", Int(4096)),
        ("intermediate_size", Int(11008)),
        ("moe_intermediate_size", Int(1407)),
        ("num_hidden_layers", Int(32)),
        ("num_attention_heads", Int(32)),
        ("n_routed_experts", Int(64)),
        ("n_shared_experts", Int(2)),
        ("first_k_dense_replace", Int(0)),
        ("routed_scaling_factor", Float(1.0)),
        ("topk_method", Text("greedy")),
        ("kv_lora_rank", Int(512)),
        ("q_lora_rank", Int(1536)),
        ("qk_nope_head_dim", Int(128)),
        ("qk_rope_head_dim", Int(64)),
        ("v_head_dim", Int(128)),
        ("attention_bias", Flag(false)),
        ("max_position_embeddings", Int(2048)),
        ("rms_norm_eps", Float(1e-6)),
        ("rope_theta", Float(10_000.0)),
        ("tie_word_embeddings", Flag(false)),
    ],
    only: &[("scoring_func", Text("softmax")), ("moe_layer_freq", Int(1)), ("mlp_bias", Flag(false))],
    // transformers never renormalizes here, whatever the key says.
    unread: &[("norm_topk_prob", Flag(false))],
    // head_dim and qk_head_dim are what transformers writes back of qk_rope_head_dim and qk_nope_head_dim.
    inert: &["aux_loss_alpha", "ep_size", "seq_aux", "head_dim", "qk_head_dim"],
};
