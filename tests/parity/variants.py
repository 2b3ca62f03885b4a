"""The tiny models: for each family, configs in the words that its checkpoints on the hub use.

A value that differs from the hub's does so to make a mechanism visible on 24 tokens (a window of 8, a jitter of 0.2).
Keys that are left out are left out on purpose: the reader has to know the default of the family's config class.
"""

from dataclasses import dataclass, field

VOCAB = 128


@dataclass(frozen=True)
class Variant:
    """One tiny model."""

    config: dict
    tokens: int = 24
    """Tokens a row; two rows."""
    shards: int = 1
    """Files that the tensors are spread over."""
    reference: str = "5.17.0"
    """The transformers that is right about it."""
    generates: bool = True
    """Whether greedy generation is recorded."""
    extra: tuple[str, ...] = field(default=())
    """What else the checkpoint holds: "mtp", "buffers", "fp8"."""


LEFT_OUT = object()
"""A key that this config does not have."""

SHARED = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
    "vocab_size": VOCAB,
}

QWEN = {"decoder_sparse_step": 1, "intermediate_size": 48, "mlp_only_layers": [], "moe_intermediate_size": 24, "num_experts": 8,
        "num_experts_per_tok": 2, "output_router_logits": False, "rms_norm_eps": 1e-06, "router_aux_loss_coef": 0.001,
        "use_sliding_window": False}

DEEPSEEK = {"attention_bias": False, "first_k_dense_replace": 1, "intermediate_size": 48, "moe_intermediate_size": 24, "moe_layer_freq": 1,
            "n_routed_experts": 8, "rms_norm_eps": 1e-06}

LATENT = {"ep_size": 1, "kv_lora_rank": 24, "num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}

FAMILIES = {
    "mixtral": SHARED | {
        "architectures": ["MixtralForCausalLM"], "intermediate_size": 40, "num_experts_per_tok": 2, "num_local_experts": 8,
        "output_router_logits": False, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None},
    "qwen2_moe": SHARED | QWEN | {
        "architectures": ["Qwen2MoeForCausalLM"], "max_window_layers": 2, "norm_topk_prob": False, "shared_expert_intermediate_size": 40,
        "sliding_window": 256},
    "qwen3_moe": SHARED | QWEN | {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "head_dim": 16, "max_window_layers": 3, "norm_topk_prob": True,
        "rope_scaling": None, "sliding_window": None},
    "olmoe": SHARED | {
        "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "clip_qkv": None, "intermediate_size": 24, "norm_topk_prob": False,
        "num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4, "output_router_logits": False, "rope_scaling": None,
        "router_aux_loss_coef": 0.01},
    "phimoe": SHARED | {
        "architectures": ["PhiMoEForCausalLM"], "attention_bias": True, "hidden_dropout": 0.0, "input_jitter_noise": 0.01,
        "intermediate_size": 40, "lm_head_bias": True, "num_experts_per_tok": 2, "num_local_experts": 8,
        "original_max_position_embeddings": 32, "output_router_logits": False, "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.2,
        "sliding_window": 256},
    "deepseek": SHARED | DEEPSEEK | {
        "architectures": ["DeepseekForCausalLM"], "aux_loss_alpha": 0.001, "n_shared_experts": 2, "norm_topk_prob": False,
        "num_experts_per_tok": 3, "pretraining_tp": 1, "rope_scaling": None, "scoring_func": "softmax", "seq_aux": True},
    "deepseek_v2": SHARED | DEEPSEEK | LATENT | {
        "architectures": ["DeepseekV2ForCausalLM"], "aux_loss_alpha": 0.001, "n_group": 1, "n_shared_experts": 2, "norm_topk_prob": False,
        "num_experts_per_tok": 2, "pretraining_tp": 1, "q_lora_rank": None, "routed_scaling_factor": 1.0, "scoring_func": "softmax",
        "seq_aux": True, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v3": SHARED | DEEPSEEK | LATENT | {
        "architectures": ["DeepseekV3ForCausalLM"], "n_group": 4, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 3,
        "num_nextn_predict_layers": 0, "q_lora_rank": 20, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 2,
        "topk_method": "noaux_tc"},
}
"""What a config of each family has, after one of its checkpoints on the hub."""


def config(model_type: str, **changes) -> dict:
    """A family's config with some keys changed or left out."""
    merged = FAMILIES[model_type] | {"model_type": model_type} | changes
    return {key: value for key, value in sorted(merged.items()) if value is not LEFT_OUT}


def yarn(spelling: str, **keys) -> dict:
    """YaRN as DeepSeek's configs have it, from a context short enough for the ramp to matter at a rope width of 8."""
    return {"beta_fast": 32, "beta_slow": 1, "factor": 8, "original_max_position_embeddings": 64, spelling: "yarn"} | keys


LONGROPE = {
    "long_factor": [1.0, 1.6, 3.0, 6.0],
    "long_mscale": 1.2,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "short_mscale": 1.1,
    "type": "longrope",
}

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}

