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

MQ_HD float mq_float(mq_u32 bits) { return __uint_as_float(bits); }
MQ_HD mq_u32 mq_bits(float x) { return __float_as_uint(x); }
MQ_HD float mq_half(mq_u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
MQ_HD void mq_load4(const mq_u32 *p, mq_u32 *w) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p));
}
MQ_HD void mq_load2(const mq_u32 *p, mq_u32 *w) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
}
MQ_HD int mq_pull(int *counter) { return atomicAdd(counter, 1); }
#endif

struct mq_bf16;
struct mq_f16;

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
template <class T> MQ_HD void mq_mma(float *c, const mq_u32 *a, const mq_u32 *b);
template <> MQ_HD void mq_mma<mq_bf16>(float *c, const mq_u32 *a, const mq_u32 *b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <> MQ_HD void mq_mma<mq_f16>(float *c, const mq_u32 *a, const mq_u32 *b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
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
