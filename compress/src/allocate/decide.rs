//! From a table of losses and a budget to a width for every matrix.

use serde::{Deserialize, Serialize};

use super::constraints::{Constraints, Matrix, Runtime};
use super::drop::Droppable;
use super::knobs::Choice;
use super::program::{self, Allocation};
use super::several;
use super::ways::{Unit, Way, units};

/// A width for every matrix, and what it is worth.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// Index into the choices, `[matrices]`; `None`: its expert is dropped.
    pub chosen: Vec<Option<usize>>,
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
    /// Experts that were dropped, where any may be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropped: Option<usize>,
    /// Predicted loss where no expert may be dropped, within the same budgets, if any may be and the budgets can be met so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_whole: Option<f64>,
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
    /// What each expert that may be dropped takes of it then, `[droppable]`.
    pub takes_dropped: Vec<f64>,
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
    /// A loss of dropping an expert that is no number.
    #[error("{name}: the predicted loss of dropping its expert is {loss}; an activation overflowed in the calibration pass")]
    Dropping {
        /// The first matrix of the expert.
        name: String,
        /// The loss.
        loss: f64,
    },
    /// What the program says of its classes.
    #[error(transparent)]
    Program(program::Infeasible),
    /// The same with several budgets.
    #[error(transparent)]
    Several(several::Infeasible),
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
    /// Experts that may be dropped.
    pub droppable: &'a [Droppable],
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
    let loss_whole = if case.droppable.is_empty() {
        None
    } else {
        match solve(&Case { droppable: &[], ..*case }, budgets, rules, &tied) {
            Ok(found) => Some(found.loss),
            Err(Undecided::Budget { .. } | Undecided::Beside { .. } | Undecided::Together { .. }) => None,
            Err(why) => return Err(why),
        }
    };
    let gone = |droppable: &&Droppable| droppable.members.iter().all(|&m| found.chosen[m].is_none());
    let dropped = (!case.droppable.is_empty()).then(|| case.droppable.iter().filter(gone).count());
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
        dropped,
        loss_whole,
        beside: budgets.beside.iter().zip(found.beside.iter().zip(&found.prices)).map(spent).collect(),
    };
    Ok(Decision { chosen: found.chosen, account })
}

/// One option per class.
struct Found {
    /// `[matrices]`.
    chosen: Vec<Option<usize>>,
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
    finite(case, classes, (&options, &program))?;
    let units = units(case, budgets, classes, (&options, &program));
    let answer = if budgets.beside.is_empty() { alone(case, budgets, &units)? } else { several(case, budgets, &units)? };
    let mut chosen = vec![None; case.matrices.len()];
    for (unit, &way) in units.iter().zip(&answer.ways) {
        let Some(picks) = &unit.ways[way].picks else { continue };
        for (&class, &option) in unit.classes.iter().zip(picks) {
            classes[class].iter().for_each(|&m| chosen[m] = Some(options[class][option]));
        }
    }
    Ok(Found { chosen, ..answer.found })
}

/// Refuses a loss that is no number, by name.
fn finite(case: &Case<'_>, classes: &[Vec<usize>], (options, program): (&[Vec<usize>], &[Vec<program::Choice>])) -> Result<(), Undecided> {
    for (members, (open, choices)) in classes.iter().zip(options.iter().zip(program)) {
        if let Some((&o, choice)) = open.iter().zip(choices).find(|(_, choice)| !choice.loss.is_finite()) {
            return Err(Undecided::Loss { name: case.matrices[members[0]].name.clone(), choice: case.choices[o], loss: choice.loss });
        }
    }
    match case.droppable.iter().find(|droppable| !droppable.loss.is_finite()) {
        Some(Droppable { members, loss, .. }) => Err(Undecided::Dropping { name: case.matrices[members[0]].name.clone(), loss: *loss }),
        None => Ok(()),
    }
}

/// A way for every unit, `[units]`, and what it comes to; what is chosen for the matrices is not said yet.
struct Answer {
    ways: Vec<usize>,
    found: Found,
}

fn weights(case: &Case<'_>) -> u64 {
    case.matrices.iter().map(Matrix::weights).sum()
}

/// With bytes as the only budget.
fn alone(case: &Case<'_>, budgets: &Budgets, units: &[Unit]) -> Result<Answer, Undecided> {
    let choice = |way: &Way| program::Choice { bytes: way.bytes, loss: way.loss };
    let program: Vec<Vec<program::Choice>> = units.iter().map(|unit| unit.ways.iter().map(choice).collect()).collect();
    let Allocation { chosen: ways, bytes, loss, bound, price, proven } =
        program::solve(&program, budgets.bytes).map_err(|why| match why {
            program::Infeasible::Budget { budget, least } => Undecided::Budget { budget, least, weights: weights(case) },
            // `open` has refused a class without options, `finite` a loss that is no number.
            other => Undecided::Program(other),
        })?;
    Ok(Answer { ways, found: Found { chosen: Vec::new(), bytes, loss, bound, price, proven, beside: Vec::new(), prices: Vec::new() } })
}

