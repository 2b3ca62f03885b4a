//! From config.json to a [`Spec`]: every key that the arithmetic depends on is read here, once.
//!
//! A value that would change the arithmetic and is not implemented is refused by key and value. A key that is left out takes
//! the default of the family's Hugging Face config class. Where versions of transformers differ, 5.17 decides.

use serde_json::{Map, Value};

use super::family::{AttentionWords, Family, GroupWords, HeadDim, Renormalize, ScoreWords, SharedWords, Sparse, WindowWords};
use super::keys::Keys;
use super::{
    Attention, FAMILIES, GroupScore, Grouped, Groups, Latent, LayerSpec, Mlp, Moe, Norm, Pairing, Rope, Router, Score, Shared, Spec, ropes,
};
use crate::{Error, Result};

/// Spellings of the number of routed experts: transformers 5 writes another one than the hub for some families.
const EXPERT_COUNTS: [&str; 3] = ["num_experts", "num_local_experts", "n_routed_experts"];

/// Keys of no family that do not change evaluation.
const INERT: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    // Read by Model::open, which refuses what the reader cannot convert.
    "quantization_config",
    "max_position_embeddings",
    "model_type",
    "original_max_position_embeddings",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "torch_dtype",
    "transformers_version",
    "use_cache",
];

/// A config, understood.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// Its family.
    pub family: &'static Family,
    /// Its arithmetic.
    pub spec: Spec,
    /// Keys that nobody here knows, by full name (`rope_scaling.x` inside an object); `inspect` lists them.
    pub unknown: Vec<String>,
}

/// Reads a config.json.
///
/// # Errors
///
/// [`Error::UnsupportedFamily`] and [`Error::NoModelType`]; [`Error::UnsupportedValue`] for a value that changes the
/// arithmetic and is not implemented; [`Error::WrongValue`], [`Error::MissingKey`] and [`Error::Contradiction`] for what
/// cannot be.
pub fn resolve(config: &Value) -> Result<Resolved> {
    let map = config.as_object().ok_or(Error::NoModelType)?;
    let model_type = map.get("model_type").and_then(Value::as_str).ok_or(Error::NoModelType)?;
    let family = FAMILIES.iter().copied().find(|family| family.model_type == model_type).ok_or_else(|| Error::UnsupportedFamily {
        model_type: model_type.to_owned(),
        supported: FAMILIES.iter().map(|family| family.model_type).collect::<Vec<_>>().join(", "),
    })?;
    let keys = Keys::new(map, family.model_type, family.defaults);
    refuse(&keys, family)?;

    let hidden = keys.size("hidden_size")?;
    let norm = Norm { kind: family.norm, eps: keys.float("rms_norm_eps")? };
    let (attention, rope, mut unknown) = attention(&keys, family, hidden)?;
    let spec = Spec {
        model_type: model_type.to_owned(),
        hidden,
        vocab: keys.size("vocab_size")?,
        layers: layers(&keys, family)?,
        norm,
        attention,
        rope,
        tied: keys.flag("tie_word_embeddings")?,
        head_bias: family.head_bias.map(|key| keys.flag(key)).transpose()?.unwrap_or(false),
    };
    unknown.extend(unknown_keys(&keys, family, map));
    unknown.sort();
    Ok(Resolved { family, spec, unknown })
}

/// Refuses the keys of which one value alone is implemented.
fn refuse(keys: &Keys<'_>, family: &Family) -> Result<()> {
    let everywhere = [("hidden_act", super::family::Literal::Text("silu"))];
    for (key, only) in everywhere.iter().chain(family.only) {
        let only = only.value();
        match keys.stated(key) {
            Some(value) if *value != only => return Err(keys.unsupported(key, value, only.to_string())),
            _ => {}
        }
    }
    Ok(())
}

fn unknown_keys(keys: &Keys<'_>, family: &Family, map: &Map<String, Value>) -> Vec<String> {
    let harmless = |key: &String| {
        INERT.contains(&key.as_str())
            || family.inert.contains(&key.as_str())
            || family.unread.iter().any(|(name, value)| name == key && map.get(key) == Some(&value.value()))
    };
    keys.unread().into_iter().filter(|key| !harmless(key)).collect()
}

