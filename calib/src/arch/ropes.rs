//! Rotary embedding from a config, in both dialects: `rope_theta` beside `rope_scaling`, or `rope_parameters` with both inside.

use serde_json::{Map, Value};

use super::family::{Family, RopeWord};
use super::keys::Keys;
use super::{Pairing, Rope, RopeScaling};
use crate::{Error, Result};

/// The rope of a model whose heads rotate `dim` elements, the factor that latent attention squares into its softmax scale
/// (YaRN's `mscale_all_dim`), and the keys inside the rope object that nobody knows.
pub(super) fn resolve(keys: &Keys<'_>, family: &Family, dim: usize, pairing: Pairing) -> Result<(Rope, f64, Vec<String>)> {
    if !dim.is_multiple_of(2) {
        return Err(Error::Contradiction { what: format!("rotary embedding turns pairs, but a head rotates {dim} elements") });
    }
    whole_head(keys)?;
    let base = keys.optional_float("rope_theta")?.or_else(|| keys.default("rope_theta").as_ref().and_then(Value::as_f64));
    let base = base.map_or_else(|| keys.float("rope_theta"), Ok)?;
    let Some((name, map)) = object(keys)? else {
        return Ok((Rope { dim, theta: base, pairing, scaling: RopeScaling::None }, 1.0, Vec::new()));
    };
    let inside = keys.inside(name, map);
    whole_head(&inside)?;
    if let Some((key, nested)) = map.iter().find(|(_, value)| value.is_object()) {
        return Err(inside.unsupported(key, nested, "one rope for all layers"));
    }
    let theta = inside.optional_float("rope_theta")?.unwrap_or(base);
    let (scaling, mscale) = match kind(&inside)?.as_str() {
        "default" => (RopeScaling::None, 1.0),
        "yarn" if family.ropes.contains(&RopeWord::Yarn) => yarn(keys, &inside)?,
        "longrope" if family.ropes.contains(&RopeWord::LongRopeMscale) => {
            let mscales = (inside.float("short_mscale")?, inside.float("long_mscale")?);
            // Known, and overruled by the two.
            let _ = (inside.stated("factor"), inside.stated("attention_factor"));
            (long_rope(keys, &inside, dim, mscales)?, 1.0)
        }
        "longrope" if family.ropes.contains(&RopeWord::LongRope) => {
            let mscale = long_rope_attention(keys, &inside)?;
            (long_rope(keys, &inside, dim, (mscale, mscale))?, 1.0)
        }
        other => {
            let supported = family.ropes.iter().map(|word| if *word == RopeWord::Yarn { ", yarn" } else { ", longrope" });
            let key = if map.contains_key("rope_type") { "rope_type" } else { "type" };
            return Err(inside.unsupported(key, &Value::from(other), format!("default{}", supported.collect::<String>())));
        }
    };
    positive(&inside, "rope_theta", theta)?;
    Ok((Rope { dim, theta, pairing, scaling }, mscale, inside.unread()))
}

/// The one rope object of the config.
fn object<'a>(keys: &Keys<'a>) -> Result<Option<(&'static str, &'a Map<String, Value>)>> {
    let (old, new) = (keys.object("rope_scaling")?, keys.object("rope_parameters")?);
    match (old, new) {
        (Some(old), Some(new)) if old != new => {
            Err(Error::Contradiction { what: "rope_scaling and rope_parameters are both given and differ".into() })
        }
        (Some(old), _) => Ok(Some(("rope_scaling", old))),
        (None, new) => Ok(new.map(|new| ("rope_parameters", new))),
    }
}

fn kind(inside: &Keys<'_>) -> Result<String> {
    let (new, old) = (inside.optional_text("rope_type")?, inside.optional_text("type")?);
    match (new, old) {
        (Some(new), Some(old)) if new != old => Err(Error::Contradiction { what: format!("rope_type is {new}, but type is {old}") }),
        (new, old) => Ok(new.or(old).unwrap_or_else(|| "default".into())),
    }
}

/// Refuses a rotation of a part of the head.
fn whole_head(keys: &Keys<'_>) -> Result<()> {
    match keys.optional_float("partial_rotary_factor")? {
        Some(factor) if factor != 1.0 => Err(keys.unsupported("partial_rotary_factor", &Value::from(factor), "1")),
        _ => Ok(()),
    }
}

fn positive(keys: &Keys<'_>, key: &str, value: f64) -> Result<f64> {
    if value > 0.0 { Ok(value) } else { Err(keys.wrong(key, &Value::from(value), "a number above 0")) }
}

/// The context of training: beside the rope object it has priority, and without either it is the whole context.
fn original(keys: &Keys<'_>, inside: &Keys<'_>) -> Result<usize> {
    let outside = keys.optional_size("original_max_position_embeddings")?;
    let within = inside.optional_size("original_max_position_embeddings")?;
    match (outside, within) {
        (Some(outside), Some(within)) if outside != within => Err(Error::Contradiction {
            what: format!("original_max_position_embeddings is {outside}, but inside the rope object it is {within}"),
        }),
        _ => outside.or(within).map_or_else(|| keys.size("max_position_embeddings"), Ok),
    }
}

