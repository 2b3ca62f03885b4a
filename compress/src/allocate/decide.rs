//! From a table of losses and a budget to a width for every matrix.

use serde::{Deserialize, Serialize};

use super::constraints::{Constraints, Matrix, Runtime};
use super::knobs::Choice;
use super::program::{self, Allocation};

/// A width for every matrix, and what it is worth.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// Index into the choices, `[matrices]`.
    pub chosen: Vec<usize>,
    /// How it was found.
    pub account: Account,
}

/// The certificate of an allocation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Account {
    /// The cost that losses are measured in; `assumed` where nothing was measured.
    pub cost: String,
    /// What is to load the result; `None`: every matrix was free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<Runtime>,
    /// Bytes of codes, scales and zeros that could be spent.
    pub budget: u64,
    /// Bytes that were spent.
    pub bytes: u64,
    /// Classes of matrices that share a width.
    pub classes: usize,
    /// Predicted loss.
    pub loss: f64,
    /// No allocation within the budget has less: the optimum of the linear relaxation.
    pub bound: f64,
    /// Loss that one byte more would save.
    pub price: f64,
    /// Whether no allocation of these classes is better.
    pub proven: bool,
    /// Predicted loss where every matrix is free, under the same limits and budget.
    pub loss_free: f64,
}

impl Account {
    /// Distance of the loss to its bound, relative.
    pub fn gap(&self) -> f64 {
        if self.loss <= self.bound { 0.0 } else { (self.loss - self.bound) / self.bound.abs().max(f64::MIN_POSITIVE) }
    }

    /// What the runtime's ties cost: predicted loss against that of free widths, minus one.
    pub fn granularity_gap(&self) -> f64 {
        if self.loss_free > 0.0 { self.loss / self.loss_free - 1.0 } else { 0.0 }
    }
}

/// Why no width can be decided.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Undecided {
    /// A matrix, or those it is tied to, with no choice left.
    #[error("{name}: none of allocate.choices is possible{}:{}", if *tied > 0 { format!(" for it and the {tied} matrices that it is tied to") } else { String::new() }, listed(objections))]
    NoChoice {
        /// The first matrix of the class.
        name: String,
        /// Others in it.
        tied: usize,
        /// What is wrong with each choice.
        objections: Vec<String>,
    },
    /// The budget is too small.
    #[error("the budget is {budget} bytes for codes and scales ({:.3} bits a weight), and the smallest widths that are allowed take {least} ({:.3} bits a weight); raise it or allow smaller widths with allocate.choices", bits(*budget, *weights), bits(*least, *weights))]
    Budget {
        /// Bytes to be spent.
        budget: u64,
        /// Bytes of the smallest widths.
        least: u64,
        /// Weights over which they are shared out.
        weights: u64,
    },
    /// A loss that is no number.
    #[error("{name}: its predicted loss at {choice} is {loss}; an activation overflowed in the calibration pass")]
    Loss {
        /// The matrix.
        name: String,
        /// The choice.
        choice: Choice,
        /// Its loss.
        loss: f64,
    },
}

fn listed(lines: &[String]) -> String {
    lines.iter().map(|line| format!("\n  {line}")).collect()
}

fn bits(bytes: u64, weights: u64) -> f64 {
    bytes as f64 * 8.0 / weights.max(1) as f64
}

/// Chooses a width for every matrix with the least total loss within `budget` bytes of codes, scales and zeros.
///
/// `losses` is `[matrices][choices]`; a loss of a choice that the constraints forbid is not looked at. `cost` names its unit.
///
/// # Errors
///
/// [`Undecided`].
pub fn decide(
    matrices: &[Matrix],
    choices: &[Choice],
    losses: &[Vec<f64>],
    budget: u64,
    rules: &Constraints,
    cost: &str,
) -> Result<Decision, Undecided> {
    let tied = rules.classes(matrices);
    let (chosen, allocation) = solve(matrices, choices, losses, budget, rules, &tied)?;
    let free: Vec<Vec<usize>> = (0..matrices.len()).map(|i| vec![i]).collect();
    let loss_free = if tied == free { allocation.loss } else { solve(matrices, choices, losses, budget, rules, &free)?.1.loss };
    let Allocation { bytes, loss, bound, price, proven, .. } = allocation;
    let account = Account {
        cost: cost.to_owned(),
        runtime: rules.runtime,
        budget,
        bytes,
        classes: tied.len(),
        loss,
        bound,
        price,
        proven,
        loss_free,
    };
    Ok(Decision { chosen, account })
}

