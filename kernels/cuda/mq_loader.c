/* Reference implementation of mq_moe.h: C11 and dlopen alone. cc -O2 -fPIC -shared mq_loader.c -ldl */
#include "mq_moe.h"
#include "mq_constants.h"
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int (*driver_fn)();
static _Thread_local char message[512];
static struct { void *lib; driver_fn init, ctx_device, attribute, load, unload, function, launch; } cu;

struct mq_model { void *module; int sms; };
struct mq_layer { mq_model *model; mq_projection part[2]; const int32_t *map; int type; };
/* What the kernels read for one projection; as in mq_moe.cu. */
typedef struct { const void *table; void *header, *items, *order, *here; } lists;
typedef struct { uint32_t offset[3], perm; uint8_t bits, log2_gs; uint16_t flags, n_tiles, k_tiles; uint32_t expert, reserved; } entry;
_Static_assert(sizeof(entry) == 32, "an entry of the expert table has 32 bytes");
_Static_assert(sizeof(mq_projection) == 40, "mq_projection is part of the ABI");

static int fail(int code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return code;
}
const char *mq_last_error(void) { return message; }

static int driver(void) {
    if (cu.lib) return 0;
    void *lib = dlopen("libcuda.so.1", RTLD_NOW);
    if (!lib) return fail(MQ_NO_DRIVER, "no CUDA driver here: %s", dlerror());
    struct { driver_fn *to; const char *name; } names[] = {
        {&cu.init, "cuInit"}, {&cu.ctx_device, "cuCtxGetDevice"}, {&cu.attribute, "cuDeviceGetAttribute"}, {&cu.load, "cuModuleLoadData"},
        {&cu.unload, "cuModuleUnload"}, {&cu.function, "cuModuleGetFunction"}, {&cu.launch, "cuLaunchKernel"}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        *(void **)names[i].to = dlsym(lib, names[i].name);
        if (!*names[i].to) return fail(MQ_NO_DRIVER, "the CUDA driver has no %s", names[i].name);
    }
    int code = cu.init(0u);
    if (code) return fail(MQ_NO_DRIVER, "cuInit says %d", code);
    cu.lib = lib;
    return 0;
}

static char *slurp(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    fseek(file, 0, SEEK_END);
    long size = ftell(file);
    rewind(file);
    char *bytes = size < 0 ? NULL : malloc((size_t)size + 1);
    if (bytes && fread(bytes, 1, (size_t)size, file) != (size_t)size) { free(bytes); bytes = NULL; }
    if (bytes) bytes[size] = 0;
    fclose(file);
    return bytes;
}

/* mq_moe.cu compiled for this device by whichever NVRTC there is. */
static char *compiled(const char *source, int arch) {
    static const char *const names[] = {"libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so"};
    void *lib = NULL;
    for (int i = 0; i < 3 && !lib; i++) lib = dlopen(names[i], RTLD_NOW);
    if (!lib) { fail(MQ_NO_IMAGE, "no cubin for sm_%d and no PTX, and no NVRTC to compile mq_moe.cu with: %s", arch, dlerror()); return NULL; }
    int (*create)(void **, const char *, const char *, int, const char *const *, const char *const *);
    int (*compile)(void *, int, const char *const *), (*size_of)(void *, size_t *), (*get)(void *, char *), (*destroy)(void **);
    *(void **)&create = dlsym(lib, "nvrtcCreateProgram");
    *(void **)&compile = dlsym(lib, "nvrtcCompileProgram");
    *(void **)&size_of = dlsym(lib, "nvrtcGetCUBINSize");
    *(void **)&get = dlsym(lib, "nvrtcGetCUBIN");
    *(void **)&destroy = dlsym(lib, "nvrtcDestroyProgram");
    if (!create || !compile || !size_of || !get || !destroy) { fail(MQ_NO_IMAGE, "this NVRTC is too old: it makes no cubins"); return NULL; }
    char option[32];
    snprintf(option, sizeof option, "-arch=sm_%d", arch);
    const char *options[] = {option, "--std=c++17", "-default-device"};
    void *program = NULL;
    char *image = NULL;
    size_t size = 0;
    if (create(&program, source, "mq_moe.cu", 0, NULL, NULL)) { fail(MQ_NO_IMAGE, "NVRTC takes no program"); return NULL; }
    int code = compile(program, 3, options);
    if (code) fail(MQ_NO_IMAGE, "NVRTC does not compile mq_moe.cu for sm_%d: error %d", arch, code);
    else if (!size_of(program, &size) && (image = malloc(size ? size : 1)) && get(program, image)) { free(image); image = NULL; }
    destroy(&program);
    return image;
}

