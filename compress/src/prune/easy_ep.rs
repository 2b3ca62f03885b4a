//! EASY-EP (NeurIPS 2025; specs: methods 4.1): `I_i = Σ_t g_{t,i} · ‖F_i(x_t)‖ · s_t`, with
//! `s_t = max(0, 1 − cos(h_t, h_t + Σ_i g_{t,i} F_i(x_t)))` over the routed experts alone. The product is formed a token.

use calib::stats::OutputSums;

use super::averaged;

/// Importance of every expert, `[experts]`, as shares averaged over the domains that count.
pub fn scores(outputs: &OutputSums, domains: &[usize]) -> Vec<f64> {
    averaged(&outputs.importance, domains)
}

#[test]
fn two_domains_by_hand() {
    let mut sums = OutputSums::new(2, 2, 1);
    sums.importance = ndarray::array![[1.0, 3.0], [6.0, 2.0]];
    // (1/4 + 6/8) / 2 and (3/4 + 2/8) / 2.
    assert_eq!(scores(&sums, &[0, 1]), [0.5, 0.5]);
    assert_eq!(scores(&sums, &[1]), [0.75, 0.25]);
}
