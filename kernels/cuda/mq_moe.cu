// Grouped products of routed experts whose widths differ: one launch a projection, whatever the widths.
//
//   mq_route    blocks 0 and 1: count each expert's pairs (token, slot) of gate and up, of down, and write work items in the table's order,
//               widest expert first; the further blocks copy the activations into the order in which a lane takes them
//   mq_w13_*    gate and up with SwiGLU: [tokens, hidden] -> [pairs, inner]
//   mq_w2_*     down: [pairs, inner] -> fp32 [pairs, hidden]
//   mq_combine  adds each token's rows in the order of its slots, times the router's weights: no float atomics, the same bits every run
//
// A block is four warps, a unit of work 64 rows by up to 8 NB tokens of one expert over all inputs, a warp 16 of the rows. The grid is
// constant and units are pulled with one atomic, so a CUDA graph may capture it. Sums run in fp32; the group scale multiplies a partial
// sum once a group. Where zero is stored, the sums of the activations come out of one more product, with ones.
//
// Activations between the kernels lie in rows padded with zeros to whole tiles (MQ_HIDDEN_LD, MQ_INNER_LD), and of every 32 of them a lane's
// eight lie together (mq_place), so that the loop over the codes loads 16 bytes at a time and checks no bounds.

struct mq_item { int slot, first, count; };

// What mq_route writes for one projection: header { items, pulled, pairs, 0 }, items, pairs in the order of the items, and for each pair
// whether its expert is here.
#define MQ_HEADER 4
struct mq_lists {
    const mq_entry *table;
    int *header;
    mq_item *items;
    int *order, *here;
};

// Expert of a pair; -1 where this device does not hold it.
MQ_HD int mq_expert_of(const void *ids, int ids_bits, const int *expert_map, int pair, int experts) {
    long long id = ids_bits == 64 ? ((const long long *)ids)[pair] : ((const int *)ids)[pair];
    if (id < 0 || id >= experts) return -1;
    return expert_map ? expert_map[id] : (int)id;
}

#define MQ_ROUTE_THREADS 256
// Pairs whose experts lie in shared memory at a time: every thread goes through all of them.
#ifndef MQ_STAGE
#define MQ_STAGE 1024
#endif
template <class F>
MQ_D void mq_pairs(int *stage, const void *ids, int ids_bits, const int *expert_map, int experts, int pairs, F f) {
#pragma unroll 1
    for (int from = 0; from < pairs; from += MQ_STAGE) {
        const int here = pairs - from < MQ_STAGE ? pairs - from : MQ_STAGE;
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < here; i += MQ_ROUTE_THREADS) stage[i] = mq_expert_of(ids, ids_bits, expert_map, from + i, experts);
        __syncthreads();
        f(from, here);
    }
}

MQ_D void mq_list(const mq_lists &to, int entries, const void *ids, int ids_bits, const int *expert_map, int experts, int pairs, int block) {
    MQ_SHARED int counts[MQ_MAX_EXPERTS], starts[MQ_MAX_EXPERTS], firsts[MQ_MAX_EXPERTS], stage[MQ_STAGE];
#pragma unroll 1
    for (int slot = threadIdx.x; slot < entries; slot += MQ_ROUTE_THREADS) counts[slot] = 0;
    mq_pairs(stage, ids, ids_bits, expert_map, experts, pairs, [&](int from, int here) {
#pragma unroll 1
        for (int i = threadIdx.x; i < here; i += MQ_ROUTE_THREADS) to.here[from + i] = 0;
#pragma unroll 1
        for (int slot = threadIdx.x; slot < entries; slot += MQ_ROUTE_THREADS) {
            const int expert = (int)to.table[slot].expert_id;
            int count = 0;
#pragma unroll 4
            for (int i = 0; i < here; i++) count += stage[i] == expert;
            counts[slot] += count;
        }
    });
    __syncthreads();
    if (threadIdx.x == 0) {
        int start = 0, item = 0;
#pragma unroll 1
        for (int slot = 0; slot < entries; slot++) {
            starts[slot] = start;
            firsts[slot] = item;
            start += counts[slot];
            item += (counts[slot] + block - 1) / block;
        }
        to.header[0] = item;
        to.header[1] = 0;
        to.header[2] = start;
        to.header[3] = 0;
    }
    __syncthreads();
#pragma unroll 1
    for (int slot = threadIdx.x; slot < entries; slot += MQ_ROUTE_THREADS)
#pragma unroll 1
        for (int i = 0; i * block < counts[slot]; i++) {
            const int left = counts[slot] - i * block;
            to.items[firsts[slot] + i] = {slot, starts[slot] + i * block, left < block ? left : block};
        }
    // Pairs of an expert stay in the order of the tokens: what is added where does not depend on a race.
    mq_pairs(stage, ids, ids_bits, expert_map, experts, pairs, [&](int from, int here) {
#pragma unroll 1
        for (int slot = threadIdx.x; slot < entries; slot += MQ_ROUTE_THREADS) {
            const int expert = (int)to.table[slot].expert_id;
            int at = starts[slot];
#pragma unroll 4
            for (int i = 0; i < here; i++)
                if (stage[i] == expert) {
                    to.order[at++] = from + i;
                    to.here[from + i] = 1;
                }
            starts[slot] = at;
        }
    });
}

