//! Configs as they stand on the hub, with the parameters that transformers 5.17 counts for them (the 16B: as its model card has it).

use serde_json::{Value, json};

use super::{Attention, GroupScore, Groups, Mlp, RopeScaling, Score, Shared, expected, resolve};

/// A model on the hub: its name, its config (keys that cannot matter left out), its parameters.
struct Hub {
    name: &'static str,
    config: &'static str,
    parameters: u64,
}

const HUB: &[Hub] = &[
    Hub {
        name: "Mixtral-8x7B-v0.1",
        parameters: 46_702_792_704,
        config: r#"{
            "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
            "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false, "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": null, "tie_word_embeddings": false,
            "vocab_size": 32000}"#,
    },
    Hub {
        name: "Qwen1.5-MoE-A2.7B",
        parameters: 14_315_784_192,
        config: r#"{
            "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192,
            "max_window_layers": 21, "model_type": "qwen2_moe", "num_attention_heads": 16, "num_hidden_layers": 24,
            "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
            "tie_word_embeddings": false, "use_sliding_window": false, "vocab_size": 151936, "decoder_sparse_step": 1,
            "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4,
            "num_experts": 60, "norm_topk_prob": false, "output_router_logits": false, "router_aux_loss_coef": 0.001}"#,
    },
    Hub {
        name: "Qwen3-30B-A3B",
        parameters: 30_532_122_624,
        config: r#"{
            "attention_bias": false, "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
            "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
            "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32,
            "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
            "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001, "sliding_window": null, "tie_word_embeddings": false, "use_sliding_window": false,
            "vocab_size": 151936}"#,
    },
    Hub {
        name: "OLMoE-1B-7B-0924",
        parameters: 6_919_161_856,
        config: r#"{
            "attention_bias": false, "clip_qkv": null, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 1024,
            "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": false, "num_attention_heads": 16,
            "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
            "output_router_logits": false, "rope_scaling": null, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01,
            "tie_word_embeddings": false, "vocab_size": 50304}"#,
    },
    Hub {
        name: "Phi-3.5-MoE-instruct",
        parameters: 41_873_153_344,
        config: r#"{
            "attention_bias": true, "hidden_act": "silu", "hidden_dropout": 0.0, "hidden_size": 4096,
            "input_jitter_noise": 0.01, "intermediate_size": 6400, "lm_head_bias": true, "max_position_embeddings": 131072,
            "model_type": "phimoe", "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "num_local_experts": 16, "original_max_position_embeddings": 4096,
            "output_router_logits": false, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "router_aux_loss_coef": 0.0,
            "router_jitter_noise": 0.01, "sliding_window": 131072, "tie_word_embeddings": false, "vocab_size": 32064,
            "rope_scaling": {"long_factor": "LONG", "long_mscale": 1.243163121016122, "original_max_position_embeddings": 4096, "short_factor": "SHORT", "short_mscale": 1.243163121016122, "type": "longrope"}}"#,
    },
    Hub {
        name: "deepseek-moe-16b-base",
        parameters: 16_375_728_128,
        config: r#"{
            "attention_bias": false, "aux_loss_alpha": 0.001, "first_k_dense_replace": 1, "hidden_act": "silu",
            "hidden_size": 2048, "intermediate_size": 10944, "max_position_embeddings": 4096, "model_type": "deepseek",
            "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_routed_experts": 64, "n_shared_experts": 2,
            "norm_topk_prob": false, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 28,
            "num_key_value_heads": 16, "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 10000,
            "scoring_func": "softmax", "seq_aux": true, "tie_word_embeddings": false, "vocab_size": 102400}"#,
    },
    Hub {
        name: "DeepSeek-V2-Lite",
        parameters: 15_706_484_224,
        config: r#"{
            "attention_bias": false, "aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
            "hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
            "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1,
            "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": false, "num_attention_heads": 16,
            "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "pretraining_tp": 1,
            "q_lora_rank": null, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
            "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096, "type": "yarn"},
            "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": true,
            "tie_word_embeddings": false, "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400}"#,
    },
    Hub {
        name: "DeepSeek-V2",
        parameters: 235_741_434_880,
        config: r#"{
            "attention_bias": false, "aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
            "hidden_size": 5120, "intermediate_size": 12288, "kv_lora_rank": 512, "max_position_embeddings": 163840,
            "model_type": "deepseek_v2", "moe_intermediate_size": 1536, "moe_layer_freq": 1, "n_group": 8,
            "n_routed_experts": 160, "n_shared_experts": 2, "norm_topk_prob": false, "num_attention_heads": 128,
            "num_experts_per_tok": 6, "num_hidden_layers": 60, "num_key_value_heads": 128, "pretraining_tp": 1,
            "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
            "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
            "rope_theta": 10000, "routed_scaling_factor": 16.0, "scoring_func": "softmax", "seq_aux": true,
            "tie_word_embeddings": false, "topk_group": 3, "topk_method": "group_limited_greedy", "v_head_dim": 128,
            "vocab_size": 102400}"#,
    },
    Hub {
        name: "DeepSeek-V3",
        parameters: 671_026_419_200,
        config: r#"{
            "attention_bias": false, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
            "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
            "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
            "norm_topk_prob": true, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
            "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
            "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": false,
            "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280}"#,
    },
];

