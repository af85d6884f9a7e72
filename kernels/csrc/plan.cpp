#include "plan.h"
#include "simd.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

namespace {

constexpr int32_t kMagic = 0x51a70002;  // the last digits count the formats

struct Header {  // of a plan: offsets in words, 0 where there is nothing
    int32_t magic, size, out_features, in_features, nnz, phases, crow_indices, columns;
    Taps taps;  // zeros: of a linear layer
};

enum Word { FORWARD = sizeof(Header) / 4, SCHEDULE = 12, TRANSPOSE = FORWARD + SCHEDULE };

constexpr int32_t kNarrow = 65536;  // columns up to here have 16 bits

struct Compressed {  // one orientation, compressed by rows
    int32_t rows, cols;
    const int32_t *ptr, *idx, *value;  // value: index into CSR order, null where it is the identity
};

class Writer {  // of words in memory that is given away as it is: what is large is written there, once
  public:
    Writer(int32_t out_features, int32_t in_features, int32_t nnz, int32_t phases, const Taps& taps)
        : header{kMagic, 0, out_features, in_features, nnz, phases, 0, 0, taps} {
        grow(TRANSPOSE + SCHEDULE * phases + int64_t(nnz) * 3 + 16 * kSlack);  // with few segments enough for all
        size_ = TRANSPOSE + SCHEDULE * phases;
        std::fill_n(words_, size_, 0);
    }
    ~Writer() { std::free(words_); }
    // Room for an array: where it begins. What pointed into the words may no longer do so.
    template <class E>
    int32_t room(int64_t count) {
        const int64_t bytes = count * sizeof(E), at = (size_ + 15) / 16 * 16, end = at + (bytes + 3) / 4 + kSlack;
        if (end > capacity_) grow(std::max(end, 2 * capacity_));
        std::fill(words_ + size_, words_ + at, 0);
        std::fill(words_ + at + bytes / 4, words_ + end, 0);
        size_ = end;
        return static_cast<int32_t>(at);
    }
    template <class E>
    E* array(int32_t at) { return reinterpret_cast<E*>(words_ + at); }
    template <class E>
    int32_t append(const E* items, int64_t count) {
        const int32_t at = room<E>(count);
        std::copy_n(items, count, array<E>(at));
        return at;
    }
    template <class E>
    int32_t append(const std::vector<E>& items) { return append(items.data(), items.size()); }
    int64_t give(int32_t** to) {
        header.size = int32_t(size_);
        std::memcpy(words_, &header, sizeof header);
        *to = std::exchange(words_, nullptr);
        return size_;
    }
    Header header;

