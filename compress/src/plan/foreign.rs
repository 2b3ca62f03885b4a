//! A plan in the words of other tools, so that they quantize with widths that were chosen here.
//!
//! * GPTQModel: `dynamic`, regular expressions over modules in an ordered object, the first that matches counts (specs: formats 2.4).
//! * llm-compressor: a recipe with one config group a (bits, group, grid), targets as anchored expressions.
//! * llama-quantize: `--tensor-type-file`, a line `tensor=type` a stacked tensor. Its types are not ours: the widths come from a
//!   program of its own over stacks, in which a matrix of `b` bits takes what the type named beside it takes, and loses what ours does.

use std::collections::BTreeMap;
use std::fmt::Write;

use calib::arch::{Part, Projection};
use kernels::Group;
use serde_json::{Map, Value, json};

use super::widths::Prepared;
use super::{Action, Measured, Plan, Shape};
use crate::allocate::{Allocate, Choice, Matrix, Runtime, Undecided};
use crate::quantize::Grid;
use crate::{Error, Result};

/// A tool that quantizes by a plan of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// llama.cpp's `llama-quantize --tensor-type-file FILE`.
    LlamaQuantize,
    /// GPTQModel's `QuantizeConfig(dynamic=…)`.
    GptqModel,
    /// llm-compressor's `oneshot(recipe=FILE)`.
    LlmCompressor,
}

impl Tool {
    /// Its name, and that of the file.
    pub fn file(self) -> &'static str {
        match self {
            Self::LlamaQuantize => "llama-quantize.txt",
            Self::GptqModel => "gptqmodel.json",
            Self::LlmCompressor => "llm-compressor.yaml",
        }
    }
}

/// What a tool is given of a plan, as the text of a file.
///
/// # Errors
///
/// [`Error::Foreign`] for widths that the tool has none of.
pub fn of_plan(plan: &Plan, tool: Tool) -> Result<String> {
    match tool {
        Tool::GptqModel => whole(plan, "GPTQModel").and_then(|()| gptqmodel(plan)),
        Tool::LlmCompressor => whole(plan, "llm-compressor").and_then(|()| llm_compressor(plan)),
        Tool::LlamaQuantize => Err(refused("llama-quantize", "its types are other ones: share out the budget with its own program".into())),
    }
}

fn refused(tool: &'static str, what: String) -> Error {
    Error::Foreign { tool, what }
}

const DROPS: &str = "allocate.drop lets experts put out a constant, which the tool does not know; leave it out";

/// Refuses a plan that drops experts.
fn whole(plan: &Plan, tool: &'static str) -> Result<()> {
    let drops = plan.tensors.values().any(|action| matches!(action, Action::Substitute(_)));
    if drops { Err(refused(tool, DROPS.into())) } else { Ok(()) }
}

fn module(tensor: &str) -> &str {
    tensor.strip_suffix(".weight").unwrap_or(tensor)
}

fn escaped(module: &str) -> String {
    module.replace('.', "\\.")
}

/// The widths of a plan's quantized matrices, by name.
fn widths(plan: &Plan) -> impl Iterator<Item = (&str, Choice)> {
    plan.tensors.iter().filter_map(|(name, action)| match action {
        Action::Quantize(q) => Some((name.as_str(), Choice { bits: q.bits, group: q.group, grid: q.grid })),
        _ => None,
    })
}

/// Whether codes are signed around zero; `None` for a grid that integer tools have none of.
fn symmetric(grid: Grid) -> Option<bool> {
    match grid {
        Grid::Sym => Some(true),
        Grid::Asym => Some(false),
        Grid::Half | Grid::Offset => None,
    }
}

