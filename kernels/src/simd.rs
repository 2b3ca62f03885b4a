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

/// Sixteen sums of four products of an unsigned and a signed byte.
pub trait Dot: Copy + Send + Sync {
    /// `sums[i] + Σ_b w[i].byte(b) · x[i].byte(b)`, bytes of `w` unsigned, of `x` signed.
    fn dot(self, sums: [i32; 16], w: [u32; 16], x: [u32; 16]) -> [i32; 16];

    /// Runs `work` compiled for the instructions that this way needs.
    fn run<R>(self, work: impl FnOnce() -> R) -> R;
}

/// Without instructions of its own; compiled for the widest vectors.
#[derive(Clone, Copy, Debug)]
pub struct Portable;

impl Dot for Portable {
    #[inline(always)]
    fn dot(self, mut sums: [i32; 16], w: [u32; 16], x: [u32; 16]) -> [i32; 16] {
        for byte in 0..4 {
            for i in 0..16 {
                let signed = i32::from((x[i] >> (8 * byte)) as u8 as i8);
                sums[i] += (w[i] >> (8 * byte) & 0xff) as i32 * signed;
            }
        }
        sums
    }

    #[inline(always)]
    fn run<R>(self, work: impl FnOnce() -> R) -> R {
        widest(work)
    }
}

/// With `vpdpbusd` of AVX-512 VNNI; there is one only where the CPU has it.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
pub struct Vnni(());

#[cfg(target_arch = "x86_64")]
impl Vnni {
    /// The way, where the CPU has it.
    pub fn detect() -> Option<Self> {
        (x86::has_avx512() && is_x86_feature_detected!("avx512vnni")).then_some(Self(()))
    }
}

#[cfg(target_arch = "x86_64")]
impl Dot for Vnni {
    #[inline(always)]
    fn dot(self, sums: [i32; 16], w: [u32; 16], x: [u32; 16]) -> [i32; 16] {
        // SAFETY: a `Vnni` was made only after the CPU was asked for these features.
        #[allow(unsafe_code)]
        unsafe {
            x86::dpbusd(sums, w, x)
        }
    }

    #[inline(always)]
    fn run<R>(self, work: impl FnOnce() -> R) -> R {
        // SAFETY: as above.
        #[allow(unsafe_code)]
        unsafe {
            x86::vnni(work)
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{__m512i, _mm512_dpbusd_epi32};

    #[inline]
    #[target_feature(enable = "avx2,fma,avx512f,avx512vl,avx512bw,avx512dq,avx512vnni")]
    pub fn dpbusd(sums: [i32; 16], w: [u32; 16], x: [u32; 16]) -> [i32; 16] {
        // SAFETY: arrays of sixteen 32-bit integers and the vector are the same 64 bytes, of which every pattern is valid.
        #[allow(unsafe_code)]
        unsafe {
            let of = |words: [u32; 16]| std::mem::transmute::<[u32; 16], __m512i>(words);
            let sums = std::mem::transmute::<[i32; 16], __m512i>(sums);
            std::mem::transmute::<__m512i, [i32; 16]>(_mm512_dpbusd_epi32(sums, of(w), of(x)))
        }
    }

    #[target_feature(enable = "avx2,fma,avx512f,avx512vl,avx512bw,avx512dq,avx512vnni")]
    pub fn vnni<R>(work: impl FnOnce() -> R) -> R {
        work()
    }

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

#[test]
fn every_way_has_the_same_sums() {
    let words = |seed: u32| std::array::from_fn(|i| (i as u32 + seed).wrapping_mul(0x9e37_79b9) ^ 0xff00_7f80);
    let (sums, w, x) = (std::array::from_fn(|i| i as i32 - 7), words(3), words(11));
    let by_hand: [i32; 16] = std::array::from_fn(|i| {
        let products = w[i].to_le_bytes().into_iter().zip(x[i].to_le_bytes()).map(|(w, x)| i32::from(w) * i32::from(x as i8));
        sums[i] + products.sum::<i32>()
    });
    assert_eq!(Portable.run(|| Portable.dot(sums, w, x)), by_hand);
    #[cfg(target_arch = "x86_64")]
    if let Some(vnni) = Vnni::detect() {
        assert_eq!(vnni.run(|| vnni.dot(sums, w, x)), by_hand);
    }
}
