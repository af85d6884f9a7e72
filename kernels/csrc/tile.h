// The inner loops, over one tile. Activations are packed: row = feature, `R` vectors of consecutive batch columns.
//
// An entry costs R multiply-adds, each with a load of x, and a load of its value and one of its column: (R + 2) / 2 cycles
// where a cycle loads two vectors, against R / 2 of multiplying. So R = 8 reaches four fifths of the peak if x is in L1:
// `block` rows of x are, 32 KiB. What a segment adds to, R vectors read and written, comes from L2: it is asked for two
// segments before. Values stand in the order in which they are read, so that they stream (order.h).
#pragma once
#include "plan.h"
#include "simd.h"

constexpr int kParked = 64;  // partial dot products held back and reduced together

// Where a tile finds the row of an entry: packed rows follow each other; entries of a convolution have an offset each.
template <int WIDTH>
struct Packed {
    INLINE const uint16_t* entries(const Schedule& s, const Tile* tile) const { return s.entry_col + tile->entry; }
    INLINE int64_t operator()(int32_t column) const { return int64_t(column) * WIDTH; }
};
struct Mapped {
    const int32_t* offsets;  // of all entries of the schedule
    INLINE const int32_t* entries(const Schedule&, const Tile* tile) const { return offsets + tile->entry; }
    INLINE int64_t operator()(int32_t offset) const { return offset; }
};

// Independent sums per output vector, so that few registers per row still hide the latency of a multiply-add. A batch
// that threads share out has tiles of 4 to 8 vectors, of how many depends on the threads: these add up alike.
template <int R>
constexpr int kSums = R >= 4 ? 1 : R == 3 ? 2 : 4;

// Asks for the rows of y that the segment after next adds to.
template <class T, int R>
INLINE void expect(const T* y, int64_t ldy, const uint16_t* segment_row) {
    const char* row = reinterpret_cast<const char*>(y + segment_row[2] * ldy);
#pragma GCC unroll 16
    for (int64_t i = 0; i < R * VECTOR_BYTES; i += 64) __builtin_prefetch(row + i, 1);
}

// Vectors of x that a quad keeps in registers, beside four sums for each of them: of 32 registers, or of 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kShared = 4;
#else
constexpr int kShared = 3;
#endif

// R vectors of y of a quad's rows += Σ values * x[col]: a load of x serves four multiply-adds.
template <class T, int R, class Rows, class Column>
INLINE void quad(const T* const (&v)[kAlike], const Column* col, int32_t length, const T* x, Rows rows,
                 T* const (&out)[kAlike]) {
    constexpr int W = kWidth<T>;
    Vec<T> acc[kAlike][R] = {};
    for (int32_t k = 0; k < length; ++k) {
        const T* in = x + rows(col[k]);
        Vec<T> shared[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            shared[r] = load<T>(in + r * W);
            hold<T>(shared[r]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kAlike; ++i) {
            const T value = v[i][k];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) acc[i][r] += value * shared[r];
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kAlike; ++i)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) store<T>(out[i] + r * W, load<T>(out[i] + r * W) + acc[i][r]);
}

// The same for any R, kShared vectors at a time.
template <class T, int R, class Rows, class Column>
INLINE void quad_in_parts(const T* const (&v)[kAlike], const Column* col, int32_t length, const T* x, Rows rows,
                          T* const (&out)[kAlike]) {
    constexpr int W = kWidth<T>;
    if constexpr (R <= kShared) {
        quad<T, R>(v, col, length, x, rows, out);
    } else {
        T* const next[kAlike] = {out[0] + kShared * W, out[1] + kShared * W, out[2] + kShared * W, out[3] + kShared * W};
        quad<T, kShared>(v, col, length, x, rows, out);
        quad_in_parts<T, R - kShared>(v, col, length, x + kShared * W, rows, next);
    }
}

// The quads of a bucket.
template <class T, int R, bool IN_CSR, class Rows, class Column>
void spmm_quads(const Schedule& s, const Bucket* b, int32_t segment, const Column* col, const T* values, const T* x,
                Rows rows, T* y, int64_t ldy) {
    const int32_t length = b->length;
    for (const int32_t stop = segment + b->count; segment < stop; segment += kAlike, col += kAlike * length) {
        const T* v[kAlike];
        T* out[kAlike];
        for (int i = 0; i < kAlike; ++i) {
            v[i] = IN_CSR ? values + s.segment_value[segment + i] : values + i * length;
            out[i] = y + s.segment_row[segment + i] * ldy;
            expect<T, R>(y, ldy, s.segment_row + segment + i + kAlike - 2);  // of the next quad
        }
        quad_in_parts<T, R>(v, col, length, x, rows, out);
        values += IN_CSR ? 0 : kAlike * length;
    }
}

