// What torch needs an answer from in cuBLAS, cuBLASLt and cuDNN; all their other functions are stubs that return success.
//
// Declared here, not included: their headers often are not installed. Handles and enumerations are plain.
#include "runtime.h"

using namespace host;

namespace host {
void count_quietly(const char *name) { count(name); }
}  // namespace host

extern "C" {

int cublasCreate_v2(void **handle) {
    static char somewhere;
    *handle = &somewhere;
    return 0;
}
int cublasGetMathMode(void *, int *mode) { return *mode = 0; }
int cublasGetPointerMode_v2(void *, int *mode) { return *mode = 0; }

struct Heuristic {  // cublasLtMatmulHeuristicResult_t
    uint64_t algorithm[8];
    size_t workspace;
    int status;
    float waves;
    int reserved[4];
};
int cublasLtMatmulAlgoGetHeuristic(void *, void *, void *, void *, void *, void *, void *, int wanted,
                                   Heuristic *results, int *found) {
    *found = wanted > 0;
    if (wanted > 0) *results = {};
    return 0;
}

// cuDNN's backend: every descriptor can be made and set; there is one engine, which needs no workspace.
int cudnnCreate(void **handle) {
    static char somewhere;
    *handle = &somewhere;
    return 0;
}
int cudnnDestroy(void *) { return 0; }
int cudnnSetStream(void *, void *) { return 0; }
int cudnnGetStream(void *, void **stream) {
    *stream = nullptr;
    return 0;
}
int cudnnBackendCreateDescriptor(int, void **descriptor) {
    *descriptor = new char;
    return 0;
}
int cudnnBackendDestroyDescriptor(void *descriptor) {
    delete static_cast<char *>(descriptor);
    return 0;
}
int cudnnBackendSetAttribute(void *, int, int, int64_t, const void *) { return 0; }
int cudnnBackendFinalize(void *) { return 0; }
int cudnnBackendGetAttribute(void *, int attribute, int type, int64_t wanted, int64_t *found, void *values) {
    constexpr int kInt64 = 3, kDescriptor = 15, kInt32 = 23, kKnobs = 302;  // CUDNN_TYPE_..., CUDNN_ATTR_...
    if (values && wanted > 0 && type == kInt64) *static_cast<int64_t *>(values) = 0;
    if (values && wanted > 0 && type == kInt32) *static_cast<int32_t *>(values) = 0;
    if (found) *found = attribute != kKnobs && (type == kInt64 || type == kInt32 || type == kDescriptor);
    return 0;
}
int cudnnBackendExecute(void *, void *, void *) {
    count("launches");
    count("cuDNN plan");
    return 0;
}

}  // extern "C"