fn gptqmodel(plan: &Plan) -> Result<String> {
    const TOOL: &str = "GPTQModel";
    // The commonest width is that of the whole config, the others are exceptions to it.
    let mut counts: BTreeMap<Choice, usize> = BTreeMap::new();
    widths(plan).for_each(|(_, choice)| *counts.entry(choice).or_default() += 1);
    let common = counts.iter().max_by_key(|(choice, count)| (**count, std::cmp::Reverse(**choice))).map(|(choice, _)| *choice);
    let common = common.ok_or_else(|| refused(TOOL, "the plan quantizes nothing".into()))?;
    let settings = |name: &str, choice: &Choice| -> Result<Map<String, Value>> {
        let sym =
            symmetric(choice.grid).ok_or_else(|| refused(TOOL, format!("{name}: {choice}; it has symmetric and integer zeros alone")))?;
        if !matches!(choice.bits, 2 | 3 | 4 | 8) {
            return Err(refused(TOOL, format!("{name}: {choice}; it has 2, 3, 4 and 8 bits")));
        }
        let group = match choice.group {
            Group::Size(size) => json!(size),
            Group::PerChannel => json!(-1),
        };
        Ok([("bits".into(), json!(choice.bits)), ("group_size".into(), group), ("sym".into(), json!(sym))].into_iter().collect())
    };
    let mut dynamic = Map::new();
    for (name, action) in &plan.tensors {
        let module = escaped(module(name));
        match action {
            Action::Quantize(q) => {
                let choice = Choice { bits: q.bits, group: q.group, grid: q.grid };
                let settings = settings(name, &choice)?;
                if choice != common {
                    dynamic.insert(format!("+:^{module}$"), Value::Object(settings));
                }
            }
            // Norms and biases are no modules that it would quantize; a router or an excluded matrix is.
            Action::Keep | Action::Refit if name.ends_with(".weight") && name.contains(".layers.") && !name.contains("norm") => {
                dynamic.insert(format!("-:^{module}$"), json!({}));
            }
            Action::Keep | Action::Refit | Action::Substitute(_) | Action::Drop { .. } => {}
        }
    }
    let mut config = settings("the commonest width", &common)?;
    config.insert("desc_act".into(), json!(false));
    config.insert("dynamic".into(), Value::Object(dynamic));
    Ok(serde_json::to_string_pretty(&config).map_err(std::io::Error::from)? + "\n")
}

fn llm_compressor(plan: &Plan) -> Result<String> {
    const TOOL: &str = "llm-compressor";
    let mut groups: BTreeMap<Choice, Vec<&str>> = BTreeMap::new();
    widths(plan).for_each(|(name, choice)| groups.entry(choice).or_default().push(module(name)));
    let mut text =
        "quantization_stage:\n  quantization_modifiers:\n    GPTQModifier:\n      ignore: [\"lm_head\"]\n      config_groups:\n".to_owned();
    for (i, (choice, names)) in groups.iter().enumerate() {
        let symmetric = symmetric(choice.grid)
            .ok_or_else(|| refused(TOOL, format!("{}: {choice}; it has symmetric and integer zeros alone", names[0])))?;
        let (strategy, size) = match choice.group {
            Group::Size(size) => ("group", format!("            group_size: {size}\n")),
            Group::PerChannel => ("channel", String::new()),
        };
        // Writing into a String cannot fail.
        let _ = write!(
            text,
            "        group_{i}:\n          weights:\n            num_bits: {}\n            type: \"int\"\n            symmetric: {symmetric}\n            strategy: \"{strategy}\"\n{size}          targets:\n",
            choice.bits
        );
        for name in names {
            let _ = writeln!(text, "            - \"re:^{}$\"", name.replace('.', "[.]"));
        }
    }
    Ok(text)
}

/// Types of llama.cpp by bits, with what a weight takes in each: blocks of 256 (k-quants) or 32 weights.
const GGML: [(u8, &str, usize); 6] =
    [(2, "q2_K", 256), (3, "q3_K", 256), (4, "q4_K", 256), (5, "q5_K", 256), (6, "q6_K", 256), (8, "q8_0", 32)];