int mq_open(const char *folder, mq_model **model) {
    *model = NULL;
    int code = driver(), device = 0, major = 0, minor = 0, sms = 0;
    if (code) return code;
    if (cu.ctx_device(&device)) return fail(MQ_NO_DRIVER, "no CUDA context is current");
    cu.attribute(&major, 75, device);
    cu.attribute(&minor, 76, device);
    cu.attribute(&sms, 16, device);
    if (major < 8) return fail(MQ_NO_IMAGE, "sm_%d%d is older than sm_80, which these kernels need", major, minor);
    char path[4096];
    char *image = NULL;
    /* A cubin made for this very device, else one for an older of its generation, else PTX for the driver to compile, else the source. */
    snprintf(path, sizeof path, "%s/cubin/mq_moe.sm_%d%da.cubin", folder, major, minor);
    image = slurp(path);
    for (int older = minor; older >= 0 && !image; older--) {
        snprintf(path, sizeof path, "%s/cubin/mq_moe.sm_%d%d.cubin", folder, major, older);
        image = slurp(path);
    }
    if (!image) {
        snprintf(path, sizeof path, "%s/ptx/mq_moe.compute_80.ptx", folder);
        image = slurp(path);
    }
    if (!image) {
        snprintf(path, sizeof path, "%s/mq_moe.cu", folder);
        char *source = slurp(path);
        if (!source) return fail(MQ_NO_IMAGE, "no cubin for sm_%d%d and no PTX below %s, and %s cannot be read", major, minor, folder, path);
        image = compiled(source, major * 10 + minor);
        free(source);
        if (!image) return MQ_NO_IMAGE;
        snprintf(path, sizeof path, "mq_moe.cu by NVRTC");
    }
    mq_model *found = calloc(1, sizeof *found);
    code = found ? cu.load(&found->module, image) : 2;
    free(image);
    if (code) { free(found); return fail(MQ_NO_IMAGE, "the driver does not load %s for sm_%d%d: error %d", path, major, minor, code); }
    found->sms = sms;
    *model = found;
    return 0;
}
void mq_close(mq_model *model) {
    if (model) cu.unload(model->module);
    free(model);
}

/* Whether the kernels of a projection were compiled for entries like this one. */
static int has_form(const entry *e, int gate_up) {
#define FORM(BITS, LOG2_GS, FLAGS) || (e->bits == BITS && e->log2_gs == LOG2_GS && (e->flags & 0x6e0u) == FLAGS)
    return gate_up ? 0 MQ_FORMS_13(FORM) : 0 MQ_FORMS_2(FORM);
#undef FORM
}

/* Everything that a kernel would trust. */
static int check(const char *what, const mq_projection *p, int rows, int inputs, int gate_up) {
    if ((uintptr_t)p->arena % 256 || !p->arena) return fail(MQ_BAD_POINTER, "%s: the arena is not aligned to 256 bytes", what);
    if (!p->host_table || !p->device_table || (uintptr_t)p->device_table % 4) return fail(MQ_BAD_POINTER, "%s: a table is missing or crooked", what);
    if (p->entries < 0 || p->entries > MQ_MAX_EXPERTS) return fail(MQ_BAD_TABLE, "%s: %d entries, at most %d", what, p->entries, MQ_MAX_EXPERTS);
    const int n = gate_up ? (rows + 31) / 32 : (rows + 63) / 64, k = (inputs + 127) / 128;
    for (int i = 0; i < p->entries; i++) {
        entry e;
        memcpy(&e, (const char *)p->host_table + 32 * i, sizeof e);
        if (e.n_tiles != n || e.k_tiles != k) return fail(MQ_BAD_TABLE, "%s, entry %d: %d x %d tiles, not %d x %d", what, i, e.n_tiles, e.k_tiles, n, k);
        if (e.expert >= MQ_EXPERTS) return fail(MQ_BAD_TABLE, "%s, entry %d: expert %u of %d", what, i, e.expert, MQ_EXPERTS);
        if (e.flags & ~0x6f0u || (e.flags >> 9 & 3) == 3 || e.perm != 0xffffffffu || !(e.flags & 0x10) != !gate_up)
            return fail(MQ_BAD_TABLE, "%s, entry %d: flags %#x are not known to this build", what, i, e.flags);
        if (e.log2_gs != 0xff && (e.log2_gs < 5 || e.log2_gs > 7)) return fail(MQ_BAD_TABLE, "%s, entry %d: groups of 2^%d", what, i, e.log2_gs);
        if (!has_form(&e, gate_up))
            return fail(MQ_BAD_TABLE, "%s, entry %d: %d bits in groups of 2^%d with flags %#x, which this build lacks: it was emitted for another checkpoint",
                        what, i, e.bits, e.log2_gs, e.flags);
        const uint64_t groups = (uint64_t)n * 64 * (e.log2_gs == 0xff ? 1 : (uint64_t)k * 128 >> e.log2_gs), scale = (e.flags >> 9 & 3) == 2 ? 4 : 2;
        const uint64_t bytes[3] = {(uint64_t)n * k * 1024 * e.bits, groups * scale,
                                   e.flags & 0x40 ? groups * scale : !(e.flags & 0x20) ? 0 : e.bits > 4 ? groups : groups / 2};
        for (int part = 0; part < 3; part++) {
            if (!bytes[part]) continue;
            const uint64_t start = 16ull * e.offset[part];
            if (start % 256 || start + bytes[part] > p->arena_bytes)
                return fail(MQ_BAD_TABLE, "%s, entry %d: %llu bytes at %llu of an arena of %llu", what, i, (unsigned long long)bytes[part],
                            (unsigned long long)start, (unsigned long long)p->arena_bytes);
        }
    }
    return 0;
}

