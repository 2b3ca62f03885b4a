//! Which module is quantized how: `config_groups` of compressed-tensors.

use std::collections::BTreeMap;

use calib::checkpoint::Checkpoint;
use kernels::Group;
use regex::Regex;
use serde::Deserialize;
use serde_json::Value;

use super::{streams, wrong};
use crate::Result;

/// `config_groups` and `ignore`, ready to be matched.
pub(super) struct Schemes {
    /// Exact names, expressions, classes: in this order they win.
    exact: Vec<(String, usize)>,
    expressions: Vec<(Regex, usize)>,
    class: Option<usize>,
    weights: Vec<WeightArguments>,
}

/// How the weights of a group are quantized.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct WeightArguments {
    pub num_bits: u8,
    #[serde(rename = "type", default = "int")]
    kind: String,
    #[serde(default = "yes")]
    pub symmetric: bool,
    strategy: Option<String>,
    group_size: Option<i64>,
    actorder: Option<String>,
}

fn int() -> String {
    "int".to_owned()
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
struct Section {
    #[serde(default)]
    format: Option<String>,
    config_groups: BTreeMap<String, ConfigGroup>,
}

#[derive(Deserialize)]
struct ConfigGroup {
    targets: Vec<String>,
    weights: Option<WeightArguments>,
    #[serde(default)]
    format: Option<String>,
    #[serde(default)]
    input_activations: Option<Value>,
}

impl WeightArguments {
    pub fn group(&self, module: &str, checkpoint: &Checkpoint) -> Result<Group> {
        let size = self.group_size.filter(|&size| size > 0).and_then(|size| usize::try_from(size).ok());
        match (self.strategy.as_deref(), size) {
            (Some("group") | None, Some(size)) => Ok(Group::Size(size)),
            (Some("channel") | None, _) => Ok(Group::PerChannel),
            (strategy, _) => Err(wrong(checkpoint, format!("{module}: the strategy {strategy:?} with group size {size:?} is not read"))),
        }
    }
}

impl Schemes {
    /// Reads the config's groups.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self> {
        let refuse = |what: String| wrong(checkpoint, what);
        let section = streams(checkpoint.config()).cloned().unwrap_or_default();
        let section: Section = serde_json::from_value(section).map_err(|error| refuse(format!("quantization_config: {error}")))?;
        let mut found = Self { exact: Vec::new(), expressions: Vec::new(), class: None, weights: Vec::new() };
        for (name, group) in section.config_groups {
            let format = group.format.or_else(|| section.format.clone()).unwrap_or_else(|| "pack-quantized".to_owned());
            let Some(weights) = group.weights else { return Err(refuse(format!("{name} quantizes no weights"))) };
            if format != "pack-quantized" || weights.kind != "int" || !(1..=8).contains(&weights.num_bits) {
                let what = format!(
                    "{name} is {format} of {} {} bits; only pack-quantized of 1 to 8 int bits is read",
                    weights.kind, weights.num_bits
                );
                return Err(refuse(what));
            }
            if group.input_activations.is_some_and(|a| !a.is_null()) {
                return Err(refuse(format!("{name} quantizes activations, which is not read")));
            }
            if let Some(order) = weights.actorder.as_deref().filter(|order| !["weight", "static"].contains(order)) {
                return Err(refuse(format!("{name}: the activation order {order:?} is not read")));
            }
            for target in group.targets {
                let index = found.weights.len();
                match target.strip_prefix("re:") {
                    // Python's `re.match` is anchored at the start only.
                    Some(expression) => {
                        let compiled = Regex::new(&format!("^(?:{expression})"));
                        let compiled = compiled.map_err(|error| refuse(format!("{name}: the target {target} is not read: {error}")))?;
                        found.expressions.push((compiled, index));
                    }
                    None if target == "Linear" => found.class = found.class.or(Some(index)),
                    None => found.exact.push((target, index)),
                }
            }
            found.weights.push(weights);
        }
        Ok(found)
    }

    /// What is said of a module: by its name, else by the first expression, else by the class `Linear`.
    pub fn of(&self, module: &str) -> Option<&WeightArguments> {
        let exact = self.exact.iter().find(|(name, _)| name == module).map(|(_, index)| *index);
        let expression = || self.expressions.iter().find(|(regex, _)| regex.is_match(module)).map(|(_, index)| *index);
        exact.or_else(expression).or(self.class).map(|index| &self.weights[index])
    }
}
