//! From scores to the experts that stay.

/// What stays of one layer's experts, and how clear it was.
#[derive(Clone, Debug, PartialEq)]
pub struct Cut {
    /// The experts that stay, rising.
    pub kept: Vec<usize>,
    /// The smallest score that stays among those that could go, and the largest that goes; of groups those that lie closest.
    /// `None` where nothing goes, or only protected experts stay.
    pub edge: Option<(f64, f64)>,
}

/// Keeps the `count` best of the experts, equally many of each of `groups` runs of consecutive experts; protected ones first.
///
/// Of equal scores the expert with the smaller hash stays: the answer does not depend on how the experts are numbered. `hash` is asked
/// only where scores are equal.
///
/// # Panics
///
/// If the groups do not divide the experts and the count, or `protected` is not of the scores' length.
pub fn select<E>(
    scores: &[f64],
    protected: &[bool],
    (count, groups): (usize, usize),
    mut hash: impl FnMut(usize) -> Result<String, E>,
) -> Result<Cut, E> {
    assert_eq!(scores.len(), protected.len(), "a word for every expert");
    assert!(scores.len().is_multiple_of(groups) && count.is_multiple_of(groups) && count <= scores.len(), "whole groups");
    let equal = |e: usize| scores.iter().enumerate().any(|(other, s)| other != e && *s == scores[e]);
    let hashes = (0..scores.len()).map(|e| if equal(e) { hash(e) } else { Ok(String::new()) }).collect::<Result<Vec<_>, E>>()?;
    let (each, size) = (count / groups, scores.len() / groups.max(1));
    let (mut kept, mut edge) = (Vec::with_capacity(count), None::<(f64, f64)>);
    for group in 0..groups {
        let mut order: Vec<usize> = (group * size..(group + 1) * size).collect();
        let better = |&a: &usize, &b: &usize| {
            protected[b].cmp(&protected[a]).then(scores[b].total_cmp(&scores[a])).then_with(|| hashes[a].cmp(&hashes[b]))
        };
        order.sort_by(better);
        if let (Some(&last), Some(&next)) = (each.checked_sub(1).and_then(|at| order.get(at)), order.get(each))
            && !protected[last]
        {
            let here = (scores[last], scores[next]);
            edge = Some(edge.filter(|(stays, goes)| stays - goes <= here.0 - here.1).unwrap_or(here));
        }
        kept.extend_from_slice(&order[..each]);
    }
    kept.sort_unstable();
    Ok(Cut { kept, edge })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cut(scores: &[f64], protected: &[usize], count: usize, groups: usize) -> Cut {
        let protected: Vec<bool> = (0..scores.len()).map(|e| protected.contains(&e)).collect();
        select(scores, &protected, (count, groups), |e| Ok::<_, ()>(format!("{e}"))).unwrap()
    }

    #[test]
    fn the_best_stay() {
        assert_eq!(cut(&[0.1, 0.4, 0.2, 0.3], &[], 2, 1), Cut { kept: vec![1, 3], edge: Some((0.3, 0.2)) });
        assert_eq!(cut(&[0.1, 0.4, 0.2, 0.3], &[], 4, 1), Cut { kept: vec![0, 1, 2, 3], edge: None });
        // Expert 0 stays whatever its score.
        assert_eq!(cut(&[0.1, 0.4, 0.2, 0.3], &[0], 2, 1).kept, [0, 1]);
    }

    #[test]
    fn every_group_keeps_as_many() {
        // Each group of two keeps its better one, though both of the second beat both of the first.
        assert_eq!(cut(&[0.1, 0.2, 0.7, 0.9], &[], 2, 2), Cut { kept: vec![1, 3], edge: Some((0.2, 0.1)) });
    }

    #[test]
    fn of_equal_scores_the_smaller_hash_stays() {
        let chosen = |hashes: [&str; 3]| select(&[1.0, 1.0, 1.0], &[false; 3], (1, 1), |e| Ok::<_, ()>(hashes[e].to_owned())).unwrap().kept;
        assert_eq!((chosen(["c", "a", "b"]), chosen(["a", "c", "b"])), (vec![1], vec![0]));
        assert!(select(&[1.0, 1.0], &[false; 2], (1, 1), |_| Err::<String, _>("unreadable")).is_err());
    }

    proptest! {
        #[test]
        fn renumbering_renumbers_the_answer(scores in prop::collection::vec(0_u8..6, 2..12), turn in 0_usize..12, keep in 1_usize..12) {
            let (n, scores) = (scores.len(), scores.iter().map(|&s| f64::from(s)).collect::<Vec<_>>());
            let (turn, keep) = (turn % n, keep.min(n));
            let hash = |e: usize| Ok::<_, ()>(format!("{:02}", (e * 7) % 13));
            let plain = select(&scores, &vec![false; n], (keep, 1), hash).unwrap();
            let mut turned = scores.clone();
            turned.rotate_left(turn);
            let moved = select(&turned, &vec![false; n], (keep, 1), |e| hash((e + turn) % n)).unwrap();
            let mut back: Vec<usize> = moved.kept.iter().map(|e| (e + turn) % n).collect();
            back.sort_unstable();
            prop_assert_eq!(plain.kept, back);
            prop_assert_eq!(plain.edge, moved.edge);
        }
    }
}
