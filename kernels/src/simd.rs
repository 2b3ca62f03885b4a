//! CPU instructions by name: run-time dispatch.

/// Runs `work` compiled for the widest vectors that this CPU has (AVX2 on x86-64, NEON on aarch64, else the baseline).
///
/// What `work` calls takes part only where it is inlined (`#[inline(always)]`). Without a fused multiply-add in the source,
/// which the compiler does not make up, the bits are the same on every width.
#[inline]
pub fn widest<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

#[test]
fn every_width_has_the_same_bits() {
    let x: Vec<f32> = (0..1000_u16).map(|i| f32::from(i) / 7.0 - 50.0).collect();
    let polynomial = |x: f32| (x * 0.1 + 3.0) * x - 0.7;
    let wide = widest(|| x.iter().map(|&x| polynomial(x)).collect::<Vec<_>>());
    assert_eq!(wide, x.iter().map(|&x| polynomial(x)).collect::<Vec<_>>());
}
