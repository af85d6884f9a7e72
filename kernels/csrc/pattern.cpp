// Patterns in CSR: those of masks, and what of one pattern's values survives in another. Rows are shared by threads.
#include <algorithm>
#include <cstring>

#include "plan.h"
#include "team.h"

namespace {

thread_local Scratch scratch;

constexpr int kRun = 8;  // columns that are written together

// Which of 64 bytes are not zero, a bit each.
uint64_t bits_of(const uint8_t* bytes) {
#if defined(__AVX512BW__)
    const __m512i all = _mm512_loadu_si512(bytes);
    return _mm512_test_epi8_mask(all, all);
#elif defined(__SSE2__)
    uint64_t zeros = 0;
    for (int i = 0; i < 4; ++i) {
        const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * i));
        zeros |= uint64_t(_mm_movemask_epi8(_mm_cmpeq_epi8(part, _mm_setzero_si128()))) << 16 * i;
    }
    return ~zeros;
#else
    constexpr uint64_t low = 0x7f7f7f7f7f7f7f7f;
    uint64_t bits = 0;
    for (int i = 0; i < 8; ++i) {
        uint64_t word;
        std::memcpy(&word, bytes + 8 * i, 8);
        word = ((((word & low) + low) | word) & ~low) >> 7;  // 1 in each such byte
        bits |= word * 0x0102040810204080 >> 56 << 8 * i;
    }
    return bits;
#endif
}

// Columns from `first` on, one for each bit that is set -> where the next ones go. All up to `end` may be written over.
int32_t* write_columns(uint64_t bits, int32_t first, int32_t* to, const int32_t* end) {
#if defined(__AVX512F__)
    if (end - to >= 64) {  // the next ones write over what is beyond
        const __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        __m512i columns = _mm512_add_epi32(_mm512_set1_epi32(first), numbers);
        for (int i = 0; i < 4; ++i, bits >>= 16) {
            _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(__mmask16(bits), columns));
            to += __builtin_popcount(bits & 0xffff);
            columns = _mm512_add_epi32(columns, _mm512_set1_epi32(16));
        }
        return to;
    }
#endif
    int32_t* const next = to + __builtin_popcountll(bits);
    for (; bits && end - to >= kRun; to += kRun)  // without a branch for each
        for (int i = 0; i < kRun; ++i, bits &= bits - 1) to[i] = first + __builtin_ctzll(bits | 1ull << 63);
    for (; bits; bits &= bits - 1) *to++ = first + __builtin_ctzll(bits);
    return next;
}

template <class T>
void carry_some(const int32_t* __restrict sources, int64_t begin, int64_t end, int32_t before, const T* __restrict from,
                T* __restrict to, T newcomer) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        for (; begin + 16 <= end; begin += 16) {
            const __m512i at = _mm512_loadu_si512(sources + begin), fill = _mm512_set1_epi32(int32_t(newcomer));
            const __mmask16 known = _mm512_cmplt_epi32_mask(at, _mm512_set1_epi32(before));
            const int32_t first = known ? sources[begin + __builtin_ctz(known)] : 0;
            const int32_t last = known ? sources[begin + 31 - __builtin_clz(known)] : 0;
            if (last - first < 32 && first + 32 <= before) {  // they ascend: as a rule two loads have all, a gather 16
                const __m512i low = _mm512_loadu_si512(from + first), high = _mm512_loadu_si512(from + first + 16);
                const __m512i here = _mm512_sub_epi32(at, _mm512_set1_epi32(first));
                _mm512_storeu_si512(to + begin,
                                    _mm512_mask_blend_epi32(known, fill, _mm512_permutex2var_epi32(low, here, high)));
            } else {
                _mm512_storeu_si512(to + begin, _mm512_mask_i32gather_epi32(fill, known, at, from, 4));
            }
        }
#endif
    for (int64_t k = begin; k < end; ++k) {  // without a branch, which is often taken wrongly
        const int32_t source = sources[k];
        const T survivor = from[source < before ? source : 0];
        to[k] = source < before ? survivor : newcomer;
    }
}

template <class T>
void carry(const int32_t* sources, int64_t count, int64_t before, const T* from, T* to, const T* fill, int64_t threads) {
    const T newcomer = fill ? *fill : T(0);
    if (!before) from = &newcomer;
    expect_writes(to, count * sizeof(T));
    shared(count, count, threads, [&](int64_t begin, int64_t end) {
        carry_some(sources, begin, end, int32_t(before), from, to, newcomer);
    });
}

// Of some rows. Of a row, `at` tells the index of each column; what an earlier row has left there is less than its first.
void find_some(int64_t begin, int64_t end, const int32_t* __restrict our_rows, const int32_t* __restrict our_columns,
               const int32_t* __restrict their_rows, const int32_t* __restrict their_columns, int32_t none,
               int32_t* __restrict sources, int32_t* __restrict at) {
    for (int64_t r = begin; r < end; ++r) {
        const int32_t first = their_rows[r];
        for (int32_t k = first; k < their_rows[r + 1]; ++k) at[their_columns[k]] = k;
        for (int32_t k = our_rows[r]; k < our_rows[r + 1]; ++k) {
            const int32_t source = at[our_columns[k]];
            sources[k] = source >= first ? source : none;
        }
    }
}

}  // namespace

