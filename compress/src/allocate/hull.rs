//! The linear relaxation of "one option per class within a budget": a walk along convex hulls.
//!
//! Only options on the lower convex hull of a class's (bytes, loss) points can carry weight in the optimum of the
//! relaxation. Steps from one hull point to the next are taken in the order of their slope (loss saved per byte) until the
//! budget is used up; the step that does not fit is taken in part, and its slope is the dual price.

use super::program::Choice;

/// A step from one hull option of a class to the next larger one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// The class.
    pub class: usize,
    /// Option before.
    pub from: usize,
    /// Option after.
    pub to: usize,
    /// Loss saved per byte; falls along the hull of a class.
    pub slope: f64,
}

/// The relaxation's optimum.
#[derive(Clone, Debug, PartialEq)]
pub struct Walk {
    /// The smallest hull option of each class: where the walk starts.
    pub smallest: Vec<usize>,
    /// All steps, steepest first.
    pub steps: Vec<Step>,
    /// Optimum of the relaxation (meaningful where the smallest options fit).
    pub bound: f64,
    /// Dual price, loss per byte.
    pub price: f64,
}

/// Options on the lower convex hull of (bytes, loss), by rising bytes and falling loss.
pub fn lower_hull(options: &[Choice]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..options.len()).collect();
    order.sort_by(|&a, &b| options[a].bytes.cmp(&options[b].bytes).then(options[a].loss.total_cmp(&options[b].loss)).then(a.cmp(&b)));
    let mut hull: Vec<usize> = Vec::new();
    for o in order {
        if hull.last().is_some_and(|&last| options[o].loss >= options[last].loss || options[o].bytes == options[last].bytes) {
            continue;
        }
        while let [.., a, b] = hull[..] {
            if slope(options, a, b) > slope(options, b, o) {
                break;
            }
            hull.pop();
        }
        hull.push(o);
    }
    hull
}

fn slope(options: &[Choice], from: usize, to: usize) -> f64 {
    (options[from].loss - options[to].loss) / (options[to].bytes - options[from].bytes) as f64
}

/// Walks from every class's smallest option to the budget.
pub fn walk(classes: &[Vec<Choice>], budget: u64) -> Walk {
    let hulls: Vec<Vec<usize>> = classes.iter().map(|c| lower_hull(c)).collect();
    let smallest: Vec<usize> = hulls.iter().map(|h| h.first().copied().unwrap_or_default()).collect();
    let mut steps: Vec<Step> = hulls
        .iter()
        .enumerate()
        .flat_map(|(class, hull)| {
            hull.windows(2).map(move |w| Step { class, from: w[0], to: w[1], slope: slope(&classes[class], w[0], w[1]) })
        })
        .collect();
    steps.sort_by(|a, b| b.slope.total_cmp(&a.slope).then(a.class.cmp(&b.class)));
    let mut size: u64 = smallest.iter().zip(classes).map(|(&o, c)| c[o].bytes).sum();
    let mut bound: f64 = smallest.iter().zip(classes).map(|(&o, c)| c[o].loss).sum();
    let mut price = 0.0;
    for s in &steps {
        let more = classes[s.class][s.to].bytes - classes[s.class][s.from].bytes;
        let saved = classes[s.class][s.from].loss - classes[s.class][s.to].loss;
        if size + more > budget {
            bound -= saved * budget.saturating_sub(size) as f64 / more as f64;
            price = s.slope;
            break;
        }
        size += more;
        bound -= saved;
    }
    Walk { smallest, steps, bound, price }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_above_the_line_is_not_on_the_hull() {
        let options = [(1u64, 10.0), (2, 8.0), (3, 2.0), (3, 3.0), (4, 2.5)].map(|(bytes, loss)| Choice { bytes, loss });
        assert_eq!(lower_hull(&options), vec![0, 2]);
    }

    #[test]
    fn the_last_step_is_taken_in_part() {
        // Slopes: class 0: 6 then 2; class 1: 4. Budget 2 + 2 steps of one byte and half of the third (2 bytes).
        let c = |points: &[(u64, f64)]| points.iter().map(|&(bytes, loss)| Choice { bytes, loss }).collect::<Vec<_>>();
        let classes = [c(&[(1, 10.0), (2, 4.0), (4, 0.0)]), c(&[(1, 7.0), (2, 3.0)])];
        let w = walk(&classes, 5);
        // 17 − 6 − 4 = 7 at 4 bytes; one of two bytes at 2 a byte: 5.
        assert_eq!((w.bound, w.price), (5.0, 2.0));
    }
}
