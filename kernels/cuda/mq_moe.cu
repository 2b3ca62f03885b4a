// Grouped products of routed experts whose widths differ: one launch a projection, whatever the widths.
//
//   mq_route    one block: counts each expert's pairs (token, slot), writes work items in the table's order, widest expert first
//   mq_w13_*    gate and up with SwiGLU: [tokens, hidden] -> [pairs, inner]
//   mq_w2_*     down: [pairs, inner] -> fp32 [pairs, hidden]
//   mq_combine  adds each token's rows in the order of its slots, times the router's weights: no float atomics, the same bits every run
//
// A block is four warps, a unit of work 64 rows by up to 8 NB tokens of one expert over all inputs, a warp 16 of the rows. The grid is
// constant and units are pulled with one atomic, so a CUDA graph may capture it. Sums run in fp32; the group scale multiplies a partial
// sum once a group. Where zero is not 2^(b-1), the sums of the activations come out of one more product, with ones.

struct mq_item { int slot, first, count; };

// Workspace, in ints: header { items, pulled 13, pulled 2, pairs }, then items, then pairs in the order of the items.
#define MQ_HEADER 4

struct mq_work {
    int *header;
    mq_item *items;
    int *pairs;
};

// Expert of a pair; -1 where this device does not hold it.
MQ_HD int mq_expert_of(const void *ids, int ids_bits, const int *expert_map, int pair, int experts) {
    long long id = ids_bits == 64 ? ((const long long *)ids)[pair] : ((const int *)ids)[pair];
    if (id < 0 || id >= experts) return -1;
    return expert_map ? expert_map[id] : (int)id;
}

// One block of MQ_ROUTE_THREADS. `block` is the most tokens an item has.
#define MQ_ROUTE_THREADS 256
extern "C" MQ_GLOBAL void mq_route(const mq_entry *table, int entries, const void *ids, int ids_bits, const int *expert_map, int experts,
                                   int pairs, int block, int *header, mq_item *items, int *order) {
    MQ_SHARED int counts[MQ_MAX_EXPERTS], starts[MQ_MAX_EXPERTS], firsts[MQ_MAX_EXPERTS];
    for (int slot = threadIdx.x; slot < entries; slot += MQ_ROUTE_THREADS) {
        int expert = (int)table[slot].expert_id, count = 0;
        for (int pair = 0; pair < pairs; pair++) count += mq_expert_of(ids, ids_bits, expert_map, pair, experts) == expert;
        counts[slot] = count;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int start = 0, item = 0;
        for (int slot = 0; slot < entries; slot++) {
            starts[slot] = start;
            firsts[slot] = item;
            start += counts[slot];
            item += (counts[slot] + block - 1) / block;
        }
        header[0] = item;
        header[1] = header[2] = 0;
        header[3] = start;
    }
    __syncthreads();
    for (int slot = threadIdx.x; slot < entries; slot += MQ_ROUTE_THREADS) {
        int expert = (int)table[slot].expert_id, at = starts[slot];
        // Pairs of an expert stay in the order of the tokens: what is added where does not depend on a race.
        for (int pair = 0; pair < pairs && at < starts[slot] + counts[slot]; pair++)
            if (mq_expert_of(ids, ids_bits, expert_map, pair, experts) == expert) order[at++] = pair;
        for (int i = 0; i * block < counts[slot]; i++) {
            int left = counts[slot] - i * block;
            items[firsts[slot] + i] = {slot, starts[slot] + i * block, left < block ? left : block};
        }
    }
}

// Two activations of one row at k, 0 past the end.
MQ_HD mq_u32 mq_two(const mq_u16 *row, int k, int inputs) {
    if (!row || k >= inputs) return 0;
    return *(const mq_u32 *)(row + k);
}

