// What the device code needs of the machine: types, conversions, loads, one matrix product of a warp. mq_host.h is its twin for g++.
typedef unsigned char mq_u8;
typedef unsigned short mq_u16;
typedef unsigned int mq_u32;

#ifdef MQ_HOST
#include "mq_host.h"
#else
#define MQ_HD __device__ __forceinline__
#define MQ_D __device__ __forceinline__
#define MQ_GLOBAL __global__
#define MQ_SHARED __shared__
#define MQ_LAUNCH(threads, blocks) __launch_bounds__(threads, blocks)

MQ_HD float mq_float(mq_u32 bits) { return __uint_as_float(bits); }
MQ_HD mq_u32 mq_bits(float x) { return __float_as_uint(x); }
MQ_HD float mq_half(mq_u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
// Codes: once, past L1.
MQ_HD void mq_load4(const mq_u32 *p, mq_u32 *w) {
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p));
}
MQ_HD void mq_load2(const mq_u32 *p, mq_u32 *w) {
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
}
// Activations: four warps read the same ones.
MQ_HD void mq_load_x(const mq_u16 *p, mq_u32 *w) {
    asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p));
}
MQ_HD void mq_store_x(mq_u16 *p, const mq_u32 *w) {
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
}
// (a & MASK) | b and (a & MASK) ^ b in one instruction: written out, the compiler takes two, for each has room for one constant.
template <mq_u32 MASK> MQ_HD mq_u32 mq_and_or(mq_u32 a, mq_u32 b) {
    mq_u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "n"(MASK), "r"(b));
    return d;
}
template <mq_u32 MASK> MQ_HD mq_u32 mq_and_xor(mq_u32 a, mq_u32 b) {
    mq_u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(d) : "r"(a), "n"(MASK), "r"(b));
    return d;
}
// Four bytes out of eight, those of a first: a nibble of `which` a byte.
MQ_HD mq_u32 mq_bytes(mq_u32 a, mq_u32 b, mq_u32 which) { return __byte_perm(a, b, which); }
// x / (1 + exp(-x)), within a few units of the last place.
MQ_HD float mq_silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
MQ_HD int mq_pull(int *counter) { return atomicAdd(counter, 1); }
#endif

// Activation types: how many bits a mantissa has, and what an exponent has added to it.
struct mq_bf16 { static constexpr int mant = 7, bias = 127; };
struct mq_f16 { static constexpr int mant = 10, bias = 15; };

#ifndef MQ_HOST
// a - b of two 16-bit numbers; sm_80 has no sub.bf16x2, so it multiplies by one.
template <class T> MQ_HD mq_u32 mq_sub2(mq_u32 a, mq_u32 b);
template <> MQ_HD mq_u32 mq_sub2<mq_f16>(mq_u32 a, mq_u32 b) {
    mq_u32 d;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
template <> MQ_HD mq_u32 mq_sub2<mq_bf16>(mq_u32 a, mq_u32 b) {
    mq_u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3f803f80u), "r"(b ^ 0x80008000u));
    return d;
}
template <class T> MQ_HD mq_u16 mq_round(float x);
template <> MQ_HD mq_u16 mq_round<mq_f16>(float x) {
    mq_u16 d;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d) : "f"(x));
    return d;
}
template <> MQ_HD mq_u16 mq_round<mq_bf16>(float x) {
    mq_u16 d;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(x));
    return d;
}
// Two numbers rounded, the first below.
template <class T> MQ_HD mq_u32 mq_round2(float low, float high);
template <> MQ_HD mq_u32 mq_round2<mq_f16>(float low, float high) {
    mq_u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
template <> MQ_HD mq_u32 mq_round2<mq_bf16>(float low, float high) {
    mq_u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
// D = A B + C; C is D, or 0 for the FIRST of a sum.
#define MQ_MMA(TYPE, D, A, B, C)                                                                                            \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};" \
        : "=f"(D[0]), "=f"(D[1]), "=f"(D[2]), "=f"(D[3])                                                                    \
        : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B[0]), "r"(B[1]), "f"(C[0]), "f"(C[1]), "f"(C[2]), "f"(C[3]))
template <class T, bool FIRST> MQ_HD void mq_mma(float *d, const mq_u32 *a, const mq_u32 *b) {
    const float c[4] = {FIRST ? 0.0f : d[0], FIRST ? 0.0f : d[1], FIRST ? 0.0f : d[2], FIRST ? 0.0f : d[3]};
    if constexpr (T::mant == 7) MQ_MMA("bf16", d, a, b, c);
    else MQ_MMA("f16", d, a, b, c);
}
#endif

// f(0), f(1), ... f(N - 1) with the number as a constant.
template <int I> struct mq_int { static constexpr int value = I; };
template <int N, int I = 0, class F> MQ_HD void mq_each(F f) {
    if constexpr (I < N) {
        f(mq_int<I>());
        mq_each<N, I + 1>(f);
    }
}
