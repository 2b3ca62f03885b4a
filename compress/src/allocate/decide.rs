//! From a table of losses and a budget to a width for every matrix.

use serde::{Deserialize, Serialize};

use super::constraints::{Constraints, Matrix, Runtime};
use super::knobs::Choice;
use super::program::{self, Allocation};
use super::several;

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
    /// Predicted loss with the ties of `native` instead, under the same limits and budget.
    pub loss_native: f64,
    /// Budgets beside that of all bytes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub beside: Vec<Spent>,
}

/// What was spent of a budget beside that of all bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spent {
    /// Of what: `bytes of layers 0 to 12`, `seconds a token`.
    pub what: String,
    /// What it allows.
    pub most: f64,
    /// What was spent.
    pub spent: f64,
    /// Loss that one unit more would save.
    pub price: f64,
}

/// What may be spent.
#[derive(Clone, Debug, PartialEq)]
pub struct Budgets {
    /// Bytes of codes, scales and zeros.
    pub bytes: u64,
    /// Further budgets.
    pub beside: Vec<Budget>,
}

impl Budgets {
    /// Bytes alone.
    pub fn of(bytes: u64) -> Self {
        Self { bytes, beside: Vec::new() }
    }
}

/// A budget beside that of all bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Budget {
    /// Of what.
    pub what: String,
    /// What it allows.
    pub most: f64,
    /// What each choice of each matrix takes of it, `[matrices][choices]`.
    pub takes: Vec<Vec<f64>>,
}

impl Account {
    /// Distance of the loss to its bound, relative.
    pub fn gap(&self) -> f64 {
        if self.loss <= self.bound { 0.0 } else { (self.loss - self.bound) / self.bound.abs().max(f64::MIN_POSITIVE) }
    }

    /// What the runtime's ties cost: predicted loss against that of `native`'s ties, minus one; below 0 where the runtime is freer.
    pub fn granularity_gap(&self) -> f64 {
        if self.loss_native > 0.0 { self.loss / self.loss_native - 1.0 } else { 0.0 }
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
    /// A layer's share of the bytes is too small for its experts, or for the presence rule.
    #[error(
        "layer {layer}: its share is {budget} bytes, its experts take {least} at the smallest widths, and the presence rule of allocate.pmq wants one of 3 and one of 2 bits; raise the budget, or say allocate.pmq.presence = \"free\""
    )]
    Layer {
        /// The layer.
        layer: usize,
        /// Its share.
        budget: u64,
        /// Bytes of the smallest widths.
        least: u64,
    },
    /// A budget beside that of all bytes that is too small.
    #[error("{what}: {most:.6} are allowed, and the smallest widths that are allowed take {least:.6}; raise it or allow smaller widths")]
    Beside {
        /// Of what.
        what: String,
        /// What it allows.
        most: f64,
        /// What the smallest widths take.
        least: f64,
    },
    /// Budgets that can be met one by one.
    #[error("each of the budgets can be met, and no widths were found that meet all of them; raise one of {}", what.join(", "))]
    Together {
        /// The budgets.
        what: Vec<String>,
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

/// What widths are chosen for, and from.
#[derive(Clone, Copy, Debug)]
pub struct Case<'a> {
    /// The matrices.
    pub matrices: &'a [Matrix],
    /// The widths.
    pub choices: &'a [Choice],
    /// Predicted losses, `[matrices][choices]`; that of a choice that the constraints forbid is not looked at.
    pub losses: &'a [Vec<f64>],
    /// The unit of the losses.
    pub cost: &'a str,
}

/// Chooses a width for every matrix with the least total loss within the budgets.
///
/// # Errors
///
/// [`Undecided`].
pub fn decide(case: &Case<'_>, budgets: &Budgets, rules: &Constraints) -> Result<Decision, Undecided> {
    let tied = rules.classes(case.matrices);
    let found = solve(case, budgets, rules, &tied)?;
    let other = |classes: Vec<Vec<usize>>| -> Result<f64, Undecided> {
        if tied == classes { Ok(found.loss) } else { Ok(solve(case, budgets, rules, &classes)?.loss) }
    };
    let loss_free = other((0..case.matrices.len()).map(|i| vec![i]).collect())?;
    let loss_native = other(Constraints { runtime: Some(Runtime::Native), ..*rules }.classes(case.matrices))?;
    let spent = |(budget, (&spent, &price)): (&Budget, (&f64, &f64))| Spent { what: budget.what.clone(), most: budget.most, spent, price };
    let account = Account {
        cost: case.cost.to_owned(),
        runtime: rules.runtime,
        budget: budgets.bytes,
        bytes: found.bytes,
        classes: tied.len(),
        loss: found.loss,
        bound: found.bound,
        price: found.price,
        proven: found.proven,
        loss_free,
        loss_native,
        beside: budgets.beside.iter().zip(found.beside.iter().zip(&found.prices)).map(spent).collect(),
    };
    Ok(Decision { chosen: found.chosen, account })
}

