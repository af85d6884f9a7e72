#include "order.h"
#include "team.h"

#include <algorithm>
#include <atomic>
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
constexpr int32_t kAlone = 65536;   // entries: a team is not worth its start for fewer

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
        expect_writes(words, capacity * 4);
        if (size_) std::memcpy(words, words_, size_ * 4);
        std::free(words_);
        words_ = words, capacity_ = capacity;
    }
    int32_t* words_ = nullptr;
    int64_t size_ = 0, capacity_ = 0;
};

struct Grid {  // the tiles of a schedule
    int32_t rows, cols, strip, block;
    int32_t strips() const { return (rows + strip - 1) / strip; }
    int32_t blocks() const { return (cols + block - 1) / block; }
};

struct Csr {
    int32_t rows;
    const int32_t *ptr, *idx;
};

struct Part {  // of a schedule: consecutive strips, which one thread writes
    Part(const Grid& grid, uint16_t* col, int32_t* value)
        : entry_col(col), entry_value(value), order(grid.strip), first(grid.block + 2) {}
    // Begins a tile: its rows that have entries, longest first -> `order`, and how many these are.
    int32_t sort(const int32_t* lengths, int32_t rows) {
        tiles.push_back({int32_t(buckets.size()), int32_t(segment_row.size()), entry});
        const int32_t block = int32_t(first.size()) - 2;
        std::fill(first.begin(), first.end(), 0);
        for (int32_t r = 0; r < rows; ++r) ++first[block - lengths[r] + 1];
        for (int32_t n = 0; n < block; ++n) {
            if (const int32_t count = first[n + 1]) buckets.push_back({block - n, count});
            first[n + 1] += first[n];
        }
        const int32_t segments = first[block];
        for (int32_t r = 0; r < rows; ++r) order[first[block - lengths[r]]++] = r;
        segment_row.insert(segment_row.end(), order.begin(), order.begin() + segments);
        return segments;
    }
    uint16_t* const entry_col;
    int32_t* const entry_value;
    int32_t entry = 0;  // the next one
    std::vector<Tile> tiles;  // their buckets and segments count from the part's first
    std::vector<Bucket> buckets;
    std::vector<uint16_t> segment_row;
    std::vector<int32_t> segment_value, order, first;
};

// Writes a schedule with so many entries, of which fill(part, strips) writes those of some strips.
template <class F>
void write_schedule(Writer& out, int at, const Grid& grid, int32_t entries, bool transposed, int64_t threads, F fill) {
    const int32_t at_col = out.room<uint16_t>(entries), at_value = out.room<int32_t>(transposed ? entries : 0);
    if (entries < kAlone) threads = 1;
    std::vector<Part> parts(threads, Part(grid, out.array<uint16_t>(at_col), out.array<int32_t>(at_value)));
    std::atomic<bool> full{false};
    together(threads, [&] {
        try {
            fill(parts[thread_index()], share(grid.strips(), thread_index(), team_size()));
        } catch (const std::bad_alloc&) {  // which may not leave a thread
            full = true;
        }
    });
    if (full) throw std::bad_alloc();
    Part& whole = parts[0];
    for (int64_t i = 1; i < threads; ++i) {
        const int32_t buckets = int32_t(whole.buckets.size()), segments = int32_t(whole.segment_row.size());
        for (const Tile& tile : parts[i].tiles)
            whole.tiles.push_back({tile.bucket + buckets, tile.segment + segments, tile.entry});
        const auto append = [](auto& to, const auto& from) { to.insert(to.end(), from.begin(), from.end()); };
        append(whole.buckets, parts[i].buckets);
        append(whole.segment_row, parts[i].segment_row);
        append(whole.segment_value, parts[i].segment_value);
    }
    whole.tiles.push_back({int32_t(whole.buckets.size()), int32_t(whole.segment_row.size()), entries});
    const int32_t fields[SCHEDULE] = {grid.rows, grid.cols, grid.strip, grid.block, grid.strips(), grid.blocks(),
                                      out.append(whole.tiles), out.append(whole.buckets), out.append(whole.segment_row),
                                      out.append(whole.segment_value), at_col, at_value};
    std::copy(fields, fields + SCHEDULE, out.array<int32_t>(at));
}

