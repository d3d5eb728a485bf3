// What the parts of the stand-in share: counters, queues of streams, ranges of memory. Read runtime.cpp first.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>

namespace host {

enum class Where { pageable, pinned, device };

// Count an event under a name that Python reads; a host sync is also told to Python's listener.
void count(const std::string &name, long by = 1);
void host_sync(const char *what);

Where where(const void *address);
bool range_of(const void *address, uintptr_t *start, size_t *size);

void enqueue(cudaStream_t stream, std::function<void()> work);  // done when somebody waits for it, not before
void finish(cudaStream_t stream);
void finish_all();

void note_once(const char *name);  // to stderr: a function that is only a stub was called

}  // namespace host

extern "C" cudaError_t cuda_host_fail(cudaError_t error);  // remember and return it
