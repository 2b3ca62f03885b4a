//! What the router says of an expert: its probability under the full softmax, summed over the tokens that chose it (SEER-MoE's soft
//! count, PMQ's weight).

use calib::stats::RouterSums;

use super::averaged;

/// Share of the mass of every expert, `[experts]`, averaged over the domains that count.
pub fn scores(router: &RouterSums, domains: &[usize]) -> Vec<f64> {
    averaged(&router.mass, domains)
}

#[test]
fn shares_by_hand() {
    let mut sums = RouterSums::new(2, 2, None);
    sums.mass = ndarray::array![[0.5, 1.5], [3.0, 1.0]];
    assert_eq!(scores(&sums, &[0, 1]), [0.5, 0.5]);
    assert_eq!(scores(&sums, &[0]), [0.25, 0.75]);
}
