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

// What tells one compiled form from another: width, group (255: whole rows), kind of zero and type of the scales.
#define MQ_FORM_FLAGS 0x6e0u
#define MQ_KEY(BITS, LOG2_GS, FLAGS) ((mq_u32)(BITS) | (mq_u32)(LOG2_GS) << 8 | (mq_u32)(FLAGS) << 16)
MQ_HD mq_u32 mq_key(const mq_entry &e) { return MQ_KEY(e.bits, e.log2_gs, e.flags & MQ_FORM_FLAGS); }

// The exponent of 2^(mant - pos) at its place, twice: or-ed to a field at bit `pos`, one unit of the field is worth 1.
template <class T> MQ_HD constexpr mq_u32 mq_magic(int pos) {
    return ((mq_u32)(T::bias + T::mant - pos) << T::mant) * 0x00010001u;
}
// 2^(mant - pos) + z as a 16-bit number, twice; z < 2^(mant - pos).
template <class T> MQ_HD constexpr mq_u32 mq_offset(int pos, mq_u32 z) {
    return (((mq_u32)(T::bias + T::mant - pos) << T::mant) + (z << pos)) * 0x00010001u;
}

template <int S> MQ_HD mq_u32 mq_shift(mq_u32 w) {
    if constexpr (S >= 0) return w >> S;
    else return w << -S;
}

// Pairs whose codes are gathered from several words.
template <int B, int P> MQ_HD constexpr bool mq_scattered() { return ((B == 3 || B == 5) && P == 15) || (B == 6 && P >= 12); }

// The codes of pair P of a lane's words of one half, or-ed to `rest`: even code at bit POS, odd code at bit 16 + POS.
template <int B, int P, int POS> MQ_HD mq_u32 mq_at(const mq_u32 *w, mq_u32 rest) {
    if constexpr (B == 6 && P >= 12) {
        constexpr int i = P - 12;
        rest = mq_and_or<(0x000f000fu << POS)>(mq_shift<12 - POS>(w[i]), rest);
        return mq_and_or<(0x00300030u << POS)>(mq_shift<8 + 2 * (i % 2) - POS>(w[4 + i / 2]), rest);
    } else if constexpr (mq_scattered<B, P>()) {
        mq_each<B>([&](auto bit) {
            constexpr int C = decltype(bit)::value;
            rest = mq_and_or<(0x00010001u << (POS + C))>(mq_shift<15 - POS - C>(w[C]), rest);
        });
        return rest;
    } else {
        constexpr int F = 16 / B;
        return mq_and_or<(((1u << B) - 1) * 0x00010001u << POS)>(mq_shift<B * (P % F) - POS>(w[P / F]), rest);
    }
}

// What stands for a code q in 16 bits, exactly: (q - zero) / step. HALF: zero lies between the two middle codes.
template <class T, int B, bool HALF> struct mq_code {
    static constexpr bool wide = B == 8 && T::mant == 7, twice = B == 1 || (HALF && !wide);
    static constexpr float step = twice ? 0.5f : 1.0f, zero = B == 1 || HALF ? ((1 << B) - 1) * 0.5f : (float)(1 << (B - 1));

    // The operand of pair P of a lane's words of one half.
    template <int P> static MQ_HD mq_u32 pair(const mq_u32 *w) {
        if constexpr (B == 1) {
            // The bit becomes the sign of 1.0: set means positive.
            constexpr mq_u32 minus_one = T::mant == 7 ? 0xbf80bf80u : 0xbc00bc00u;
            return mq_and_xor<0x80008000u>(mq_shift<P - 15>(w[0]), minus_one);
        } else if constexpr (wide) {
            // Eight bits and an implied one do not fit bf16 beside an offset: by way of 2^15 + q in fp32, whose upper half the difference is.
            constexpr mq_u32 first = 0x7404u | P % 2 << 4, second = first + 0x20u;
            constexpr float offset = 32768.0f + zero;
            mq_u32 low = mq_bits(mq_float(mq_bytes(w[P / 2], 0x47000000u, first)) - offset);
            mq_u32 high = mq_bits(mq_float(mq_bytes(w[P / 2], 0x47000000u, second)) - offset);
            return mq_bytes(low, high, 0x7632u);
        } else if constexpr (B == 8 && !HALF) {
            return mq_sub2<T>(mq_bytes(w[P / 2], 0x64646464u, 0x4240u + P % 2 * 0x101u), mq_offset<T>(0, 128));
        } else {
            // As many fields as the mantissa holds are taken where they stand; one shift serves the next batch. With a HALF zero they stand
            // one bit higher, so that a unit is worth 2 and the constant a whole number of halves.
            constexpr int up = HALF ? 1 : 0, n = (T::mant - up) / B, pos = up + (mq_scattered<B, P>() ? 0 : P % (16 / B) % n * B);
            return mq_sub2<T>(mq_at<B, P, pos>(w, mq_magic<T>(pos - up)), mq_offset<T>(pos - up, HALF ? (1u << B) - 1 : 1u << (B - 1)));
        }
    }
};

