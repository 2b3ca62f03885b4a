// Runs the emitted .cu on the CPU over one layer read from a file, and writes what each kernel gave. Used by the tests of kernels::emit.
//   input: ints tokens, top_k, entries, ids_bits, has_map, blocks, type; u64 bytes of the two arenas; arenas, tables (32 B an entry), x, ids, weights, map
//   output: parts [pairs, hidden] f32, out [tokens, hidden], then the dequantized gate-up and down of entry 0 of each table
#include <stdio.h>
#define MQ_HOST 1
#include "mq_moe.cu"

static FILE *in, *to;
template <class T> static T *take(size_t count, size_t align = 256) {
    T *p = (T *)aligned_alloc(align, (count * sizeof(T) + align - 1) / align * align + align);
    if (fread(p, sizeof(T), count, in) != count) abort();
    return p;
}
int main(int, char **argv) {
    in = fopen(argv[1], "rb");
    to = fopen(argv[2], "wb");
    if (!in || !to) return 2;
    int *n = take<int>(7);
    int tokens = n[0], top_k = n[1], entries = n[2], ids_bits = n[3], blocks = n[5], type = n[6], pairs = tokens * top_k;
    unsigned long long *bytes = take<unsigned long long>(2);
    mq_u8 *arena[2] = {take<mq_u8>(bytes[0]), take<mq_u8>(bytes[1])};
    mq_entry *table[2] = {take<mq_entry>(entries), take<mq_entry>(entries)};
    mq_u16 *x = take<mq_u16>(tokens * MQ_HIDDEN);
    mq_u8 *ids = take<mq_u8>(pairs * ids_bits / 8);
    float *weights = take<float>(pairs);
    int *map = n[4] ? take<int>(MQ_EXPERTS) : 0;
    // Everything that is written starts as NaN, or as a number that is no place.
    std::vector<float> parts(pairs * MQ_HIDDEN + 1, NAN);
    std::vector<mq_u16> placed(tokens * MQ_HIDDEN_LD, 0xffff), mid(pairs * MQ_INNER_LD, 0xffff), out(tokens * MQ_HIDDEN + 1, 0xffff);
    std::vector<std::vector<int>> held;
    auto ints = [&](size_t count) { return (held.emplace_back(count, -1), held.back().data()); };
    mq_lists lists[2];
    for (int i = 0; i < 2; i++)
        lists[i] = {table[i], ints(MQ_HEADER), (mq_item *)ints((pairs / 8 + entries + 1) * 3), ints(pairs), ints(pairs)};
    mq_launch(2 + (tokens * MQ_HIDDEN_LD / 8 + 255) / 256, 1, MQ_ROUTE_THREADS, [&] {
        mq_route(lists[0], lists[1], entries, ids, ids_bits, map, MQ_EXPERTS, pairs, 8 * blocks, x, MQ_HIDDEN, tokens, placed.data());
    });
    // The entry points by type and blocks of eight tokens, as a loader launches them.
    decltype(&mq_w13_bf16_1) first[2][2] = {{mq_w13_bf16_1, mq_w13_bf16_4}, {mq_w13_f16_1, mq_w13_f16_4}};
    decltype(&mq_w2_bf16_1) second[2][2] = {{mq_w2_bf16_1, mq_w2_bf16_4}, {mq_w2_f16_1, mq_w2_f16_4}};
    mq_launch(2, 1, 128, [&] { first[type][blocks == 4](arena[0], lists[0], placed.data(), top_k, mid.data()); });
    mq_launch(2, 1, 128, [&] { second[type][blocks == 4](arena[1], lists[1], mid.data(), top_k, parts.data()); });
    mq_launch(tokens, (MQ_HIDDEN + 255) / 256, 256, [&] {
        (type ? mq_combine_f16 : mq_combine_bf16)(parts.data(), lists[1].here, weights, top_k, out.data(), MQ_HIDDEN);
    });
    fwrite(parts.data(), 4, pairs * MQ_HIDDEN, to);
    fwrite(out.data(), 2, tokens * MQ_HIDDEN, to);
    for (int i = 0; i < 2; i++)
        for (int entry = 0; entry < entries; entry++) {
            std::vector<mq_u16> weights16(2 * MQ_INNER * MQ_HIDDEN, 0xffff);
            int rows = i ? MQ_HIDDEN : MQ_INNER, inputs = i ? MQ_INNER : MQ_HIDDEN;
            mq_launch(table[i][entry].n_tiles, table[i][entry].k_tiles, 128, [&] {
                (type ? mq_dequant_f16 : mq_dequant_bf16)(arena[i], table[i], entry, weights16.data(), rows, inputs);
            });
            fwrite(weights16.data(), 2, (i ? 1 : 2) * MQ_INNER * MQ_HIDDEN, to);
        }
    return fclose(to);
}