/// How far the context is stretched: `factor`, where null by the ratio of the contexts.
fn stretch(keys: &Keys<'_>, inside: &Keys<'_>, original: usize) -> Result<f64> {
    let factor = match inside.optional_float("factor")? {
        Some(factor) => factor,
        None => keys.size("max_position_embeddings")? as f64 / original as f64,
    };
    positive(inside, "factor", factor)
}

/// YaRN (arXiv 2309.00071): its scaling, and the factor that latent attention squares into its softmax scale.
fn yarn(keys: &Keys<'_>, inside: &Keys<'_>) -> Result<(RopeScaling, f64)> {
    let original = original(keys, inside)?;
    if inside.stated("factor").is_none() {
        inside.float("factor")?;
    }
    let factor = stretch(keys, inside, original)?;
    // 0 counts as left out, as it does for the reference.
    let nonzero = |key: &str| inside.optional_float(key).map(|value| value.filter(|value| *value != 0.0));
    let (mscale, all_dim) = (nonzero("mscale")?, nonzero("mscale_all_dim")?);
    let derived = match (mscale, all_dim) {
        (Some(mscale), Some(all_dim)) => yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim),
        _ => yarn_mscale(factor, 1.0),
    };
    let scaling = RopeScaling::Yarn {
        factor,
        original,
        beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
        beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
        truncate: inside.optional_flag("truncate")?.unwrap_or(true),
        attention_factor: inside.optional_float("attention_factor")?.unwrap_or(derived),
    };
    Ok((scaling, all_dim.map_or(1.0, |all_dim| yarn_mscale(factor, all_dim))))
}

/// `0.1 · m · ln(factor) + 1`, the paper's attention temperature with m = 1.
fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

fn long_rope(keys: &Keys<'_>, inside: &Keys<'_>, dim: usize, (short_mscale, long_mscale): (f64, f64)) -> Result<RopeScaling> {
    let factors = |key: &str| {
        let factors = inside.floats(key)?;
        if factors.len() != dim / 2 || factors.iter().any(|factor| *factor <= 0.0) {
            let stated = inside.value(key).unwrap_or_default();
            return Err(inside.wrong(key, &stated, format!("{} numbers above 0, one a rotated pair", dim / 2)));
        }
        Ok(factors)
    };
    Ok(RopeScaling::LongRope {
        original: original(keys, inside)?,
        short: factors("short_factor")?,
        long: factors("long_factor")?,
        short_mscale,
        long_mscale,
    })
}

