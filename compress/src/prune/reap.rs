//! REAP (arXiv 2510.13999; specs: methods 6.1): `S_j = (1 / |X_j|) Σ_{t ∈ X_j} g_{t,j} · ‖F_j(x_t)‖`, the mean over the tokens that
//! chose the expert, with the model's own coefficients. An expert that no token chose has 0.

use calib::stats::OutputSums;

/// Saliency of every expert over the tokens of the domains that count, `[experts]`.
pub fn scores(outputs: &OutputSums, domains: &[usize]) -> Vec<f64> {
    let of = |expert: usize| {
        let sum: f64 = domains.iter().map(|&d| outputs.weighted[(d, expert)]).sum();
        let tokens: u64 = domains.iter().map(|&d| outputs.counts[(d, expert)]).sum();
        sum / tokens.max(1) as f64
    };
    (0..outputs.counts.ncols()).map(of).collect()
}

#[test]
fn a_rare_expert_that_says_much_scores_high() {
    let mut sums = OutputSums::new(2, 3, 1);
    sums.weighted = ndarray::array![[4.0, 100.0, 0.0], [2.0, 100.0, 0.0]];
    sums.counts = ndarray::array![[1, 100, 0], [1, 300, 0]];
    // (4 + 2) / 2, 200 / 400, nothing.
    assert_eq!(scores(&sums, &[0, 1]), [3.0, 0.5, 0.0]);
    assert_eq!(scores(&sums, &[0]), [4.0, 1.0, 0.0]);
}