fn solve(
    matrices: &[Matrix],
    choices: &[Choice],
    losses: &[Vec<f64>],
    budget: u64,
    rules: &Constraints,
    classes: &[Vec<usize>],
) -> Result<(Vec<usize>, Allocation), Undecided> {
    let mut options: Vec<Vec<usize>> = Vec::with_capacity(classes.len());
    let mut program: Vec<Vec<program::Choice>> = Vec::with_capacity(classes.len());
    for members in classes {
        let objection = |c: &Choice| members.iter().find_map(|&m| rules.objection(&matrices[m], c));
        let open: Vec<usize> = (0..choices.len()).filter(|&o| objection(&choices[o]).is_none()).collect();
        if open.is_empty() {
            let objections = choices.iter().filter_map(|c| objection(c).map(|why| format!("{c}: {why}"))).collect();
            return Err(Undecided::NoChoice { name: matrices[members[0]].name.clone(), tied: members.len() - 1, objections });
        }
        let option = |&o: &usize| program::Choice {
            bytes: members.iter().map(|&m| matrices[m].bytes(&choices[o])).sum(),
            loss: members.iter().map(|&m| losses[m][o]).sum(),
        };
        program.push(open.iter().map(option).collect());
        options.push(open);
    }
    let allocation = program::solve(&program, budget).map_err(|why| match why {
        program::Infeasible::Budget { budget, least } => {
            Undecided::Budget { budget, least, weights: matrices.iter().map(Matrix::weights).sum() }
        }
        program::Infeasible::NoOption { class } => {
            Undecided::NoChoice { name: matrices[classes[class][0]].name.clone(), tied: classes[class].len() - 1, objections: Vec::new() }
        }
        program::Infeasible::Loss { class, option, loss } => {
            Undecided::Loss { name: matrices[classes[class][0]].name.clone(), choice: choices[options[class][option]], loss }
        }
    })?;
    let mut chosen = vec![0; matrices.len()];
    for ((members, open), &option) in classes.iter().zip(&options).zip(&allocation.chosen) {
        members.iter().for_each(|&m| chosen[m] = open[option]);
    }
    Ok((chosen, allocation))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocate::knobs::Limits;
    use crate::quantize::Grid;
    use calib::arch::{Part, Projection};
    use kernels::{Group, ScaleType};

    /// Two layers of two experts with one matrix each, 2 · 128 weights: 2 bits take 2·(32 + 2) = 68 bytes, 4 bits 132.
    fn matrices() -> Vec<Matrix> {
        let matrix = |layer, e| Matrix {
            name: format!("{layer}.{e}"),
            layer,
            part: Part::Expert(e, Projection::Down),
            shape: [2, 128],
            scale: ScaleType::Bf16,
        };
        vec![matrix(0, 0), matrix(0, 1), matrix(1, 0), matrix(1, 1)]
    }

    const CHOICES: [Choice; 2] =
        [Choice { bits: 2, group: Group::Size(128), grid: Grid::Sym }, Choice { bits: 4, group: Group::Size(128), grid: Grid::Sym }];

    fn losses() -> Vec<Vec<f64>> {
        vec![vec![9.0, 1.0], vec![1.0, 0.5], vec![2.0, 0.5], vec![7.0, 1.0]]
    }

    #[test]
    fn free_widths_go_where_the_loss_is_and_ties_cost() {
        let budget = 2 * 68 + 2 * 132;
        let free = decide(&matrices(), &CHOICES, &losses(), budget, &Constraints::default(), "c").unwrap();
        assert_eq!((free.chosen, free.account.loss), (vec![1, 0, 0, 1], 1.0 + 1.0 + 2.0 + 1.0));
        // A layer a class: 10 → 1.5 and 9 → 1.5; the first saves more.
        let rules = Constraints { runtime: Some(Runtime::Vllm), ..Constraints::default() };
        let tied = decide(&matrices(), &CHOICES, &losses(), budget, &rules, "c").unwrap();
        assert_eq!((tied.chosen, tied.account.loss), (vec![1, 1, 0, 0], 1.5 + 9.0));
        assert_eq!((tied.account.classes, tied.account.bytes, tied.account.loss_free), (2, budget, 5.0));
        assert!((tied.account.granularity_gap() - 1.1).abs() < 1e-12);
    }

    #[test]
    fn what_cannot_be_says_why() {
        let said = |budget, rules: &Constraints| decide(&matrices(), &CHOICES, &losses(), budget, rules, "c").unwrap_err().to_string();
        let low = said(200, &Constraints::default());
        assert!(low.contains("200 bytes") && low.contains("take 272 (2.125 bits a weight)"), "{low}");
        let none = said(1000, &Constraints { least: Limits { experts: Some(5), ..Limits::default() }, ..Constraints::default() });
        assert_eq!(none.lines().next(), Some("0.0: none of allocate.choices is possible:"));
        assert_eq!(none.lines().nth(1), Some("  2 bits sym, group 128: allocate.min_bits asks for at least 5"));
    }
}
