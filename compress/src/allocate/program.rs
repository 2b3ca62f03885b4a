//! One option per class under one byte budget: a multiple-choice knapsack, solved with a certificate.
//!
//! The relaxation's optimum is a walk along convex hulls ([`hull`]), which gives a price `λ` (loss per byte) and a
//! bound `L`. With reduced costs `r = loss + λ·bytes − min(loss + λ·bytes)` of its class, every allocation obeys
//!
//! `loss − L = Σ r + λ·(budget − bytes)`,
//!
//! so the walk's rounded answer, at distance `G` from the bound, rules out every option with `r ≥ G`. What is left (the
//! *core*) is solved exactly by a Pareto sweep over (bytes, loss), pruned by the same identity. Where the sweep would hold
//! more than [`STATES`] states it stops and the remaining gap is reported.

use super::hull::{self, Step};

/// States that the exact sweep may hold at once; above it the best answer so far is returned with its gap.
pub const STATES: usize = 1 << 18;

/// States that it may hold over all classes: where thousands are alike (a plan without measured losses) every level would be large.
const ALL_STATES: usize = 1 << 20;

/// One way to store a tie class.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Stored bytes, scales and padding included.
    pub bytes: u64,
    /// Predicted loss; adds over classes.
    pub loss: f64,
}

/// An allocation and its certificate.
#[derive(Clone, Debug, PartialEq)]
pub struct Allocation {
    /// The chosen option of each class, `[classes]`.
    pub chosen: Vec<usize>,
    /// Their bytes.
    pub bytes: u64,
    /// Their loss.
    pub loss: f64,
    /// Optimum of the linear relaxation: no allocation within the budget has less loss.
    pub bound: f64,
    /// Dual price of the budget, loss per byte; 0 where every class has its best option.
    pub price: f64,
    /// Whether the answer is proven optimal.
    pub proven: bool,
}

impl Allocation {
    /// Distance to the bound relative to it; 0 where both are 0.
    pub fn gap(&self) -> f64 {
        if self.loss <= self.bound { 0.0 } else { (self.loss - self.bound) / self.bound.abs().max(f64::MIN_POSITIVE) }
    }
}

/// Why a program has no answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Infeasible {
    /// Even the smallest options do not fit.
    #[error("the budget of {budget} bytes is below the smallest possible size, {least} bytes; raise the budget or allow a smaller width")]
    Budget {
        /// Bytes asked for.
        budget: u64,
        /// Bytes of every class's smallest option.
        least: u64,
    },
    /// A class without options.
    #[error("class {class} has no option left; loosen its rules")]
    NoOption {
        /// Its number.
        class: usize,
    },
    /// A loss that is NaN or infinite.
    #[error("option {option} of class {class} has the loss {loss}, which is not finite")]
    Loss {
        /// Number of the class.
        class: usize,
        /// Number of the option.
        option: usize,
        /// Its loss.
        loss: f64,
    },
}

/// Chooses one option per class with the least total loss within `budget` bytes.
///
/// # Errors
///
/// [`Infeasible`] where there is no answer or a loss is not finite.
pub fn solve(classes: &[Vec<Choice>], budget: u64) -> Result<Allocation, Infeasible> {
    check(classes)?;
    let walk = hull::walk(classes, budget);
    let least: u64 = walk.smallest.iter().zip(classes).map(|(&o, c)| c[o].bytes).sum();
    if least > budget {
        return Err(Infeasible::Budget { budget, least });
    }
    let rounded = round(classes, &walk, budget);
    let mut answer = Allocation {
        bytes: bytes(classes, &rounded),
        loss: loss(classes, &rounded),
        chosen: rounded,
        bound: walk.bound,
        price: walk.price,
        proven: false,
    };
    exact(classes, budget, &mut answer);
    Ok(answer)
}

fn check(classes: &[Vec<Choice>]) -> Result<(), Infeasible> {
    for (class, options) in classes.iter().enumerate() {
        if options.is_empty() {
            return Err(Infeasible::NoOption { class });
        }
        if let Some((option, bad)) = options.iter().enumerate().find(|(_, o)| !o.loss.is_finite()) {
            return Err(Infeasible::Loss { class, option, loss: bad.loss });
        }
    }
    Ok(())
}

fn bytes(classes: &[Vec<Choice>], chosen: &[usize]) -> u64 {
    classes.iter().zip(chosen).map(|(c, &o)| c[o].bytes).sum()
}

fn loss(classes: &[Vec<Choice>], chosen: &[usize]) -> f64 {
    classes.iter().zip(chosen).map(|(c, &o)| c[o].loss).sum()
}

/// The walk's whole steps, and of the steps behind the critical one all that still fit, steepest first.
fn round(classes: &[Vec<Choice>], walk: &hull::Walk, budget: u64) -> Vec<usize> {
    let mut chosen = walk.smallest.clone();
    let mut size = bytes(classes, &chosen);
    for Step { class, from, to, .. } in &walk.steps {
        // A step whose predecessor did not fit is not reachable: its class stands elsewhere.
        let more = classes[*class][*to].bytes - classes[*class][*from].bytes;
        if chosen[*class] == *from && size + more <= budget {
            chosen[*class] = *to;
            size += more;
        }
    }
    chosen
}