VARIANTS: dict[str, Variant] = {
    "mixtral": Variant(config("mixtral"), shards=2),
    "mixtral_window": Variant(config("mixtral", sliding_window=8, rope_theta=LEFT_OUT, rms_norm_eps=LEFT_OUT)),
    "qwen2_moe": Variant(config("qwen2_moe")),
    "qwen3_moe": Variant(config("qwen3_moe")),
    "qwen3_moe_tied": Variant(
        config("qwen3_moe", decoder_sparse_step=2, dtype="bfloat16", norm_topk_prob=False, num_experts_per_tok=3, rope_scaling=LEFT_OUT,
               rope_parameters={"rope_theta": 5000.0, "rope_type": "default"}, rope_theta=LEFT_OUT, tie_word_embeddings=True,
               torch_dtype=LEFT_OUT)
    ),
    "olmoe": Variant(config("olmoe")),
    "olmoe_clip": Variant(config("olmoe", clip_qkv=0.6, norm_topk_prob=True, num_key_value_heads=2)),
    "phimoe": Variant(config("phimoe", rope_scaling=LONGROPE)),
    "phimoe_longrope": Variant(
        config("phimoe", router_jitter_noise=0.1, rope_scaling=LONGROPE, rope_theta=LEFT_OUT),
        tokens=40, reference="4.57.3", generates=False,
    ),
    "deepseek": Variant(config("deepseek"), extra=("buffers",)),
    "deepseek_v2": Variant(config("deepseek_v2")),
    "deepseek_v2_group": Variant(
        config("deepseek_v2", n_group=4, n_shared_experts=1, num_experts_per_tok=3, q_lora_rank=20,
               rope_scaling=yarn("type", mscale=1.0, mscale_all_dim=0.707), routed_scaling_factor=4.0, topk_group=2,
               topk_method="group_limited_greedy")
    ),
    "deepseek_v3": Variant(config("deepseek_v3")),
    "deepseek_v3_yarn": Variant(
        config("deepseek_v3", n_group=2, num_experts_per_tok=2, q_lora_rank=None,
               rope_parameters=yarn("rope_type", mscale=1.0, mscale_all_dim=1.0, rope_theta=10000.0), rope_theta=LEFT_OUT, topk_group=1)
    ),
    "deepseek_v3_mtp": Variant(config("deepseek_v3", num_hidden_layers=2, num_nextn_predict_layers=1), extra=("mtp",)),
    "deepseek_v3_fp8": Variant(
        config("deepseek_v3", hidden_size=64, intermediate_size=192, kv_lora_rank=32, moe_intermediate_size=136, n_group=2, n_routed_experts=4,
               num_experts_per_tok=2, num_hidden_layers=2, num_nextn_predict_layers=1, quantization_config=FP8, topk_group=1),
        extra=("mtp", "fp8"),
    ),
}