int mq_layer_bind(mq_model *model, const mq_projection *gate_up, const mq_projection *down, const int32_t *expert_map, int act_type, mq_layer **layer) {
    *layer = NULL;
    int code = check("gate_up", gate_up, MQ_INNER, MQ_HIDDEN, 1);
    if (!code) code = check("down", down, MQ_HIDDEN, MQ_INNER, 0);
    if (code) return code;
    if (gate_up->entries != down->entries) return fail(MQ_BAD_TABLE, "gate_up has %d experts, down %d", gate_up->entries, down->entries);
    if (act_type != MQ_BF16 && act_type != MQ_F16) return fail(MQ_BAD_SIZE, "activation type %d; there are 0 (bf16) and 1 (f16)", act_type);
    mq_layer *found = calloc(1, sizeof *found);
    if (!found) return fail(MQ_BAD_SIZE, "out of memory");
    *found = (mq_layer){model, {*gate_up, *down}, expert_map, act_type};
    *layer = found;
    return 0;
}
void mq_layer_free(mq_layer *layer) { free(layer); }

typedef struct { size_t header[2], items[2], order[2], here[2], placed, mid, parts, end; } space;
static size_t up(size_t n) { return (n + 255) & ~(size_t)255; }
static space plan(int tokens, int top_k, int entries) {
    const size_t pairs = (size_t)tokens * (size_t)top_k, items = up((pairs / 8 + (size_t)entries + 1) * 12);
    space s = {0};
    size_t at = 0;
    for (int i = 0; i < 2; i++) {
        s.header[i] = at; at += 256;
        s.items[i] = at; at += items;
        s.order[i] = at; at += up(pairs * 4);
        s.here[i] = at; at += up(pairs * 4);
    }
    s.placed = at; at += up((size_t)tokens * MQ_HIDDEN_LD * 2);
    s.mid = at; at += up(pairs * MQ_INNER_LD * 2);
    s.parts = at; at += up(pairs * MQ_HIDDEN * 4);
    s.end = at;
    return s;
}
size_t mq_workspace_bytes(int tokens, int top_k, int entries) { return tokens > 0 && top_k > 0 ? plan(tokens, top_k, entries).end : 0; }

static int launch(mq_model *model, const char *name, unsigned gx, unsigned gy, unsigned threads, mq_stream stream, void **arguments) {
    void *function = NULL;
    int code = cu.function(&function, model->module, name);
    if (!code) code = cu.launch(function, gx, gy, 1u, threads, 1u, 1u, 0u, stream, arguments, NULL);
    return code ? fail(MQ_LAUNCH, "%s: the driver says %d", name, code) : 0;
}