impl Hub {
    fn config(&self) -> Value {
        // 64 factors each, of which the values do not matter here.
        let factors = |from: f64| json!((0..64).map(|i| from + f64::from(i) / 8.0).collect::<Vec<_>>()).to_string();
        let config = self.config.replace(r#""LONG""#, &factors(1.0)).replace(r#""SHORT""#, &factors(1.0));
        serde_json::from_str(&config).unwrap()
    }

    fn find(name: &str) -> Value {
        HUB.iter().find(|hub| hub.name == name).unwrap().config()
    }
}

#[test]
fn every_config_resolves_to_the_parameters_that_transformers_counts() {
    for hub in HUB {
        let resolved = resolve(&hub.config()).unwrap();
        assert_eq!(resolved.unknown, Vec::<String>::new(), "{}", hub.name);
        let count = |axes: Vec<super::Axis>| axes.iter().map(|axis| axis.size as u64).product::<u64>();
        let total: u64 = expected(resolved.family, &resolved.spec).map(|(_, _, axes)| count(axes)).sum();
        assert_eq!(total, hub.parameters, "{}", hub.name);
    }
}

#[test]
fn what_the_released_models_say_of_their_routers() {
    let moe = |name: &str, layer: usize| resolve(&Hub::find(name)).unwrap().spec.moe(layer).cloned();
    assert_eq!(moe("Mixtral-8x7B-v0.1", 0).unwrap().router.renormalize, Some(0.0));
    let qwen = moe("Qwen1.5-MoE-A2.7B", 0).unwrap();
    assert_eq!((qwen.router.renormalize, qwen.shared), (None, Some(Shared { inner: 5632, gated: true })));
    assert_eq!(moe("Qwen3-30B-A3B", 47).unwrap().router.renormalize, Some(0.0));
    assert_eq!(moe("Phi-3.5-MoE-instruct", 0).unwrap().router.score, Score::SparseMixer { jitter: 0.01 });
    assert_eq!(moe("deepseek-moe-16b-base", 0), None);
    assert_eq!(moe("deepseek-moe-16b-base", 1).unwrap().shared, Some(Shared { inner: 2816, gated: false }));
    let v2 = moe("DeepSeek-V2", 1).unwrap().router;
    assert_eq!(v2.groups, Some(Groups { count: 8, keep: 3, by: GroupScore::Max, masked: 0.0 }));
    assert_eq!((v2.scale, v2.renormalize), (16.0, None));
    let v3 = moe("DeepSeek-V3", 3).unwrap().router;
    assert_eq!(v3.groups, Some(Groups { count: 8, keep: 4, by: GroupScore::TopTwo, masked: f32::NEG_INFINITY }));
    assert_eq!((v3.score, v3.correction, v3.scale, v3.renormalize), (Score::Sigmoid, true, 2.5, Some(1e-20)));
    assert_eq!(resolve(&Hub::find("DeepSeek-V3")).unwrap().spec.layers[2].mlp, Mlp::Dense { inner: 18432 });
}

#[test]
fn what_the_released_models_say_of_their_attention() {
    let spec = |name: &str| resolve(&Hub::find(name)).unwrap().spec;
    let phi = spec("Phi-3.5-MoE-instruct");
    assert!(phi.layers.iter().all(|layer| layer.window == Some(131_072)) && phi.head_bias);
    assert!(matches!(phi.rope.scaling, RopeScaling::LongRope { original: 4096, long_mscale, .. } if long_mscale == 1.243163121016122));
    let Attention::Grouped(phi) = phi.attention else { panic!("phimoe has grouped attention") };
    assert!(phi.qkv_bias && phi.output_bias);
    let Attention::Grouped(qwen) = spec("Qwen1.5-MoE-A2.7B").attention else { panic!("qwen2_moe has grouped attention") };
    assert!(qwen.qkv_bias && !qwen.output_bias);
    let Attention::Grouped(qwen) = spec("Qwen3-30B-A3B").attention else { panic!("qwen3_moe has grouped attention") };
    assert_eq!((qwen.heads * qwen.head_dim, qwen.kv_heads), (4096, 4));
    // V2-Lite: mscale and mscale_all_dim are equal, so cosine and sine keep their length, and the softmax scale is
    // 192^-1/2 · (0.0707 · ln 40 + 1)² = 0.072169 · 1.260804² = 0.114721
    let lite = spec("DeepSeek-V2-Lite");
    assert!(matches!(lite.rope.scaling, RopeScaling::Yarn { factor: 40.0, attention_factor: 1.0, truncate: true, .. }));
    let Attention::Latent(lite) = lite.attention else { panic!("deepseek_v2 has latent attention") };
    assert_eq!(lite.q_rank, None);
    assert!((lite.scale - 0.114_721).abs() < 1e-6, "{}", lite.scale);
}