/// The widths of llama-quantize's types for a budget, as its `--tensor-type-file`; and how they were chosen.
///
/// # Errors
///
/// [`Error::Foreign`] where a stack's rows are no whole number of blocks or `choices` has no width that a type stands for,
/// [`Error::Undecided`] for a budget that its types do not meet.
pub fn llama_quantize(allocate: &Allocate, shape: &Shape, measured: Option<&Measured>) -> Result<(String, crate::allocate::Account)> {
    const TOOL: &str = "llama-quantize";
    let asked = Prepared::new(allocate, shape, measured);
    if allocate.drop.is_some() {
        return Err(refused(TOOL, DROPS.into()));
    }
    let allocate = Allocate { runtime: Some(Runtime::Gguf), untied: false, ..allocate.clone() };
    let prepared = Prepared::new(&allocate, shape, measured);
    if !prepared.choices.iter().any(|c| GGML.iter().any(|(bits, ..)| *bits == c.bits)) {
        return Err(refused(TOOL, "none of allocate.choices has 2, 3, 4, 5, 6 or 8 bits".into()));
    }
    let smallest = GGML.iter().filter(|(bits, ..)| prepared.choices.iter().any(|c| c.bits == *bits)).min_by_key(|(bits, ..)| *bits);
    if let Some((_, name, block)) = smallest
        && let Some(m) = prepared.matrices.iter().find(|m| !m.shape[1].is_multiple_of(*block))
    {
        return Err(refused(
            TOOL,
            format!("{}: its {} inputs are no multiple of the {block} weights of a block of {name}", m.name, m.shape[1]),
        ));
    }
    let decision = prepared.decide(asked.bytes)?;
    let mut lines: BTreeMap<(usize, &'static str), &'static str> = BTreeMap::new();
    for (matrix, &option) in prepared.matrices.iter().zip(&decision.chosen) {
        // Nothing is dropped where drop is not asked for.
        let Some(option) = option else { continue };
        let bits = prepared.choices[option].bits;
        let Some((_, name, block)) = GGML.iter().find(|(b, ..)| *b == bits) else {
            return Err(Undecided::NoChoice { name: matrix.name.clone(), tied: 0, objections: Vec::new() }.into());
        };
        if !matrix.shape[1].is_multiple_of(*block) {
            return Err(refused(TOOL, format!("{}: its {} inputs are no multiple of the {block} of {name}", matrix.name, matrix.shape[1])));
        }
        let stack = stack(matrix).ok_or_else(|| refused(TOOL, format!("{}: llama.cpp stores it under another shape", matrix.name)))?;
        lines.insert((matrix.layer, stack), name);
    }
    let text = lines.iter().map(|((layer, stack), name)| format!("^blk\\.{layer}\\.{stack}\\.weight$={name}\n")).collect();
    Ok((text, decision.account))
}

/// The tensor of a layer that a matrix lies in.
fn stack(matrix: &Matrix) -> Option<&'static str> {
    use Projection::{Down, Gate, Up};
    Some(match matrix.part {
        Part::Query => "attn_q",
        Part::Key => "attn_k",
        Part::Value => "attn_v",
        Part::Output => "attn_output",
        Part::QueryA => "attn_q_a",
        Part::QueryB => "attn_q_b",
        Part::KvA => "attn_kv_a_mqa",
        Part::Expert(_, Gate) => "ffn_gate_exps",
        Part::Expert(_, Up) => "ffn_up_exps",
        Part::Expert(_, Down) => "ffn_down_exps",
        Part::Shared(Gate) => "ffn_gate_shexp",
        Part::Shared(Up) => "ffn_up_shexp",
        Part::Shared(Down) => "ffn_down_shexp",
        Part::Dense(Gate) => "ffn_gate",
        Part::Dense(Up) => "ffn_up",
        Part::Dense(Down) => "ffn_down",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Quantize, Solver};
    use kernels::ScaleType;

    fn quantize(bits: u8, grid: Grid, group: Group) -> Action {
        Action::Quantize(Quantize { bits, group, grid, scale: ScaleType::Bf16, solver: Solver::Planned, dead_channels: 0 })
    }

    fn plan(tensors: &[(&str, Action)]) -> Plan {
        let empty = json!({ "schema": 1, "model": "m", "corpus": null, "quantizer": null, "tensors": {} });
        let mut plan: Plan = serde_json::from_value(empty).unwrap();
        plan.tensors = tensors.iter().map(|(name, action)| ((*name).to_owned(), action.clone())).collect();
        plan
    }

    fn three() -> Plan {
        let size = Group::Size(128);
        plan(&[
            ("model.layers.0.a.weight", quantize(4, Grid::Sym, size)),
            ("model.layers.0.b.weight", quantize(4, Grid::Sym, size)),
            ("model.layers.1.a.weight", quantize(2, Grid::Asym, Group::PerChannel)),
            ("model.layers.1.gate.weight", Action::Keep),
            ("model.layers.1.input_layernorm.weight", Action::Keep),
            ("model.norm.weight", Action::Keep),
        ])
    }

    #[test]
    fn gptqmodel_takes_the_commonest_width_and_exceptions() {
        let text = of_plan(&three(), Tool::GptqModel).unwrap();
        let found: Value = serde_json::from_str(&text).unwrap();
        let expected = json!({
            "bits": 4, "group_size": 128, "sym": true, "desc_act": false,
            "dynamic": { "+:^model\\.layers\\.1\\.a$": { "bits": 2, "group_size": -1, "sym": false }, "-:^model\\.layers\\.1\\.gate$": {} },
        });
        assert_eq!(found, expected);
        let five = plan(&[("model.layers.0.a.weight", quantize(5, Grid::Sym, Group::Size(32)))]);
        let said = of_plan(&five, Tool::GptqModel).unwrap_err().to_string();
        assert!(said.contains("model.layers.0.a.weight: 5 bits sym") && said.contains("2, 3, 4 and 8"), "{said}");
    }

    #[test]
    fn llm_compressor_takes_a_group_a_width() {
        let text = of_plan(&three(), Tool::LlmCompressor).unwrap();
        let groups = text.matches("num_bits").count();
        assert_eq!((groups, text.matches("re:^").count(), text.matches("strategy: \"channel\"").count()), (2, 3, 1));
        assert!(text.contains("- \"re:^model[.]layers[.]1[.]a$\"\n"), "{text}");
        let half = plan(&[("x.weight", quantize(1, Grid::Half, Group::Size(32)))]);
        assert!(of_plan(&half, Tool::LlmCompressor).unwrap_err().to_string().contains("1 bits half"));
    }
}