// mask (rows, columns), a byte each -> crow_indices (rows + 1,), and how many are not zero: more than int32 holds, perhaps.
EXPORT int64_t sparselottery_mask_rows(const uint8_t* mask, int64_t rows, int64_t columns, int32_t* crow_indices,
                                       int64_t threads) {
    shared(rows, rows * columns, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const uint8_t* const row = mask + r * columns;
            int32_t count = 0;
            int64_t c = 0;
            for (; c + 64 <= columns; c += 64) count += __builtin_popcountll(bits_of(row + c));
            for (; c < columns; ++c) count += row[c] != 0;
            crow_indices[r + 1] = count;
        }
    });
    int64_t total = crow_indices[0] = 0;
    for (int64_t r = 1; r <= rows; ++r) crow_indices[r] = int32_t(total += crow_indices[r]);
    return total;
}

// The same mask, and its crow_indices -> col_indices.
EXPORT int64_t sparselottery_mask_columns(const uint8_t* mask, int64_t rows, int64_t columns, const int32_t* crow_indices,
                                          int32_t* col_indices, int64_t threads) {
    expect_writes(col_indices, crow_indices[rows] * int64_t(4));
    shared(rows, rows * columns, threads, [&](int64_t begin, int64_t stop) {
        const int32_t* const end = col_indices + crow_indices[stop];
        for (int64_t r = begin; r < stop; ++r) {
            const uint8_t* const row = mask + r * columns;
            int32_t* to = col_indices + crow_indices[r];
            int64_t c = 0;
            for (; c + 64 <= columns; c += 64)
                if (const uint64_t bits = bits_of(row + c)) to = write_columns(bits, int32_t(c), to, end);
            for (; c < columns; ++c)
                if (row[c]) *to++ = int32_t(c);
        }
    });
    return DONE;
}

// Are these indices of `nnz` values of a matrix (rows, columns) in CSR, ascending within each row?
EXPORT int64_t sparselottery_is_pattern(int64_t rows, int64_t columns, int64_t nnz, const int32_t* crow_indices,
                                        const int32_t* col_indices) {
    if (crow_indices[0] != 0 || crow_indices[rows] != nnz) return false;
    for (int64_t r = 0; r < rows; ++r)
        if (crow_indices[r] > crow_indices[r + 1]) return false;
    int64_t descents = 0, allowed = 0;  // of a column to the next one: of all, and where a row ends
    bool inside = true;
    for (int64_t k = 1; k < nnz; ++k) descents += col_indices[k] <= col_indices[k - 1];
    for (int64_t r = 0; r < rows; ++r) {
        const int32_t begin = crow_indices[r], end = crow_indices[r + 1];
        if (begin == end) continue;
        inside &= col_indices[begin] >= 0 && col_indices[end - 1] < columns;
        allowed += begin && col_indices[begin] <= col_indices[begin - 1];
    }
    return inside && descents == allowed;
}

// Of each value its place in the matrix when flattened.
EXPORT int64_t sparselottery_positions(int64_t rows, int64_t columns, const int32_t* crow_indices, const int32_t* col_indices,
                                       int64_t* positions) {
    expect_writes(positions, crow_indices[rows] * int64_t(8));
    for (int64_t r = 0; r < rows; ++r)
        for (int32_t k = crow_indices[r]; k < crow_indices[r + 1]; ++k) positions[k] = r * columns + col_indices[k];
    return DONE;
}

// The inverse; false where these are no ascending positions in the matrix.
EXPORT int64_t sparselottery_at_positions(int64_t rows, int64_t columns, int64_t nnz, const int64_t* positions,
                                          int32_t* crow_indices, int32_t* col_indices) {
    if (nnz && (positions[0] < 0 || positions[nnz - 1] >= rows * columns)) return false;
    expect_writes(col_indices, nnz * int64_t(4));
    int64_t row = 0, begin = 0, last = -1;  // of the row: its first position
    bool ascending = true;
    crow_indices[0] = 0;
    for (int64_t k = 0; k < nnz; ++k) {
        const int64_t at = positions[k];
        ascending &= at > last;
        for (; row < rows - 1 && at >= begin + columns; begin += columns) crow_indices[++row] = int32_t(k);
        col_indices[k] = int32_t(at - begin), last = at;
    }
    while (row < rows) crow_indices[++row] = int32_t(nnz);
    return ascending;
}

// Of each value of the pattern `ours` its index among the values of `theirs`, as many as these where it is not there.
EXPORT int64_t sparselottery_sources(int64_t rows, int64_t columns, const int32_t* our_rows, const int32_t* our_columns,
                                     const int32_t* their_rows, const int32_t* their_columns, int32_t* sources,
                                     int64_t threads) {
    expect_writes(sources, our_rows[rows] * int64_t(4));
    shared(rows, our_rows[rows] + int64_t(their_rows[rows]), threads, [&](int64_t begin, int64_t end) {
        int32_t* const at = scratch.get<int32_t>(columns);
        std::fill_n(at, columns, -1);
        find_some(begin, end, our_rows, our_columns, their_rows, their_columns, their_rows[rows], sources, at);
    });
    return DONE;
}

// Elements of `bytes` each: to[k] = from[sources[k]], and *fill, or zero where that is null, where there is none of `before`.
EXPORT int64_t sparselottery_carry(const int32_t* sources, int64_t count, int64_t before, int64_t bytes, const void* from,
                                   void* to, const void* fill, int64_t threads) {
    const auto of = [&](auto one) {
        using T = decltype(one);
        carry(sources, count, before, static_cast<const T*>(from), static_cast<T*>(to), static_cast<const T*>(fill), threads);
    };
    if (bytes == 8) of(uint64_t());
    if (bytes == 4) of(uint32_t());
    if (bytes == 2) of(uint16_t());
    return DONE;
}
