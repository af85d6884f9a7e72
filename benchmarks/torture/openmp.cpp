// As much of OpenMP's runtime as csrc/ uses, from threads alone: ThreadSanitizer sees how they begin and end, which it does
// not see of libgomp, so no alarm is false. Each parallel region starts threads of its own.
#include <thread>
#include <vector>

namespace {

struct Member {  // of a team, a thread; outside of all, alone
    unsigned size = 1, number = 0;
    bool inside = false;
};

thread_local Member me;

}  // namespace

extern "C" {

int omp_get_thread_num() { return int(me.number); }
int omp_get_num_threads() { return int(me.size); }
int omp_in_parallel() { return me.inside; }

void GOMP_parallel(void (*region)(void*), void* data, unsigned threads, unsigned) {
    const Member outer = me;
    const unsigned size = threads ? threads : 1;
    const auto run = [&](unsigned number) {
        me = {size, number, true};
        region(data);
    };
    std::vector<std::thread> others;
    for (unsigned i = 1; i < size; ++i) others.emplace_back(run, i);
    run(0);
    for (auto& each : others) each.join();
    me = outer;
}

}  // extern "C"
