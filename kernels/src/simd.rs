//! CPU instructions by name: run-time dispatch. The only file of this crate that may be unsafe for their sake.

/// Runs `work` compiled for the widest vectors that this CPU has: AVX-512 or AVX2 with FMA on x86-64, else the baseline.
///
/// Only what is inlined into it takes part: write `widest(#[inline(always)] || …)`, and mark in the same way what the closure
/// calls. `f32::mul_add` is one instruction there, and the bits are the same on every width; only x86-64 CPUs older than 2013
/// pay for it dearly.
#[inline]
pub fn widest<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        if x86::has_avx512() {
            // SAFETY: the CPU has every feature that the function is compiled for: it was just asked.
            #[allow(unsafe_code)]
            return unsafe { x86::avx512(work) };
        }
        if x86::has_avx2() {
            // SAFETY: as above.
            #[allow(unsafe_code)]
            return unsafe { x86::avx2(work) };
        }
    }
    work()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    #[inline]
    pub fn has_avx512() -> bool {
        has_avx2()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
    }

    #[inline]
    pub fn has_avx2() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
    }

    #[target_feature(enable = "avx2,fma,avx512f,avx512vl,avx512bw,avx512dq")]
    pub fn avx512<R>(work: impl FnOnce() -> R) -> R {
        work()
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn avx2<R>(work: impl FnOnce() -> R) -> R {
        work()
    }
}

#[test]
fn every_width_has_the_same_bits() {
    let x: Vec<f32> = (0..1000_u16).map(|i| f32::from(i) / 7.0 - 50.0).collect();
    let polynomial = |x: f32| x.mul_add(0.1, 3.0).mul_add(x, -0.7);
    let wide = widest(
        #[inline(always)]
        || x.iter().map(|&x| polynomial(x)).collect::<Vec<_>>(),
    );
    assert_eq!(wide, x.iter().map(|&x| polynomial(x)).collect::<Vec<_>>());
}