// acc[n] += W(slab) * x over all inputs. rows[n] are the activations of token 8n + g, null past the item's end.
template <class T, int B, int NB>
MQ_D void mq_slab_product(const mq_u8 *arena, const mq_entry &e, int row_tile, int slab, int lane, const mq_u16 *const *rows, int inputs, float (*acc)[4]) {
    const mq_u32 *words = (const mq_u32 *)(arena + 16ull * e.w_off16) + ((unsigned long long)row_tile * e.k_tiles * 4 + slab) * (64 * B);
    const mq_u8 *scales = arena + 16ull * e.s_off16, *zeros = arena + 16ull * e.z_off16;
    const int g = lane >> 2, t = lane & 3;
    const int groups = e.log2_gs == 0xff ? 1 : (e.k_tiles * 128) >> e.log2_gs;
    // Fragments of 16 inputs a group: 2, 4, 8, or the whole row.
    const int run = e.log2_gs == 0xff ? e.k_tiles * 8 : 1 << (e.log2_gs - 4);
    // At one bit the operands are ±1 around a half, so only a stored zero needs the sums.
    const bool sums = (e.flags & (MQ_ZEROS | MQ_OFFSET)) || (B != 1 && (e.flags & MQ_HALF));
    const mq_u32 one = T::mant == 7 ? 0x3f803f80u : 0x3c003c00u;
    const mq_u32 ones[4] = {one, one, one, one};
    float part[NB][4] = {}, total[NB][4] = {};
    for (int tile = 0; tile < e.k_tiles; tile++) {
        mq_u32 w[2 * B];
        mq_slab<B>(words + (unsigned long long)tile * (256 * B), lane, w);
        mq_each<8>([&](auto fragment) {
            constexpr int J = decltype(fragment)::value, H = J / 4, P = J % 4 * 4;
            const mq_u32 a[4] = {mq_operand<T, B, P>(w + H * B), mq_operand<T, B, P + 1>(w + H * B), mq_operand<T, B, P + 2>(w + H * B),
                                 mq_operand<T, B, P + 3>(w + H * B)};
            const int k = tile * 128 + J * 16 + 2 * t;
#pragma unroll
            for (int n = 0; n < NB; n++) {
                const mq_u32 b[2] = {mq_two(rows[n], k, inputs), mq_two(rows[n], k + 8, inputs)};
                mq_mma<T>(part[n], a, b);
                if (sums) mq_mma<T>(total[n], ones, b);
            }
            // A group has two fragments at least.
            const int done = tile * 8 + J + 1;
            if (J % 2 == 1 && done % run == 0) {
                unsigned long long i = ((unsigned long long)row_tile * groups + (done / run - 1)) * 64 + slab * 16 + g;
                const float s0 = mq_scale(scales, e.flags, i), s1 = mq_scale(scales, e.flags, i + 8);
                float c0 = 0, c1 = 0;
                if (sums) {
                    c0 = mq_correction(zeros, e, i, s0, mq_zero<B>());
                    c1 = mq_correction(zeros, e, i + 8, s1, mq_zero<B>());
                }
#pragma unroll
                for (int n = 0; n < NB; n++)
#pragma unroll
                    for (int r = 0; r < 4; r++) {
                        acc[n][r] = fmaf(r < 2 ? s0 * mq_step<B>() : s1 * mq_step<B>(), part[n][r], acc[n][r]);
                        if (sums) acc[n][r] = fmaf(r < 2 ? c0 : c1, total[n][r], acc[n][r]);
                        part[n][r] = total[n][r] = 0;
                    }
            }
        });
    }
}

template <class T, int NB>
MQ_D void mq_product(const mq_u8 *arena, const mq_entry &e, int row_tile, int slab, int lane, const mq_u16 *const *rows, int inputs, float (*acc)[4]) {
    switch (e.bits) {
#define MQ_CASE(B) case B: mq_slab_product<T, B, NB>(arena, e, row_tile, slab, lane, rows, inputs, acc); break;
        MQ_WIDTHS(MQ_CASE)
#undef MQ_CASE
    }
}

MQ_HD float mq_silu(float x) { return x / (1.0f + expf(-x)); }

