// Threads, memory that outlives a call, and the choice of a tile's registers: what all drivers share.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <ctime>
#include <thread>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#include <unistd.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "simd.h"

constexpr double kLate = 1e-3;  // seconds that no thread which has a processor is late by
constexpr double kRest = 10;    // times what was lost by waiting for others, a thread works alone: a tenth is lost at most

// A barrier of threads that wait for each other a hundred times a millisecond: they spin, and where others need the
// processor soon let them have it, which OpenMP's does after milliseconds.
class Meeting {
  public:
    void wait(int64_t threads) {  // of which all come
        const int64_t phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; spins < 2000; ++spins) {
            if (phase_.load(std::memory_order_acquire) != phase) return;
#ifdef __x86_64__
            _mm_pause();
#endif
        }
        const double began = seconds(), used = processor_seconds();
        while (phase_.load(std::memory_order_acquire) == phase) std::this_thread::yield();
        const double wall = seconds() - began, cores = std::max(1u, std::thread::hardware_concurrency());
        const double fair = wall * std::min(cores, double(threads));  // for all members, who work or wait
        if (wall > kLate && processor_seconds() - used < fair / 2) lost_.store(wall, std::memory_order_relaxed);
    }
    double lost() const { return lost_.load(std::memory_order_relaxed); }  // seconds, to processes that had our processors
    static double seconds() {
        return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    }

  private:
    static double processor_seconds() { return double(std::clock()) / CLOCKS_PER_SEC; }
    std::atomic<double> lost_{0};
    alignas(64) std::atomic<int64_t> arrived_{0};
    alignas(64) std::atomic<int64_t> phase_{0};
};

struct Member {  // of a team: this thread; outside of all teams, alone
    Meeting* meeting = nullptr;
    int64_t index = 0, size = 1;
};
inline thread_local Member member;

inline int64_t team_size() { return member.size; }
inline int64_t thread_index() { return member.index; }
inline void barrier() {
    if (member.meeting) member.meeting->wait(member.size);
}

// When a calling thread had to wait for members that other processes kept off the processors, it works alone for a while:
// a team that meets is as slow as its last member's turn comes late, which is milliseconds.
class Company {
  public:
    bool wanted() const { return alone_until_ == 0 || Meeting::seconds() > alone_until_; }
    void lost(double seconds) { alone_until_ = Meeting::seconds() + kRest * seconds; }

  private:
    double alone_until_ = 0;
};
inline thread_local Company company;

#ifdef _OPENMP
// Was this process forked from the one that loaded this library? Threads of OpenMP, torch's or ours, stayed there, and a team
// would wait for them forever.
inline const int64_t loaded_by = getpid();
inline bool orphaned() { return getpid() != loaded_by; }
#endif

// f() by a team of `threads`, just as many if `all`; false, with nothing done, where there is no company.
template <class F>
bool in_company(int64_t threads, bool all, F f) {
#ifdef _OPENMP
    if (threads < 2 || !company.wanted() || omp_in_parallel() || orphaned()) return false;
    Meeting meeting;
    double met = 0;
#pragma omp parallel num_threads(threads)
    {
        const int64_t given = omp_get_num_threads(), size = all ? threads : given;  // OpenMP may give fewer
        for (int64_t i = omp_get_thread_num(); i < size; i += given) {
            member = {&meeting, i, size};
            f();
        }
        meeting.wait(given);
        if (omp_get_thread_num() == 0) met = Meeting::seconds();
        member = {};
    }
    const double lost = std::max(meeting.lost(), Meeting::seconds() - met);
    if (lost > kLate) company.lost(lost);
    return true;
#else
    return false;
#endif
}

// f() by all members of a team, who may wait at barriers. What f computes must not depend on the team's size: it may be 1.
template <class F>
void together(int64_t threads, F f) {
    if (!in_company(threads, false, f)) f();
}

constexpr int64_t kWorthy = 1 << 18;  // bytes or indices to read, up to which a second thread comes too late

// f(begin, end) for the shares of [0, size) that members of a team have. work: what there is to read, all in all.
template <class F>
void shared(int64_t size, int64_t work, int64_t threads, F f) {
    together(work > kWorthy ? threads : 1, [&] {
        f(size * thread_index() / team_size(), size * (thread_index() + 1) / team_size());
    });
}

// f() by all members of a team of just this size, without barriers; one after the other where there is no company.
template <class F>
void one_by_one(int64_t threads, F f) {
    if (in_company(threads, true, f)) return;
    const Member outside = member;
    for (int64_t i = 0; i < threads; ++i) {
        member = {nullptr, i, threads};
        f();
    }
    member = outside;
}

// Pieces of work that threads take one by one: of two neighbours on a shared machine, one is often half as fast. Half of the
// team takes them from the front, the others from the back. So a thread mostly comes to what it, or its die, had before in
// this layer, in the one before and in torch's own operators, which share out alike: a line from another die costs 160 ns.
class Queue {
  public:
    // f(piece) for pieces of [begin, end) that nobody else has taken.
    template <class F>
    void each(int64_t begin, int64_t end, F f) {
        const bool front = 2 * thread_index() < team_size();
        for (;;) {
            const uint64_t taken = taken_.fetch_add(front ? 1 : uint64_t(1) << 32, std::memory_order_relaxed);
            const int64_t first = int64_t(taken & UINT32_MAX), last = int64_t(taken >> 32);
            if (first + last >= end - begin) return;
            f(front ? begin + first : end - 1 - last);
        }
    }

  private:
    std::atomic<uint64_t> taken_{0};  // from the front and, in the upper half, from the back
};

constexpr size_t kHugePage = 2 << 20;

// Asks for huge pages in fresh memory that is about to be written: faulting in 4 KiB at a time costs a large
// convolution as much as its arithmetic.
inline void expect_writes(void* memory, int64_t bytes) {
#ifdef __linux__
    constexpr int64_t huge = kHugePage;
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
            const size_t bytes = count * sizeof(T), unit = bytes < kHugePage ? 4096 : kHugePage;
            size_ = (bytes + unit - 1) / unit * unit;
            memory_ = std::aligned_alloc(unit, size_);
            if (!memory_) std::abort();
            expect_writes(memory_, size_);  // columns of a block are pages apart: huge ones need a hundredth of the TLB
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