/// LongRoPE's factor on cosine and sine where the config has none for short and long of its own (arXiv 2402.13753).
fn long_rope_attention(keys: &Keys<'_>, inside: &Keys<'_>) -> Result<f64> {
    let original = original(keys, inside)?;
    let factor = stretch(keys, inside, original)?;
    let derived = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() };
    Ok(inside.optional_float("attention_factor")?.unwrap_or(derived))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::arch::{Attention, Spec};

    fn spec(config: Value) -> Spec {
        super::super::resolve(&config).unwrap().spec
    }

    fn close(got: &[f64], reference: &[f64]) {
        assert_eq!(got.len(), reference.len());
        for (a, b) in got.iter().zip(reference) {
            // The reference computes in f32.
            assert!((a / b - 1.0).abs() < 1e-6, "{got:?} {reference:?}");
        }
    }

    /// A config whose heads rotate 16 elements.
    fn sixteen(model_type: &str, rope: Value) -> Value {
        json!({
            "model_type": model_type, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
            "max_position_embeddings": 4096, "rope_theta": 10000.0, "rope_scaling": rope,
        })
    }

    #[test]
    fn yarn_gives_the_reference_frequencies() {
        // transformers 5.17, ROPE_INIT_FUNCTIONS["yarn"].
        let rounded = [1.0, 3.162277639e-01, 8.125000447e-02, 1.976423711e-02, 4.375000019e-03, 7.905694656e-04, 2.5e-04, 7.905694656e-05];
        let exact = [1.0, 3.162277639e-01, 8.539863676e-02, 1.912677661e-02, 3.556971438e-03, 7.905694656e-04, 2.5e-04, 7.905694656e-05];
        for (truncate, reference) in [(true, rounded), (false, exact)] {
            let rope = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "truncate": truncate});
            let (frequencies, factor) = spec(sixteen("qwen3_moe", rope)).rope.frequencies(7);
            close(&frequencies, &reference);
            close(&[factor], &[1.138629436111989]);
        }
    }

    #[test]
    fn yarn_of_deepseek_scales_the_softmax() {
        // transformers 5.17, DeepseekV3Attention.scaling and ROPE_INIT_FUNCTIONS["yarn"].
        let cases = [
            (json!({"mscale": 1.0, "mscale_all_dim": 0.707}), 0.3289117225658471, 1.053118360780668),
            (json!({}), 0.25, 1.2079441541679836),
            (json!({"mscale": 0.5}), 0.25, 1.2079441541679836),
        ];
        for (mscales, scale, factor) in cases {
            let mut rope = json!({"type": "yarn", "factor": 8, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1});
            rope.as_object_mut().unwrap().extend(mscales.as_object().unwrap().clone());
            let spec = spec(json!({
                "model_type": "deepseek_v3", "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "rope_scaling": rope, "rope_theta": 10000
            }));
            let (frequencies, got) = spec.rope.frequencies(7);
            close(&frequencies, &[1.0, 5.625000224e-02, 1.249999972e-03, 1.250000059e-04]);
            close(&[got], &[factor]);
            let Attention::Latent(latent) = spec.attention else { panic!("deepseek_v3 has latent attention") };
            close(&[f64::from(latent.scale)], &[scale]);
        }
    }

    #[test]
    fn long_factors_begin_past_the_original_context() {
        // transformers 4.57.3, PhimoeRotaryEmbedding at 32 and 33 tokens: angle at position 1, length of (cosine, sine).
        let rope = json!({
            "type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 1.6, 3.0, 6.0], "short_mscale": 1.1,
            "long_mscale": 1.2, "original_max_position_embeddings": 32
        });
        let rope = spec(json!({
            "model_type": "phimoe", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "rope_scaling": rope,
            "original_max_position_embeddings": 32, "rope_theta": 10000.0,
        }));
        let (short, factor) = rope.rope.frequencies(32);
        close(&short, &[0.9999999403953552, 0.09090908616781235, 0.007692307233810425, 0.0005882353289052844]);
        close(&[factor], &[1.1]);
        let (long, factor) = rope.rope.frequencies(33);
        close(&long, &[0.9999999403953552, 0.0624999925494194, 0.0033333334140479565, 0.00016666666488163173]);
        close(&[factor], &[1.2]);
    }

    #[test]
    fn longrope_without_mscales_stretches_by_the_contexts() {
        // transformers 5.17, ROPE_INIT_FUNCTIONS["longrope"]: sqrt(1 + ln 4 / ln 1024).
        let (short, long): (Vec<f64>, Vec<f64>) = ((0..8).map(|i| 1.0 + 0.1 * f64::from(i)).collect(), (1..9).map(f64::from).collect());
        let rope = json!({"type": "longrope", "short_factor": short, "long_factor": long, "original_max_position_embeddings": 1024});
        let rope = spec(sixteen("mixtral", rope)).rope;
        let (frequencies, factor) = rope.frequencies(1024);
        close(
            &frequencies,
            &[1.0, 2.874797583e-01, 8.333333582e-02, 2.432521433e-02, 7.142857183e-03, 2.108185319e-03, 6.249999860e-04, 1.860163320e-04],
        );
        close(&[factor], &[1.0954451150103321]);
        let (frequencies, factor) = rope.frequencies(1025);
        close(
            &frequencies,
            &[1.0, 1.581138819e-01, 3.333333507e-02, 7.905694656e-03, 2.000000095e-03, 5.270463298e-04, 1.428571413e-04, 3.952847328e-05],
        );
        close(&[factor], &[1.0954451150103321]);
    }

    #[test]
    fn both_dialects_say_the_same() {
        let yarn = |spelling: &str| json!({spelling: "yarn", "factor": 8, "original_max_position_embeddings": 64});
        let old = spec(json!({"model_type": "deepseek_v3", "rope_theta": 5000.0, "rope_scaling": yarn("type")}));
        let mut inside = yarn("rope_type");
        inside["rope_theta"] = json!(5000.0);
        let new = spec(json!({"model_type": "deepseek_v3", "rope_parameters": inside}));
        assert_eq!(old, new);
        let plain = spec(json!({"model_type": "mixtral", "rope_parameters": {"rope_type": "default"}, "rope_theta": 5000.0}));
        assert_eq!((plain.rope.theta, plain.rope.scaling), (5000.0, RopeScaling::None));
        let defaulted = spec(json!({"model_type": "mixtral", "rope_parameters": {"rope_type": "default"}}));
        assert_eq!(defaulted.rope.theta, 1e6);
    }

    #[test]
    fn a_rope_that_contradicts_itself_is_refused() {
        let wrong = [
            (json!({"rope_type": "yarn", "type": "longrope"}), "rope_type is yarn, but type is longrope"),
            (json!({"type": "yarn"}), "rope_scaling.factor is missing"),
            (
                json!({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "factor": 2}),
                "8 numbers above 0, one a rotated pair",
            ),
            (json!({"full_attention": {"rope_type": "default"}}), "one rope for all layers"),
            (json!("yarn"), "rope_scaling is \"yarn\", but has to be an object"),
        ];
        for (rope, said) in wrong {
            let error = super::super::resolve(&sixteen("qwen3_moe", rope)).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}
