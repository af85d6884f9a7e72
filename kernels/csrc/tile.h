// The inner loops, over one tile. Activations are packed: row = feature, `R` vectors of consecutive batch columns.
//
// Each multiply-add of the forward pass has a load of x, and loads are what is short: an entry has R of them, one for its
// column and a quarter of one for its value, as four values are loaded at a time. Backward two multiply-adds share a load.
// What a segment adds to, R vectors read and written, comes from L2: it is asked for two segments before. Values stand in
// the order in which they are read, so that they stream (order.h). docs/built/linear.md counts the cycles.
#pragma once
#include <cstring>

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

// Asks for the rows of y that the segment after next adds to.
template <class T, int R>
INLINE void expect(const T* y, int64_t ldy, const uint16_t* segment_row) {
    const char* row = reinterpret_cast<const char*>(y + segment_row[2] * ldy);
#pragma GCC unroll 16
    for (int64_t i = 0; i < R * VECTOR_BYTES; i += 64) __builtin_prefetch(row + i, 1);
}

// Of 32 registers, or of 16: vectors of x that a quad keeps in registers, beside four sums for each of them, and vectors of
// gx and x that backward are kept beside four dot products.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kShared = 4, kFused = 8;
#else
constexpr int kShared = 3, kFused = 4;
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
    constexpr int W = kWidth<T>, E = kUnit<T>, U = kSums<T, R>;
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
            const auto entry = [&](int32_t k, auto value, Vec<T>(&to)[R]) __attribute__((always_inline)) {
                const T* in = x + rows(col[k]);
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) to[r] += value * load<T>(in + r * W);
            };
            int32_t k = 0;
            for (; k + E <= length; k += E) {
                const Unit<T> unit(v + k);
                each_place<T>([&](auto J) __attribute__((always_inline)) { entry(k + J, unit.template all<J>(), acc[J % U]); });
            }
            for (; k < length; ++k) entry(k, v[k], acc[0]);
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

// dot + <mine, in>: one chain of multiply-adds, or two where it would be long.
template <class T, int R>
INLINE Vec<T> product(const Vec<T> (&mine)[R], const Vec<T> (&in)[R], Vec<T> dot) {
    constexpr int C = R > 4 ? 2 : 1;
    Vec<T> chain[C] = {dot};
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) chain[r % C] += mine[r] * in[r];
    return C > 1 ? chain[0] + chain[C - 1] : chain[0];
}

// Dot products of `count` entries, at most a unit, a vector of parts for each -> to, or those places of it that `at` says;
// added if `add`. At once: held back in memory, to be added up together, they took longer than the multiply-adds of a batch
// of 32.
template <class T, bool SCATTERED>
INLINE void write_dots(const Vec<T> (&dots)[kUnit<T>], int32_t count, T* to, const int32_t* at, bool add) {
    typedef typename Simd<T>::Lane Lane;
    const Lane total = add_units<T>(fold<T>(dots));
    if (!SCATTERED && count == kUnit<T>) {
        Lane& all = *reinterpret_cast<Lane*>(to);
        all = add ? all + total : total;
        return;
    }
    each_place<T>([&](auto J) __attribute__((always_inline)) {
        if (J >= count) return;
        T& one = to[SCATTERED ? at[J] : J];
        one = add ? one + total[int(J)] : total[int(J)];
    });
}

// R vectors of a row of Wᵀ: its gx, U sums of it at a time, and its x.
template <class T, int R, int U>
struct FusedRow {
    INLINE FusedRow(const T* gx, const T* x) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) acc[0][r] = load<T>(gx + r * kWidth<T>), mine[r] = load<T>(x + r * kWidth<T>);
    }
    // gx += value * gy, and dot + <x, gy>.
    template <class V>
    INLINE Vec<T> entry(V value, const T* gy, Vec<T> (&to)[R], Vec<T> dot) const {
        Vec<T> in[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            in[r] = load<T>(gy + r * kWidth<T>);
            hold<T>(in[r]);
            to[r] += value * in[r];
        }
        return product<T, R>(mine, in, dot);
    }
    INLINE void write(T* gx) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int u = 1; u < U; ++u) acc[0][r] += acc[u][r];
            store<T>(gx + r * kWidth<T>, acc[0][r]);
        }
    }
    Vec<T> acc[U][R] = {}, mine[R];
};

// f(at, vectors) for the parts of R vectors, kFused or fewer each; `at` in elements.
template <class T, int R, int AT = 0, class F>
INLINE void each_part(F f) {
    constexpr int P = R < kFused ? R : kFused;
    f(Place<AT>(), Place<P>());
    if constexpr (R > P) each_part<T, R - P, AT + P * kWidth<T>>(f);
}