fn attention(keys: &Keys<'_>, family: &Family, hidden: usize) -> Result<(Attention, Rope, Vec<String>)> {
    let heads = keys.size("num_attention_heads")?;
    match &family.attention {
        AttentionWords::Grouped { qkv_bias, output_bias, qk_norm, clip, head_dim } => {
            let flag = |key: &Option<&str>| key.map(|key| keys.flag(key)).transpose().map(|flag| flag.unwrap_or(false));
            let kv_heads = keys.optional_size("num_key_value_heads")?.unwrap_or(heads);
            if !heads.is_multiple_of(kv_heads) {
                return Err(contradiction(format!("num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}")));
            }
            let head_dim = head_width(keys, *head_dim, hidden, heads)?;
            let (rope, _, unknown) = ropes::resolve(keys, family, head_dim, Pairing::HalfSplit)?;
            let grouped = Grouped {
                heads,
                kv_heads,
                head_dim,
                qkv_bias: flag(qkv_bias)?,
                output_bias: flag(output_bias)?,
                qk_norm: *qk_norm,
                clip: clip.map(|key| keys.optional_float(key)).transpose()?.flatten().map(|clip| clip as f32),
                scale: (head_dim as f64).powf(-0.5) as f32,
            };
            Ok((Attention::Grouped(grouped), rope, unknown))
        }
        AttentionWords::Latent { interleave, norm_eps } => {
            // Expanded keys have every head: fewer key-value heads would have no meaning.
            if let Some(stated) =
                keys.stated("num_key_value_heads").filter(|value| !value.is_null() && value.as_u64() != Some(heads as u64))
            {
                return Err(keys.unsupported("num_key_value_heads", stated, format!("{heads}, the number of attention heads")));
            }
            let interleaved = interleave.map(|key| keys.flag(key)).transpose()?.unwrap_or(true);
            let pairing = if interleaved { Pairing::Interleaved } else { Pairing::HalfSplit };
            let (nope_dim, rope_dim) = (keys.size("qk_nope_head_dim")?, keys.size("qk_rope_head_dim")?);
            let (rope, mscale, unknown) = ropes::resolve(keys, family, rope_dim, pairing)?;
            let latent = Latent {
                heads,
                q_rank: keys.optional_size("q_lora_rank")?,
                kv_rank: keys.size("kv_lora_rank")?,
                nope_dim,
                rope_dim,
                value_dim: keys.size("v_head_dim")?,
                bias: keys.flag("attention_bias")?,
                norm_eps: *norm_eps,
                scale: (((nope_dim + rope_dim) as f64).powf(-0.5) * mscale * mscale) as f32,
            };
            Ok((Attention::Latent(latent), rope, unknown))
        }
    }
}

fn head_width(keys: &Keys<'_>, from: HeadDim, hidden: usize, heads: usize) -> Result<usize> {
    let stated = keys.optional_size("head_dim")?;
    match stated {
        Some(width) if from == HeadDim::Key => Ok(width),
        _ if !hidden.is_multiple_of(heads) => {
            Err(contradiction(format!("num_attention_heads = {heads} does not divide hidden_size = {hidden}")))
        }
        Some(width) if width != hidden / heads => {
            Err(keys.unsupported("head_dim", &Value::from(width), format!("{}, hidden_size / num_attention_heads", hidden / heads)))
        }
        _ => Ok(hidden / heads),
    }
}

fn layers(keys: &Keys<'_>, family: &Family) -> Result<Vec<LayerSpec>> {
    let count = keys.size("num_hidden_layers")?;
    if count > 4096 {
        return Err(keys.wrong("num_hidden_layers", &Value::from(count), "at most 4096"));
    }
    let windows = windows(keys, family, count)?;
    let sparse = sparse_layers(keys, family, count)?;
    if !sparse.contains(&true) {
        return Err(contradiction(format!("none of the {count} layers has experts")));
    }
    let moe = moe(keys, family)?;
    // Known also where no layer is dense.
    let _ = keys.stated("intermediate_size");
    let layer = |(window, sparse)| {
        let mlp = if sparse { Mlp::Moe(moe.clone()) } else { Mlp::Dense { inner: keys.size("intermediate_size")? } };
        Ok(LayerSpec { window, mlp })
    };
    windows.into_iter().zip(sparse).map(layer).collect()
}

