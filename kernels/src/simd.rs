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

/// Sixteen lanes of 32 bits, one way a set of instructions; every way gives the same bits.
///
/// As with [`widest`], only what is inlined into [`Lanes::run`] is compiled for them.
pub trait Lanes: Copy + Send + Sync {
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen integers.
    type I: Copy;

    /// Runs `work` compiled for the instructions that this way needs.
    fn run<R>(self, work: impl FnOnce() -> R) -> R;
    /// From memory.
    fn floats(self, from: &[f32; 16]) -> Self::F;
    /// To memory.
    fn array(self, of: Self::F) -> [f32; 16];
    /// The same number in every lane.
    fn splat(self, of: f32) -> Self::F;
    /// `a + b`.
    fn sum(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a · b`.
    fn product(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`, rounded once.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// From memory.
    fn words(self, from: &[u32; 16]) -> Self::I;
    /// `words >> shift & mask`.
    fn field(self, words: Self::I, shift: u32, mask: u32) -> Self::I;
    /// Signed integers as f32.
    fn convert(self, of: Self::I) -> Self::F;
    /// What the field of `B` bits from `shift` on means: `table` holds it at up to 4 bits for each value of four bits, of which the lowest
    /// `B` decide, and it is the field less `fixed` in any case.
    fn decode<const B: usize>(self, words: Self::I, shift: u32, table: Self::F, fixed: Self::F) -> Self::F;
    /// `sums[i] + Σ_b w[i].byte(b) · x[i].byte(b)`, bytes of `w` unsigned, of `x` signed.
    fn dot(self, sums: Self::I, w: Self::I, x: Self::I) -> Self::I;
}

/// Work that is compiled once for every way.
pub trait Wide {
    /// What it gives.
    type Out;
    /// Does it.
    fn with(self, lanes: impl Lanes) -> Self::Out;
}

/// Does `work` in the widest way that this CPU has: AVX-512 with VNNI, AVX2 with FMA, or none of its own.
pub fn lanes<W: Wide>(work: W) -> W::Out {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(lanes) = Avx512::detect() {
            return work.with(lanes);
        }
        if let Some(lanes) = Avx2::detect() {
            return work.with(lanes);
        }
    }
    work.with(Portable)
}

/// Without instructions of its own.
#[derive(Clone, Copy, Debug)]
pub struct Portable;

impl Lanes for Portable {
    type F = [f32; 16];
    type I = [u32; 16];

    #[inline(always)]
    fn run<R>(self, work: impl FnOnce() -> R) -> R {
        widest(work)
    }

    #[inline(always)]
    fn floats(self, from: &[f32; 16]) -> [f32; 16] {
        *from
    }

    #[inline(always)]
    fn array(self, of: [f32; 16]) -> [f32; 16] {
        of
    }

    #[inline(always)]
    fn splat(self, of: f32) -> [f32; 16] {
        [of; 16]
    }

