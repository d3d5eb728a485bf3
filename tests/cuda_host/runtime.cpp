// Stand-in of the CUDA runtime for the host side: one H100 whose memory is host memory and whose kernels do nothing.
//
// Copies are really made, as late as CUDA allows: a stream is a queue, and its work is done when the host waits for
// it, or for an event behind it. A copy that somebody forgets to wait for is therefore seen as missing. Read enqueue()
// and finish() first, then memory.cpp (allocations, copies) and device.cpp (properties, kernels, libraries).
#include "runtime.h"

#include <deque>
#include <map>
#include <mutex>
#include <set>

namespace host {

static std::recursive_mutex lock;
using Locked = std::lock_guard<std::recursive_mutex>;

struct Stream {
    std::deque<std::function<void()>> work;
    uint64_t submitted = 0, finished = 0;
};

struct Event {
    Stream *stream = nullptr;
    uint64_t position = 0;
};

// Never destroyed: torch still calls at exit.
static std::map<std::string, long> &counts = *new std::map<std::string, long>;
static std::set<Stream *> &streams = *new std::set<Stream *>;
static void (*listener)(const char *) = nullptr;

void count(const std::string &name, long by) {
    Locked locked(lock);
    counts[name] += by;
}

void host_sync(const char *what) {
    count(std::string("sync ") + what);
    if (listener) listener(what);
}

void note_once(const char *name) {
    Locked locked(lock);
    if (counts[std::string("stub ") + name]++ == 0) fprintf(stderr, "cuda_host: stub called: %s\n", name);
}

static Stream *stream_of(cudaStream_t stream) {
    static Stream *standard = new Stream, *per_thread = new Stream;
    Locked locked(lock);
    auto value = reinterpret_cast<uintptr_t>(stream);
    Stream *found = value <= 1 ? standard : value == 2 ? per_thread : reinterpret_cast<Stream *>(stream);
    streams.insert(found);
    return found;
}

static void run_until(Stream *stream, uint64_t position) {
    while (stream->finished < position) {
        auto work = std::move(stream->work.front());
        stream->work.pop_front();
        work();
        stream->finished++;
    }
}

void enqueue(cudaStream_t stream, std::function<void()> work) {
    Locked locked(lock);
    Stream *queue = stream_of(stream);
    queue->work.push_back(std::move(work));
    queue->submitted++;
}

void finish(cudaStream_t stream) {
    Locked locked(lock);
    Stream *queue = stream_of(stream);
    run_until(queue, queue->submitted);
}

void finish_all() {
    Locked locked(lock);
    for (Stream *stream : streams) run_until(stream, stream->submitted);
}

static Event *event_of(cudaEvent_t event) { return reinterpret_cast<Event *>(event); }

static bool is_done(const Event *event) { return !event->stream || event->stream->finished >= event->position; }

}  // namespace host

using namespace host;

extern "C" {

// For Python, through ctypes.
long cuda_host_count(const char *name) {
    Locked locked(lock);
    auto found = counts.find(name);
    return found == counts.end() ? 0 : found->second;
}

int cuda_host_counts(char *text, size_t size) {  // "count name\n" each; returns the length, which may be above size
    Locked locked(lock);
    std::string all;
    for (auto &[name, number] : counts) all += std::to_string(number) + " " + name + "\n";
    snprintf(text, size, "%s", all.c_str());
    return static_cast<int>(all.size());
}

void cuda_host_reset() {
    Locked locked(lock);
    counts.clear();
}

void cuda_host_finish() { finish_all(); }

void cuda_host_listen(void (*called)(const char *)) { listener = called; }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int) {
    *stream = reinterpret_cast<cudaStream_t>(new Stream);
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {  // its record stays: events point at it
    finish(stream);
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    host_sync("stream");
    finish(stream);
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    host_sync("device");
    finish_all();
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {  // not yet, but at the next question
    Locked locked(lock);
    Stream *queue = stream_of(stream);
    if (queue->finished >= queue->submitted) return cudaSuccess;
    finish(stream);
    return cudaErrorNotReady;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    Locked locked(lock);
    Event at = *event_of(event);
    count("stream waits for event");
    if (!is_done(&at)) enqueue(stream, [at] { run_until(at.stream, at.position); });
    return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void *data, unsigned) {
    enqueue(stream, [=] { callback(stream, cudaSuccess, data); });
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus *status, unsigned long long *,
                                     cudaGraph_t *, const cudaGraphNode_t **, const cudaGraphEdgeData **, size_t *) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0, *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    *event = reinterpret_cast<cudaEvent_t>(new Event);
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event_of(event);
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    Locked locked(lock);
    Stream *queue = stream_of(stream);
    *event_of(event) = {queue, queue->submitted};
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {  // not yet, but at the next question
    Locked locked(lock);
    Event *at = event_of(event);
    if (is_done(at)) return cudaSuccess;
    run_until(at->stream, at->position);
    return cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    host_sync("event");
    Locked locked(lock);
    Event *at = event_of(event);
    if (at->stream) run_until(at->stream, at->position);
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t) {
    *ms = 1.0f;
    return cudaSuccess;
}

}  // extern "C"