int mq_moe_forward(mq_layer *layer, const void *x, int64_t ldx, const void *topk_ids, int ids_bits, const float *topk_weights, int top_k, void *out,
                   int64_t ldo, int tokens, void *workspace, size_t workspace_bytes, mq_stream stream) {
    if (tokens == 0) return 0;
    if (tokens < 0 || top_k < 1 || top_k > MQ_TOP_K || (int64_t)tokens * top_k > 1 << 24)
        return fail(MQ_BAD_SIZE, "%d tokens of %d experts each; top_k is at most %d, pairs at most 2^24", tokens, top_k, MQ_TOP_K);
    if (ids_bits != 32 && ids_bits != 64) return fail(MQ_BAD_SIZE, "ids of %d bits; there are 32 and 64", ids_bits);
    if (ldx < MQ_HIDDEN || ldo < MQ_HIDDEN || ldx % 2) return fail(MQ_BAD_SIZE, "rows of %lld and %lld for a hidden size of %d", (long long)ldx, (long long)ldo, MQ_HIDDEN);
    if (!x || !out || !topk_ids || !topk_weights || (uintptr_t)x % 4 || (uintptr_t)topk_ids % (uintptr_t)(ids_bits / 8))
        return fail(MQ_BAD_POINTER, "a pointer is null, or x or the ids are not aligned (4 bytes; their own size)");
    const int entries = layer->part[0].entries;
    const space s = plan(tokens, top_k, entries);
    if (!workspace || (uintptr_t)workspace % 256 || workspace_bytes < s.end)
        return fail(MQ_WORKSPACE, "a workspace of %zu bytes where %zu, aligned to 256, are needed", workspace_bytes, s.end);
    const int blocks = tokens <= 8 ? 1 : tokens <= 16 ? 2 : 4, block = 8 * blocks;
    const char *type = layer->type == MQ_BF16 ? "bf16" : "f16";
    int pairs = tokens * top_k, experts = MQ_EXPERTS, count = entries, most = block, bits = ids_bits, k = top_k, code;
    char *at = workspace, name[64];
    void *placed = at + s.placed, *mid = at + s.mid, *parts = at + s.parts;
    const int32_t *map = layer->map;
    lists of[2];
    for (int i = 0; i < 2; i++) of[i] = (lists){layer->part[i].device_table, at + s.header[i], at + s.items[i], at + s.order[i], at + s.here[i]};
    const unsigned grid = (unsigned)layer->model->sms * MQ_RESIDENT(blocks);
    {
        const unsigned copies = (unsigned)(((int64_t)tokens * (MQ_HIDDEN_LD / 8) + 255) / 256);
        void *arguments[] = {&of[0], &of[1], &count, &topk_ids, &bits, &map, &experts, &pairs, &most, &x, &ldx, &tokens, &placed};
        code = launch(layer->model, "mq_route", 2 + copies, 1, 256, stream, arguments);
    }
    if (!code) {
        void *arguments[] = {&layer->part[0].arena, &of[0], &placed, &k, &mid};
        snprintf(name, sizeof name, "mq_w13_%s_%d", type, blocks);
        code = launch(layer->model, name, grid, 1, 128, stream, arguments);
    }
    if (!code) {
        void *arguments[] = {&layer->part[1].arena, &of[1], &mid, &k, &parts};
        snprintf(name, sizeof name, "mq_w2_%s_%d", type, blocks);
        code = launch(layer->model, name, grid, 1, 128, stream, arguments);
    }
    if (!code) {
        void *arguments[] = {&parts, &of[1].here, &topk_weights, &k, &out, &ldo};
        snprintf(name, sizeof name, "mq_combine_%s", type);
        code = launch(layer->model, name, (unsigned)tokens, (MQ_HIDDEN + 255) / 256, 256, stream, arguments);
    }
    return code;
}

int mq_dequant(mq_layer *layer, int projection, int expert, void *out, int type, mq_stream stream) {
    if ((uintptr_t)out % 4) return fail(MQ_BAD_POINTER, "out is not aligned to 4 bytes");
    if (projection < 0 || projection > 1 || !out || (type != MQ_BF16 && type != MQ_F16)) return fail(MQ_BAD_SIZE, "projection %d, type %d", projection, type);
    const mq_projection *p = &layer->part[projection];
    for (int i = 0; i < p->entries; i++) {
        entry e;
        memcpy(&e, (const char *)p->host_table + 32 * i, sizeof e);
        if ((int)e.expert != expert) continue;
        int rows = projection ? MQ_HIDDEN : MQ_INNER, inputs = projection ? MQ_INNER : MQ_HIDDEN;
        void *arguments[] = {(void *)&p->arena, (void *)&p->device_table, &i, &out, &rows, &inputs};
        return launch(layer->model, type == MQ_BF16 ? "mq_dequant_bf16" : "mq_dequant_f16", e.n_tiles, e.k_tiles, 128, stream, arguments);
    }
    return fail(MQ_BAD_TABLE, "expert %d is not in this layer", expert);
}
