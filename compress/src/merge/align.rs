//! Neurons brought into one order before experts are averaged (M-SMoE, REAM; specs: methods 6.4, 6.9).
//!
//! A gated MLP stays what it is when rows of gate and up and columns of down are permuted **together**: one permutation an expert. The
//! best one against a lead is an assignment problem over `‖g_i − g′_j‖² + ‖u_i − u′_j‖² + ‖d_i − d′_j‖²`, where the first two are
//! rows and the third columns; it is solved exactly.

use ndarray::{Array2, Axis};

use super::Matrices;

/// The order of `member`'s neurons that comes closest to `lead`: neuron `order[i]` of the member takes place `i`.
///
/// # Panics
///
/// If the two are not of one shape.
pub fn order(lead: &Matrices, member: &Matrices) -> Vec<usize> {
    assert_eq!(lead.gate.dim(), member.gate.dim(), "experts of one shape");
    // Squares of the lengths are the same in every order, so the products decide.
    let near = lead.gate.dot(&member.gate.t()) + lead.up.dot(&member.up.t()) + lead.down.t().dot(&member.down);
    assignment(&near.mapv(|x| -x))
}

/// `member` with its neurons in this order.
pub fn permuted(member: &Matrices, order: &[usize]) -> Matrices {
    Matrices { gate: member.gate.select(Axis(0), order), up: member.up.select(Axis(0), order), down: member.down.select(Axis(1), order) }
}

/// The column of each row in the cheapest assignment (the Hungarian method with potentials, `O(n³)`).
///
/// # Panics
///
/// If the costs are not square.
pub fn assignment(cost: &Array2<f64>) -> Vec<usize> {
    let side = cost.nrows();
    assert!(cost.is_square(), "as many rows as columns");
    // 1-based, as the method is written: column 0 stands for the row that is being placed.
    let (mut row_price, mut column_price) = (vec![0.0; side + 1], vec![0.0; side + 1]);
    let (mut row_of, mut way) = (vec![0_usize; side + 1], vec![0_usize; side + 1]);
    for row in 1..=side {
        row_of[0] = row;
        let mut column = 0;
        let (mut least, mut used) = (vec![f64::INFINITY; side + 1], vec![false; side + 1]);
        while row_of[column] != 0 {
            used[column] = true;
            let (at, mut delta, mut next) = (row_of[column], f64::INFINITY, 0);
            for j in (1..=side).filter(|&j| !used[j]) {
                let slack = cost[(at - 1, j - 1)] - row_price[at] - column_price[j];
                if slack < least[j] {
                    (least[j], way[j]) = (slack, column);
                }
                if least[j] < delta {
                    (delta, next) = (least[j], j);
                }
            }
            for j in 0..=side {
                if used[j] {
                    row_price[row_of[j]] += delta;
                    column_price[j] -= delta;
                } else {
                    least[j] -= delta;
                }
            }
            column = next;
        }
        while column != 0 {
            let before = way[column];
            row_of[column] = row_of[before];
            column = before;
        }
    }
    let mut columns = vec![0; side];
    (1..=side).for_each(|j| columns[row_of[j] - 1] = j - 1);
    columns
}

#[cfg(test)]
mod tests {
    use ndarray::array;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_assignment_by_hand() {
        // Greedily row 0 would take column 1 (1) and row 1 be left with 8; the best is 2 + 2 + 3.
        assert_eq!(assignment(&array![[2.0, 1.0, 9.0], [8.0, 2.0, 9.0], [9.0, 9.0, 3.0]]), [0, 1, 2]);
        assert_eq!(assignment(&array![[4.0]]), [0]);
        assert!(assignment(&Array2::zeros((0, 0))).is_empty());
    }

    fn expert(inner: usize, seed: u64) -> Matrices {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1_u64 << 53) as f64 - 0.5
        };
        let mut matrix = |rows, columns| Array2::from_shape_simple_fn((rows, columns), &mut next);
        Matrices { gate: matrix(inner, 3), up: matrix(inner, 3), down: matrix(3, inner) }
    }

    #[test]
    fn a_shuffled_copy_comes_back() {
        let lead = expert(7, 3);
        let shuffled = permuted(&lead, &[3, 0, 6, 2, 5, 1, 4]);
        assert_eq!(permuted(&shuffled, &order(&lead, &shuffled)), lead);
        assert_eq!(order(&lead, &lead), [0, 1, 2, 3, 4, 5, 6]);
    }

    proptest! {
        #[test]
        fn no_order_is_cheaper(values in prop::collection::vec(0_u8..20, 16)) {
            let cost = Array2::from_shape_vec((4, 4), values.into_iter().map(f64::from).collect()).unwrap();
            let of = |order: &[usize]| order.iter().enumerate().map(|(i, &j)| cost[(i, j)]).sum::<f64>();
            let found = assignment(&cost);
            let mut orders = vec![vec![]];
            for _ in 0..4 {
                orders = orders.into_iter().flat_map(|o: Vec<usize>| (0..4).filter(|j| !o.contains(j)).map(|j| [o.clone(), vec![j]].concat()).collect::<Vec<_>>()).collect();
            }
            prop_assert!(orders.iter().all(|order| of(&found) <= of(order)));
        }
    }
}
