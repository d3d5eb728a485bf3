// The stand-in's memory: "device" memory is mapped lazily, so that it costs what is written to it and no more.
#include "runtime.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

namespace host {

struct Range {
    size_t size;
    Where kind;
};

static std::recursive_mutex lock;
using Locked = std::lock_guard<std::recursive_mutex>;
static std::map<uintptr_t, Range> &ranges = *new std::map<uintptr_t, Range>;
static size_t device_bytes = 0;

static size_t device_size() {  // of an H100; CUDA_HOST_MEMORY in the environment for another
    const char *given = getenv("CUDA_HOST_MEMORY");
    return given ? strtoull(given, nullptr, 10) : size_t{85'017'755'648};
}

static std::map<uintptr_t, Range>::iterator find(const void *address) {
    auto key = reinterpret_cast<uintptr_t>(address);
    auto next = ranges.upper_bound(key);
    if (next == ranges.begin()) return ranges.end();
    auto found = std::prev(next);
    return key < found->first + found->second.size ? found : ranges.end();
}

Where where(const void *address) {
    Locked locked(lock);
    auto found = find(address);
    return found == ranges.end() ? Where::pageable : found->second.kind;
}

bool range_of(const void *address, uintptr_t *start, size_t *size) {
    Locked locked(lock);
    auto found = find(address);
    if (found == ranges.end()) return false;
    *start = found->first, *size = found->second.size;
    return true;
}

static cudaError_t map_lazily(void **address, size_t size, Where kind) {
    void *mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return cudaErrorMemoryAllocation;
    Locked locked(lock);
    ranges[reinterpret_cast<uintptr_t>(mapped)] = {size, kind};
    *address = mapped;
    return cudaSuccess;
}

static cudaError_t unmap(void *address) {
    if (!address) return cudaSuccess;
    finish_all();
    Locked locked(lock);
    auto found = ranges.find(reinterpret_cast<uintptr_t>(address));
    if (found == ranges.end()) return cudaErrorInvalidValue;
    if (found->second.kind == Where::device) device_bytes -= found->second.size;
    munmap(address, found->second.size);
    ranges.erase(found);
    return cudaSuccess;
}

static const char *name_of(Where kind) {
    return kind == Where::device ? "device" : kind == Where::pinned ? "pinned" : "pageable";
}

// Within the device nothing is copied, as no kernel is run: it would only fill memory. Else as CUDA does: pageable memory is read before this returns, and written before this returns; all else is only begun.
static void copy(void *to, const void *from, size_t size, cudaStream_t stream) {
    Where target = where(to), source = where(from);
    auto kind = std::string("copy ") + name_of(source) + " to " + name_of(target);
    count(kind);
    count(kind + ", bytes", static_cast<long>(size));
    if (target == Where::device && source == Where::device) return;
    if (target == Where::pageable) {
        host_sync("copy to pageable memory");
        finish(stream);
        memcpy(to, from, size);
    } else if (source == Where::pageable) {
        auto first = static_cast<const char *>(from);
        std::vector<char> staged(first, first + size);
        enqueue(stream, [to, staged = std::move(staged)] { memcpy(to, staged.data(), staged.size()); });
    } else {
        enqueue(stream, [=] { memmove(to, from, size); });
    }
}

}  // namespace host

using namespace host;

extern "C" {

cudaError_t cudaMalloc(void **address, size_t size) {
    count("cudaMalloc");
    {
        Locked locked(lock);
        if (device_bytes + size > device_size()) {
            cuda_host_fail(cudaErrorMemoryAllocation);
            return cudaErrorMemoryAllocation;
        }
        device_bytes += size;
    }
    return map_lazily(address, size, Where::device);
}
cudaError_t cudaFree(void *address) {
    if (address) host_sync("cudaFree");
    return unmap(address);
}
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    Locked locked(lock);
    *total = device_size();
    *available = *total - device_bytes;
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **address, size_t size, unsigned) {
    count("cudaHostAlloc");
    return map_lazily(address, size, Where::pinned);
}
cudaError_t cudaMallocHost(void **address, size_t size) { return cudaHostAlloc(address, size, 0); }
cudaError_t cudaFreeHost(void *address) { return unmap(address); }
cudaError_t cudaHostRegister(void *address, size_t size, unsigned) {
    count("cudaHostRegister");
    if (getenv("CUDA_HOST_NO_PINNING")) {  // as in a container or under WSL2
        cuda_host_fail(cudaErrorNotSupported);
        return cudaErrorNotSupported;
    }
    if (where(address) != Where::pageable) {
        cuda_host_fail(cudaErrorHostMemoryAlreadyRegistered);
        return cudaErrorHostMemoryAlreadyRegistered;
    }
    Locked locked(lock);
    ranges[reinterpret_cast<uintptr_t>(address)] = {size, Where::pinned};
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *address) {
    finish_all();
    Locked locked(lock);
    if (ranges.erase(reinterpret_cast<uintptr_t>(address))) return cudaSuccess;
    cuda_host_fail(cudaErrorHostMemoryNotRegistered);
    return cudaErrorHostMemoryNotRegistered;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *address) {
    Where kind = where(address);
    auto plain = const_cast<void *>(address);
    *attributes = {};
    attributes->type = kind == Where::device   ? cudaMemoryTypeDevice
                       : kind == Where::pinned ? cudaMemoryTypeHost
                                               : cudaMemoryTypeUnregistered;
    attributes->hostPointer = kind == Where::pinned ? plain : nullptr;
    attributes->devicePointer = kind == Where::pageable ? nullptr : plain;
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
    copy(to, from, size, stream);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind) {
    host_sync("cudaMemcpy");
    copy(to, from, size, nullptr);
    finish(nullptr);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *address, int value, size_t size, cudaStream_t stream) {
    count("memset");
    // Zeros go where zeros are: pages that were never written stay unmapped.
    enqueue(stream, [=] {
        if (value == 0 && size >= (size_t{1} << 20)) {
            auto start = reinterpret_cast<uintptr_t>(address), page = uintptr_t{4096};
            auto first = (start + page - 1) / page * page, last = (start + size) / page * page;
            memset(address, 0, first - start);
            madvise(reinterpret_cast<void *>(first), last - first, MADV_DONTNEED);
            memset(reinterpret_cast<void *>(last), 0, start + size - last);
        } else {
            memset(address, value, size);
        }
    });
    return cudaSuccess;
}
cudaError_t cudaMemset(void *address, int value, size_t size) { return cudaMemsetAsync(address, value, size, nullptr); }

}  // extern "C"