/// One option per class.
struct Found {
    /// `[matrices]`.
    chosen: Vec<usize>,
    bytes: u64,
    loss: f64,
    bound: f64,
    price: f64,
    proven: bool,
    /// Spent of the other budgets, and their prices.
    beside: Vec<f64>,
    prices: Vec<f64>,
}

/// Choices that every member of a class may have.
fn open(case: &Case<'_>, rules: &Constraints, members: &[usize]) -> Result<Vec<usize>, Undecided> {
    let objection = |c: &Choice| members.iter().find_map(|&m| rules.objection(&case.matrices[m], c));
    let open: Vec<usize> = (0..case.choices.len()).filter(|&o| objection(&case.choices[o]).is_none()).collect();
    if open.is_empty() {
        let objections = case.choices.iter().filter_map(|c| objection(c).map(|why| format!("{c}: {why}"))).collect();
        return Err(Undecided::NoChoice { name: case.matrices[members[0]].name.clone(), tied: members.len() - 1, objections });
    }
    Ok(open)
}

/// Choices that the members of each class may have together, and what they take and lose, `[classes][options]`.
#[allow(clippy::type_complexity, reason = "two tables of the same shape")]
pub(super) fn of_classes(
    case: &Case<'_>,
    rules: &Constraints,
    classes: &[Vec<usize>],
) -> Result<(Vec<Vec<usize>>, Vec<Vec<program::Choice>>), Undecided> {
    let options = classes.iter().map(|members| open(case, rules, members)).collect::<Result<Vec<_>, _>>()?;
    let option = |members: &[usize], o: usize| program::Choice {
        bytes: members.iter().map(|&m| rules.bytes(&case.matrices[m], &case.choices[o])).sum(),
        loss: members.iter().map(|&m| case.losses[m][o]).sum(),
    };
    let program = classes.iter().zip(&options).map(|(members, open)| open.iter().map(|&o| option(members, o)).collect()).collect();
    Ok((options, program))
}

fn solve(case: &Case<'_>, budgets: &Budgets, rules: &Constraints, classes: &[Vec<usize>]) -> Result<Found, Undecided> {
    let (options, program) = of_classes(case, rules, classes)?;
    let loss_of = |class: usize, option: usize, loss: f64| Undecided::Loss {
        name: case.matrices[classes[class][0]].name.clone(),
        choice: case.choices[options[class][option]],
        loss,
    };
    let mut found = if budgets.beside.is_empty() {
        let Allocation { chosen, bytes, loss, bound, price, proven } =
            program::solve(&program, budgets.bytes).map_err(|why| match why {
                program::Infeasible::Budget { budget, least } => {
                    Undecided::Budget { budget, least, weights: case.matrices.iter().map(Matrix::weights).sum() }
                }
                // `open` has refused such a class.
                program::Infeasible::NoOption { class } => {
                    let name = case.matrices[classes[class][0]].name.clone();
                    Undecided::NoChoice { name, tied: classes[class].len() - 1, objections: Vec::new() }
                }
                program::Infeasible::Loss { class, option, loss } => loss_of(class, option, loss),
            })?;
        Found { chosen, bytes, loss, bound, price, proven, beside: Vec::new(), prices: Vec::new() }
    } else {
        let beside = |members: &[usize], o: usize| -> Vec<f64> {
            budgets.beside.iter().map(|b| members.iter().map(|&m| b.takes[m][o]).sum()).collect()
        };
        let of = |(members, (open, program)): (&Vec<usize>, (&Vec<usize>, &Vec<program::Choice>))| {
            let choice = |(&o, whole): (&usize, &program::Choice)| several::Choice {
                loss: whole.loss,
                takes: std::iter::once(whole.bytes as f64).chain(beside(members, o)).collect(),
            };
            open.iter().zip(program).map(choice).collect()
        };
        let classes: Vec<Vec<several::Choice>> = classes.iter().zip(options.iter().zip(&program)).map(of).collect();
        several(case, budgets, &classes, &loss_of)?
    };
    let of_classes = std::mem::replace(&mut found.chosen, vec![0; case.matrices.len()]);
    for ((members, open), &option) in classes.iter().zip(&options).zip(&of_classes) {
        members.iter().for_each(|&m| found.chosen[m] = open[option]);
    }
    Ok(found)
}

