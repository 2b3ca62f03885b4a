//! Classes that are decided together: those of one expert that may be dropped, and every other class alone.
//!
//! Dropping ties all matrices of an expert, which otherwise have a width a class. Such an expert becomes one class of the program: an
//! option for each combination of its classes' options, and one more for dropping it. Of the combinations only those are kept that no other
//! beats in everything: their number grows with the widths, not with their product.

use super::decide::{Budgets, Case};
use super::drop::Droppable;
use super::program;

/// One way to store the classes of a unit.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Way {
    /// The option of each class; `None`: its expert is dropped.
    pub picks: Option<Vec<usize>>,
    /// Stored bytes.
    pub bytes: u64,
    /// Predicted loss.
    pub loss: f64,
    /// What it takes of the budgets beside that of all bytes.
    pub beside: Vec<f64>,
}

/// Classes that are decided together.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Unit {
    /// Indices into the classes.
    pub classes: Vec<usize>,
    /// In which ways, `[ways]`.
    pub ways: Vec<Way>,
}

/// The units of `classes` (of matrices), whose options take and lose what `program` says; `open` names the choice of each.
pub(super) fn units(
    case: &Case<'_>,
    budgets: &Budgets,
    classes: &[Vec<usize>],
    (open, program): (&[Vec<usize>], &[Vec<program::Choice>]),
) -> Vec<Unit> {
    let options = |class: usize| -> Vec<Way> {
        let way = |(option, (&o, choice)): (usize, (&usize, &program::Choice))| Way {
            picks: Some(vec![option]),
            bytes: choice.bytes,
            loss: choice.loss,
            beside: budgets.beside.iter().map(|budget| classes[class].iter().map(|&m| budget.takes[m][o]).sum()).collect(),
        };
        open[class].iter().zip(&program[class]).enumerate().map(way).collect()
    };
    let mut of_matrix = vec![None; case.matrices.len()];
    for (index, droppable) in case.droppable.iter().enumerate() {
        droppable.members.iter().for_each(|&m| of_matrix[m] = Some(index));
    }
    let mut experts: Vec<Vec<usize>> = vec![Vec::new(); case.droppable.len()];
    let mut found = Vec::new();
    for (class, members) in classes.iter().enumerate() {
        match members.first().and_then(|&m| of_matrix[m]) {
            Some(expert) => experts[expert].push(class),
            None => found.push(Unit { classes: vec![class], ways: options(class) }),
        }
    }
    for (index, (classes, droppable)) in experts.into_iter().zip(case.droppable).enumerate() {
        let mut ways = vec![Way { picks: Some(Vec::new()), bytes: 0, loss: 0.0, beside: vec![0.0; budgets.beside.len()] }];
        for &class in &classes {
            let with = |way: &Way| options(class).into_iter().map(|option| joined(way, option)).collect::<Vec<_>>();
            ways = unbeaten(ways.iter().flat_map(with).collect());
        }
        ways.push(dropped(droppable, budgets, index));
        found.push(Unit { classes, ways });
    }
    found
}

fn joined(way: &Way, option: Way) -> Way {
    Way {
        picks: way.picks.iter().zip(&option.picks).map(|(a, b)| [a.as_slice(), b].concat()).next(),
        bytes: way.bytes + option.bytes,
        loss: way.loss + option.loss,
        beside: way.beside.iter().zip(&option.beside).map(|(a, b)| a + b).collect(),
    }
}

fn dropped(droppable: &Droppable, budgets: &Budgets, index: usize) -> Way {
    let beside = budgets.beside.iter().map(|budget| budget.takes_dropped[index]).collect();
    Way { picks: None, bytes: droppable.bytes, loss: droppable.loss, beside }
}

/// Those that no other beats in everything; of equal ones the first.
fn unbeaten(mut ways: Vec<Way>) -> Vec<Way> {
    ways.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.loss.total_cmp(&b.loss)));
    let mut kept: Vec<Way> = Vec::new();
    for way in ways {
        // Sorted, so that whoever beats it stands before it.
        let beats = |other: &Way| other.loss <= way.loss && other.beside.iter().zip(&way.beside).all(|(a, b)| a <= b);
        let beaten = if way.beside.is_empty() { kept.last().is_some_and(beats) } else { kept.iter().any(beats) };
        if !beaten {
            kept.push(way);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(pick: usize, bytes: u64, loss: f64, beside: &[f64]) -> Way {
        Way { picks: Some(vec![pick]), bytes, loss, beside: beside.to_vec() }
    }

    #[test]
    fn what_another_beats_in_everything_is_left_out() {
        let ways = vec![way(0, 4, 1.0, &[]), way(1, 2, 3.0, &[]), way(2, 3, 3.0, &[]), way(3, 2, 4.0, &[]), way(4, 4, 1.0, &[])];
        let kept: Vec<_> = unbeaten(ways).into_iter().map(|way| way.picks.unwrap()[0]).collect();
        assert_eq!(kept, [1, 0]);
        // Larger and worse, but cheaper in another budget.
        let ways = vec![way(0, 2, 3.0, &[5.0]), way(1, 3, 3.5, &[1.0]), way(2, 4, 3.5, &[1.0])];
        let kept: Vec<_> = unbeaten(ways).into_iter().map(|way| way.picks.unwrap()[0]).collect();
        assert_eq!(kept, [0, 1]);
    }
}
