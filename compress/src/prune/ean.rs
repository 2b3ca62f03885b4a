//! Expert activation norm (specs: methods 6.1): `Σ_{t ∈ X_j} ‖F_j(x_t)‖`, without the routing weight.

use calib::stats::OutputSums;

use super::averaged;

/// Share of the norms of every expert, `[experts]`, averaged over the domains that count.
pub fn scores(outputs: &OutputSums, domains: &[usize]) -> Vec<f64> {
    averaged(&outputs.norms, domains)
}

#[test]
fn shares_by_hand() {
    let mut sums = OutputSums::new(1, 2, 1);
    sums.norms = ndarray::array![[1.0, 7.0]];
    assert_eq!(scores(&sums, &[0]), [0.125, 0.875]);
}
