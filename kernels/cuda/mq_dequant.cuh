// MQT-1 words -> codes -> 16-bit operands, and the exact weights. Header-free: NVRTC compiles it alone, g++ with mq_host.h.
// The layout's specification is kernels/src/layout/mod.rs; formulas of the operands: specs "dequantisation, exactly".

// Rows of the expert table; 32 bytes, as table.rs writes them.
struct mq_entry {
    mq_u32 w_off16, s_off16, z_off16, perm_off16;
    mq_u8 bits, log2_gs;
    mq_u16 flags, n_tiles, k_tiles;
    mq_u32 expert_id, reserved;
};
static_assert(sizeof(mq_entry) == 32, "an entry of the expert table has 32 bytes");

#define MQ_GATE_UP 0x10u
#define MQ_ZEROS 0x20u
#define MQ_OFFSET 0x40u
#define MQ_HALF 0x80u

// Activation types: how many bits a mantissa has, and the exponent field of 2^(mant - pos) at its place.
struct mq_bf16 { static constexpr int mant = 7, bias = 127; };
struct mq_f16 { static constexpr int mant = 10, bias = 15; };

template <class T> MQ_HD constexpr mq_u32 mq_magic(int pos) {
    return ((mq_u32)(T::bias + T::mant - pos) << T::mant) * 0x00010001u;
}
// 2^(mant - pos) + z as a 16-bit number, twice; z < 2^(mant - pos).
template <class T> MQ_HD constexpr mq_u32 mq_offset(int pos, mq_u32 z) {
    return (((mq_u32)(T::bias + T::mant - pos) << T::mant) + (z << pos)) * 0x00010001u;
}

// The codes of pair P of a lane's words of one half: even code below, odd code 16 bits above.
template <int B, int P> MQ_HD mq_u32 mq_pair(const mq_u32 *w) {
    if constexpr ((B == 3 || B == 5) && P == 15) {
        mq_u32 both = 0;
#pragma unroll
        for (int c = 0; c < B; c++) both |= ((w[c] >> 15) & 0x00010001u) << c;
        return both;
    } else if constexpr (B == 6 && P >= 12) {
        constexpr int i = P - 12;
        return ((w[i] >> 12) & 0x000f000fu) | (((w[4 + i / 2] >> (12 + 2 * (i % 2))) & 0x00030003u) << 4);
    } else {
        constexpr int F = 16 / B;
        return (w[P / F] >> (B * (P % F))) & (((1u << B) - 1) * 0x00010001u);
    }
}

// The operand of pair P: q - 2^(B-1) twice, exact in 16 bits; at one bit 2q - 1.
template <class T, int B, int P> MQ_HD mq_u32 mq_operand(const mq_u32 *w) {
    if constexpr (B == 1) {
        // The bit becomes the sign of 1.0: set means positive.
        constexpr mq_u32 minus_one = T::mant == 7 ? 0xbf80bf80u : 0xbc00bc00u;
        return ((w[0] << (15 - P)) & 0x80008000u) ^ minus_one;
    } else if constexpr (B == 8 && T::mant == 7) {
        // Eight bits and an implied one do not fit bf16 beside an offset: by way of fp32, whose upper half the difference is.
        mq_u32 both = mq_pair<B, P>(w);
        mq_u32 low = mq_bits(mq_float(0x4b000000u | (both & 0xff)) - 8388736.0f);
        mq_u32 high = mq_bits(mq_float(0x4b000000u | (both >> 16)) - 8388736.0f);
        return (low >> 16) | (high & 0xffff0000u);
    } else if constexpr (((B == 3 || B == 5) && P == 15) || (B == 6 && P >= 12)) {
        return mq_sub2<T>(mq_pair<B, P>(w) | mq_magic<T>(0), mq_offset<T>(0, 1u << (B - 1)));
    } else {
        // As many fields as the mantissa holds are taken where they stand; one shift serves the next batch.
        constexpr int F = 16 / B, n = T::mant / B, f = P % F, pos = f % n * B, shift = f / n * n * B;
        mq_u32 v = ((w[P / F] >> shift) & ((((1u << B) - 1) << pos) * 0x00010001u)) | mq_magic<T>(pos);
        return mq_sub2<T>(v, mq_offset<T>(pos, 1u << (B - 1)));
    }
}

// The zero that operands have had subtracted, and what one step of an operand is worth.
template <int B> MQ_HD constexpr float mq_zero() { return B == 1 ? 0.5f : (float)(1 << (B - 1)); }
template <int B> MQ_HD constexpr float mq_step() { return B == 1 ? 0.5f : 1.0f; }

// A lane's words of both halves of one slab: 16 bytes a load where B is even, 8 where it is odd.
template <int B> MQ_HD void mq_slab(const mq_u32 *slab, int lane, mq_u32 *w) {
    constexpr int V = B % 2 ? 2 : 4;
#pragma unroll
    for (int s = 0; s < 2 * B; s += V) {
        if constexpr (V == 4) mq_load4(slab + s / V * 128 + lane * 4, w + s);
        else mq_load2(slab + s / V * 64 + lane * 2, w + s);
    }
}