void write_forward(Writer& out, const Grid& grid, const Csr& w, int64_t threads) {
    write_schedule(out, FORWARD, grid, w.ptr[w.rows], false, threads, [&](Part& part, Range strips) {
        std::vector<int32_t> cursor(grid.strip), lengths(grid.strip);
        for (int64_t s = strips.begin; s < strips.end; ++s) {
            const int32_t row0 = int32_t(s) * grid.strip, height = std::min(grid.strip, w.rows - row0);
            std::copy_n(w.ptr + row0, height, cursor.begin());
            part.entry = w.ptr[row0];
            for (int32_t b = 0; b < grid.blocks(); ++b) {
                const int32_t col0 = b * grid.block, limit = col0 + std::min(grid.block, grid.cols - col0);
                for (int32_t r = 0; r < height; ++r) {
                    int32_t k = cursor[r];
                    while (k < w.ptr[row0 + r + 1] && w.idx[k] < limit) ++k;
                    lengths[r] = k - cursor[r];
                }
                const int32_t segments = part.sort(lengths.data(), height);
                for (int32_t i = 0; i < segments; ++i) {
                    const int32_t r = part.order[i], begin = cursor[r];
                    part.segment_value.push_back(begin);
                    uint16_t* const col = part.entry_col + part.entry;
                    for (int32_t k = 0; k < lengths[r]; ++k) col[k] = uint16_t(w.idx[begin + k] - col0);
                    part.entry += lengths[r];
                    cursor[r] += lengths[r];
                }
            }
        }
    });
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

// Writes the transpose that holds those values of W for which at(row of W, col of W, &entry). A row of Wᵀ are `size` columns
// of W, and so each of its tiles is read from a rectangle of W, which stays in a cache: what is large is passed in order.
template <class F>
void write_transpose(Writer& out, int phase, const Grid& grid, int32_t size, const Csr& w, int64_t threads, F at) {
    const int32_t height = grid.block / size;  // of the rectangle
    const auto count = [&](int32_t row, int32_t begin, int32_t end) {
        Entry e;
        int32_t found = 0;
        for (int32_t k = begin; k < end; ++k) found += at(row, w.idx[k], &e);
        return found;
    };
    int32_t entries = 0;
    for (int32_t r = 0; r < w.rows; ++r) entries += count(r, w.ptr[r], w.ptr[r + 1]);
    write_schedule(out, TRANSPOSE + SCHEDULE * phase, grid, entries, true, threads, [&](Part& part, Range strips) {
        std::vector<int32_t> cursor(w.rows), end(height), lengths(grid.strip), next(grid.strip);
        const int64_t before = strips.begin * grid.strip * size;
        for (int32_t r = 0; r < w.rows; ++r) {
            cursor[r] = int32_t(std::lower_bound(w.idx + w.ptr[r], w.idx + w.ptr[r + 1], before) - w.idx);
            part.entry += count(r, w.ptr[r], cursor[r]);
        }
        for (int64_t s = strips.begin; s < strips.end; ++s) {
            const int32_t row0 = int32_t(s) * grid.strip, rows = std::min(grid.strip, grid.rows - row0);
            const int32_t limit = (row0 + rows) * size;
            for (int32_t b = 0; b < grid.blocks(); ++b) {
                const int32_t col0 = b * grid.block, top = b * height, bottom = std::min(top + height, w.rows);
                Entry e;
                std::fill(lengths.begin(), lengths.end(), 0);
                for (int32_t r = top; r < bottom; ++r) {
                    int32_t k = cursor[r];
                    for (; k < w.ptr[r + 1] && w.idx[k] < limit; ++k)
                        if (at(r, w.idx[k], &e)) ++lengths[e.row - row0];
                    end[r - top] = k;
                }
                const int32_t segments = part.sort(lengths.data(), rows);
                for (int32_t i = 0; i < segments; ++i) {
                    next[part.order[i]] = part.entry;
                    part.entry += lengths[part.order[i]];
                }
                for (int32_t r = top; r < bottom; ++r) {
                    for (int32_t k = cursor[r]; k < end[r - top]; ++k) {
                        if (!at(r, w.idx[k], &e)) continue;
                        const int32_t to = next[e.row - row0]++;
                        part.entry_col[to] = uint16_t(e.col - col0);
                        part.entry_value[to] = k;
                    }
                    cursor[r] = end[r - top];
                }
            }
        }
    });
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
// to be given back to sparselottery_free. Not a bit of it depends on the threads.
EXPORT int64_t sparselottery_plan(int32_t out_features, int32_t in_features, const int32_t* crow_indices,
                                  const int32_t* col_indices, int32_t strip, int32_t strip_back, int32_t block,
                                  bool backward, int64_t threads, int32_t** words) {
    const Csr w{out_features, crow_indices, col_indices};
    const int32_t nnz = crow_indices[out_features];
    Writer out(out_features, in_features, nnz, backward, {});
    out.header.crow_indices = out.append(crow_indices, out_features + 1);
    if (in_features <= kNarrow) {
        out.header.columns = out.room<uint16_t>(nnz);
        std::copy_n(col_indices, nnz, out.array<uint16_t>(out.header.columns));
    } else {
        out.header.columns = out.append(col_indices, nnz);
    }
    write_forward(out, {out_features, in_features, strip, block}, w, threads);
    if (backward)
        write_transpose(out, 0, {in_features, out_features, strip_back, block}, 1, w, threads,
                        [](int32_t row, int32_t col, Entry* e) {
                            *e = {col, row};
                            return true;
                        });
    return out.give(words);
}

// The same for a convolution; `block` and `block_back` are in channels.
EXPORT int64_t sparselottery_conv_plan(int32_t out_channels, const Taps* taps, const int32_t* crow_indices,
                                       const int32_t* col_indices, int32_t strip, int32_t block, int32_t block_back,
                                       bool backward, int64_t threads, int32_t** words) {
    const int32_t size = taps->size(), nnz = crow_indices[out_channels];
    Writer out(out_channels, taps->channels * size, nnz, backward ? taps->phases() : 0, *taps);
    const int32_t in_group = taps->channels / taps->groups, out_group = out_channels / taps->groups;
    std::vector<int32_t> columns(nnz);  // of all channels, where CSR counts those of the group
    for (int32_t r = 0; r < out_channels; ++r)
        for (int32_t k = crow_indices[r]; k < crow_indices[r + 1]; ++k)
            columns[k] = col_indices[k] + r / out_group * in_group * size;
    const Csr w{out_channels, crow_indices, columns.data()};
    write_forward(out, {out_channels, taps->channels * size, strip, block * size}, w, threads);
    for (int phase = 0; phase < out.header.phases; ++phase)
        write_transpose(out, phase, {taps->channels, out_channels * size, strip, block_back * size}, size, w, threads,
                        [&](int32_t row, int32_t col, Entry* e) {
                            const int tap = col % size, stride = taps->stride[1];
                            int shift;
                            *e = {col / size, row * size + tap};
                            return taps->reaches(0, phase / stride, tap / taps->kernel[1], &shift) &&
                                   taps->reaches(1, phase % stride, tap % taps->kernel[1], &shift);
                        });
    return out.give(words);
}

EXPORT void sparselottery_free(void* memory) { std::free(memory); }