// Where input k lies in a row of activations: of 32, lane t has 2t, 2t + 1 and those 8, 16, 24 further.
MQ_HD constexpr int mq_place(int k) { return (k & ~30) | (k & 6) << 2 | (k >> 2 & 6); }

// Grid: 2 + ceil(tokens * MQ_HIDDEN_LD / 8 / 256). `block` is the most tokens an item has; x [tokens, ldx] is aligned to 4 bytes, ldx even.
extern "C" MQ_GLOBAL void mq_route(mq_lists first, mq_lists second, int entries, const void *ids, int ids_bits, const int *expert_map, int experts,
                                   int pairs, int block, const mq_u16 *x, long long ldx, int tokens, mq_u16 *placed) {
    const bool down = blockIdx.x == 1;
    const mq_lists to = {down ? second.table : first.table, down ? second.header : first.header, down ? second.items : first.items,
                         down ? second.order : first.order, down ? second.here : first.here};
    if (blockIdx.x < 2) return mq_list(to, entries, ids, ids_bits, expert_map, experts, pairs, block);
    const long long part = (long long)(blockIdx.x - 2) * MQ_ROUTE_THREADS + threadIdx.x;
    const long long token = part / (MQ_HIDDEN_LD / 8);
    if (token >= tokens) return;
    const int at = (int)(part % (MQ_HIDDEN_LD / 8)), k = at / 4 * 32 + at % 4 * 2;
    mq_u32 w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = k + 8 * i < MQ_HIDDEN ? *(const mq_u32 *)(x + token * ldx + k + 8 * i) : 0;
    mq_store_x(placed + token * MQ_HIDDEN_LD + at * 8, w);
}

// What a group comes to: its sum times its scale, and what its stored zero takes off. `code`'s step is left to the end.
template <class code, int B, int FLAGS, int NB>
MQ_D void mq_group(const mq_groups<B, FLAGS> &groups, int at, float (*part)[4], float (*total)[4], float (*acc)[4]) {
    float s[2], c[2];
#pragma unroll
    for (int side = 0; side < 2; side++) {
        s[side] = groups.scale(at + 8 * side);
        if constexpr (mq_groups<B, FLAGS>::stored) {
            const float z = groups.zero(at + 8 * side);
            c[side] = (FLAGS & MQ_OFFSET ? fmaf(s[side], code::zero, z) : s[side] * (code::zero - z)) * (1.0f / code::step);
        }
    }
#pragma unroll
    for (int n = 0; n < NB; n++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
            acc[n][r] = fmaf(s[r / 2], part[n][r], acc[n][r]);
            if constexpr (mq_groups<B, FLAGS>::stored) acc[n][r] = fmaf(c[r / 2], total[n][r], acc[n][r]);
        }
}

// One tile's codes of a lane times the activations: 16 rows by 128 inputs. `groups` begin with the tile's first, at the lane's row.
template <class T, int B, int LOG2_GS, int FLAGS, int NB>
MQ_D void mq_tile(const mq_u32 *w, const mq_u16 *const *rows, const mq_groups<B, FLAGS> &groups, float (*part)[4], float (*total)[4], float (*acc)[4]) {
    typedef mq_code<T, B, (FLAGS & MQ_HALF) != 0> code;
    constexpr bool sums = mq_groups<B, FLAGS>::stored, whole = LOG2_GS == 255;
    // Fragments of 16 inputs a group: 2, 4, 8, or the whole row.
    constexpr int run = whole ? 8 : 1 << (LOG2_GS - 4) % 32;
    constexpr mq_u32 one = T::mant == 7 ? 0x3f803f80u : 0x3c003c00u;
    const mq_u32 ones[4] = {one, one, one, one};
    mq_each<4>([&](auto quarter) {
        constexpr int Q = decltype(quarter)::value;
        mq_u32 x[NB][4];
#pragma unroll
        for (int n = 0; n < NB; n++) mq_load_x(rows[n] + Q * 32, x[n]);
        mq_each<2>([&](auto fragment) {
            constexpr int J = 2 * Q + decltype(fragment)::value, P = J % 4 * 4;
            constexpr bool first = !whole && J % run == 0;
            const mq_u32 *half = w + J / 4 * B;
            const mq_u32 a[4] = {code::template pair<P>(half), code::template pair<P + 1>(half), code::template pair<P + 2>(half),
                                 code::template pair<P + 3>(half)};
#pragma unroll
            for (int n = 0; n < NB; n++) {
                mq_mma<T, first>(part[n], a, x[n] + J % 2 * 2);
                if constexpr (sums) mq_mma<T, first>(total[n], ones, x[n] + J % 2 * 2);
            }
        });
        if constexpr (!whole && (2 * Q + 2) % run == 0)
            mq_group<code, B, FLAGS, NB>(groups, ((2 * Q + 2) / run - 1) * 64, part, total, acc);
    });
}

