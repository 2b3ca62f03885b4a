//! PMQ, the bit allocation of MC-MoE (arXiv 2410.06270, eq. 5), as its published code really computes it.
//!
//! One integer program a layer: minimize `Σ_e φ_e^α · w_e^β · ε_{e,b}^γ` with one width `b ∈ {1, 2, 3}` an expert, at most
//! `total` bits over all experts, and, where the presence rule is on, at least one expert at 3 and one at 2 bits. The paper says
//! `(α, β, γ) = (1, 1.5, 2)`; the code never uses its γ and computes `(1, 1.5, 1)`, which reproduces all its shipped allocations.
//! Solved exactly by dynamic programming over (bytes used, a 3 seen, a 2 seen), in which a state that takes more bytes and costs more
//! than another with the same flags is dropped.
//!
//! `ε` is the error of the block's output when this expert alone is rounded by MC-MoE's trial quantizer: a sum over batches of
//! un-squared norms, so that the batch partition changes it ([`Params::batch`]).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::program::Choice;

/// Exponents and rules of PMQ.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Pmq")]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Exponent of φ, an expert's share of the selections.
    pub alpha: f64,
    /// Exponent of w, an expert's share of the full-softmax mass before top-k.
    pub beta: f64,
    /// Exponent of ε, the error of the block's output when this expert alone is quantized. 1 as the code is, 2 as the paper says.
    pub gamma: f64,
    /// Whether at least one expert must have 3 and one 2 bits.
    pub presence: Presence,
    /// Calibration samples whose errors are one norm of `ε`; MC-MoE has 8 of 2048 tokens.
    #[schemars(range(min = 1))]
    pub batch: usize,
    /// Whether every layer has a program of its own.
    pub scope: Scope,
}

impl Default for Params {
    fn default() -> Self {
        Self { alpha: 1.0, beta: 1.5, gamma: 1.0, presence: Presence::Required, batch: 8, scope: Scope::Layer }
    }
}

/// Over what bytes are shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// One program a layer, each with its share of the bytes, as PMQ has it.
    Layer,
    /// One program over all layers; there is no presence rule then.
    Model,
}

/// PMQ's presence rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Presence {
    /// At least one expert at 3 bits and one at 2.
    Required,
    /// No such rule.
    Free,
}

/// What PMQ knows of one expert.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Expert {
    /// Times it was selected, `n_e`.
    pub selections: f64,
    /// Sum of its full-softmax probabilities where it was selected, `σ_e`.
    pub mass: f64,
    /// `ε_{e,b}` for 1, 2 and 3 bits.
    pub errors: [f64; 3],
}

/// No allocation obeys the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no allocation of {experts} experts obeys a total of {total} bits; between {least} and {most} are possible")]
pub struct Infeasible {
    /// Experts of the layer.
    pub experts: usize,
    /// Bits asked for.
    pub total: usize,
    /// The smallest total that the rules allow.
    pub least: usize,
    /// The largest total that can be used.
    pub most: usize,
}

impl Params {
    /// `φ^α · w^β · ε^γ` of an expert, with φ and w as its shares of the layer's selections and mass.
    pub fn cost(&self, phi: f64, w: f64, epsilon: f64) -> f64 {
        phi.powf(self.alpha) * w.powf(self.beta) * epsilon.powf(self.gamma)
    }
}

/// Bits of every expert of one layer, `[experts]`, with at most `total` bits over all of them.
///
/// # Errors
///
/// [`Infeasible`] if the rules cannot be met.
pub fn allocate(experts: &[Expert], total: usize, params: &Params) -> Result<Vec<u8>, Infeasible> {
    let n = experts.len();
    let (selections, mass): (f64, f64) = (experts.iter().map(|e| e.selections).sum(), experts.iter().map(|e| e.mass).sum());
    let options = |e: &Expert| -> Vec<Choice> {
        let cost = |error: f64| params.cost(e.selections / selections, e.mass / mass, error);
        (1..=3).zip(e.errors).map(|(bytes, error)| Choice { bytes, loss: cost(error) }).collect()
    };
    let required: &[usize] = if params.presence == Presence::Required { &[2, 1] } else { &[] };
    let classes: Vec<Vec<Choice>> = experts.iter().map(options).collect();
    match choose(&classes, total as u64, required) {
        Some(chosen) => Ok(chosen.into_iter().map(|option| option as u8 + 1).collect()),
        None => {
            let extra = if required.is_empty() { 0 } else { 3 };
            Err(Infeasible { experts: n, total, least: n + extra, most: 3 * n - usize::from(extra > 0) })
        }
    }
}

/// A choice for the first few experts.
#[derive(Clone, Copy)]
struct State {
    /// Which of the required options have been chosen.
    seen: u8,
    bytes: u64,
    loss: f64,
    parent: u32,
    option: u32,
}