// A lane's words of both halves of one slab: 16 bytes a load where B is even, 8 where it is odd. `at` are the first of them.
template <int B> MQ_HD constexpr int mq_vector() { return B % 2 ? 2 : 4; }
template <int B> MQ_HD void mq_slab(const mq_u32 *at, mq_u32 *w) {
    constexpr int V = mq_vector<B>();
#pragma unroll
    for (int s = 0; s < 2 * B; s += V) {
        if constexpr (V == 4) mq_load4(at + s * 32, w + s);
        else mq_load2(at + s * 32, w + s);
    }
}

// Scales of an expert and its zeros or offsets, if it has any, from one place on: rows of 64, one a group. A nibble a zero up to 4 bits, so
// that the place begins at row `odd` of a byte.
template <int B, int FLAGS> struct mq_groups {
    const mq_u8 *scales, *zeros;
    int odd;
    static constexpr bool stored = (FLAGS & (MQ_ZEROS | MQ_OFFSET)) != 0;
    static constexpr int bytes = (FLAGS >> 9 & 3) == 2 ? 4 : 2;

    static MQ_HD mq_groups of(const mq_u8 *arena, const mq_entry &e, unsigned long long i) {
        mq_groups found = {arena + 16ull * e.s_off16, arena + 16ull * e.z_off16, (int)(i & 1)};
        found.skip(i);
        return found;
    }
    MQ_HD void skip(unsigned long long n) {
        scales += n * bytes;
        if constexpr (stored) zeros += FLAGS & MQ_OFFSET ? n * bytes : B > 4 ? n : n / 2;
    }
    static MQ_HD float number(const mq_u8 *at) {
        if constexpr ((FLAGS >> 9 & 3) == 0) return mq_float((mq_u32)*(const mq_u16 *)at << 16);
        else if constexpr ((FLAGS >> 9 & 3) == 1) return mq_half(*(const mq_u16 *)at);
        else return *(const float *)at;
    }
    MQ_HD float scale(int i) const { return number(scales + i * bytes); }
    // The zero point, or the offset, stored or not; `i` is even for a nibble.
    MQ_HD float zero(int i) const {
        if constexpr (FLAGS & MQ_OFFSET) return number(zeros + i * bytes);
        else if constexpr ((FLAGS & MQ_ZEROS) && B > 4) return (float)zeros[i];
        else if constexpr (FLAGS & MQ_ZEROS) return (float)(zeros[i / 2] >> odd * 4 & 15);
        else return FLAGS & MQ_HALF ? ((1 << B) - 1) * 0.5f : (1 << B) * 0.5f;
    }
};

