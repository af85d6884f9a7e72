// The inner loops, over one tile. Activations are packed: row = feature, `R` vectors of consecutive batch columns.
#pragma once
#include "plan.h"
#include "simd.h"

constexpr int kParked = 64;  // partial dot products held back and reduced together

// Values are read along rows of W but stored in CSR order, so a tile touches many short runs that no hardware prefetcher
// follows. Asking for them this many entries ahead takes a third off the backward pass of a large layer.
constexpr int kAhead = 256;
static_assert(kAhead <= kSlack, "the plan's arrays are read this far past their end");

// Where a tile finds the row of an entry: rows of a matrix are `ld` apart; taps of a convolution have a table.
struct Strided {
    int64_t ld;
    INLINE int64_t operator()(uint16_t column) const { return column * ld; }
};
struct Mapped {
    const int32_t* offset;
    INLINE int64_t operator()(uint16_t column) const { return offset[column]; }
};

// Independent sums per output vector, so that few registers per row still hide the latency of a multiply-add. A batch
// that threads share out has tiles of 4 to 8 vectors, of how many depends on the threads: these add up alike.
template <int R>
constexpr int kSums = R >= 4 ? 1 : R == 3 ? 2 : 4;

// y[row] += Σ values * x[col]. For W the values of a segment are consecutive; for Wᵀ each has its own index.
template <class T, int R, bool TRANSPOSED, class Rows>
void spmm_tile(const Schedule& s, const Tile* tile, const T* values, const T* x, Rows rows, T* y, int64_t ldy) {
    constexpr int W = kWidth<T>, U = kSums<R>;
    const Bucket* last = s.buckets + tile[1].bucket;
    const uint16_t* col = s.entry_col + tile->entry;
    const int32_t* at = s.entry_value + tile->entry;
    int32_t segment = tile->segment;
    for (const Bucket* b = s.buckets + tile->bucket; b < last; ++b) {
        const int32_t length = b->length;
        for (const int32_t stop = segment + b->count; segment < stop; ++segment) {
            T* out = y + s.segment_row[segment] * ldy;
            const T* v = TRANSPOSED ? nullptr : values + s.segment_value[segment];
            if (!TRANSPOSED) __builtin_prefetch(v + 2 * length);  // this row's segment in the next tile
            Vec<T> acc[U][R] = {};
            auto entry = [&](int32_t k, Vec<T>(&to)[R]) __attribute__((always_inline)) {
                const T* in = x + rows(col[k]);
                const T value = TRANSPOSED ? values[at[k]] : v[k];
                if (TRANSPOSED) __builtin_prefetch(values + at[k + kAhead]);
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) to[r] += value * load<T>(in + r * W);
            };
            int32_t k = 0;
            for (; k + U <= length; k += U)
#pragma GCC unroll 4
                for (int u = 0; u < U; ++u) entry(k + u, acc[u]);
            for (; k < length; ++k) entry(k, acc[0]);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
                for (int u = 1; u < U; ++u) acc[0][r] += acc[u][r];
                store<T>(out + r * W, load<T>(out + r * W) + acc[0][r]);
            }
            col += length;
            at += length;
        }
    }
}

// Sums parked partial dot products across lanes, 16 at a time: gvalues[at[i]] (+)= Σ lanes of parked[i].
template <class T>
void unpark(const T* parked, int count, const int32_t* at, T* gvalues, bool add) {
    constexpr int W = kWidth<T>;
    for (int i = 0; i < count; i += W) {
        alignas(64) T total[W];
        store<T>(total, sums<T>(parked + i * W));
        const int n = count - i < W ? count - i : W;
        if (add)
            for (int l = 0; l < n; ++l) gvalues[at[i + l]] += total[l];
        else
            for (int l = 0; l < n; ++l) gvalues[at[i + l]] = total[l];
    }
}

