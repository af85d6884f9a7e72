// The inner loops, over one tile. Activations are packed: row = feature, `R` vectors of consecutive batch columns.
//
// Each multiply-add has a load of x, and loads are what is short: an entry has R of them, one for its column and a quarter of
// one for its value, as four values are loaded at a time. What a segment adds to, R vectors read and written, is in L2.
// Values stand in the order in which they are read, so that they stream (order.h). docs/built/linear.md counts the cycles.
#pragma once
#include "plan.h"
#include "simd.h"

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
template <class T, int R>
constexpr int kSums = R >= 4 ? 1 : R == 3 ? 2 : kUnit<T>;

// Asks for R vectors of y, to be written soon.
template <class T, int R>
INLINE void expect(const T* y) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < R * VECTOR_BYTES; i += 64) __builtin_prefetch(reinterpret_cast<const char*>(y) + i, 1);
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
            expect<T, R>(y + s.segment_row[segment + kAlike + i] * ldy);  // of the next quad
        }
        quad_in_parts<T, R>(v, col, length, x, rows, out);
        values += IN_CSR ? 0 : kAlike * length;
    }
}

// How many segments of a bucket are multiplied together: with R = 4 one alone has as many sums as a multiply-add has cycles.
template <int R>
constexpr int kTogether = R == 4 ? 2 : 1;

// y of P rows += Σ values * x[col]. Their `length` columns each follow each other.
template <class T, int R, int P, class Rows, class Column>
INLINE void spmm_rows(const T* const (&v)[P], const Column* col, int32_t length, const T* x, Rows rows, T* const (&out)[P]) {
    constexpr int W = kWidth<T>, E = kUnit<T>, U = kSums<T, R>;
    Vec<T> acc[P][U][R] = {};
    const auto entry = [&](int32_t place, auto value, Vec<T>(&to)[R]) __attribute__((always_inline)) {
        const T* in = x + rows(col[place]);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) to[r] += value * load<T>(in + r * W);
    };
    int32_t k = 0;
    for (; k + E <= length; k += E)
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
            const Unit<T> unit(v[p] + k);
            each_place<T>([&](auto J) __attribute__((always_inline)) {
                entry(p * length + k + J, unit.template all<J>(), acc[p][J % U]);
            });
        }
    for (; k < length; ++k)
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) entry(p * length + k, v[p][k], acc[p][0]);
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int u = 1; u < U; ++u) acc[p][0][r] += acc[p][u][r];
            store<T>(out[p] + r * W, load<T>(out[p] + r * W) + acc[p][0][r]);
        }
}

// y[row] += Σ values * x[col]. values: of this tile, in its order; or, if IN_CSR, all of W.
template <class T, int R, bool IN_CSR, class Rows>
void spmm_tile(const Schedule& s, const Tile* tile, const T* values, const T* x, Rows rows, T* y, int64_t ldy) {
    const Bucket* last = s.buckets + tile[1].bucket;
    const auto* col = rows.entries(s, tile);
    int32_t segment = tile->segment;
    for (const Bucket* b = s.buckets + tile->bucket; b < last; ++b) {
        const int32_t length = b->length;
        if (kSums<T, R> == 1 && b->alike == kAlike) {  // else a row's sum would depend on whether it is in a quad
            spmm_quads<T, R, IN_CSR>(s, b, segment, col, values, x, rows, y, ldy);
            segment += b->count, col += b->count * length;
            values += IN_CSR ? 0 : b->count * length;
            continue;
        }
        const int32_t stop = segment + b->count;
        const auto some = [&](auto P) __attribute__((always_inline)) {
            for (; segment + P <= stop; segment += P, col += P * length) {
                const T* v[P];
                T* out[P];
                for (int p = 0; p < P; ++p) {
                    v[p] = IN_CSR ? values + s.segment_value[segment + p] : values + p * length;
                    out[p] = y + s.segment_row[segment + p] * ldy;
                    if (IN_CSR) __builtin_prefetch(v[p] + 2 * length);  // this row's segment in the next tile
                }
                spmm_rows<T, R, P>(v, col, length, x, rows, out);
                values += IN_CSR ? 0 : P * length;
            }
        };
        some(Place<kTogether<R>>());
        if (kTogether<R> > 1) some(Place<1>());
    }
}
