// A schedule while it is written: its tiles, and who writes them.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "order.h"
#include "writer.h"

constexpr int32_t kAlone = 65536;  // entries: a team is not worth its start for fewer

struct Grid {  // the tiles of a schedule
    int32_t rows, cols, strip, block;
    int32_t strips() const { return (rows + strip - 1) / strip; }
    int32_t blocks() const { return (cols + block - 1) / block; }
};

struct Csr {
    int32_t rows;
    const int32_t *ptr, *idx;
};

// The first rows of quads: of kAlike rows, one after the other in a strip, that have the same columns, if not none.
// Where single weights are pruned, the lengths of two rows or their first columns already differ.
inline std::vector<int32_t> quads_of(const Csr& w, int32_t strip) {
    std::vector<int32_t> quads;
    const auto as_next = [&](int32_t r) {
        const int32_t length = w.ptr[r + 1] - w.ptr[r];
        const int32_t *mine = w.idx + w.ptr[r], *next = mine + length;
        return length && w.ptr[r + 2] - w.ptr[r + 1] == length && *mine == *next &&
               !std::memcmp(mine, next, length * sizeof *mine);
    };
    for (int32_t r = 0, alike = 1; r + 1 < w.rows; ++r) {  // alike: rows up to this one
        alike = (r + 1) % strip && as_next(r) ? alike + 1 : 1;
        if (alike < kAlike) continue;
        quads.push_back(r + 2 - kAlike);
        alike = 0;
    }
    return quads;
}

struct Part {  // of a schedule: consecutive strips, which one thread writes
    Part(const Grid& grid, uint16_t* col, int32_t* value)
        : entry_col(col), entry_value(value), order(grid.strip), first(2 * grid.block + 2) {}
    // Begins a tile: its rows that have entries -> `order`, and how many these are. Quads, of which [quad, last) are the
    // first rows, come before other rows, the longest of both first.
    int32_t sort(const int32_t* lengths, int32_t rows, const int32_t* quad = nullptr, const int32_t* last = nullptr) {
        tiles.push_back({int32_t(buckets.size()), int32_t(segment_row.size()), entry});
        int32_t longest = 0;
        for (int32_t r = 0; r < rows; ++r) longest = std::max(longest, lengths[r]);
        const int32_t *ranks = lengths, ranked = quad < last ? 2 * longest : longest;
        if (quad < last) {
            rank.assign(lengths, lengths + rows);
            for (; quad < last; ++quad)
                for (int32_t i = 0; i < kAlike && lengths[*quad]; ++i) rank[*quad + i] += longest;
            ranks = rank.data();
        }
        std::fill_n(first.begin(), ranked + 2, 0);
        for (int32_t r = 0; r < rows; ++r) ++first[ranked - ranks[r] + 1];
        for (int32_t n = 0; n < ranked; ++n) {
            const int32_t length = ranked - n;
            if (const int32_t count = first[n + 1])
                buckets.push_back(length > longest ? Bucket{length - longest, count, kAlike} : Bucket{length, count, 1});
            first[n + 1] += first[n];
        }
        const int32_t segments = first[ranked];
        for (int32_t r = 0; r < rows; ++r) order[first[ranked - ranks[r]]++] = r;
        segment_row.insert(segment_row.end(), order.begin(), order.begin() + segments);
        return segments;
    }
    uint16_t* const entry_col;
    int32_t* const entry_value;
    int32_t entry = 0;  // the next one
    std::vector<Tile> tiles;  // their buckets and segments count from the part's first
    std::vector<Bucket> buckets;
    std::vector<uint16_t> segment_row;
    std::vector<int32_t> segment_value, order, first, rank;
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