    #[inline(always)]
    fn sum(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn product(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn mul_add(self, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn words(self, from: &[u32; 16]) -> [u32; 16] {
        *from
    }

    #[inline(always)]
    fn field(self, words: [u32; 16], shift: u32, mask: u32) -> [u32; 16] {
        words.map(|word| word >> shift & mask)
    }

    #[inline(always)]
    fn convert(self, of: [u32; 16]) -> [f32; 16] {
        of.map(|x| x as i32 as f32)
    }

    #[inline(always)]
    fn decode<const B: usize>(self, words: [u32; 16], shift: u32, _table: [f32; 16], fixed: [f32; 16]) -> [f32; 16] {
        let codes = self.convert(self.field(words, shift, (1 << B) - 1));
        std::array::from_fn(|i| codes[i] - fixed[i])
    }

    #[inline(always)]
    fn dot(self, mut sums: [u32; 16], w: [u32; 16], x: [u32; 16]) -> [u32; 16] {
        for byte in 0..4 {
            for i in 0..16 {
                let signed = i32::from((x[i] >> (8 * byte)) as u8 as i8);
                sums[i] = sums[i].wrapping_add(((w[i] >> (8 * byte) & 0xff) as i32 * signed) as u32);
            }
        }
        sums
    }
}

#[cfg(target_arch = "x86_64")]
pub use ways::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod ways {
    use std::arch::x86_64::*;

    use super::{Lanes, x86};

    /// Instructions of a way that the CPU has.
    macro_rules! has {
        ($($work:tt)*) => {{
            // SAFETY: a value of this type was made only after the CPU was asked for every feature that it stands for, and what is read or
            // written is a reference to as many bytes.
            #[allow(unsafe_code)]
            unsafe { $($work)* }
        }};
    }

    /// With AVX-512 and its VNNI; there is one only where the CPU has them.
    #[derive(Clone, Copy, Debug)]
    pub struct Avx512(());

    impl Avx512 {
        /// The way, where the CPU has it.
        pub fn detect() -> Option<Self> {
            (x86::has_avx512() && is_x86_feature_detected!("avx512vnni")).then_some(Self(()))
        }
    }

    impl Lanes for Avx512 {
        type F = __m512;
        type I = __m512i;

        #[inline(always)]
        fn run<R>(self, work: impl FnOnce() -> R) -> R {
            has!(x86::vnni(work))
        }

        #[inline(always)]
        fn floats(self, from: &[f32; 16]) -> __m512 {
            has!(_mm512_loadu_ps(from.as_ptr()))
        }

        #[inline(always)]
        fn array(self, of: __m512) -> [f32; 16] {
            let mut to = [0.0; 16];
            has!(_mm512_storeu_ps(to.as_mut_ptr(), of));
            to
        }

        #[inline(always)]
        fn splat(self, of: f32) -> __m512 {
            has!(_mm512_set1_ps(of))
        }

        #[inline(always)]
        fn sum(self, a: __m512, b: __m512) -> __m512 {
            has!(_mm512_add_ps(a, b))
        }

        #[inline(always)]
        fn product(self, a: __m512, b: __m512) -> __m512 {
            has!(_mm512_mul_ps(a, b))
        }

        #[inline(always)]
        fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            has!(_mm512_fmadd_ps(a, b, c))
        }

        #[inline(always)]
        fn words(self, from: &[u32; 16]) -> __m512i {
            has!(_mm512_loadu_si512(from.as_ptr().cast()))
        }

        #[inline(always)]
        fn field(self, words: __m512i, shift: u32, mask: u32) -> __m512i {
            has!(_mm512_and_si512(_mm512_srlv_epi32(words, _mm512_set1_epi32(shift as i32)), _mm512_set1_epi32(mask as i32)))
        }

        #[inline(always)]
        fn convert(self, of: __m512i) -> __m512 {
            has!(_mm512_cvtepi32_ps(of))
        }

        #[inline(always)]
        fn decode<const B: usize>(self, words: __m512i, shift: u32, table: __m512, fixed: __m512) -> __m512 {
            if B <= 4 {
                // The permutation looks at the lowest four bits alone.
                return has!(_mm512_permutexvar_ps(_mm512_srlv_epi32(words, _mm512_set1_epi32(shift as i32)), table));
            }
            let codes = self.convert(self.field(words, shift, (1 << B) - 1));
            has!(_mm512_sub_ps(codes, fixed))
        }

        #[inline(always)]
        fn dot(self, sums: __m512i, w: __m512i, x: __m512i) -> __m512i {
            has!(_mm512_dpbusd_epi32(sums, w, x))
        }
    }

    /// With AVX2 and FMA; there is one only where the CPU has them.
    #[derive(Clone, Copy, Debug)]
    pub struct Avx2(());

    impl Avx2 {
        /// The way, where the CPU has it.
        pub fn detect() -> Option<Self> {
            x86::has_avx2().then_some(Self(()))
        }
    }

    impl Lanes for Avx2 {
        type F = [__m256; 2];
        type I = [__m256i; 2];

        #[inline(always)]
        fn run<R>(self, work: impl FnOnce() -> R) -> R {
            has!(x86::avx2(work))
        }

        #[inline(always)]
        fn floats(self, from: &[f32; 16]) -> [__m256; 2] {
            has!([_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))])
        }

        #[inline(always)]
        fn array(self, of: [__m256; 2]) -> [f32; 16] {
            let mut to = [0.0; 16];
            has! {
                _mm256_storeu_ps(to.as_mut_ptr(), of[0]);
                _mm256_storeu_ps(to.as_mut_ptr().add(8), of[1]);
            }
            to
        }

        #[inline(always)]
        fn splat(self, of: f32) -> [__m256; 2] {
            has!([_mm256_set1_ps(of); 2])
        }

        #[inline(always)]
        fn sum(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            has!([_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])])
        }

        #[inline(always)]
        fn product(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            has!([_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])])
        }

        #[inline(always)]
        fn mul_add(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
            has!([_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])])
        }

        #[inline(always)]
        fn words(self, from: &[u32; 16]) -> [__m256i; 2] {
            has!([_mm256_loadu_si256(from.as_ptr().cast()), _mm256_loadu_si256(from.as_ptr().add(8).cast())])
        }

        #[inline(always)]
        fn field(self, words: [__m256i; 2], shift: u32, mask: u32) -> [__m256i; 2] {
            has! {
                let (shift, mask) = (_mm256_set1_epi32(shift as i32), _mm256_set1_epi32(mask as i32));
                [_mm256_and_si256(_mm256_srlv_epi32(words[0], shift), mask), _mm256_and_si256(_mm256_srlv_epi32(words[1], shift), mask)]
            }
        }

        #[inline(always)]
        fn convert(self, of: [__m256i; 2]) -> [__m256; 2] {
            has!([_mm256_cvtepi32_ps(of[0]), _mm256_cvtepi32_ps(of[1])])
        }

        #[inline(always)]
        fn decode<const B: usize>(self, words: [__m256i; 2], shift: u32, _table: [__m256; 2], fixed: [__m256; 2]) -> [__m256; 2] {
            let codes = self.convert(self.field(words, shift, (1 << B) - 1));
            has!([_mm256_sub_ps(codes[0], fixed[0]), _mm256_sub_ps(codes[1], fixed[1])])
        }

        #[inline(always)]
        fn dot(self, sums: [__m256i; 2], w: [__m256i; 2], x: [__m256i; 2]) -> [__m256i; 2] {
            // Even and odd bytes as 16 bits each, so that no pair of products is cut off.
            let half = |i: usize| {
                has! {
                    let even = _mm256_madd_epi16(_mm256_and_si256(w[i], _mm256_set1_epi32(0x00ff_00ff)), _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x[i])));
                    let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(w[i]), _mm256_srai_epi16::<8>(x[i]));
                    _mm256_add_epi32(sums[i], _mm256_add_epi32(even, odd))
                }
            };
            [half(0), half(1)]
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
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
fn every_way_has_the_same_bits() {
    struct All;
    impl Wide for All {
        type Out = Vec<[u32; 16]>;

        fn with(self, lanes: impl Lanes) -> Self::Out {
            lanes.run(
                #[inline(always)]
                || all(lanes),
            )
        }
    }
    #[inline(always)]
    fn all(lanes: impl Lanes) -> Vec<[u32; 16]> {
        let words = |seed: u32| std::array::from_fn(|i| (i as u32 + seed).wrapping_mul(0x9e37_79b9) ^ 0xff00_7f80);
        let [a, b, c] = [3, 11, 23].map(|seed| lanes.words(&words(seed)));
        let [x, y, z] = [3, 11, 23].map(|seed| lanes.floats(&words(seed).map(|word| word as i32 as f32 / 7.0)));
        let table = lanes.floats(&std::array::from_fn(|i| (i % 4) as f32 - 1.5));
        let four = lanes.floats(&std::array::from_fn(|i| i as f32 - 8.0));
        let found = [
            lanes.sum(x, y),
            lanes.product(x, y),
            lanes.mul_add(x, y, z),
            lanes.convert(lanes.dot(c, a, b)),
            lanes.convert(lanes.field(a, 5, 0x0f0f_0f0f)),
            lanes.decode::<2>(a, 6, table, lanes.splat(1.5)),
            lanes.decode::<4>(a, 12, four, lanes.splat(8.0)),
            lanes.decode::<8>(a, 24, four, lanes.splat(128.0)),
        ];
        found.map(|x| lanes.array(x).map(f32::to_bits)).to_vec()
    }
    let meant = All.with(Portable);
    let word = 3_u32.wrapping_mul(0x9e37_79b9) ^ 0xff00_7f80;
    assert_eq!(meant[5][0], ((word >> 6 & 3) as f32 - 1.5).to_bits());
    assert_eq!(meant[7][0], ((word >> 24) as f32 - 128.0).to_bits());
    let bytes = |seed: u32| (seed.wrapping_mul(0x9e37_79b9) ^ 0xff00_7f80).to_le_bytes();
    let dot: i32 = bytes(3).into_iter().zip(bytes(11)).map(|(w, x)| i32::from(w) * i32::from(x as i8)).sum();
    assert_eq!(meant[3][0], ((23_u32.wrapping_mul(0x9e37_79b9) ^ 0xff00_7f80).wrapping_add(dot as u32) as i32 as f32).to_bits());
    assert_eq!(lanes(All), meant);
    #[cfg(target_arch = "x86_64")]
    if let Some(lanes) = Avx2::detect() {
        assert_eq!(All.with(lanes), meant);
    }
}
