//! Completions that the model writes itself for demonstrations without any.
//!
//! What a model would have said is what its experts are for: EASY-EP keeps more of a domain on prompts with the model's own completions
//! than with references or on prompts alone (arXiv 2504.06792).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::write::Hold;

/// How they are written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Generate {
    /// Most tokens of a completion; it ends earlier where the model ends it.
    pub tokens: usize,
    /// What logits are divided by; 0 takes the likeliest token.
    pub temperature: f64,
    /// Completions of equally long prompts that are written side by side.
    pub at_once: usize,
    /// Where the routed experts are meanwhile.
    pub experts: Hold,
}

impl Default for Generate {
    fn default() -> Self {
        Self { tokens: 512, temperature: 0.0, at_once: super::write::at_once(), experts: Hold::default() }
    }
}

impl Generate {
    /// Knobs that have no meaning: the knob and what is wrong with it.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let least = [("tokens", self.tokens), ("at_once", self.at_once)].into_iter().filter(|(_, value)| *value == 0);
        let mut found: Vec<_> = least.map(|(knob, _)| (knob, format!("{knob} = 0; ask for at least 1"))).collect();
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            found.push(("temperature", format!("temperature = {}; ask for 0 (the likeliest token) or more", self.temperature)));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_has_a_default_and_what_has_no_meaning_is_told() {
        assert_eq!(serde_json::from_str::<Generate>("{}").unwrap(), Generate::default());
        assert!(serde_json::from_str::<Generate>(r#"{"token": 1}"#).unwrap_err().to_string().contains("unknown field `token`"));
        assert!(Generate::default().problems().is_empty());
        let wrong = Generate { tokens: 0, temperature: -1.0, ..Generate::default() };
        assert_eq!(wrong.problems().into_iter().map(|(knob, _)| knob).collect::<Vec<_>>(), ["tokens", "temperature"]);
    }
}
