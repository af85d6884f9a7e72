// Threads, memory that outlives a call, and the choice of a tile's registers: what all drivers share.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "simd.h"

#ifdef _OPENMP
inline int64_t team_size() { return omp_get_num_threads(); }
inline int64_t thread_index() { return omp_get_thread_num(); }
inline void barrier() {
#pragma omp barrier
}
#else
inline int64_t team_size() { return 1; }
inline int64_t thread_index() { return 0; }
inline void barrier() {}
#endif

// A barrier for threads that wait for each other a hundred times a millisecond: they spin, and where others need the
// processor soon let them have it, which OpenMP's does after milliseconds.
class Meeting {
  public:
    void size(int64_t threads) { threads_ = threads; }  // before anybody waits
    void wait() {
        const int64_t phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins)
            if (spins < 2000) {
#ifdef __x86_64__
                _mm_pause();
#endif
            } else {
                std::this_thread::yield();
            }
    }

  private:
    int64_t threads_ = 1;
    alignas(64) std::atomic<int64_t> arrived_{0};
    alignas(64) std::atomic<int64_t> phase_{0};
};

// Asks for huge pages in fresh memory that is about to be written: faulting in 4 KiB at a time costs a large
// convolution as much as its arithmetic.
inline void expect_writes(void* memory, int64_t bytes) {
#ifdef __linux__
    constexpr int64_t huge = 2 << 20;
    const int64_t address = reinterpret_cast<int64_t>(memory), begin = (address + huge - 1) / huge * huge;
    const int64_t length = (address + bytes - begin) / huge * huge;
    if (length > 0) madvise(reinterpret_cast<void*>(begin), length, MADV_HUGEPAGE);
#endif
}

class Scratch {  // per thread, grows, lives as long as the thread: fresh pages cost more than many a kernel
  public:
    ~Scratch() { std::free(memory_); }
    template <class T>
    T* get(size_t count) {
        if (count * sizeof(T) > size_) {
            std::free(memory_);
            size_ = (count * sizeof(T) + 4095) / 4096 * 4096;
            memory_ = std::aligned_alloc(64, size_);
            if (!memory_) std::abort();
        }
        return static_cast<T*>(memory_);
    }

  private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};

// A tile has at most 8 vectors of consecutive columns: this many groups of kLanes.
template <class T>
constexpr int kMaxGroups = 8 * kWidth<T> / kLanes ? 8 * kWidth<T> / kLanes : 1;

// f(std::integral_constant<int, R>) for a tile of `groups` lane groups.
template <class T, int G = 1, class F>
INLINE void with_registers(int64_t groups, F f) {
    if constexpr (G < kMaxGroups<T>)
        if (groups != G) return with_registers<T, G + 1>(groups, f);
    f(std::integral_constant<int, G * kLanes / kWidth<T>>());
}
