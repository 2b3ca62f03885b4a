//! Super-experts (REAP; specs: methods 6.1): a few experts whose outputs are out of all proportion, which a model does not survive
//! without.

/// Share of the layers, from the first, in which they are looked for.
const LAYERS: f64 = 0.75;
/// Share of all experts that has to lie below one.
const BELOW: f64 = 0.995;
/// Share of the largest output of all that one has to exceed.
const OF_LARGEST: f64 = 0.1;

/// Which experts are super-experts: `peaks` is the largest magnitude of an output of every expert of every layer of experts, in order.
///
/// One exceeds both the 99.5th percentile of all peaks and a tenth of the largest, in the first three quarters of the layers.
pub fn super_experts(peaks: &[Vec<f64>]) -> Vec<Vec<bool>> {
    let mut all: Vec<f64> = peaks.iter().flatten().copied().collect();
    all.sort_unstable_by(f64::total_cmp);
    let at = ((all.len() as f64 * BELOW).ceil() as usize).saturating_sub(1);
    let percentile = all.get(at).copied().unwrap_or(f64::INFINITY);
    let largest = all.last().copied().unwrap_or(f64::INFINITY);
    let threshold = percentile.max(OF_LARGEST * largest);
    let first = (peaks.len() as f64 * LAYERS).ceil() as usize;
    let of = |(layer, peaks): (usize, &Vec<f64>)| peaks.iter().map(|&peak| layer < first && peak > threshold).collect();
    peaks.iter().enumerate().map(of).collect()
}

#[test]
fn one_in_a_thousand_of_the_first_layers() {
    // 4 layers of 250: the 99.5th percentile is the 995th of 1000 peaks, which is 1; a tenth of the largest is 10.
    let mut peaks = vec![vec![1.0; 250]; 4];
    (peaks[0][3], peaks[1][7], peaks[2][9], peaks[3][4]) = (100.0, 9.0, 11.0, 90.0);
    let found = super_experts(&peaks);
    let of = |layer: usize| found[layer].iter().enumerate().filter(|(_, f)| **f).map(|(e, _)| e).collect::<Vec<_>>();
    // 9 is below a tenth, and layer 3 is beyond three quarters.
    assert_eq!([of(0), of(1), of(2), of(3)], [vec![3], vec![], vec![9], vec![]]);
    assert!(super_experts(&[]).is_empty());
}