/// With budgets beside the bytes.
fn several(
    case: &Case<'_>,
    budgets: &Budgets,
    classes: &[Vec<several::Choice>],
    loss_of: &dyn Fn(usize, usize, f64) -> Undecided,
) -> Result<Found, Undecided> {
    // No budget of bytes is one that nothing reaches.
    let largest = |options: &Vec<several::Choice>| options.iter().map(|o| o.takes[0]).fold(0.0, f64::max);
    let bytes = (budgets.bytes as f64).min(classes.iter().map(largest).sum::<f64>());
    let most: Vec<f64> = std::iter::once(bytes).chain(budgets.beside.iter().map(|b| b.most)).collect();
    let answer = several::solve(classes, &most).map_err(|why| match why {
        several::Infeasible::Budget { budget: 0, least, .. } => {
            Undecided::Budget { budget: budgets.bytes, least: least as u64, weights: case.matrices.iter().map(Matrix::weights).sum() }
        }
        several::Infeasible::Budget { budget, most, least } => {
            Undecided::Beside { what: budgets.beside[budget - 1].what.clone(), most, least }
        }
        several::Infeasible::Together => Undecided::Together {
            what: std::iter::once("allocate's bytes".to_owned()).chain(budgets.beside.iter().map(|b| b.what.clone())).collect(),
        },
        several::Infeasible::Loss { class, option, loss } => loss_of(class, option, loss),
    })?;
    Ok(Found {
        chosen: answer.chosen,
        bytes: answer.takes[0].round() as u64,
        loss: answer.loss,
        bound: answer.bound,
        price: answer.prices[0],
        proven: answer.loss <= answer.bound,
        beside: answer.takes[1..].to_vec(),
        prices: answer.prices[1..].to_vec(),
    })
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

    fn run(budget: u64, rules: &Constraints) -> Result<Decision, Undecided> {
        let case = Case { matrices: &matrices(), choices: &CHOICES, losses: &losses(), cost: "c" };
        decide(&case, &Budgets::of(budget), rules)
    }

    #[test]
    fn a_device_of_its_own_holds_a_layer_down() {
        // Layer 0 may take its two smallest widths and nothing more; the bytes go to layer 1.
        let layer = |m: &Matrix| CHOICES.iter().map(|c| if m.layer == 0 { m.bytes(c) as f64 } else { 0.0 }).collect();
        let beside = Budget { what: "bytes of layer 0".into(), most: 150.0, takes: matrices().iter().map(layer).collect() };
        let budgets = Budgets { bytes: 2 * 68 + 2 * 132, beside: vec![beside] };
        let case = Case { matrices: &matrices(), choices: &CHOICES, losses: &losses(), cost: "c" };
        let found = decide(&case, &budgets, &Constraints::default()).unwrap();
        assert_eq!((found.chosen, found.account.loss), (vec![0, 0, 1, 1], 9.0 + 1.0 + 0.5 + 1.0));
        let Spent { what, spent, price, .. } = &found.account.beside[0];
        assert_eq!((what.as_str(), *spent), ("bytes of layer 0", 136.0));
        // 64 bytes more let expert 0 of layer 0 save 8, and are taken from expert 0 of layer 1, which loses 1.5.
        assert!((price - 6.5 / 64.0).abs() < 1e-6, "{price}");
        let low = Budgets { beside: vec![Budget { most: 100.0, ..budgets.beside[0].clone() }], ..budgets };
        let said = decide(&case, &low, &Constraints::default()).unwrap_err().to_string();
        assert!(said.starts_with("bytes of layer 0: 100.0") && said.contains("take 136.0"), "{said}");
    }

    #[test]
    fn free_widths_go_where_the_loss_is_and_ties_cost() {
        let budget = 2 * 68 + 2 * 132;
        let free = run(budget, &Constraints::default()).unwrap();
        assert_eq!((free.chosen, free.account.loss), (vec![1, 0, 0, 1], 1.0 + 1.0 + 2.0 + 1.0));
        // A layer a class: 10 → 1.5 and 9 → 1.5; the first saves more.
        let rules = Constraints { runtime: Some(Runtime::Vllm), ..Constraints::default() };
        let tied = run(budget, &rules).unwrap();
        assert_eq!((tied.chosen, tied.account.loss), (vec![1, 1, 0, 0], 1.5 + 9.0));
        assert_eq!((tied.account.classes, tied.account.bytes, tied.account.loss_free), (2, budget, 5.0));
        assert!((tied.account.granularity_gap() - 1.1).abs() < 1e-12);
    }

    #[test]
    fn what_cannot_be_says_why() {
        let said = |budget, rules: &Constraints| run(budget, rules).unwrap_err().to_string();
        let low = said(200, &Constraints::default());
        assert!(low.contains("200 bytes") && low.contains("take 272 (2.125 bits a weight)"), "{low}");
        let none = said(1000, &Constraints { least: Limits { experts: Some(5), ..Limits::default() }, ..Constraints::default() });
        assert_eq!(none.lines().next(), Some("0.0: none of allocate.choices is possible:"));
        assert_eq!(none.lines().nth(1), Some("  2 bits sym, group 128: allocate.min_bits asks for at least 5"));
    }
}