/// A partial choice over the core: what it adds to the base, and the entry it came from.
#[derive(Clone, Copy)]
struct State {
    bytes: i64,
    reduced: f64,
    parent: u32,
    option: u32,
}

/// Improves `answer` to the optimum, as long as the sweep stays within [`STATES`].
fn exact(classes: &[Vec<Choice>], budget: u64, answer: &mut Allocation) {
    let price = answer.price;
    let cost = |o: &Choice| price.mul_add(o.bytes as f64, o.loss);
    let base: Vec<usize> =
        classes.iter().map(|c| (0..c.len()).min_by(|&a, &b| cost(&c[a]).total_cmp(&cost(&c[b]))).unwrap_or_default()).collect();
    let distance = answer.loss - answer.bound;
    // Differences below this are rounding of the sums; they prove nothing and cost states.
    let resolution = 1e-12 * answer.loss.abs().max(1e-300);
    if distance <= resolution {
        answer.proven = true;
        return;
    }
    let mut core: Vec<(usize, Vec<(usize, f64)>)> = Vec::new();
    for (i, options) in classes.iter().enumerate() {
        let floor = cost(&options[base[i]]);
        let open: Vec<(usize, f64)> =
            (0..options.len()).map(|o| (o, (cost(&options[o]) - floor).max(0.0))).filter(|&(_, r)| r < distance).collect();
        if open.len() > 1 {
            core.push((i, open));
        }
    }
    // Classes whose alternatives are nearly free come first: they close the gap, and a small gap prunes the rest.
    let nearest = |open: &[(usize, f64)], own: usize| open.iter().filter(|(o, _)| *o != own).map(|(_, r)| *r).fold(f64::INFINITY, f64::min);
    core.sort_by(|a, b| nearest(&a.1, base[a.0]).total_cmp(&nearest(&b.1, base[b.0])).then(a.0.cmp(&b.0)));
    let slack = budget as i64 - bytes(classes, &base) as i64;
    sweep(classes, &core, &base, slack, answer, resolution);
}

fn sweep(
    classes: &[Vec<Choice>],
    core: &[(usize, Vec<(usize, f64)>)],
    base: &[usize],
    slack: i64,
    answer: &mut Allocation,
    resolution: f64,
) {
    let price = answer.price;
    let mut best = answer.loss - answer.bound;
    let mut winner: Option<(usize, usize)> = None;
    let mut levels: Vec<Vec<State>> = vec![vec![State { bytes: 0, reduced: 0.0, parent: 0, option: 0 }]];
    let total = |s: &State| s.reduced + price * (slack - s.bytes) as f64;
    if slack >= 0 && total(&levels[0][0]) + resolution < best {
        best = total(&levels[0][0]);
        winner = Some((0, 0));
    }
    let (mut proven, mut all) = (true, 0);
    for (class, open) in core {
        let from = levels.last().map_or(&[][..], Vec::as_slice);
        let own = classes[*class][base[*class]].bytes as i64;
        let mut next: Vec<State> = Vec::with_capacity(from.len() * open.len());
        for (p, s) in from.iter().enumerate() {
            for &(option, r) in open {
                let reduced = s.reduced + r;
                if reduced + resolution < best {
                    let bytes = s.bytes + classes[*class][option].bytes as i64 - own;
                    next.push(State { bytes, reduced, parent: p as u32, option: option as u32 });
                }
            }
        }
        let next = pareto(next, price);
        for (p, s) in next.iter().enumerate() {
            if s.bytes <= slack && total(s) + resolution < best {
                best = total(s);
                winner = Some((levels.len(), p));
            }
        }
        all += next.len();
        let full = next.len() > STATES || all > ALL_STATES;
        levels.push(next);
        if full {
            proven = false;
            break;
        }
    }
    if let Some((level, state)) = winner {
        let mut chosen = base.to_vec();
        let (mut level, mut state) = (level, state);
        while level > 0 {
            let s = levels[level][state];
            chosen[core[level - 1].0] = s.option as usize;
            state = s.parent as usize;
            level -= 1;
        }
        answer.bytes = bytes(classes, &chosen);
        answer.loss = loss(classes, &chosen);
        answer.chosen = chosen;
    }
    answer.proven = proven;
}