  private:
    void grow(int64_t capacity) {
        int32_t* words = static_cast<int32_t*>(std::aligned_alloc(64, (capacity * 4 + 63) / 64 * 64));
        if (!words) throw std::bad_alloc();
        if (size_) std::memcpy(words, words_, size_ * 4);
        std::free(words_);
        words_ = words, capacity_ = capacity;
    }
    int32_t* words_ = nullptr;
    int64_t size_ = 0, capacity_ = 0;
};

void write_schedule(Writer& out, int at, const Compressed& m, int32_t strip, int32_t block) {
    const int32_t strips = (m.rows + strip - 1) / strip, blocks = (m.cols + block - 1) / block;
    std::vector<Tile> tiles;
    std::vector<Bucket> buckets;
    std::vector<uint16_t> segment_row;
    std::vector<int32_t> segment_value;
    const int32_t nnz = m.ptr[m.rows], at_col = out.room<uint16_t>(nnz), at_value = out.room<int32_t>(m.value ? nnz : 0);
    uint16_t* const entry_col = out.array<uint16_t>(at_col);
    int32_t* const entry_value = out.array<int32_t>(at_value);
    int32_t entry = 0;
    std::vector<int32_t> cursor(m.ptr, m.ptr + m.rows), end(strip), order(strip), first(block + 2);
    for (int32_t s = 0; s < strips; ++s) {
        const int32_t row0 = s * strip, height = std::min(strip, m.rows - row0);
        for (int32_t b = 0; b < blocks; ++b) {
            tiles.push_back({int32_t(buckets.size()), int32_t(segment_row.size()), entry});
            const int32_t col0 = b * block, limit = col0 + block;
            std::fill(first.begin(), first.end(), 0);
            for (int32_t r = 0; r < height; ++r) {  // a counting sort of the rows by segment length, longest first
                int32_t k = cursor[row0 + r];
                while (k < m.ptr[row0 + r + 1] && m.idx[k] < limit) ++k;
                end[r] = k;
                ++first[block - (k - cursor[row0 + r]) + 1];
            }
            for (int32_t n = 0; n <= block; ++n) {
                const int32_t length = block - n, count = first[n + 1];
                if (length && count) buckets.push_back({length, count});
                first[n + 1] += first[n];
            }
            for (int32_t r = 0; r < height; ++r) order[first[block - (end[r] - cursor[row0 + r])]++] = r;
            for (int32_t i = 0; i < height; ++i) {
                const int32_t r = order[i], begin = cursor[row0 + r];
                if (begin == end[r]) break;
                segment_row.push_back(uint16_t(r));
                segment_value.push_back(begin);
                const int32_t length = end[r] - begin;
                for (int32_t k = 0; k < length; ++k) entry_col[entry + k] = uint16_t(m.idx[begin + k] - col0);
                if (m.value) std::copy_n(m.value + begin, length, entry_value + entry);
                entry += length;
                cursor[row0 + r] = end[r];
            }
        }
    }
    tiles.push_back({int32_t(buckets.size()), int32_t(segment_row.size()), entry});
    if (m.value) segment_value.clear();
    const int32_t fields[SCHEDULE] = {m.rows, m.cols, strip, block, strips, blocks, out.append(tiles), out.append(buckets),
                                out.append(segment_row), out.append(segment_value), at_col, at_value};
    std::copy(fields, fields + SCHEDULE, out.array<int32_t>(at));
}

Schedule read_schedule(const int32_t* words, int at) {
    const int32_t* f = words + at;
    return {f[0], f[1], f[2], f[3], f[4], f[5],
            reinterpret_cast<const Tile*>(words + f[6]), reinterpret_cast<const Bucket*>(words + f[7]),
            reinterpret_cast<const uint16_t*>(words + f[8]), words + f[9],
            reinterpret_cast<const uint16_t*>(words + f[10]), words + f[11]};
}

struct Entry {
    int32_t row, col;  // of Wᵀ
};

// Writes the transpose that holds those values of W (in CSR order) for which at(k, row of W, col of W, &entry).
template <class F>
void write_transpose(Writer& out, int phase, int32_t rows, int32_t cols, int32_t out_features, const int32_t* crow_indices,
                     const int32_t* col_indices, int32_t strip, int32_t block, F at) {
    std::vector<int32_t> ptr(rows + 1), idx, value;
    Entry e;
    auto each = [&](auto f) {
        for (int32_t r = 0; r < out_features; ++r)
            for (int32_t k = crow_indices[r]; k < crow_indices[r + 1]; ++k)
                if (at(r, col_indices[k], &e)) f(k);
    };
    each([&](int32_t) { ++ptr[e.row + 1]; });
    for (int32_t r = 0; r < rows; ++r) ptr[r + 1] += ptr[r];
    std::vector<int32_t> next(ptr.begin(), ptr.end());
    idx.resize(ptr[rows]), value.resize(ptr[rows]);
    each([&](int32_t k) {
        const int32_t to = next[e.row]++;
        idx[to] = e.col;
        value[to] = k;
    });
    write_schedule(out, TRANSPOSE + SCHEDULE * phase, {rows, cols, ptr.data(), idx.data(), value.data()}, strip, block);
}

}  // namespace

Schedule Plan::transpose(int phase) const { return read_schedule(words, TRANSPOSE + SCHEDULE * phase); }

