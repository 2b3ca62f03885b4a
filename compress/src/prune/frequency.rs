//! How often an expert is chosen: `|X_j|`.

use calib::stats::RouterSums;

use super::averaged;

/// Share of the choices of every expert, `[experts]`, averaged over the domains that count.
pub fn scores(router: &RouterSums, domains: &[usize]) -> Vec<f64> {
    averaged(&router.counts.mapv(|count| count as f64), domains)
}

#[test]
fn shares_by_hand() {
    let mut sums = RouterSums::new(1, 3, None);
    sums.counts = ndarray::array![[5, 3, 0]];
    assert_eq!(scores(&sums, &[0]), [0.625, 0.375, 0.0]);
}