/// The options, `[experts]`, with the least loss within `bytes` where every one of the options `required` is taken by some expert; every
/// expert has the same options. `None` where there is no such choice.
pub fn choose(classes: &[Vec<Choice>], bytes: u64, required: &[usize]) -> Option<Vec<usize>> {
    let flag = |option: usize| required.iter().position(|&r| r == option).map_or(0, |i| 1_u8 << i);
    let mut levels = vec![vec![State { seen: 0, bytes: 0, loss: 0.0, parent: 0, option: 0 }]];
    for options in classes {
        let mut next = Vec::new();
        for (parent, state) in levels.last().into_iter().flatten().enumerate() {
            for (option, choice) in options.iter().enumerate().filter(|(_, c)| state.bytes + c.bytes <= bytes) {
                let (seen, loss) = (state.seen | flag(option), state.loss + choice.loss);
                next.push(State { seen, bytes: state.bytes + choice.bytes, loss, parent: parent as u32, option: option as u32 });
            }
        }
        next.sort_by(|a, b| a.seen.cmp(&b.seen).then(a.bytes.cmp(&b.bytes)).then(a.loss.total_cmp(&b.loss)));
        let mut least: (u8, f64) = (0, f64::INFINITY);
        next.retain(|state| {
            let better = state.seen != least.0 || state.loss < least.1;
            if better {
                least = (state.seen, state.loss);
            }
            better
        });
        levels.push(next);
    }
    let all = (1_u8 << required.len()) - 1;
    let last = levels.last()?;
    let mut at = (0..last.len()).filter(|&s| last[s].seen == all).min_by(|&a, &b| last[a].loss.total_cmp(&last[b].loss))?;
    let mut chosen = vec![0; classes.len()];
    for (level, option) in levels[1..].iter().zip(&mut chosen).rev() {
        *option = level[at].option as usize;
        at = level[at].parent as usize;
    }
    Some(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Statistics of Mixtral-8x7B that MC-MoE ships, and its allocations.
    fn layer(n: [f64; 8], sigma: [f64; 8], eps: [[f64; 8]; 3]) -> Vec<Expert> {
        (0..8).map(|e| Expert { selections: n[e], mass: sigma[e], errors: [eps[0][e], eps[1][e], eps[2][e]] }).collect()
    }

    fn layer_0() -> Vec<Expert> {
        layer(
            [68862., 63387., 62746., 63751., 66314., 70431., 56466., 72331.],
            [19891.64, 22812.15, 21595.75, 21344.5, 19123.95, 16804.89, 17566.24, 18464.88],
            [
                [455.0034, 3856.1067, 735.98, 663.1968, 525.4329, 434.1846, 3275.4322, 450.2718],
                [180.3979, 708.0323, 372.656, 341.5241, 273.9226, 218.0749, 677.7527, 231.7869],
                [78.2074, 369.9871, 156.3292, 143.5118, 114.7053, 92.0674, 288.9788, 97.39],
            ],
        )
    }

    fn layer_15() -> Vec<Expert> {
        layer(
            [57215., 75579., 71096., 41404., 68277., 71485., 73259., 65973.],
            [16520.23, 20950.06, 21695.99, 13733.55, 19519.83, 22127.42, 22578.1, 21265.41],
            [
                [8985.3019, 9444.3328, 10683.2902, 9922.8464, 9709.1861, 9970.1731, 10261.2159, 10843.5886],
                [7735.2966, 8232.2283, 9034.205, 7955.6494, 8293.2678, 8359.2397, 8838.6206, 9324.9939],
                [3187.4453, 3396.0761, 3739.4943, 3233.4293, 3418.2149, 3467.761, 3664.6971, 3852.9494],
            ],
        )
    }

    #[test]
    fn the_published_allocations_come_out() {
        for (total, first, middle) in [
            (12, [1, 3, 2, 1, 1, 1, 2, 1], [1, 1, 2, 1, 1, 2, 3, 1]),
            (14, [2, 3, 2, 2, 1, 1, 2, 1], [1, 1, 3, 1, 1, 2, 3, 2]),
            (16, [2, 3, 2, 2, 2, 1, 3, 1], [1, 2, 3, 1, 1, 3, 3, 2]),
            (18, [2, 3, 3, 2, 2, 1, 3, 2], [1, 2, 3, 1, 2, 3, 3, 3]),
            (20, [2, 3, 3, 3, 2, 2, 3, 2], [2, 3, 3, 1, 2, 3, 3, 3]),
        ] {
            assert_eq!(allocate(&layer_0(), total, &Params::default()).unwrap(), first, "layer 0, {total} bits");
            assert_eq!(allocate(&layer_15(), total, &Params::default()).unwrap(), middle, "layer 15, {total} bits");
        }
    }

    #[test]
    fn without_the_presence_rule_the_middle_layer_has_no_two_bit_expert() {
        let free = Params { presence: Presence::Free, ..Params::default() };
        for (total, bits) in [
            (12, [1, 1, 3, 1, 1, 1, 3, 1]),
            (14, [1, 1, 3, 1, 1, 3, 3, 1]),
            (16, [1, 1, 3, 1, 1, 3, 3, 3]),
            (18, [1, 3, 3, 1, 1, 3, 3, 3]),
            (20, [1, 3, 3, 1, 3, 3, 3, 3]),
        ] {
            assert_eq!(allocate(&layer_15(), total, &free).unwrap(), bits, "{total} bits");
        }
    }

    #[test]
    fn a_total_that_the_rules_forbid_names_the_range() {
        let e = allocate(&layer_0(), 10, &Params::default()).unwrap_err();
        assert_eq!((e.least, e.most), (11, 23));
    }
}
