#include "plan.h"
#include "simd.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
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

class Writer {
  public:
    Writer(int32_t out_features, int32_t in_features, int32_t nnz, int32_t phases, const Taps& taps)
        : header{kMagic, 0, out_features, in_features, nnz, phases, 0, 0, taps}, words(TRANSPOSE + SCHEDULE * phases) {}
    template <class E>
    int32_t append(const std::vector<E>& items) {
        const size_t at = (words.size() + 15) / 16 * 16;
        words.resize(at + (items.size() * sizeof(E) + 3) / 4 + kSlack);
        if (!items.empty()) std::memcpy(words.data() + at, items.data(), items.size() * sizeof(E));
        return static_cast<int32_t>(at);
    }
    int64_t give(int32_t** to) {
        header.size = int32_t(words.size());
        std::memcpy(words.data(), &header, sizeof header);
        *to = static_cast<int32_t*>(std::aligned_alloc(64, (words.size() * 4 + 63) / 64 * 64));
        if (!*to) return -1;
        std::memcpy(*to, words.data(), words.size() * 4);
        return static_cast<int64_t>(words.size());
    }
    Header header;
    std::vector<int32_t> words;
};

void write_schedule(Writer& out, int at, const Compressed& m, int32_t strip, int32_t block) {
    const int32_t strips = (m.rows + strip - 1) / strip, blocks = (m.cols + block - 1) / block;
    std::vector<Tile> tiles;
    std::vector<Bucket> buckets;
    std::vector<uint16_t> segment_row, entry_col;
    std::vector<int32_t> segment_value, entry_value;
    entry_col.reserve(m.ptr[m.rows]);
    if (m.value) entry_value.reserve(m.ptr[m.rows]);
    std::vector<int32_t> cursor(m.ptr, m.ptr + m.rows), end(strip), order(strip), first(block + 2);
    for (int32_t s = 0; s < strips; ++s) {
        const int32_t row0 = s * strip, height = std::min(strip, m.rows - row0);
        for (int32_t b = 0; b < blocks; ++b) {
            tiles.push_back({int32_t(buckets.size()), int32_t(segment_row.size()), int32_t(entry_col.size())});
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
                for (int32_t k = begin; k < end[r]; ++k) {
                    entry_col.push_back(uint16_t(m.idx[k] - col0));
                    if (m.value) entry_value.push_back(m.value[k]);
                }
                cursor[row0 + r] = end[r];
            }
        }
    }
    tiles.push_back({int32_t(buckets.size()), int32_t(segment_row.size()), int32_t(entry_col.size())});
    if (m.value) segment_value.clear();
    const int32_t fields[SCHEDULE] = {m.rows, m.cols, strip, block, strips, blocks, out.append(tiles), out.append(buckets),
                                out.append(segment_row), out.append(segment_value), out.append(entry_col),
                                out.append(entry_value)};
    std::copy(fields, fields + SCHEDULE, out.words.begin() + at);
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
    out.header.crow_indices = out.append(std::vector<int32_t>(crow_indices, crow_indices + out_features + 1));
    out.header.columns = in_features <= kNarrow ? out.append(std::vector<uint16_t>(col_indices, col_indices + nnz))
                                                : out.append(std::vector<int32_t>(col_indices, col_indices + nnz));
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