// Over Wᵀ: gx[row] += Σ values * gy[col], and from the same loads gvalues (+)= <x[row], gy[col]>.
template <class T, int R, class Rows>
void fused_tile(const Schedule& s, const Tile* tile, const T* values, const T* gy, Rows rows, const T* x, int64_t ldx,
                T* gx, int64_t ldgx, T* gvalues, bool add) {
    constexpr int W = kWidth<T>;
    alignas(64) T parked[kParked * W];
    int count = 0;
    const Bucket* last = s.buckets + tile[1].bucket;
    const uint16_t* col = s.entry_col + tile->entry;
    const int32_t *at = s.entry_value + tile->entry, *parked_at = at;
    int32_t segment = tile->segment;
    for (const Bucket* b = s.buckets + tile->bucket; b < last; ++b)
        for (const int32_t stop = segment + b->count; segment < stop; ++segment) {
            const int64_t row = s.segment_row[segment];
            T* out = gx + row * ldgx;
            Vec<T> acc[R], mine[R];
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) acc[r] = load<T>(out + r * W), mine[r] = load<T>(x + row * ldx + r * W);
            for (int32_t left = b->length; left;) {
                const int n = left < kParked - count ? left : kParked - count;
                T* park = parked + count * W;
                for (int k = 0; k < n; ++k) {
                    const T* in = gy + rows(col[k]);
                    const T value = values[at[k]];
                    __builtin_prefetch(values + at[k + kAhead]);
                    __builtin_prefetch(gvalues + at[k + kAhead], 1);
                    Vec<T> dot = {}, dot2 = {};
#pragma GCC unroll 16
                    for (int r = 0; r < R; ++r) {
                        Vec<T> g = load<T>(in + r * W);
                        hold<T>(g);
                        acc[r] += value * g;
                        (r & 1 ? dot2 : dot) += mine[r] * g;
                    }
                    store<T>(park + k * W, R > 1 ? dot + dot2 : dot);
                }
                col += n, at += n, left -= n, count += n;
                if (count == kParked) {
                    unpark<T>(parked, kParked, parked_at, gvalues, add);
                    parked_at = at;
                    count = 0;
                }
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) store<T>(out + r * W, acc[r]);
        }
    unpark<T>(parked, count, parked_at, gvalues, add);
}

// Over W: gvalues (+)= <gy[row], x[col]>, where gx is not wanted.
template <class T, int R, class Rows>
void sddmm_tile(const Schedule& s, const Tile* tile, const T* gy, int64_t ld, const T* x, Rows rows, T* gvalues,
                bool add) {
    constexpr int W = kWidth<T>;
    alignas(64) T parked[kParked * W];
    int32_t parked_at[kParked];
    int count = 0;
    const Bucket* last = s.buckets + tile[1].bucket;
    const uint16_t* col = s.entry_col + tile->entry;
    int32_t segment = tile->segment;
    for (const Bucket* b = s.buckets + tile->bucket; b < last; ++b)
        for (const int32_t stop = segment + b->count; segment < stop; ++segment) {
            const T* row = gy + s.segment_row[segment] * ld;
            int32_t at = s.segment_value[segment];
            __builtin_prefetch(gvalues + at + 2 * b->length, 1);
            Vec<T> mine[R];
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) mine[r] = load<T>(row + r * W);
            for (int32_t left = b->length; left;) {
                const int n = left < kParked - count ? left : kParked - count;
                T* park = parked + count * W;
                for (int k = 0; k < n; ++k) {
                    const T* in = x + rows(col[k]);
                    Vec<T> dot = {}, dot2 = {};
#pragma GCC unroll 16
                    for (int r = 0; r < R; ++r) (r & 1 ? dot2 : dot) += mine[r] * load<T>(in + r * W);
                    store<T>(park + k * W, R > 1 ? dot + dot2 : dot);
                }
                for (int k = 0; k < n; ++k) parked_at[count + k] = at + k;
                col += n, at += n, left -= n, count += n;
                if (count == kParked) {
                    unpark<T>(parked, kParked, parked_at, gvalues, add);
                    count = 0;
                }
            }
        }
    unpark<T>(parked, count, parked_at, gvalues, add);
}
