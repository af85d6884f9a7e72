#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

enum Word { OUT, IN, NNZ, COLUMNS, FORWARD, TRANSPOSE = FORWARD + 12, HEADER = 32 };

struct Compressed {  // one orientation, compressed by rows
    int32_t rows, cols;
    const int32_t *ptr, *idx, *value;  // value: index into CSR order, null where it is the identity
};

class Writer {
  public:
    Writer() : words(HEADER) {}
    template <class E>
    int32_t append(const std::vector<E>& items) {
        const size_t at = (words.size() + 15) / 16 * 16;
        words.resize(at + (items.size() * sizeof(E) + 3) / 4 + kSlack);
        std::memcpy(words.data() + at, items.data(), items.size() * sizeof(E));
        return static_cast<int32_t>(at);
    }
    std::vector<int32_t> words;
};

// Strips are at most `strip` high, and low enough that threads find at least eight of them to share.
void write_schedule(Writer& out, int at, const Compressed& m, int32_t strip, int32_t block) {
    strip = std::min(strip, std::max(32, m.rows / 8 / 16 * 16));
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
    const int32_t fields[12] = {m.rows, m.cols, strip, block, strips, blocks, out.append(tiles), out.append(buckets),
                                out.append(segment_row), out.append(segment_value), out.append(entry_col),
                                out.append(entry_value)};
    std::copy(fields, fields + 12, out.words.begin() + at);
}

Schedule read_schedule(const int32_t* words, int at) {
    const int32_t* f = words + at;
    return {f[0], f[1], f[2], f[3], f[4], f[5],
            reinterpret_cast<const Tile*>(words + f[6]), reinterpret_cast<const Bucket*>(words + f[7]),
            reinterpret_cast<const uint16_t*>(words + f[8]), words + f[9],
            reinterpret_cast<const uint16_t*>(words + f[10]), words + f[11]};
}

}  // namespace

Plan read_plan(const int32_t* words) {
    const uint16_t* columns = words[COLUMNS] ? reinterpret_cast<const uint16_t*>(words + words[COLUMNS]) : nullptr;
    return {words[OUT], words[IN], words[NNZ], columns, read_schedule(words, FORWARD), read_schedule(words, TRANSPOSE)};
}

// Builds the plan of CSR indices that the caller has validated; *words is to be given back to sparselottery_free.
EXPORT int64_t sparselottery_plan(int32_t out_features, int32_t in_features, const int32_t* crow_indices,
                                      const int32_t* col_indices, int32_t strip, int32_t block, int32_t** words) {
    const int32_t nnz = crow_indices[out_features];
    std::vector<int32_t> ptr(in_features + 1), rows(nnz), value(nnz);
    for (int32_t k = 0; k < nnz; ++k) ++ptr[col_indices[k] + 1];
    for (int32_t c = 0; c < in_features; ++c) ptr[c + 1] += ptr[c];
    std::vector<int32_t> next(ptr.begin(), ptr.end());
    for (int32_t r = 0; r < out_features; ++r)
        for (int32_t k = crow_indices[r]; k < crow_indices[r + 1]; ++k) {
            const int32_t at = next[col_indices[k]]++;
            rows[at] = r;
            value[at] = k;
        }
    Writer out;
    out.words[OUT] = out_features;
    out.words[IN] = in_features;
    out.words[NNZ] = nnz;
    if (in_features <= 65536) out.words[COLUMNS] = out.append(std::vector<uint16_t>(col_indices, col_indices + nnz));
    write_schedule(out, FORWARD, {out_features, in_features, crow_indices, col_indices, nullptr}, strip, block);
    write_schedule(out, TRANSPOSE, {in_features, out_features, ptr.data(), rows.data(), value.data()}, strip, block);
    *words = static_cast<int32_t*>(std::malloc(out.words.size() * 4));
    if (!*words) return -1;
    std::memcpy(*words, out.words.data(), out.words.size() * 4);
    return static_cast<int64_t>(out.words.size());
}

EXPORT void sparselottery_free(void* memory) { std::free(memory); }