/// With budgets beside the bytes.
fn several(case: &Case<'_>, budgets: &Budgets, units: &[Unit]) -> Result<Answer, Undecided> {
    let choice = |way: &Way| several::Choice {
        loss: way.loss,
        takes: std::iter::once(way.bytes as f64).chain(way.beside.iter().copied()).collect(),
    };
    let classes: Vec<Vec<several::Choice>> = units.iter().map(|unit| unit.ways.iter().map(choice).collect()).collect();
    // No budget of bytes is one that nothing reaches.
    let largest = |options: &Vec<several::Choice>| options.iter().map(|o| o.takes[0]).fold(0.0, f64::max);
    let bytes = (budgets.bytes as f64).min(classes.iter().map(largest).sum::<f64>());
    let most: Vec<f64> = std::iter::once(bytes).chain(budgets.beside.iter().map(|b| b.most)).collect();
    let answer = several::solve(&classes, &most).map_err(|why| match why {
        several::Infeasible::Budget { budget: 0, least, .. } => {
            Undecided::Budget { budget: budgets.bytes, least: least as u64, weights: weights(case) }
        }
        several::Infeasible::Budget { budget, most, least } => {
            Undecided::Beside { what: budgets.beside[budget - 1].what.clone(), most, least }
        }
        several::Infeasible::Together => Undecided::Together {
            what: std::iter::once("allocate's bytes".to_owned()).chain(budgets.beside.iter().map(|b| b.what.clone())).collect(),
        },
        // `finite` has refused it.
        other @ several::Infeasible::Loss { .. } => Undecided::Several(other),
    })?;
    let found = Found {
        chosen: Vec::new(),
        bytes: answer.takes[0].round() as u64,
        loss: answer.loss,
        bound: answer.bound,
        price: answer.prices[0],
        proven: answer.loss <= answer.bound,
        beside: answer.takes[1..].to_vec(),
        prices: answer.prices[1..].to_vec(),
    };
    Ok(Answer { ways: answer.chosen, found })
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

    /// Of a decision that drops nothing.
    fn picks(found: &Decision) -> Vec<usize> {
        found.chosen.iter().map(|choice| choice.unwrap()).collect()
    }

    fn run(budget: u64, rules: &Constraints) -> Result<Decision, Undecided> {
        let case = Case { matrices: &matrices(), choices: &CHOICES, losses: &losses(), cost: "c", droppable: &[] };
        decide(&case, &Budgets::of(budget), rules)
    }

    #[test]
    fn a_device_of_its_own_holds_a_layer_down() {
        // Layer 0 may take its two smallest widths and nothing more; the bytes go to layer 1.
        let layer = |m: &Matrix| CHOICES.iter().map(|c| if m.layer == 0 { m.bytes(c) as f64 } else { 0.0 }).collect();
        let beside =
            Budget { what: "bytes of layer 0".into(), most: 150.0, takes: matrices().iter().map(layer).collect(), takes_dropped: vec![] };
        let budgets = Budgets { bytes: 2 * 68 + 2 * 132, beside: vec![beside] };
        let case = Case { matrices: &matrices(), choices: &CHOICES, losses: &losses(), cost: "c", droppable: &[] };
        let found = decide(&case, &budgets, &Constraints::default()).unwrap();
        assert_eq!((picks(&found), found.account.loss), (vec![0, 0, 1, 1], 9.0 + 1.0 + 0.5 + 1.0));
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
        assert_eq!((picks(&free), free.account.loss), (vec![1, 0, 0, 1], 1.0 + 1.0 + 2.0 + 1.0));
        // A layer a class: 10 → 1.5 and 9 → 1.5; the first saves more.
        let rules = Constraints { runtime: Some(Runtime::Vllm), ..Constraints::default() };
        let tied = run(budget, &rules).unwrap();
        assert_eq!((picks(&tied), tied.account.loss), (vec![1, 1, 0, 0], 1.5 + 9.0));
        assert_eq!((tied.account.classes, tied.account.bytes, tied.account.loss_free), (2, budget, 5.0));
        assert!((tied.account.granularity_gap() - 1.1).abs() < 1e-12);
    }

    /// One layer of experts whose three matrices take 68 and 132 bytes each, natively tied, and what dropping them costs.
    fn experts(losses: &[[[f64; 2]; 3]], dropping: &[f64]) -> (Vec<Matrix>, Vec<Vec<f64>>, Vec<Droppable>) {
        let matrix =
            |e, p| Matrix { name: format!("{e}.{p:?}"), layer: 0, part: Part::Expert(e, p), shape: [2, 128], scale: ScaleType::Bf16 };
        let matrices = (0..losses.len()).flat_map(|e| Projection::ALL.map(|p| matrix(e, p))).collect();
        let droppable = |(e, &loss): (usize, &f64)| Droppable { layer: 0, members: (3 * e..3 * e + 3).collect(), bytes: 4, loss };
        (matrices, losses.iter().flatten().map(|l| l.to_vec()).collect(), dropping.iter().enumerate().map(droppable).collect())
    }

    #[test]
    fn an_expert_is_dropped_where_its_bytes_save_more_elsewhere() {
        // Free widths. Expert 0 is worth little: dropping it takes 4 bytes instead of 204, and frees 200 for three matrices of expert 1.
        let losses = [[[0.5, 0.1]; 3], [[4.0, 1.0]; 3]];
        let (matrices, losses, droppable) = experts(&losses, &[2.0]);
        let case = Case { matrices: &matrices, choices: &CHOICES, losses: &losses, cost: "c", droppable: &droppable };
        let found = decide(&case, &Budgets::of(6 * 68), &Constraints::default()).unwrap();
        assert_eq!(found.chosen, [None, None, None, Some(1), Some(1), Some(1)]);
        let account = &found.account;
        assert_eq!((account.bytes, account.loss, account.dropped), (4 + 3 * 132, 2.0 + 3.0, Some(1)));
        assert_eq!(account.loss_whole, Some(1.5 + 12.0));
        // Too few bytes without it; and with a budget of its own that dropping does not take from.
        let found = decide(&case, &Budgets::of(5 * 68), &Constraints::default()).unwrap();
        assert_eq!((found.account.loss_whole, found.account.dropped), (None, Some(1)));
        let takes = (0..6).map(|m| if m < 3 { vec![1.0, 2.0] } else { vec![0.0, 0.0] }).collect();
        let beside = Budget { what: "expert 0".into(), most: 2.0, takes, takes_dropped: vec![0.5] };
        let found = decide(&case, &Budgets { bytes: 10_000, beside: vec![beside] }, &Constraints::default()).unwrap();
        assert_eq!((found.chosen[0], found.chosen[3], found.account.beside[0].spent), (None, Some(1), 0.5));
        let (_, _, droppable) = experts(&[], &[f64::NAN]);
        let said = decide(&Case { droppable: &droppable, ..case }, &Budgets::of(6 * 68), &Constraints::default()).unwrap_err();
        assert!(said.to_string().starts_with("0.Gate: the predicted loss of dropping its expert is NaN"), "{said}");
    }

    /// The least loss of every combination of each expert's ways.
    fn brute(losses: &[[[f64; 2]; 3]], dropping: &[f64], budget: i64) -> Option<f64> {
        let Some(((first, rest), (drop, others))) = losses.split_first().zip(dropping.split_first()) else {
            return (budget >= 0).then_some(0.0);
        };
        let size = |option: usize| [68, 132][option];
        let kept = (0..4).map(|i| {
            let (both, down) = (i / 2, i % 2);
            (2 * size(both) + size(down), first[0][both] + first[1][both] + first[2][down])
        });
        let ways = kept.chain(std::iter::once((4, *drop)));
        ways.filter_map(|(bytes, loss)| brute(rest, others, budget - bytes).map(|least| least + loss)).min_by(f64::total_cmp)
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(500))]
        #[test]
        fn dropping_is_never_predicted_to_lose_more(
            losses in proptest::collection::vec([[0.0..9.0_f64, 0.0..4.0], [0.0..9.0, 0.0..4.0], [0.0..9.0, 0.0..4.0]], 1..5),
            dropping in proptest::collection::vec(0.0..20.0_f64, 4),
            budget in 0_u64..1800,
        ) {
            let dropping = &dropping[..losses.len()];
            let (matrices, table, droppable) = experts(&losses, dropping);
            let case = Case { matrices: &matrices, choices: &CHOICES, losses: &table, cost: "c", droppable: &droppable };
            // Streams of compressed-tensors as bytes, ties of gate with up: the smallest of what `native` ties.
            let rules = Constraints { runtime: None, ..Constraints::default() };
            let tied = Constraints { runtime: Some(Runtime::Native), ..rules }.classes(&matrices);
            let found = solve(&case, &Budgets::of(budget), &rules, &tied);
            let whole = solve(&Case { droppable: &[], ..case }, &Budgets::of(budget), &rules, &tied);
            let best = brute(&losses, dropping, budget as i64);
            match (&found, best) {
                (Ok(found), Some(best)) => {
                    proptest::prop_assert!((found.loss - best).abs() < 1e-9, "{} is not {best}", found.loss);
                    proptest::prop_assert!(found.chosen.chunks(3).all(|e| e.iter().all(Option::is_none) || e.iter().all(Option::is_some)));
                    proptest::prop_assert!(whole.is_err() || found.loss <= whole.as_ref().map_or(0.0, |w| w.loss) + 1e-9);
                }
                (Err(_), None) => {}
                (_, best) => proptest::prop_assert!(false, "{:?} against {best:?}", found.as_ref().map(|f| f.loss)),
            }
        }
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
