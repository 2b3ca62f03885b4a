// A CUDA driver without a GPU: what mq_loader.c asks of libcuda.so.1, with the emitted .cu compiled by g++ in it. A launch runs the kernel on
// the CPU, on the arguments that a driver would copy. Used by the tests of the loader and of the Python package; part of nothing emitted.
//   g++ -std=c++17 -shared -fPIC mq_host_driver.cpp -o libcuda.so.1     beside mq_moe.cu and mq_host.h
#define MQ_HOST 1
#include "mq_moe.cu"

template <class... A, size_t... I> static void mq_apply(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<A> *)arguments[I]...);
}
template <class... A> static void mq_run(void (*kernel)(A...), unsigned gx, unsigned gy, unsigned threads, void **arguments) {
    mq_launch(gx, gy, threads, [&] { mq_apply(kernel, arguments, std::index_sequence_for<A...>()); });
}

extern "C" {
int cuInit(unsigned) { return 0; }
int cuCtxGetDevice(int *device) { return *device = 0; }
int cuDeviceGetAttribute(int *value, int which, int) {
    *value = which == 75 ? 9 : which == 76 ? 0 : 2;
    return 0;
}
int cuModuleLoadData(void **module, const char *) {
    *module = (void *)"module";
    return 0;
}
int cuModuleUnload(void *) { return 0; }
int cuModuleGetFunction(void **function, void *, const char *name) {
    static char held[64];
    *function = strcpy(held, name);
    return 0;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *,
                   void **arguments, void **) {
    if (gz != 1 || by != 1 || bz != 1 || shared) return 1;
    const char *name = (const char *)function;
#define MQ_NAMED(KERNEL) if (!strcmp(name, #KERNEL)) return mq_run(KERNEL, gx, gy, bx, arguments), 0;
    MQ_NAMED(mq_route)
    MQ_NAMED(mq_combine_bf16)
    MQ_NAMED(mq_combine_f16)
    MQ_NAMED(mq_dequant_bf16)
    MQ_NAMED(mq_dequant_f16)
#define MQ_BLOCKED(NB) MQ_NAMED(mq_w13_bf16_##NB) MQ_NAMED(mq_w13_f16_##NB) MQ_NAMED(mq_w2_bf16_##NB) MQ_NAMED(mq_w2_f16_##NB)
    MQ_BLOCKS(MQ_BLOCKED)
    return 500;
}
}