/// The sliding window of each layer.
fn windows(keys: &Keys<'_>, family: &Family, count: usize) -> Result<Vec<Option<usize>>> {
    let alike = match family.window {
        WindowWords::Never => {
            let used = keys.optional_flag("use_sliding_window")?;
            if let Some(value) = keys.stated("sliding_window").filter(|value| !value.is_null() && used != Some(false)) {
                return Err(keys.unsupported("sliding_window", value, "null"));
            }
            if used == Some(true) {
                return Err(keys.unsupported("use_sliding_window", &Value::from(true), "false"));
            }
            return Ok(vec![None; count]);
        }
        WindowWords::Every => return Ok(vec![keys.optional_size("sliding_window")?; count]),
        WindowWords::Listed => false,
        WindowWords::ListedAlike => true,
    };
    let used = keys.flag("use_sliding_window")?;
    // Read in any case: it is known, and means nothing where it is not used.
    let stated = keys.stated("sliding_window");
    let Some(list) = keys.stated("layer_types").filter(|value| !value.is_null()) else {
        return match used {
            false => Ok(vec![None; count]),
            true => Err(keys.unsupported(
                "use_sliding_window",
                &Value::from(true),
                "false, or true beside layer_types (without it transformers' versions slide different layers)",
            )),
        };
    };
    let types = list.as_array().filter(|types| types.len() == count);
    let types = types.ok_or_else(|| keys.wrong("layer_types", list, format!("a list of {count} strings, one a layer")))?;
    let window = if used { keys.optional_size("sliding_window")? } else { None };
    let windows = types.iter().map(|layer| match (layer.as_str(), window) {
        (Some("full_attention"), _) => Ok(None),
        (Some("sliding_attention"), Some(window)) => Ok(Some(window)),
        (Some("sliding_attention"), None) if used => Err(keys.wrong("sliding_window", stated.unwrap_or(&Value::Null), "a whole number")),
        (Some("sliding_attention"), None) => {
            Err(keys.unsupported("layer_types", layer, "full_attention where use_sliding_window is false"))
        }
        _ => Err(keys.unsupported("layer_types", layer, "full_attention and sliding_attention")),
    });
    let windows = windows.collect::<Result<Vec<_>>>()?;
    if alike && used && windows.contains(&None) {
        return Err(keys.unsupported("layer_types", list, "sliding_attention in every layer: transformers slides them all"));
    }
    Ok(windows)
}

/// Whether each layer has experts.
fn sparse_layers(keys: &Keys<'_>, family: &Family, count: usize) -> Result<Vec<bool>> {
    Ok(match family.sparse {
        Sparse::Every => vec![true; count],
        Sparse::Stepped => {
            let step = keys.size("decoder_sparse_step")?;
            let dense = keys.counts("mlp_only_layers")?;
            (0..count).map(|layer| !dense.contains(&(layer as u64)) && (layer + 1).is_multiple_of(step)).collect()
        }
        Sparse::Leading => {
            let dense = keys.count("first_k_dense_replace")?;
            (0..count).map(|layer| layer >= dense).collect()
        }
        Sparse::LeadingMultiples => {
            let (dense, step) = (keys.count("first_k_dense_replace")?, keys.size("moe_layer_freq")?);
            (0..count).map(|layer| layer >= dense && layer.is_multiple_of(step)).collect()
        }
    })
}

fn moe(keys: &Keys<'_>, family: &Family) -> Result<Moe> {
    let experts = expert_count(keys, family)?;
    let top_k = keys.size("num_experts_per_tok")?;
    if top_k > experts {
        return Err(contradiction(format!("num_experts_per_tok = {top_k} exceeds the {experts} experts ({})", family.experts)));
    }
    let inner = keys.size(family.expert_width)?;
    let shared = match family.shared {
        SharedWords::None => None,
        SharedWords::Gated(key) => Some(Shared { inner: keys.size(key)?, gated: true }),
        SharedWords::Counted => {
            keys.optional_count("n_shared_experts")?.filter(|count| *count > 0).map(|count| Shared { inner: count * inner, gated: false })
        }
    };
    Ok(Moe { experts, top_k, inner, router: router(keys, family, experts, top_k)?, shared })
}

/// The number of routed experts, under any of its names.
fn expert_count(keys: &Keys<'_>, family: &Family) -> Result<usize> {
    let mut stated: Vec<(&str, &Value)> = EXPERT_COUNTS.iter().filter_map(|key| Some((*key, keys.stated(key)?))).collect();
    stated.retain(|(_, value)| !value.is_null());
    if let [(one, a), .., (other, b)] = stated[..]
        && a != b
    {
        return Err(contradiction(format!("{one} = {a}, but {other} = {b}")));
    }
    let experts = keys.size(stated.first().map_or(family.experts, |(key, _)| key))?;
    if experts > 65_536 {
        return Err(keys.wrong(family.experts, &Value::from(experts), "at most 65536"));
    }
    Ok(experts)
}