// Of a row with `length` entries: gx += Σ values * gy[col], and from the same loads gvalues (+)= <x, gy[col]>.
template <class T, int R, bool IN_CSR, class Rows, class Column>
INLINE void fused_row(const T* values, const Column* col, const int32_t* at, int32_t length, const T* gy, Rows rows,
                      const T* x, T* gx, T* gvalues, bool add) {
    constexpr int E = kUnit<T>, U = kSums<T, R>;
    constexpr bool whole = R <= kFused;  // else gx and x come from L1 for each unit
    FusedRow<T, whole ? R : 1, U> row(gx, x);
    const auto unit = [&](int32_t k, auto count, auto value) __attribute__((always_inline)) {
        Vec<T> dots[E] = {};
        if constexpr (whole)
            each_place<T>([&](auto J) __attribute__((always_inline)) {
                if (J < count) dots[J] = row.entry(value(J), gy + rows(col[k + J]), row.acc[J % U], dots[J]);
            });
        else
            each_part<T, R>([&](auto from, auto vectors) __attribute__((always_inline)) {
                FusedRow<T, vectors, 1> part(gx + from, x + from);
                each_place<T>([&](auto J) __attribute__((always_inline)) {
                    if (J < count) dots[J] = part.entry(value(J), gy + rows(col[k + J]) + from, part.acc[0], dots[J]);
                });
                part.write(gx + from);
            });
        write_dots<T, IN_CSR>(dots, count, IN_CSR ? gvalues : gvalues + k, at + k, add);
    };
    const auto scalar = [&](int32_t k) __attribute__((always_inline)) {
        if (!IN_CSR) return values[k];
        __builtin_prefetch(values + at[k + kAhead]);
        __builtin_prefetch(gvalues + at[k + kAhead], 1);
        return values[at[k]];
    };
    int32_t k = 0;
    for (; !IN_CSR && k + E <= length; k += E) {
        const Unit<T> four(values + k);
        unit(k, Place<E>(), [&](auto J) __attribute__((always_inline)) { return four.template all<J>(); });
    }
    const auto one = [&](auto J) __attribute__((always_inline)) { return scalar(k + J); };
    for (; IN_CSR && k + E <= length; k += E) unit(k, Place<E>(), one);
    if (k < length) unit(k, length - k, one);
    if (whole) row.write(gx);
}

// Over Wᵀ: gx[row] += Σ values * gy[col], and from the same loads gvalues (+)= <x[row], gy[col]>. Values and their gradient
// are of this tile, in its order; or, if IN_CSR, all of W: their misses are asked for kAhead entries before.
template <class T, int R, bool IN_CSR, class Rows>
void fused_tile(const Schedule& s, const Tile* tile, const T* values, const T* gy, Rows rows, const T* x, int64_t ldx,
                T* gx, int64_t ldgx, T* gvalues, bool add) {
    const int32_t* at = s.entry_value + tile->entry;
    const Bucket* last = s.buckets + tile[1].bucket;
    const auto* col = rows.entries(s, tile);
    int32_t segment = tile->segment;
    for (const Bucket* b = s.buckets + tile->bucket; b < last; ++b) {
        const int32_t length = b->length;
        for (const int32_t stop = segment + b->count; segment < stop; ++segment) {
            const int64_t row = s.segment_row[segment];
            expect<T, R>(gx, ldgx, s.segment_row + segment);
            expect<T, R>(x, ldx, s.segment_row + segment);
            fused_row<T, R, IN_CSR>(values, col, at, length, gy, rows, x + row * ldx, gx + row * ldgx, gvalues, add);
            col += length, at += length;
            if (!IN_CSR) values += length, gvalues += length;
        }
    }
}

// Over W: gvalues (+)= <gy[row], x[col]>, where gx is not wanted.
template <class T, int R, class Rows>
void sddmm_tile(const Schedule& s, const Tile* tile, const T* gy, int64_t ld, const T* x, Rows rows, T* gvalues,
                bool add) {
    constexpr int W = kWidth<T>, E = kUnit<T>;
    const Bucket* last = s.buckets + tile[1].bucket;
    const auto* col = rows.entries(s, tile);
    int32_t segment = tile->segment;
    for (const Bucket* b = s.buckets + tile->bucket; b < last; ++b) {
        const int32_t length = b->length;
        for (const int32_t stop = segment + b->count; segment < stop; ++segment) {
            const T* row = gy + s.segment_row[segment] * ld;
            expect<T, R>(gy, ld, s.segment_row + segment);
            Vec<T> mine[R];
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) mine[r] = load<T>(row + r * W);
            for (int32_t k = 0; k < length; k += E) {
                Vec<T> dots[E] = {};
                each_place<T>([&](auto J) __attribute__((always_inline)) {
                    if (k + J >= length) return;
                    Vec<T> in[R];
#pragma GCC unroll 16
                    for (int r = 0; r < R; ++r) in[r] = load<T>(x + rows(col[k + J]) + r * W);
                    dots[J] = product<T, R>(mine, in, dots[J]);
                });
                write_dots<T, false>(dots, length - k < E ? length - k : E, gvalues + k, nullptr, add);
            }
            col += length, gvalues += length;
        }
    }
}