// acc[n] += W(slab) * x over all inputs. rows[n] are the activations of token 8n + g at the lane's place.
template <class T, int B, int LOG2_GS, int FLAGS, int NB>
MQ_D void mq_slab_product(const mq_u8 *arena, const mq_entry &e, int row_tile, int slab, int lane, const mq_u16 **rows, float (*acc)[4]) {
    typedef mq_code<T, B, (FLAGS & MQ_HALF) != 0> code;
    constexpr int a_tile = LOG2_GS == 255 ? 0 : 128 >> LOG2_GS % 32;
    const int tiles = e.k_tiles;
    const mq_u32 *words = (const mq_u32 *)(arena + 16ull * e.w_off16) + ((unsigned long long)row_tile * tiles * 4 + slab) * (64 * B) + lane * mq_vector<B>();
    auto groups = mq_groups<B, FLAGS>::of(arena, e, (unsigned long long)row_tile * (a_tile ? tiles * a_tile : 1) * 64 + slab * 16 + (lane >> 2));
    float part[NB][4] = {}, total[NB][4] = {};
    // The codes of a tile are under way while those before them are multiplied.
    mq_u32 w[2 * B], next[2 * B];
    mq_slab<B>(words, w);
    auto step = [&](int tile, const mq_u32 *now, mq_u32 *then) {
        words += 256 * B;
        if (tile + 1 < tiles) mq_slab<B>(words, then);
        mq_tile<T, B, LOG2_GS, FLAGS, NB>(now, rows, groups, part, total, acc);
        groups.skip(a_tile * 64);
#pragma unroll
        for (int n = 0; n < NB; n++) rows[n] += 128;
    };
    if constexpr (NB == 1) {
        // Two tiles a turn: their registers change roles, and nothing is copied.
#pragma unroll 1
        for (int tile = 0;; tile += 2) {
            step(tile, w, next);
            if (tile + 1 >= tiles) break;
            step(tile + 1, next, w);
            if (tile + 2 >= tiles) break;
        }
    } else if constexpr (NB == 4 && B == 8) {
        // No registers are left for codes under way.
#pragma unroll 1
        for (int tile = 0;; tile++) {
            step(tiles, w, next);
            if (tile + 1 >= tiles) break;
            mq_slab<B>(words, w);
        }
    } else {
#pragma unroll 1
        for (int tile = 0; tile < tiles; tile++) {
            step(tile, w, next);
#pragma unroll
            for (int i = 0; i < 2 * B; i++) w[i] = next[i];
        }
    }
    if constexpr (LOG2_GS == 255) mq_group<code, B, FLAGS, NB>(groups, 0, part, total, acc);
    if constexpr (code::step != 1.0f)
#pragma unroll
        for (int n = 0; n < NB; n++)
#pragma unroll
            for (int r = 0; r < 4; r++) acc[n][r] *= code::step;
}

// The product of an entry's slab, by its form: those of gate and up, or of down.
template <class T, int NB, bool SECOND>
MQ_D void mq_product(const mq_u8 *arena, const mq_entry &e, int row_tile, int slab, int lane, const mq_u16 **rows, float (*acc)[4]) {
#define MQ_CASE(B, G, F) case MQ_KEY(B, G, F): return mq_slab_product<T, B, G, F, NB>(arena, e, row_tile, slab, lane, rows, acc);
    if constexpr (SECOND) switch (mq_key(e)) { MQ_FORMS_2(MQ_CASE) }
    else switch (mq_key(e)) { MQ_FORMS_13(MQ_CASE) }
#undef MQ_CASE
}