Plan read_plan(const int32_t* words) {
    const Header& h = *reinterpret_cast<const Header*>(words);
    const bool narrow = h.in_features <= kNarrow;
    const int32_t* columns = h.columns ? words + h.columns : nullptr;
    return {h.out_features, h.in_features, h.nnz, h.phases, h.crow_indices ? words + h.crow_indices : nullptr,
            narrow ? nullptr : columns, narrow ? reinterpret_cast<const uint16_t*>(columns) : nullptr,
            read_schedule(words, FORWARD), words};
}

bool is_plan(const int32_t* words, int64_t size, int64_t rows, int64_t columns, int64_t nnz, bool backward,
             const Taps* taps) {
    if (!words || size < TRANSPOSE) return false;
    const Header& h = *reinterpret_cast<const Header*>(words);
    const Taps none{}, &expected = taps ? *taps : none;
    return h.magic == kMagic && h.size == size && h.out_features == rows && h.in_features == columns && h.nnz == nnz &&
           h.phases >= int32_t(backward) && !std::memcmp(&h.taps, &expected, sizeof expected);
}

EXPORT const int64_t sparselottery_vector_bytes = VECTOR_BYTES;
ABI(plan, FORWARD, sizeof(Taps) / 4);

// Builds the plan of CSR indices that the caller has validated, with Wᵀ in strips of `strip_back` if `backward`; *words is
// to be given back to sparselottery_free.
EXPORT int64_t sparselottery_plan(int32_t out_features, int32_t in_features, const int32_t* crow_indices,
                                  const int32_t* col_indices, int32_t strip, int32_t strip_back, int32_t block,
                                  bool backward, int32_t** words) {
    const int32_t nnz = crow_indices[out_features];
    Writer out(out_features, in_features, nnz, backward, {});
    out.header.crow_indices = out.append(crow_indices, out_features + 1);
    if (in_features <= kNarrow) {
        out.header.columns = out.room<uint16_t>(nnz);
        std::copy_n(col_indices, nnz, out.array<uint16_t>(out.header.columns));
    } else {
        out.header.columns = out.append(col_indices, nnz);
    }
    write_schedule(out, FORWARD, {out_features, in_features, crow_indices, col_indices, nullptr}, strip, block);
    if (!backward) return out.give(words);
    write_transpose(out, 0, in_features, out_features, out_features, crow_indices, col_indices, strip_back, block,
                    [](int32_t row, int32_t col, Entry* e) {
                        *e = {col, row};
                        return true;
                    });
    return out.give(words);
}

// The same for a convolution; `block` and `block_back` are in channels.
EXPORT int64_t sparselottery_conv_plan(int32_t out_channels, const Taps* taps, const int32_t* crow_indices,
                                       const int32_t* col_indices, int32_t strip, int32_t block, int32_t block_back,
                                       bool backward, int32_t** words) {
    const int32_t size = taps->size(), nnz = crow_indices[out_channels];
    Writer out(out_channels, taps->channels * size, nnz, backward ? taps->phases() : 0, *taps);
    const int32_t in_group = taps->channels / taps->groups, out_group = out_channels / taps->groups;
    std::vector<int32_t> columns(nnz);  // of all channels, where CSR counts those of the group
    for (int32_t r = 0; r < out_channels; ++r)
        for (int32_t k = crow_indices[r]; k < crow_indices[r + 1]; ++k)
            columns[k] = col_indices[k] + r / out_group * in_group * size;
    write_schedule(out, FORWARD, {out_channels, taps->channels * size, crow_indices, columns.data(), nullptr}, strip,
                   block * size);
    for (int phase = 0; phase < out.header.phases; ++phase)
        write_transpose(out, phase, taps->channels, out_channels * size, out_channels, crow_indices, columns.data(), strip,
                        block_back * size, [&](int32_t row, int32_t col, Entry* e) {
                            const int tap = col % size, stride = taps->stride[1];
                            int shift;
                            *e = {col / size, row * size + tap};
                            return taps->reaches(0, phase / stride, tap / taps->kernel[1], &shift) &&
                                   taps->reaches(1, phase % stride, tap % taps->kernel[1], &shift);
                        });
    return out.give(words);
}

EXPORT void sparselottery_free(void* memory) { std::free(memory); }
