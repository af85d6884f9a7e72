// Values in the order in which tiles read them, and back: in CSR they are short runs at odd places, whose misses no
// prefetcher foresees. Bringing one over costs under a nanosecond, once a call; each tile of the batch then streams them.
// Those of 16 bits are widened, and their gradient is rounded, on the way.
#pragma once
#include "plan.h"

struct Range {
    int64_t begin, end;
};

// One of `parts` parts of `count` rows or strips.
inline Range share(int64_t count, int64_t part, int64_t parts) {
    return {count * part / parts, count * (part + 1) / parts};
}

// How many entries come before a strip.
inline int64_t first_entry(const Schedule& s, int64_t strip) { return s.tiles[strip * s.blocks].entry; }

// One of `parts` parts of the strips: as nearly equal in entries and rows as whole strips are.
inline Range fair_share(const Schedule& s, int64_t part, int64_t parts) {
    const auto weight = [&](int64_t strip) { return first_entry(s, strip) + strip * s.strip; };
    const auto first = [&](int64_t p) {
        int64_t strip = 0;
        while (strip < s.strips && (weight(strip) + weight(strip + 1)) * parts < 2 * weight(s.strips) * p) ++strip;
        return strip;
    };
    return {first(part), part + 1 < parts ? first(part + 1) : s.strips};
}

// f(place in the order, place in CSR, how many follow) for runs of the entries of `strips`, of which the places in `csr` are
// asked for before.
template <bool TRANSPOSED, class T, class F>
inline void each_run(const Schedule& s, Range strips, const T* csr, F f) {
    const Tile *first = s.tiles + strips.begin * s.blocks, *last = s.tiles + strips.end * s.blocks;
    if (TRANSPOSED) {
        for (int64_t k = first->entry; k < last->entry; ++k) {
            __builtin_prefetch(csr + s.entry_value[k + kAhead]);
            f(k, s.entry_value[k], 1);
        }
        return;
    }
    int64_t segment = first->segment, k = first->entry;
    for (const Bucket* b = s.buckets + first->bucket; b < s.buckets + last->bucket; ++b)
        for (const int64_t stop = segment + b->count; segment < stop; ++segment, k += b->length) {
            __builtin_prefetch(csr + s.segment_value[segment + 16]);
            f(k, s.segment_value[segment], b->length);
        }
}

// ordered: what comes first in it is the first entry of `strips`. TRANSPOSED: s is of Wᵀ.
template <bool TRANSPOSED, class T, class S>
void to_order(const Schedule& s, Range strips, const S* values, T* ordered) {
    const int64_t first = first_entry(s, strips.begin);
    each_run<TRANSPOSED>(s, strips, values, [&](int64_t to, int64_t from, int32_t count) __attribute__((always_inline)) {
        for (int32_t i = 0; i < count; ++i) ordered[to - first + i] = values[from + i];
    });
}

template <bool TRANSPOSED, class T, class S>
void from_order(const Schedule& s, Range strips, const T* ordered, S* values) {
    const int64_t first = first_entry(s, strips.begin);
    each_run<TRANSPOSED>(s, strips, values, [&](int64_t from, int64_t to, int32_t count) __attribute__((always_inline)) {
        for (int32_t i = 0; i < count; ++i) values[to + i] = ordered[from - first + i];
    });
}