fn router(keys: &Keys<'_>, family: &Family, experts: usize, top_k: usize) -> Result<Router> {
    let words = &family.router;
    let score = match words.score {
        ScoreWords::Softmax => Score::Softmax,
        ScoreWords::Sigmoid => Score::Sigmoid,
        ScoreWords::SparseMixer if top_k != 2 => {
            return Err(keys.unsupported("num_experts_per_tok", &Value::from(top_k), "2, for which SparseMixer is defined"));
        }
        ScoreWords::SparseMixer => Score::SparseMixer { jitter: keys.float("router_jitter_noise")? as f32 },
    };
    let renormalize = match words.renormalize {
        Renormalize::Never => None,
        Renormalize::Always => Some(0.0),
        Renormalize::Key { epsilon } => keys.flag("norm_topk_prob")?.then_some(epsilon),
        Renormalize::KeyBeyondOne { epsilon } => (keys.flag("norm_topk_prob")? && top_k > 1).then_some(epsilon),
    };
    Ok(Router {
        score,
        correction: family.names.correction.is_some(),
        groups: groups(keys, words.groups, experts, top_k)?,
        renormalize,
        scale: words.scale.map(|key| keys.float(key)).transpose()?.unwrap_or(1.0) as f32,
    })
}

fn groups(keys: &Keys<'_>, words: GroupWords, experts: usize, top_k: usize) -> Result<Option<Groups>> {
    let (by, masked) = match words {
        GroupWords::None => return Ok(None),
        GroupWords::TopTwo => (GroupScore::TopTwo, f32::NEG_INFINITY),
        GroupWords::Method => match keys.optional_text("topk_method")?.as_deref() {
            Some("greedy") => {
                // Known, and without meaning here.
                let _ = (keys.stated("n_group"), keys.stated("topk_group"));
                return Ok(None);
            }
            Some("group_limited_greedy") => (GroupScore::Max, 0.0),
            other => return Err(keys.unsupported("topk_method", &Value::from(other), r#""greedy" and "group_limited_greedy""#)),
        },
    };
    let (count, keep) = (keys.size("n_group")?, keys.size("topk_group")?);
    if !experts.is_multiple_of(count) {
        return Err(contradiction(format!("n_group = {count} does not divide the {experts} experts")));
    }
    if keep > count {
        return Err(contradiction(format!("topk_group = {keep} exceeds n_group = {count}")));
    }
    let each = experts / count;
    if top_k > keep * each {
        return Err(contradiction(format!(
            "num_experts_per_tok = {top_k} exceeds the {} experts of topk_group = {keep} groups",
            keep * each
        )));
    }
    if by == GroupScore::TopTwo && each < 2 {
        return Err(contradiction(format!("n_group = {count} leaves one expert a group, and groups are judged by their two best")));
    }
    // Where every group stays there is nothing to mask.
    Ok((keep < count).then_some(Groups { count, keep, by, masked }))
}

fn contradiction(what: String) -> Error {
    Error::Contradiction { what }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The config with one key more, or another value for it.
    fn with(model_type: &str, changes: Value) -> Value {
        let mut config = json!({"model_type": model_type, "n_routed_experts": 64, "num_experts_per_tok": 2});
        if !matches!(model_type, "deepseek" | "deepseek_v2" | "deepseek_v3") {
            config = json!({"model_type": model_type});
        }
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        config
    }

    #[test]
    fn what_is_left_out_takes_the_class_default() {
        let spec = |model_type| resolve(&with(model_type, json!({}))).unwrap().spec;
        let seen = |spec: &Spec| (spec.rope.theta, spec.norm.eps, spec.layers.len(), spec.tied);
        assert_eq!(seen(&spec("mixtral")), (1e6, 1e-5, 32, false));
        assert_eq!(seen(&spec("phimoe")), (1e6, 1e-5, 32, false));
        assert_eq!(seen(&spec("olmoe")), (1e4, 1e-5, 16, false));
        assert_eq!(seen(&spec("qwen2_moe")), (1e4, 1e-6, 24, false));
        assert_eq!(seen(&spec("qwen3_moe")), (1e4, 1e-6, 24, false));
        assert_eq!(seen(&spec("deepseek")), (1e4, 1e-6, 30, false));
        assert_eq!(seen(&spec("deepseek_v2")), (1e4, 1e-6, 32, false));
        assert_eq!(seen(&spec("deepseek_v3")), (1e4, 1e-6, 61, false));
        let Attention::Grouped(olmoe) = spec("olmoe").attention else { panic!("olmoe has grouped attention") };
        assert_eq!((olmoe.kv_heads, olmoe.clip), (16, None));
        let Attention::Grouped(qwen) = spec("qwen2_moe").attention else { panic!("qwen2_moe has grouped attention") };
        assert!(qwen.qkv_bias && !qwen.output_bias);
        let Attention::Latent(v3) = spec("deepseek_v3").attention else { panic!("deepseek_v3 has latent attention") };
        assert_eq!(v3.q_rank, Some(1536));
        assert_eq!(spec("deepseek_v3").rope.pairing, Pairing::Interleaved);
        assert_eq!(spec("deepseek_v3").moe(3).unwrap().router.renormalize, Some(1e-20));
        assert_eq!(spec("qwen3_moe").moe(3).unwrap().router.renormalize, None);
    }

    #[test]
    fn a_value_that_is_not_implemented_is_refused_by_key_and_value() {
        let yarn = json!({"type": "yarn", "factor": 4.0});
        let refused = [
            ("mixtral", json!({"hidden_act": "gelu"}), "hidden_act = \"gelu\""),
            ("mixtral", json!({"rope_scaling": {"type": "linear", "factor": 2.0}}), "rope_scaling.type = \"linear\""),
            ("qwen3_moe", json!({"rope_parameters": {"rope_type": "llama3"}}), "rope_parameters.rope_type = \"llama3\""),
            ("qwen3_moe", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor = 0.5"),
            ("qwen2_moe", json!({"use_sliding_window": true}), "use_sliding_window = true"),
            ("qwen3_moe", json!({"use_sliding_window": true}), "use_sliding_window = true"),
            ("olmoe", json!({"sliding_window": 128}), "sliding_window = 128"),
            ("olmoe", json!({"head_dim": 64}), "head_dim = 64"),
            ("phimoe", json!({"num_experts_per_tok": 1}), "num_experts_per_tok = 1"),
            ("phimoe", json!({"rope_scaling": yarn}), "rope_scaling.type = \"yarn\""),
            ("deepseek", json!({"scoring_func": "sigmoid"}), "scoring_func = \"sigmoid\""),
            ("deepseek", json!({"rope_scaling": yarn}), "rope_scaling.type = \"yarn\""),
            ("deepseek_v2", json!({"topk_method": "noaux_tc"}), "topk_method = \"noaux_tc\""),
            ("deepseek_v2", json!({"scoring_func": "sigmoid"}), "scoring_func = \"sigmoid\""),
            ("deepseek_v2", json!({"mlp_bias": true}), "mlp_bias = true"),
            ("deepseek_v2", json!({"moe_layer_freq": 2}), "moe_layer_freq = 2"),
            ("deepseek_v2", json!({"num_key_value_heads": 4}), "num_key_value_heads = 4"),
            ("deepseek_v3", json!({"scoring_func": "softmax"}), "scoring_func = \"softmax\""),
            ("deepseek_v3", json!({"topk_method": "greedy"}), "topk_method = \"greedy\""),
        ];
        for (model_type, change, said) in refused {
            let error = resolve(&with(model_type, change)).unwrap_err().to_string();
            assert!(error.contains(said) && error.contains(model_type), "{error}");
        }
    }

    #[test]
    fn what_cannot_be_is_said() {
        let wrong = [
            ("mixtral", json!({"num_key_value_heads": 5}), "does not divide num_attention_heads = 32"),
            ("mixtral", json!({"num_experts_per_tok": 9}), "exceeds the 8 experts"),
            ("mixtral", json!({"hidden_size": "big"}), "hidden_size is \"big\", but has to be a whole number"),
            ("mixtral", json!({"hidden_size": 0}), "at least 1"),
            ("mixtral", json!({"hidden_size": null}), "hidden_size is missing"),
            ("mixtral", json!({"num_experts": 8, "num_local_experts": 16}), "num_experts = 8, but num_local_experts = 16"),
            ("mixtral", json!({"num_hidden_layers": 1_000_000}), "at most 4096"),
            ("qwen3_moe", json!({"decoder_sparse_step": 25}), "none of the 24 layers has experts"),
            ("deepseek", json!({"n_routed_experts": null}), "n_routed_experts is missing"),
            ("deepseek_v2", json!({"num_experts_per_tok": null}), "num_experts_per_tok is missing"),
            ("deepseek_v2", json!({"topk_method": "group_limited_greedy"}), "n_group is missing"),
            ("deepseek_v3", json!({"n_group": 7}), "does not divide the 64 experts"),
            ("deepseek_v3", json!({"topk_group": 9}), "topk_group = 9 exceeds n_group = 8"),
            ("deepseek_v3", json!({"topk_group": 1, "num_experts_per_tok": 9}), "exceeds the 8 experts of topk_group = 1"),
            ("deepseek_v3", json!({"n_group": 64}), "one expert a group"),
            ("mistral", json!({}), "supported are deepseek, deepseek_v2, deepseek_v3, mixtral, olmoe, phimoe, qwen2_moe, qwen3_moe"),
        ];
        for (model_type, change, said) in wrong {
            let error = resolve(&with(model_type, change)).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        assert!(resolve(&json!({})).unwrap_err().to_string().contains("no model_type"));
    }

    #[test]
    fn experts_are_counted_under_any_name() {
        for key in EXPERT_COUNTS {
            let spec = resolve(&json!({"model_type": "qwen3_moe", key: 32})).unwrap().spec;
            assert_eq!(spec.moe(0).unwrap().experts, 32);
        }
    }

    #[test]
    fn unknown_keys_are_listed() {
        let config = json!({
            "model_type": "deepseek_v2", "num_experts_per_tok": 2, "norm_topk_prob": true, "attn_logit_softcapping": 30.0,
            "rope_scaling": {"type": "yarn", "factor": 40, "attn_temperature": 2}, "use_cache": true,
        });
        let resolved = resolve(&config).unwrap();
        assert_eq!(resolved.unknown, ["attn_logit_softcapping", "norm_topk_prob", "rope_scaling.attn_temperature"]);
        assert_eq!(resolved.spec.moe(0).unwrap().router.renormalize, None);
    }

    #[test]
    fn layers_slide_where_layer_types_say_so() {
        let types = json!(["sliding_attention", "full_attention", "sliding_attention"]);
        let config = |model_type: &str, types: &Value| json!({"model_type": model_type, "num_hidden_layers": 3, "use_sliding_window": true, "sliding_window": 8, "layer_types": types});
        let windows = |config| resolve(&config).map(|resolved| resolved.spec.layers.iter().map(|layer| layer.window).collect::<Vec<_>>());
        assert_eq!(windows(config("qwen2_moe", &types)).unwrap(), [Some(8), None, Some(8)]);
        assert!(windows(config("qwen3_moe", &types)).unwrap_err().to_string().contains("slides them all"));
        assert_eq!(windows(config("qwen3_moe", &json!(vec!["sliding_attention"; 3]))).unwrap(), [Some(8); 3]);
        assert!(windows(config("qwen2_moe", &json!(vec!["chunked_attention"; 3]))).is_err());
        assert!(windows(config("qwen2_moe", &json!(["full_attention"]))).unwrap_err().to_string().contains("a list of 3 strings"));
        assert_eq!(windows(json!({"model_type": "mixtral", "sliding_window": 8, "num_hidden_layers": 2})).unwrap(), [Some(8); 2]);
        // As transformers 5 writes a qwen2_moe that does not slide.
        let off = json!({"model_type": "qwen2_moe", "num_hidden_layers": 1, "sliding_window": 0, "layer_types": ["full_attention"]});
        assert_eq!(windows(off).unwrap(), [None]);
    }

    #[test]
    fn dense_layers_stand_where_each_family_puts_them() {
        let dense = |config: Value| -> Vec<usize> {
            let layers = resolve(&config).unwrap().spec.layers;
            (0..layers.len()).filter(|layer| matches!(layers[*layer].mlp, Mlp::Dense { .. })).collect()
        };
        let qwen = json!({"model_type": "qwen3_moe", "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]});
        assert_eq!(dense(qwen), [0, 2, 3, 4]);
        let sixteen = json!({"num_hidden_layers": 6, "first_k_dense_replace": 1, "moe_layer_freq": 2});
        assert_eq!(dense(with("deepseek", sixteen)), [0, 1, 3, 5]);
        assert_eq!(dense(with("deepseek_v3", json!({"num_hidden_layers": 5}))), [0, 1, 2]);
    }
}