// SECOND: down, from rows of pairs to fp32; else gate and up, from rows of tokens to activations.
template <class T, int NB, bool SECOND>
MQ_D void mq_grouped(const mq_u8 *arena, const mq_lists &lists, const mq_u16 *x, int top_k, void *out) {
    constexpr int outputs = SECOND ? MQ_HIDDEN : MQ_INNER, ldx = SECOND ? MQ_INNER_LD : MQ_HIDDEN_LD;
    constexpr int row_tiles = (outputs + (SECOND ? 63 : 31)) / (SECOND ? 64 : 32);
    MQ_SHARED int pulled;
    const int slab = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    for (;;) {
        __syncthreads();
        if (threadIdx.x == 0) pulled = mq_pull(lists.header + 1);
        __syncthreads();
        const int unit = pulled;
        if (unit >= lists.header[0] * row_tiles) return;
        const mq_item item = lists.items[unit / row_tiles];
        const int row_tile = unit % row_tiles;
        const mq_entry e = lists.table[item.slot];
        const mq_u16 *rows[NB];
#pragma unroll
        for (int n = 0; n < NB; n++) {
            // Past the item's end its first token stands in: columns of a product do not mix, and this one is not written.
            const int pair = lists.order[item.first + (n * 8 + g < item.count ? n * 8 + g : 0)];
            rows[n] = x + (long long)(SECOND ? pair : pair / top_k) * ldx + t * 8;
        }
        float acc[NB][4] = {};
        mq_product<T, NB, SECOND>(arena, e, row_tile, slab, lane, rows, acc);
#pragma unroll
        for (int n = 0; n < NB; n++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int at = n * 8 + 2 * t + r;
                if (at >= item.count) continue;
                const int pair = lists.order[item.first + at];
                if constexpr (SECOND) {
                    const int row = row_tile * 64 + slab * 16 + g;
                    float *to = (float *)out + (long long)pair * MQ_HIDDEN;
                    if (row < outputs) to[row] = acc[n][r];
                    if (row + 8 < outputs) to[row + 8] = acc[n][r + 2];
                } else {
                    const int row = row_tile * 32 + slab * 8 + g;
                    mq_u16 *to = (mq_u16 *)out + (long long)pair * MQ_INNER_LD;
                    to[mq_place(row)] = row < outputs ? mq_round<T>(mq_silu(acc[n][r]) * acc[n][r + 2]) : 0;
                    if constexpr (row_tiles * 32 < MQ_INNER_LD)
                        if (row_tile == row_tiles - 1)
#pragma unroll 1
                            for (int rest = row + 32; rest < MQ_INNER_LD; rest += 32) to[mq_place(rest)] = 0;
                }
            }
    }
}

// MQ_RESIDENT blocks hide each other's waits; more would leave a thread too few registers, and what does not fit goes to local memory.
#define MQ_ENTRY(NB, NAME, T)                                                                                                                 \
    extern "C" MQ_GLOBAL void MQ_LAUNCH(128, MQ_RESIDENT(NB))                                                                                  \
    mq_w13_##NAME##_##NB(const mq_u8 *arena, mq_lists lists, const mq_u16 *x, int top_k, mq_u16 *out) {                                        \
        mq_grouped<T, NB, false>(arena, lists, x, top_k, out);                                                                                 \
    }                                                                                                                                         \
    extern "C" MQ_GLOBAL void MQ_LAUNCH(128, MQ_RESIDENT(NB))                                                                                  \
    mq_w2_##NAME##_##NB(const mq_u8 *arena, mq_lists lists, const mq_u16 *x, int top_k, float *out) {                                          \
        mq_grouped<T, NB, true>(arena, lists, x, top_k, out);                                                                                  \
    }
#define MQ_BOTH(NB) MQ_ENTRY(NB, bf16, mq_bf16) MQ_ENTRY(NB, f16, mq_f16)
MQ_BLOCKS(MQ_BOTH)

// Grid: (tokens, hidden / 256), 256 threads. A pair whose expert is not here adds nothing.
template <class T>
MQ_D void mq_combine(const float *parts, const int *here, const float *weights, int top_k, mq_u16 *out, long long ldo) {
    const int token = blockIdx.x, h = blockIdx.y * 256 + threadIdx.x;
    if (h >= MQ_HIDDEN) return;
    float sum = 0;
#pragma unroll 1
    for (int slot = 0; slot < top_k; slot++) {
        const int pair = token * top_k + slot;
        if (here[pair]) sum = fmaf(weights[pair], parts[(long long)pair * MQ_HIDDEN + h], sum);
    }
    out[token * ldo + h] = mq_round<T>(sum);
}
extern "C" MQ_GLOBAL void mq_combine_bf16(const float *parts, const int *here, const float *weights, int top_k, mq_u16 *out, long long ldo) {
    mq_combine<mq_bf16>(parts, here, weights, top_k, out, ldo);
}
extern "C" MQ_GLOBAL void mq_combine_f16(const float *parts, const int *here, const float *weights, int top_k, mq_u16 *out, long long ldo) {
    mq_combine<mq_f16>(parts, here, weights, top_k, out, ldo);
}
