// As much of OpenMP's runtime as csrc/ uses, from pthreads alone: ThreadSanitizer sees how they wait, which it does not
// see of libgomp, so no alarm is false. Each parallel region starts threads of its own.
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr int kLoops = 256;  // of a region, at most

struct Team {
    explicit Team(unsigned size) : size(size) { pthread_barrier_init(&barrier, nullptr, size); }
    ~Team() { pthread_barrier_destroy(&barrier); }
    unsigned size;
    pthread_barrier_t barrier;
    std::atomic<long> singles{0};          // `single` constructs that somebody has taken
    std::atomic<long> chunks[kLoops] = {};  // of each dynamic loop, that somebody has taken
};

struct Member {  // of a team, a thread; outside of all, alone
    Team* team = nullptr;
    unsigned number = 0;
    long singles = 0, loops = 0, alone = 0;
    long start = 0, end = 0, chunk = 1;  // of the present loop
};

thread_local Member me;

bool take(long* begin, long* end) {
    const long number = me.team ? me.team->chunks[me.loops].fetch_add(1, std::memory_order_relaxed) : me.alone++;
    *begin = me.start + number * me.chunk;
    *end = *begin + me.chunk < me.end ? *begin + me.chunk : me.end;
    return *begin < me.end;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return int(me.number); }
int omp_get_num_threads() { return me.team ? int(me.team->size) : 1; }

void GOMP_barrier() {
    if (me.team) pthread_barrier_wait(&me.team->barrier);
}

bool GOMP_single_start() {
    if (!me.team) return true;
    long mine = me.singles++;
    return me.team->singles.compare_exchange_strong(mine, mine + 1, std::memory_order_relaxed);
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* from, long* to) {
    if (step != 1 || me.loops == kLoops) std::abort();  // csrc/ has no such loops
    me.start = start, me.end = end, me.chunk = chunk, me.alone = 0;
    return take(from, to);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* from, long* to) { return take(from, to); }

void GOMP_loop_end() {
    ++me.loops;
    GOMP_barrier();
}

void GOMP_loop_end_nowait() { ++me.loops; }

void GOMP_parallel(void (*region)(void*), void* data, unsigned threads, unsigned) {
    const Member outer = me;
    Team team(threads ? threads : 1);
    const auto run = [&](unsigned number) {
        me = Member{};
        me.team = &team, me.number = number;
        region(data);
    };
    std::vector<std::thread> others;
    for (unsigned i = 1; i < team.size; ++i) others.emplace_back(run, i);
    run(0);
    for (auto& each : others) each.join();
    me = outer;
}

}  // extern "C"
