//! How sure a choice of experts is: what domains have in common, and what another draw of the demonstrations would have changed.

use std::collections::BTreeSet;

/// Share of `a` that also stands in `b`; 1 where `a` is empty.
pub fn overlap(a: &[usize], b: &[usize]) -> f64 {
    let b: BTreeSet<&usize> = b.iter().collect();
    let shared = a.iter().filter(|e| b.contains(e)).count();
    if a.is_empty() { 1.0 } else { shared as f64 / a.len() as f64 }
}

/// Mean share of `kept` that each of the `others`, chosen from other draws of the same texts, keeps too; 1 without any.
pub fn stability(kept: &[usize], others: &[Vec<usize>]) -> f64 {
    if others.is_empty() { 1.0 } else { others.iter().map(|other| overlap(kept, other)).sum::<f64>() / others.len() as f64 }
}

#[test]
fn shares_by_hand() {
    assert_eq!(overlap(&[1, 2, 3, 4], &[2, 4, 9]), 0.5);
    assert_eq!((overlap(&[], &[1]), overlap(&[1], &[])), (1.0, 0.0));
    assert_eq!(stability(&[1, 2], &[vec![1, 2], vec![2, 3]]), 0.75);
    assert_eq!(stability(&[1, 2], &[]), 1.0);
}
