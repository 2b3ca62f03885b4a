/* C interface of the kernels of one checkpoint: plain C types, driver API found at run time (libcuda by dlopen), no CUDA runtime.
 *
 * Every function that can fail returns 0 or a code below; mq_last_error() then holds a sentence (per thread). A layer's calls are
 * asynchronous on the stream that they are given and may be captured in a CUDA graph. `mq_constants.h` holds the checkpoint's numbers. */
#ifndef MQ_MOE_H
#define MQ_MOE_H
#include <stddef.h>
#include <stdint.h>

#define MQ_ABI 1

enum mq_error { MQ_OK = 0, MQ_NO_DRIVER = 1, MQ_NO_IMAGE = 2, MQ_BAD_TABLE = 3, MQ_BAD_POINTER = 4, MQ_BAD_SIZE = 5, MQ_WORKSPACE = 6, MQ_LAUNCH = 7 };
enum mq_type { MQ_BF16 = 0, MQ_F16 = 1 };

typedef struct mq_model mq_model;
typedef struct mq_layer mq_layer;
typedef void *mq_stream; /* CUstream */

/* One projection of a layer: the arena on the device (256-byte aligned), its table on the host, to be checked, and on the device. */
typedef struct mq_projection {
    const void *arena;
    uint64_t arena_bytes;
    const void *host_table, *device_table;
    int32_t entries, reserved;
} mq_projection;

/* Opens the folder that holds this file: a cubin for the current device or an older of its generation, or PTX, or mq_moe.cu compiled by
 * NVRTC. Needs a current context. */
int mq_open(const char *folder, mq_model **model);
void mq_close(mq_model *model);
/* expert_map: device array over the checkpoint's experts, null for the identity, -1 for what is not on this device. */
int mq_layer_bind(mq_model *model, const mq_projection *gate_up, const mq_projection *down, const int32_t *expert_map, int act_type, mq_layer **layer);
void mq_layer_free(mq_layer *layer);
size_t mq_workspace_bytes(int tokens, int top_k, int entries);
/* x [tokens, ldx] and out [tokens, ldo] of the bound type, 4-byte aligned; topk_ids [tokens, top_k] of 32 or 64 bits. An expert that stands in no
 * table adds nothing: where `constants` of the checkpoint's config.json names one, the caller adds its mean with its weight. */
int mq_moe_forward(mq_layer *layer, const void *x, int64_t ldx, const void *topk_ids, int ids_bits, const float *topk_weights, int top_k, void *out,
                   int64_t ldo, int tokens, void *workspace, size_t workspace_bytes, mq_stream stream);
/* One expert's weights: gate then up [2 inner, hidden] (projection 0), or down [hidden, inner] (projection 1). */
int mq_dequant(mq_layer *layer, int projection, int expert, void *out, int type, mq_stream stream);
const char *mq_last_error(void);
#endif
