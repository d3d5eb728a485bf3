// The driver functions (libcuda) that torch and Triton call; kernels that are loaded are accepted and not run.
#include "runtime.h"

#include <cuda.h>

using namespace host;

extern "C" {

static const char *const context = "context";

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int) {
    *device = 0;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int *count) {
    *count = 1;
    return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *version) {
    *version = 13030;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device);  // the same numbers
    return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char **text) {
    *text = "an error";
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned *flags, int *active) {
    *flags = 0, *active = 1;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *found, CUdevice) {
    *found = reinterpret_cast<CUcontext>(const_cast<char *>(context));
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *found) { return cuDevicePrimaryCtxRetain(found, 0); }
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return cuDeviceGet(device, 0); }
CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr address) {
    uintptr_t start;
    if (!range_of(reinterpret_cast<void *>(address), &start, size)) return CUDA_ERROR_INVALID_VALUE;
    *base = start;
    return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) {
        *static_cast<CUdeviceptr *>(value) = address;
        return CUDA_SUCCESS;
    }
    note_once("cuPointerGetAttribute, an unknown attribute");
    return CUDA_ERROR_INVALID_VALUE;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    return CUDA_SUCCESS;
}

// Kernels compiled at run time: a module is accepted whatever it holds, a function is its name.
CUresult cuModuleLoadData(CUmodule *module, const void *) {
    count("modules loaded");
    *module = reinterpret_cast<CUmodule>(new char);
    return CUDA_SUCCESS;
}
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned, CUjit_option *, void **) {
    return cuModuleLoadData(module, image);
}
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule, const char *name) {
    *function = reinterpret_cast<CUfunction>(new std::string(name));
    return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute a, CUfunction) {
    *value = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction, int threads, size_t shared) {
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, nullptr, threads, shared);
    return CUDA_SUCCESS;
}
static CUresult launch(CUfunction function) {
    count("launches");
    count("kernel compiled at run time " + *reinterpret_cast<std::string *>(function));
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                        CUstream, void **, void **) {
    return launch(function);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *, CUfunction function, void **, void **) { return launch(function); }

CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *v, CUlimit) { *v = 0; return CUDA_SUCCESS; }
}  // extern "C"
