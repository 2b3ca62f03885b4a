// The machine for g++: a block's threads are fibers that change at every collective, so the emitted .cu runs as it is, on a CPU, under
// sanitizers. Not a part of what is emitted for a GPU.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <type_traits>
#include <vector>

#define MQ_HD inline
#define MQ_D inline
#define MQ_GLOBAL
#define MQ_SHARED static
#define MQ_LAUNCH(threads, blocks)

struct mq_dim { unsigned x, y, z; };
static mq_dim threadIdx, blockIdx, gridDim;

inline float mq_float(mq_u32 bits) { float x; memcpy(&x, &bits, 4); return x; }
inline mq_u32 mq_bits(float x) { mq_u32 bits; memcpy(&bits, &x, 4); return bits; }
inline float mq_half(mq_u16 bits) {
    mq_u32 exponent = bits >> 10 & 31, mantissa = bits & 1023, sign = (mq_u32)(bits >> 15) << 31;
    if (exponent == 31) return mq_float(sign | 0x7f800000u | mantissa << 13);
    float x = exponent ? mq_float((exponent + 112) << 23 | mantissa << 13) : (float)mantissa * 5.9604644775390625e-8f;
    return mq_float(mq_bits(x) | sign);
}
inline mq_u16 mq_to_half(float x) {
    mq_u32 bits = mq_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (mq_u16)(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return (mq_u16)(sign | 0x7c00u);
    if (magnitude < 0x38800000u) return (mq_u16)(sign | (mq_u32)lrintf(mq_float(magnitude) * 16777216.0f));
    mq_u32 rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
    return (mq_u16)(sign | ((rounded - 0x38000000u) >> 13));
}
inline mq_u16 mq_to_bf16(float x) {
    mq_u32 bits = mq_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (mq_u16)(bits >> 16 | 0x40);
    return (mq_u16)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline void mq_load4(const mq_u32 *p, mq_u32 *w) {
    if ((uintptr_t)p % 16) abort();
    memcpy(w, p, 16);
}
inline void mq_load2(const mq_u32 *p, mq_u32 *w) {
    if ((uintptr_t)p % 8) abort();
    memcpy(w, p, 8);
}
inline void mq_load_x(const mq_u16 *p, mq_u32 *w) { mq_load4((const mq_u32 *)p, w); }
inline void mq_store_x(mq_u16 *p, const mq_u32 *w) {
    if ((uintptr_t)p % 16) abort();
    memcpy(p, w, 16);
}
template <mq_u32 MASK> inline mq_u32 mq_and_or(mq_u32 a, mq_u32 b) { return (a & MASK) | b; }
template <mq_u32 MASK> inline mq_u32 mq_and_xor(mq_u32 a, mq_u32 b) { return (a & MASK) ^ b; }
inline mq_u32 mq_bytes(mq_u32 a, mq_u32 b, mq_u32 which) {
    mq_u32 d = 0;
    for (int i = 0; i < 4; i++) {
        mq_u32 from = which >> 4 * i & 7;
        d |= ((from < 4 ? a >> 8 * from : b >> 8 * (from - 4)) & 255) << 8 * i;
    }
    return d;
}
inline float mq_silu(float x) { return x / (1.0f + expf(-x)); }
inline int mq_pull(int *counter) { return (*counter)++; }

struct mq_bf16;
struct mq_f16;
template <class T> inline float mq_wide(mq_u16 x) { return std::is_same<T, mq_f16>::value ? mq_half(x) : mq_float((mq_u32)x << 16); }
template <class T> inline mq_u16 mq_round(float x) { return std::is_same<T, mq_f16>::value ? mq_to_half(x) : mq_to_bf16(x); }
template <class T> inline mq_u32 mq_round2(float low, float high) { return mq_round<T>(low) | (mq_u32)mq_round<T>(high) << 16; }
template <class T> inline mq_u32 mq_sub2(mq_u32 a, mq_u32 b) {
    mq_u32 low = mq_round<T>(mq_wide<T>((mq_u16)a) - mq_wide<T>((mq_u16)b));
    mq_u32 high = mq_round<T>(mq_wide<T>((mq_u16)(a >> 16)) - mq_wide<T>((mq_u16)(b >> 16)));
    return low | high << 16;
}

// ---- fibers ----
struct mq_block {
    std::vector<ucontext_t> fibers;
    std::vector<std::vector<char>> stacks;
    std::vector<char> done;
    ucontext_t scheduler;
    unsigned current, arrived, generation;
    unsigned warp_arrived[32], warp_generation[32];
    mq_u32 a[32][32][4], b[32][32][2];
    void (*body)(void *);
    void *argument;
};
static mq_block mq_now;

inline void mq_yield() {
    mq_dim thread = threadIdx;
    swapcontext(&mq_now.fibers[mq_now.current], &mq_now.scheduler);
    threadIdx = thread;
}
inline void __syncthreads() {
    unsigned generation = mq_now.generation;
    if (++mq_now.arrived == mq_now.fibers.size()) {
        mq_now.arrived = 0;
        mq_now.generation++;
    } else
        while (mq_now.generation == generation) mq_yield();
}
inline void mq_sync_warp() {
    unsigned warp = threadIdx.x / 32, generation = mq_now.warp_generation[warp];
    if (++mq_now.warp_arrived[warp] == 32) {
        mq_now.warp_arrived[warp] = 0;
        mq_now.warp_generation[warp]++;
    } else
        while (mq_now.warp_generation[warp] == generation) mq_yield();
}
inline void mq_trampoline() {
    mq_now.body(mq_now.argument);
    mq_now.done[mq_now.current] = 1;
    swapcontext(&mq_now.fibers[mq_now.current], &mq_now.scheduler);
}
// Runs a kernel: every block in turn, its threads as fibers.
template <class F> inline void mq_launch(unsigned gx, unsigned gy, unsigned threads, F f) {
    gridDim = {gx, gy, 1};
    for (unsigned y = 0; y < gy; y++)
        for (unsigned x = 0; x < gx; x++) {
            blockIdx = {x, y, 0};
            mq_now.fibers.assign(threads, ucontext_t());
            mq_now.stacks.resize(threads);
            mq_now.done.assign(threads, 0);
            mq_now.arrived = 0;
            memset(mq_now.warp_arrived, 0, sizeof mq_now.warp_arrived);
            mq_now.body = [](void *f) { (*(F *)f)(); };
            mq_now.argument = &f;
            for (unsigned i = 0; i < threads; i++) {
                mq_now.stacks[i].resize(1 << 17);
                getcontext(&mq_now.fibers[i]);
                mq_now.fibers[i].uc_stack.ss_sp = mq_now.stacks[i].data();
                mq_now.fibers[i].uc_stack.ss_size = mq_now.stacks[i].size();
                mq_now.fibers[i].uc_link = &mq_now.scheduler;
                makecontext(&mq_now.fibers[i], mq_trampoline, 0);
            }
            for (bool left = true; left;) {
                left = false;
                for (unsigned i = 0; i < threads; i++) {
                    if (mq_now.done[i]) continue;
                    left = true;
                    mq_now.current = i;
                    threadIdx = {i, 0, 0};
                    swapcontext(&mq_now.scheduler, &mq_now.fibers[i]);
                }
            }
        }
}

// D = A B + C as the instruction has it: A [16, 16] by rows, B [16, 8] by columns, lane (g, t). C is D, or 0 for the FIRST of a sum.
template <class T, bool FIRST> inline void mq_mma(float *d, const mq_u32 *a, const mq_u32 *b) {
    unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    memcpy(mq_now.a[warp][lane], a, 16);
    memcpy(mq_now.b[warp][lane], b, 8);
    mq_sync_warp();
    for (unsigned r = 0; r < 4; r++) {
        unsigned row = g + 8 * (r / 2), column = 2 * t + r % 2;
        float sum = 0;
        for (unsigned k = 0; k < 16; k++) {
            mq_u32 left = mq_now.a[warp][row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            mq_u32 right = mq_now.b[warp][column * 4 + k % 8 / 2][k / 8];
            sum += mq_wide<T>((mq_u16)(left >> (k % 2 * 16))) * mq_wide<T>((mq_u16)(right >> (k % 2 * 16)));
        }
        d[r] = FIRST ? sum : d[r] + sum;
    }
    mq_sync_warp();
}