// One slab to `out`, [rows, inputs] of T: bit-exact with the reference, (q - z) * s in fp32, or fma(s, q, o). With gate and up in turns of
// eight, up follows gate.
template <class T, int B, int LOG2_GS, int FLAGS>
MQ_D void mq_dequant_slab(const mq_u8 *arena, const mq_entry &e, int row_tile, int k_tile, int slab, int lane, mq_u16 *out, int rows, int inputs) {
    mq_u32 both[2 * B];
    const mq_u32 *words = (const mq_u32 *)(arena + 16ull * e.w_off16);
    mq_slab<B>(words + (((unsigned long long)row_tile * e.k_tiles + k_tile) * 4 + slab) * (64 * B) + lane * mq_vector<B>(), both);
    const int g = lane >> 2, t = lane & 3, gate_up = e.flags & MQ_GATE_UP;
#pragma unroll 1
    for (int h = 0; h < 2; h++) {
        mq_u32 w[B];
#pragma unroll
        for (int x = 0; x < B; x++) w[x] = h ? both[B + x] : both[x];
        // Two fragments, 32 inputs, lie in one group.
        mq_each<2>([&](auto fragments) {
            constexpr int J = 2 * decltype(fragments)::value;
            const int k = k_tile * 128 + 64 * h + 16 * J + 2 * t;
            const int groups = LOG2_GS == 255 ? 1 : (e.k_tiles * 128) >> (LOG2_GS % 32), group = LOG2_GS == 255 ? 0 : k >> (LOG2_GS % 32);
            mq_each<2>([&](auto side) {
                constexpr int S = decltype(side)::value;
                const int row = row_tile * 64 + slab * 16 + g + 8 * S, from = gate_up ? (row_tile * 4 + slab) * 8 + g : row;
                if (from >= rows) return;
                mq_u16 *to = out + (unsigned long long)(gate_up ? from + S * rows : row) * inputs;
                const auto of = mq_groups<B, FLAGS>::of(arena, e, ((unsigned long long)row_tile * groups + group) * 64 + row % 64);
                const float s = of.scale(0), z = of.zero(0);
                mq_each<4>([&](auto pair) {
                    constexpr int N = decltype(pair)::value, P = 4 * (J + N / 2) + 2 * (N % 2) + S;
                    const int at = k + 8 * N;
                    if (at >= inputs) return;
                    const mq_u32 q = mq_at<B, P, 0>(w, 0);
                    const float low = (float)(int)(q & 0xffff), high = (float)(int)(q >> 16);
                    if constexpr (FLAGS & MQ_OFFSET) *(mq_u32 *)(to + at) = mq_round2<T>(fmaf(s, low, z), fmaf(s, high, z));
                    else *(mq_u32 *)(to + at) = mq_round2<T>((low - z) * s, (high - z) * s);
                });
            });
        });
    }
}

// Grid: (row tiles, k tiles), 128 threads. `out` is aligned to 4 bytes; `inputs` is even.
template <class T> MQ_D void mq_dequant(const mq_u8 *arena, const mq_entry *table, int entry, mq_u16 *out, int rows, int inputs) {
    const mq_entry e = table[entry];
    int slab = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (blockIdx.x >= e.n_tiles || blockIdx.y >= e.k_tiles) return;
    switch (mq_key(e)) {
#define MQ_CASE(B, G, F) \
    case MQ_KEY(B, G, F): mq_dequant_slab<T, B, G, F>(arena, e, blockIdx.x, blockIdx.y, slab, lane, out, rows, inputs); break;
        MQ_FORMS(MQ_CASE)
#undef MQ_CASE
    }
}
extern "C" MQ_GLOBAL void mq_dequant_bf16(const mq_u8 *arena, const mq_entry *table, int entry, mq_u16 *out, int rows, int inputs) {
    mq_dequant<mq_bf16>(arena, table, entry, out, rows, inputs);
}
extern "C" MQ_GLOBAL void mq_dequant_f16(const mq_u8 *arena, const mq_entry *table, int entry, mq_u16 *out, int rows, int inputs) {
    mq_dequant<mq_f16>(arena, table, entry, out, rows, inputs);
}