/// Keeps the states that no other beats in both bytes and loss (`loss = reduced − λ·bytes`, up to a constant).
fn pareto(mut states: Vec<State>, price: f64) -> Vec<State> {
    let loss = |s: &State| (-price).mul_add(s.bytes as f64, s.reduced);
    states.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(loss(a).total_cmp(&loss(b))));
    let mut least = f64::INFINITY;
    states.retain(|s| {
        let better = loss(s) < least;
        least = least.min(loss(s));
        better
    });
    states
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn choice(bytes: u64, loss: f64) -> Choice {
        Choice { bytes, loss }
    }

    #[test]
    fn two_experts_by_hand() {
        // Sizes 1, 2, 3; budget 4. (1,3): 9 + 1 = 10; (2,2): 4 + 3 = 7; (3,1): 1 + 8 = 9.
        let classes = [vec![choice(1, 9.0), choice(2, 4.0), choice(3, 1.0)], vec![choice(1, 8.0), choice(2, 3.0), choice(3, 1.0)]];
        let a = solve(&classes, 4).unwrap();
        assert_eq!((a.chosen, a.bytes, a.loss), (vec![1, 1], 4, 7.0));
        assert!(a.proven);
    }

    #[test]
    fn an_option_off_the_hull_is_found_where_it_is_best() {
        // Hull of the class: (0, 10) and (4, 0); (2, 6) lies above it and is the only one that budget 3 can use.
        let classes = [vec![choice(0, 10.0), choice(2, 6.0), choice(4, 0.0)]];
        assert_eq!(solve(&classes, 3).unwrap().chosen, vec![1]);
    }

    #[test]
    fn too_small_a_budget_says_what_would_do() {
        let classes = [vec![choice(5, 1.0)], vec![choice(7, 1.0), choice(6, 2.0)]];
        assert_eq!(solve(&classes, 10), Err(Infeasible::Budget { budget: 10, least: 11 }));
    }

    #[test]
    fn a_loss_that_is_not_finite_is_refused() {
        let classes = [vec![choice(1, 1.0), choice(2, f64::NAN)]];
        assert!(matches!(solve(&classes, 3), Err(Infeasible::Loss { class: 0, option: 1, .. })));
    }

    /// Every combination.
    fn brute(classes: &[Vec<Choice>], budget: u64) -> Option<f64> {
        let (head, tail) = classes.split_first()?;
        head.iter()
            .filter(|o| o.bytes <= budget)
            .filter_map(|o| if tail.is_empty() { Some(o.loss) } else { brute(tail, budget - o.bytes).map(|l| l + o.loss) })
            .min_by(f64::total_cmp)
    }

    /// The relaxation in its direct form, by a simplex solver.
    fn relaxation(classes: &[Vec<Choice>], budget: u64) -> f64 {
        use minilp::{ComparisonOp, LinearExpr, OptimizationDirection, Problem};
        let mut lp = Problem::new(OptimizationDirection::Minimize);
        let mut size = LinearExpr::empty();
        for options in classes {
            let mut one = LinearExpr::empty();
            for o in options {
                let x = lp.add_var(o.loss, (0.0, 1.0));
                one.add(x, 1.0);
                size.add(x, o.bytes as f64);
            }
            lp.add_constraint(one, ComparisonOp::Eq, 1.0);
        }
        lp.add_constraint(size, ComparisonOp::Le, budget as f64);
        lp.solve().unwrap().objective()
    }

    fn programs() -> impl Strategy<Value = (Vec<Vec<Choice>>, u64)> {
        let class = prop::collection::vec((0u64..12, 0u32..1000).prop_map(|(b, l)| choice(b, f64::from(l) / 7.0)), 1..5);
        (prop::collection::vec(class, 1..7), 0u64..60)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        #[test]
        fn equals_every_combination_tried((classes, budget) in programs()) {
            match (solve(&classes, budget), brute(&classes, budget)) {
                (Ok(a), Some(best)) => {
                    prop_assert!(a.proven);
                    prop_assert!((a.loss - best).abs() <= 1e-9 * best.abs().max(1.0), "{} is not {}", a.loss, best);
                    prop_assert!(a.bound <= best + 1e-9 * best.abs().max(1.0));
                    prop_assert!(a.bytes <= budget);
                }
                (Err(Infeasible::Budget { .. }), None) => {}
                (a, b) => prop_assert!(false, "{a:?} against {b:?}"),
            }
        }

        #[test]
        fn the_bound_is_the_optimum_of_the_relaxation((classes, budget) in programs()) {
            if let Ok(a) = solve(&classes, budget) {
                let lp = relaxation(&classes, budget);
                prop_assert!((a.bound - lp).abs() <= 1e-7 * lp.abs().max(1.0), "{} is not {lp}", a.bound);
            }
        }

        #[test]
        fn a_larger_budget_never_loses_more((classes, budget) in programs()) {
            if let (Ok(a), Ok(b)) = (solve(&classes, budget), solve(&classes, budget + 3)) {
                prop_assert!(b.loss <= a.loss + 1e-9);
            }
        }

        #[test]
        fn permuting_classes_permutes_the_answer((classes, budget) in programs()) {
            let reversed: Vec<_> = classes.iter().rev().cloned().collect();
            if let (Ok(a), Ok(b)) = (solve(&classes, budget), solve(&reversed, budget)) {
                prop_assert!((a.loss - b.loss).abs() <= 1e-9 * a.loss.abs().max(1.0));
            }
        }
    }
}