// y[row] += Σ values * x[col]. values: of this tile, in its order; or, if IN_CSR, all of W.
template <class T, int R, bool IN_CSR, class Rows>
void spmm_tile(const Schedule& s, const Tile* tile, const T* values, const T* x, Rows rows, T* y, int64_t ldy) {
    constexpr int W = kWidth<T>, U = kSums<R>;
    const Bucket* last = s.buckets + tile[1].bucket;
    const auto* col = rows.entries(s, tile);
    int32_t segment = tile->segment;
    for (const Bucket* b = s.buckets + tile->bucket; b < last; ++b) {
        const int32_t length = b->length;
        if (U == 1 && b->alike == kAlike) {  // else a row's sum would depend on whether it is in a quad
            spmm_quads<T, R, IN_CSR>(s, b, segment, col, values, x, rows, y, ldy);
            segment += b->count, col += b->count * length;
            values += IN_CSR ? 0 : b->count * length;
            continue;
        }
        for (const int32_t stop = segment + b->count; segment < stop; ++segment) {
            T* out = y + s.segment_row[segment] * ldy;
            const T* v = IN_CSR ? values + s.segment_value[segment] : values;
            if (IN_CSR) __builtin_prefetch(v + 2 * length);  // this row's segment in the next tile
            expect<T, R>(y, ldy, s.segment_row + segment);
            Vec<T> acc[U][R] = {};
            auto entry = [&](int32_t k, Vec<T>(&to)[R]) __attribute__((always_inline)) {
                const T* in = x + rows(col[k]);
                const T value = v[k];
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
            values += IN_CSR ? 0 : length;
        }
    }
}

// Partial dot products, a vector each, held back until there are kParked of them, then summed across lanes and written, or
// added: one after the other or, if SCATTERED, where `at` says.
template <class T, bool SCATTERED>
class Parked {
  public:
    Parked(T* to, const int32_t* at, bool add) : to_(to), at_(at), add_(add) {}
    ~Parked() { flush(); }
    // Room for n of `wanted` more, n at least 1.
    INLINE T* reserve(int32_t wanted, int32_t* n) {
        if (count_ == kParked) flush();
        *n = wanted < kParked - count_ ? wanted : kParked - count_;
        T* room = parked_ + count_ * kWidth<T>;
        count_ += *n;
        return room;
    }

  private:
    void flush() {
        constexpr int W = kWidth<T>;
        for (int i = 0; i < count_; i += W) {
            const Vec<T> total = sums<T>(parked_ + i * W);
            if (!SCATTERED && count_ - i >= W) {
                store<T>(to_ + i, add_ ? load<T>(to_ + i) + total : total);
                continue;
            }
            alignas(64) T each[W];
            store<T>(each, total);
            for (int l = 0; l < W && i + l < count_; ++l) {
                T& to = to_[SCATTERED ? at_[i + l] : i + l];
                to = add_ ? to + each[l] : each[l];
            }
        }
        if (SCATTERED) at_ += count_;
        else to_ += count_;
        count_ = 0;
    }
    alignas(64) T parked_[kParked * kWidth<T>];
    T* to_;
    const int32_t* at_;
    int32_t count_ = 0;
    const bool add_;
};

// Over Wᵀ: gx[row] += Σ values * gy[col], and from the same loads gvalues (+)= <x[row], gy[col]>. Values and their gradient
// are of this tile, in its order; or, if IN_CSR, all of W: their misses are asked for kAhead entries before.
template <class T, int R, bool IN_CSR, class Rows>
void fused_tile(const Schedule& s, const Tile* tile, const T* values, const T* gy, Rows rows, const T* x, int64_t ldx,
                T* gx, int64_t ldgx, T* gvalues, bool add) {
    constexpr int W = kWidth<T>;
    const int32_t* at = s.entry_value + tile->entry;
    Parked<T, IN_CSR> dots(gvalues, at, add);
    const Bucket* last = s.buckets + tile[1].bucket;
    const auto* col = rows.entries(s, tile);
    int32_t segment = tile->segment;
    for (const Bucket* b = s.buckets + tile->bucket; b < last; ++b)
        for (const int32_t stop = segment + b->count; segment < stop; ++segment) {
            const int64_t row = s.segment_row[segment];
            T* out = gx + row * ldgx;
            expect<T, R>(gx, ldgx, s.segment_row + segment);
            expect<T, R>(x, ldx, s.segment_row + segment);
            Vec<T> acc[R], mine[R];
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) acc[r] = load<T>(out + r * W), mine[r] = load<T>(x + row * ldx + r * W);
            for (int32_t left = b->length; left;) {
                int32_t n;
                T* park = dots.reserve(left, &n);
                for (int32_t k = 0; k < n; ++k) {
                    const T* in = gy + rows(col[k]);
                    const T value = IN_CSR ? values[at[k]] : values[k];
                    if (IN_CSR) {
                        __builtin_prefetch(values + at[k + kAhead]);
                        __builtin_prefetch(gvalues + at[k + kAhead], 1);
                    }
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
                col += n, at += n, left -= n;
                if (!IN_CSR) values += n;
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) store<T>(out + r * W, acc[r]);
        }
}

// Over W: gvalues (+)= <gy[row], x[col]>, where gx is not wanted.
template <class T, int R, class Rows>
void sddmm_tile(const Schedule& s, const Tile* tile, const T* gy, int64_t ld, const T* x, Rows rows, T* gvalues,
                bool add) {
    constexpr int W = kWidth<T>;
    Parked<T, false> dots(gvalues, nullptr, add);
    const Bucket* last = s.buckets + tile[1].bucket;
    const auto* col = rows.entries(s, tile);
    int32_t segment = tile->segment;
    for (const Bucket* b = s.buckets + tile->bucket; b < last; ++b)
        for (const int32_t stop = segment + b->count; segment < stop; ++segment) {
            const T* row = gy + s.segment_row[segment] * ld;
            expect<T, R>(gy, ld, s.segment_row + segment);
            Vec<T> mine[R];
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) mine[r] = load<T>(row + r * W);
            for (int32_t left = b->length; left;) {
                int32_t n;
                T* park = dots.reserve(left, &n);
                for (int32_t k = 0; k < n; ++k) {
                    const T* in = x + rows(col[k]);
                    Vec<T> dot = {}, dot2 = {};
#pragma GCC unroll 16
                    for (int r = 0; r < R; ++r) (r & 1 ? dot2 : dot) += mine[r] * load<T>(in + r * W);
                    store<T>(park + k * W, R > 1 ? dot + dot2 : dot);
                }
                col += n, left -= n;
            }
        }
}