MQ_HD float mq_scale(const mq_u8 *base, mq_u32 flags, unsigned long long i) {
    switch (flags >> 9 & 3) {
    case 0: return mq_float((mq_u32)((const mq_u16 *)base)[i] << 16);
    case 1: return mq_half(((const mq_u16 *)base)[i]);
    default: return ((const float *)base)[i];
    }
}

// The zero point of one row and group, or the offset; B is the width of the codes.
MQ_HD float mq_stored_zero(const mq_u8 *base, const mq_entry &e, unsigned long long i) {
    if (e.flags & MQ_OFFSET) return mq_scale(base, e.flags, i);
    if (e.bits > 4) return (float)base[i];
    return (float)(base[i / 2] >> (i % 2 * 4) & 15);
}
MQ_HD float mq_fixed_zero(const mq_entry &e) {
    float top = (float)(1u << e.bits);
    return e.flags & MQ_HALF ? (top - 1.0f) * 0.5f : top * 0.5f;
}

// What has to be added to s * sum(operand * x) for every unit of sum(x): (z0 - z) * s, or s * z0 + o.
MQ_HD float mq_correction(const mq_u8 *zeros, const mq_entry &e, unsigned long long i, float s, float z0) {
    if (e.flags & MQ_OFFSET) return fmaf(s, z0, mq_stored_zero(zeros, e, i));
    return s * (z0 - (e.flags & MQ_ZEROS ? mq_stored_zero(zeros, e, i) : mq_fixed_zero(e)));
}

// The weight itself: (q - z) * s in fp32, or fma(s, q, o).
MQ_HD float mq_weight(const mq_u8 *zeros, const mq_entry &e, unsigned long long i, float s, mq_u32 q) {
    if (e.flags & MQ_OFFSET) return fmaf(s, (float)q, mq_stored_zero(zeros, e, i));
    return ((float)q - (e.flags & MQ_ZEROS ? mq_stored_zero(zeros, e, i) : mq_fixed_zero(e))) * s;
}

// One slab to `out`, [rows, ld] of T: bit-exact with the reference. `rows` and `inputs` are those of one matrix; with gate and up in
// turns of eight, up follows gate.
template <class T, int B>
MQ_D void mq_dequant_slab(const mq_u8 *arena, const mq_entry &e, int row_tile, int k_tile, int slab, int lane, mq_u16 *out, int rows, int inputs) {
    mq_u32 w[2 * B];
    const mq_u32 *words = (const mq_u32 *)(arena + 16ull * e.w_off16);
    mq_slab<B>(words + (((unsigned long long)row_tile * e.k_tiles + k_tile) * 4 + slab) * (64 * B), lane, w);
    const mq_u8 *scales = arena + 16ull * e.s_off16, *zeros = arena + 16ull * e.z_off16;
    int groups = e.log2_gs == 0xff ? 1 : (e.k_tiles * 128) >> e.log2_gs;
    int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int h = 0; h < 2; h++)
        mq_each<16>([&](auto p) {
            constexpr int P = decltype(p)::value;
            int r = P & 3, row = row_tile * 64 + slab * 16 + g + 8 * (r & 1);
            int k = k_tile * 128 + 64 * h + 16 * (P >> 2) + 8 * (r >> 1) + 2 * t;
            int from = row, to = row;
            if (e.flags & MQ_GATE_UP) {
                from = row / 16 * 8 + row % 8;
                to = from + (row % 16 / 8) * rows;
            }
            if (from >= rows || k >= inputs) return;
            int group = e.log2_gs == 0xff ? 0 : k >> e.log2_gs;
            unsigned long long i = ((unsigned long long)row_tile * groups + group) * 64 + row % 64;
            float s = mq_scale(scales, e.flags, i);
            mq_u32 both = mq_pair<B, P>(w + h * B);
            mq_u16 *at = out + (unsigned long long)to * inputs + k;
            at[0] = mq_round<T>(mq_weight(zeros, e, i, s, both & 0xffff));
            if (k + 1 < inputs) at[1] = mq_round<T>(mq_weight(zeros, e, i, s, both >> 16));
        });
}

// Grid: (row tiles, k tiles), 128 threads.
template <class T> MQ_D void mq_dequant(const mq_u8 *arena, const mq_entry *table, int entry, mq_u16 *out, int rows, int inputs) {
    const mq_entry e = table[entry];
    int slab = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (blockIdx.x >= e.n_tiles || blockIdx.y >= e.k_tiles) return;
    switch (e.bits) {
#define MQ_CASE(B) case B: mq_dequant_slab<T, B>(arena, e, blockIdx.x, blockIdx.y, slab, lane, out, rows, inputs); break;
        MQ_WIDTHS(MQ_CASE)
#undef MQ_CASE
    }
}
extern "C" MQ_GLOBAL void mq_dequant_bf16(const mq_u8 *arena, const mq_entry *table, int entry, mq_u16 *out, int rows, int inputs) {
    mq_dequant<mq_bf16>(arena, table, entry, out, rows, inputs);
}
extern "C" MQ_GLOBAL void mq_dequant_f16(const mq_u8 *arena, const mq_entry *table, int entry, mq_u16 *out, int rows, int inputs) {
    mq_dequant<mq_f16>(arena, table, entry, out, rows, inputs);
}