// SECOND: down, from rows of pairs to fp32; else gate and up, from rows of tokens to activations.
template <class T, int NB, bool SECOND>
MQ_D void mq_grouped(const mq_u8 *arena, const mq_entry *table, const mq_u16 *x, long long ldx, int inputs, int top_k, int *header,
                     const mq_item *items, const int *order, void *out, int ldo, int outputs, int row_tiles) {
    MQ_SHARED int pulled;
    const int slab = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    for (;;) {
        __syncthreads();
        if (threadIdx.x == 0) pulled = mq_pull(header + (SECOND ? 2 : 1));
        __syncthreads();
        const int unit = pulled;
        if (unit >= header[0] * row_tiles) return;
        const mq_item item = items[unit / row_tiles];
        const int row_tile = unit % row_tiles;
        const mq_entry e = table[item.slot];
        const mq_u16 *rows[NB];
#pragma unroll
        for (int n = 0; n < NB; n++) {
            const int at = n * 8 + g;
            rows[n] = 0;
            if (at < item.count) {
                const int pair = order[item.first + at];
                rows[n] = x + (SECOND ? pair : pair / top_k) * ldx;
            }
        }
        float acc[NB][4] = {};
        mq_product<T, NB>(arena, e, row_tile, slab, lane, rows, inputs, acc);
#pragma unroll
        for (int n = 0; n < NB; n++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int at = n * 8 + 2 * t + r;
                if (at >= item.count) continue;
                const int pair = order[item.first + at];
                if constexpr (SECOND) {
                    const int row = row_tile * 64 + slab * 16 + g;
                    float *to = (float *)out + (long long)pair * ldo;
                    if (row < outputs) to[row] = acc[n][r];
                    if (row + 8 < outputs) to[row + 8] = acc[n][r + 2];
                } else {
                    const int row = row_tile * 32 + slab * 8 + g;
                    mq_u16 *to = (mq_u16 *)out + (long long)pair * ldo;
                    if (row < outputs) to[row] = mq_round<T>(mq_silu(acc[n][r]) * acc[n][r + 2]);
                }
            }
    }
}

#define MQ_ENTRY(NB, NAME, T)                                                                                                              \
    extern "C" MQ_GLOBAL void mq_w13_##NAME##_##NB(const mq_u8 *arena, const mq_entry *table, const mq_u16 *x, long long ldx, int top_k,      \
                                                  int *header, const mq_item *items, const int *order, mq_u16 *out) {                       \
        mq_grouped<T, NB, false>(arena, table, x, ldx, MQ_HIDDEN, top_k, header, items, order, out, MQ_INNER_LD, MQ_INNER, (MQ_INNER + 31) / 32); \
    }                                                                                                                                      \
    extern "C" MQ_GLOBAL void mq_w2_##NAME##_##NB(const mq_u8 *arena, const mq_entry *table, const mq_u16 *x, long long ldx, int top_k,       \
                                                 int *header, const mq_item *items, const int *order, float *out) {                         \
        mq_grouped<T, NB, true>(arena, table, x, ldx, MQ_INNER, top_k, header, items, order, out, MQ_HIDDEN, MQ_HIDDEN, (MQ_HIDDEN + 63) / 64); \
    }
#define MQ_BOTH(NB) MQ_ENTRY(NB, bf16, mq_bf16) MQ_ENTRY(NB, f16, mq_f16)
MQ_BLOCKS(MQ_BOTH)

// Grid: (tokens, hidden / 256), 256 threads. A pair whose expert is not here adds nothing.
template <class T>
MQ_D void mq_combine(const float *parts, const mq_entry *table, int entries, const void *ids, int ids_bits, const int *expert_map, int experts,
                     const float *weights, int top_k, mq_u16 *out, long long ldo) {
    const int token = blockIdx.x, h = blockIdx.y * 256 + threadIdx.x;
    if (h >= MQ_HIDDEN) return;
    float sum = 0;
    for (int slot = 0; slot < top_k; slot++) {
        const int pair = token * top_k + slot, expert = mq_expert_of(ids, ids_bits, expert_map, pair, experts);
        bool here = false;
        for (int i = 0; i < entries && expert >= 0; i++) here |= (int)table[i].expert_id == expert;
        if (here) sum = fmaf(weights[pair], parts[(long long)pair * MQ_HIDDEN + h], sum);
    }
    out[token * ldo + h] = mq_round<T>(sum);
}
extern "C" MQ_GLOBAL void mq_combine_bf16(const float *parts, const mq_entry *table, int entries, const void *ids, int ids_bits, const int *expert_map,
                                          int experts, const float *weights, int top_k, mq_u16 *out, long long ldo) {
    mq_combine<mq_bf16>(parts, table, entries, ids, ids_bits, expert_map, experts, weights, top_k, out, ldo);
}
extern "C" MQ_GLOBAL void mq_combine_f16(const float *parts, const mq_entry *table, int entries, const void *ids, int ids_bits, const int *expert_map,
                                         int experts, const float *weights, int top_k, mq_u16 *out, long long ldo) {
    mq_combine<mq_f16>(parts, table, entries, ids, ids_bits, expert_map, experts, weights, top_k, out, ldo);
}
