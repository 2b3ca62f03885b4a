//! DeepSeek-V3 and R1: latent attention, sigmoid routing with a selection bias and groups, a multi-token-prediction layer at the end.

use super::NormKind;
use super::family::*;
use Literal::{Flag, Float, Int, Text};

/// `model_type = "deepseek_v3"`.
pub static FAMILY: Family = Family {
    model_type: "deepseek_v3",
    names: Names {
        block: "mlp",
        projections: PROJECTIONS,
        shared: Some("shared_experts"),
        shared_gate: None,
        correction: Some("e_score_correction_bias"),
    },
    attention: AttentionWords::Latent { interleave: Some("rope_interleave"), norm_eps: 1e-6 },
    norm: NormKind::Rms,
    router: RouterWords {
        score: ScoreWords::Sigmoid,
        renormalize: Renormalize::Key { epsilon: 1e-20 },
        groups: GroupWords::TopTwo,
        scale: Some("routed_scaling_factor"),
    },
    sparse: Sparse::Leading,
    experts: "n_routed_experts",
    expert_width: "moe_intermediate_size",
    shared: SharedWords::Counted,
    window: WindowWords::Never,
    ropes: &[RopeWord::Yarn],
    head_bias: None,
    beyond: Beyond::Mtp,
    defaults: &[
        ("vocab_size", Int(129_280)),
        ("hidden_size", Int(7168)),
        ("intermediate_size", Int(18432)),
        ("moe_intermediate_size", Int(2048)),
        ("num_hidden_layers", Int(61)),
        ("num_attention_heads", Int(128)),
        ("n_routed_experts", Int(256)),
        ("num_experts_per_tok", Int(8)),
        ("n_shared_experts", Int(1)),
        ("n_group", Int(8)),
        ("topk_group", Int(4)),
        ("first_k_dense_replace", Int(3)),
        ("norm_topk_prob", Flag(true)),
        ("routed_scaling_factor", Float(2.5)),
        ("kv_lora_rank", Int(512)),
        ("q_lora_rank", Int(1536)),
        ("qk_nope_head_dim", Int(128)),
        ("qk_rope_head_dim", Int(64)),
        ("v_head_dim", Int(128)),
        ("rope_interleave", Flag(true)),
        ("attention_bias", Flag(false)),
        ("max_position_embeddings", Int(4096)),
        ("rms_norm_eps", Float(1e-6)),
        ("rope_theta", Float(10_000.0)),
        ("tie_word_embeddings", Flag(false)),
    ],
    only: &[("scoring_func", Text("sigmoid")), ("topk_method", Text("noaux_tc")), ("moe_layer_freq", Int(1))],
    unread: &[],
    // MTP layers are found by their tensors, whatever the config announces.
    inert: &["aux_loss_alpha", "ep_size", "seq_aux", "head_dim", "qk_head_dim", "num_nextn_predict_layers", "num_mtp_layers"],
};
