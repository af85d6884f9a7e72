#include "schedule.h"

namespace {

constexpr int32_t kNarrow = 65536;  // columns up to here have 16 bits
constexpr int32_t kRun = 16;        // columns that are looked at together

typedef int32_t Run __attribute__((vector_size(4 * kRun)));
typedef uint16_t NarrowRun __attribute__((vector_size(2 * kRun)));
typedef int8_t Flags __attribute__((vector_size(kRun)));
constexpr Run kNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline Run run(const int32_t* columns) {  // not aligned: clang takes a reference to a vector for one that is
    Run loaded;
    std::memcpy(&loaded, columns, sizeof loaded);
    return loaded;
}

// How many of the ascending columns [begin, end) are below a limit; up to `readable` they may be read.
inline int32_t columns_below(int32_t limit, const int32_t* begin, const int32_t* end, const int32_t* readable) {
    const int32_t* at = begin;
    for (; readable - at >= kRun; at += kRun) {  // without a branch for each
        const int32_t left = int32_t(std::min<int64_t>(end - at, kRun));
        const Flags below = __builtin_convertvector((run(at) < limit) & (kNumbers < left), Flags);
        uint64_t bits[2];
        std::memcpy(bits, &below, sizeof bits);
        const int32_t count = (__builtin_popcountll(bits[0]) + __builtin_popcountll(bits[1])) / 8;
        if (count < kRun) return int32_t(at - begin) + count;
    }
    while (at < end && *at < limit) ++at;
    return int32_t(at - begin);
}

// `wide` replaces the columns of a tile where most weights are those of quads, wherever strips end: these may depend on the
// number of threads, and sums may not.
void write_forward(Writer& out, Grid grid, int32_t wide, const Csr& w, int64_t threads) {
    const std::vector<int32_t> quads = quads_of(w, grid.strip);
    int64_t shared = 0;
    for (const int32_t r : quads_of(w, w.rows)) shared += kAlike * (w.ptr[r + 1] - w.ptr[r]);
    if (2 * shared > w.ptr[w.rows]) grid.block = std::max(grid.block, wide);
    write_schedule(out, FORWARD, grid, w.ptr[w.rows], false, threads, [&](Part& part, Range strips) {
        std::vector<int32_t> cursor(grid.strip), lengths(grid.strip);
        const int32_t end = w.ptr[std::min<int64_t>(strips.end * grid.strip, w.rows)], nnz = w.ptr[w.rows];
        for (int64_t s = strips.begin; s < strips.end; ++s) {
            const int32_t row0 = int32_t(s) * grid.strip, height = std::min(grid.strip, w.rows - row0);
            std::copy_n(w.ptr + row0, height, cursor.begin());
            part.entry = w.ptr[row0];
            std::vector<int32_t> mine(std::lower_bound(quads.begin(), quads.end(), row0),
                                      std::lower_bound(quads.begin(), quads.end(), row0 + height));
            for (int32_t& r : mine) r -= row0;
            for (int32_t b = 0; b < grid.blocks(); ++b) {
                const int32_t col0 = b * grid.block, limit = col0 + std::min(grid.block, grid.cols - col0);
                for (int32_t r = 0; r < height; ++r)
                    lengths[r] = columns_below(limit, w.idx + cursor[r], w.idx + w.ptr[row0 + r + 1], w.idx + nnz);
                const int32_t segments = part.sort(lengths.data(), height, mine.data(), mine.data() + mine.size());
                for (int32_t i = 0; i < segments; ++i) {
                    const int32_t r = part.order[i], begin = cursor[r], length = lengths[r];
                    part.segment_value.push_back(begin);
                    uint16_t* const col = part.entry_col + part.entry;
                    int32_t k = 0;
                    const int32_t room = std::min(end - part.entry, nnz - begin) - kRun;
                    for (; k < length && k <= room; k += kRun) {  // the next ones write over what is beyond
                        const Run columns = run(w.idx + begin + k) - col0;
                        const NarrowRun narrow = __builtin_convertvector(columns, NarrowRun);
                        std::memcpy(col + k, &narrow, sizeof narrow);
                    }
                    for (; k < length; ++k) col[k] = uint16_t(w.idx[begin + k] - col0);
                    part.entry += length;
                    cursor[r] += length;
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

// f(row, tile) for the rows [top, bottom) of tiles of a height, counted from 0.
template <class F>
void each_tile_row(int32_t top, int32_t bottom, int32_t height, F f) {
    for (int32_t tile = 0, begin = top; begin < bottom; begin += height, ++tile)
        for (int32_t r = begin; r < std::min(begin + height, bottom); ++r) f(r, tile);
}

// Writes the transpose that holds those values of W for which at(row of W, col of W, &entry). A row of Wᵀ are `size` columns
// of W, and so each of its tiles is read from a rectangle of W, which stays in a cache: what is large is passed in order.
// A small W is one rectangle, of all tiles.
template <class F>
void write_transpose(Writer& out, int phase, const Grid& grid, int32_t size, const Csr& w, int64_t threads, F at) {
    const int32_t height = grid.block / size;  // of a tile's rectangle
    const auto count = [&](int32_t row, int32_t begin, int32_t end) {
        Entry e;
        int32_t found = 0;
        for (int32_t k = begin; k < end; ++k) found += at(row, w.idx[k], &e);
        return found;
    };
    int32_t entries = 0;
    for (int32_t r = 0; r < w.rows; ++r) entries += count(r, w.ptr[r], w.ptr[r + 1]);
    const bool small = w.ptr[w.rows] < kAlone && int64_t(grid.rows) * grid.blocks() < kAlone;
    const int32_t wide = small ? grid.strips() : 1, high = small ? grid.blocks() : 1;  // of a rectangle, in tiles
    write_schedule(out, TRANSPOSE + SCHEDULE * phase, grid, entries, true, threads, [&](Part& part, Range strips) {
        const int32_t width = wide * grid.strip;
        std::vector<int32_t> cursor(w.ptr, w.ptr + w.rows), end(w.rows), lengths(width * high), next(width * high);
        if (const int64_t before = strips.begin * grid.strip * size)
            for (int32_t r = 0; r < w.rows; ++r) {
                cursor[r] = int32_t(std::lower_bound(w.idx + w.ptr[r], w.idx + w.ptr[r + 1], before) - w.idx);
                part.entry += count(r, w.ptr[r], cursor[r]);
            }
        for (int64_t s = strips.begin; s < strips.end; s += wide) {
            const int32_t row0 = int32_t(s) * grid.strip, rows = std::min(width, grid.rows - row0);
            const int32_t limit = (row0 + rows) * size;
            for (int32_t b = 0; b < grid.blocks(); b += high) {
                const int32_t top = b * height, bottom = std::min(top + high * height, w.rows);
                std::fill(lengths.begin(), lengths.end(), 0);
                each_tile_row(top, bottom, height, [&](int32_t r, int32_t tile) {
                    Entry e;
                    int32_t k = cursor[r], *const length = lengths.data() + tile * width - row0;
                    const int32_t stop = w.ptr[r + 1];  // read once: lengths might be there, for all the compiler knows
                    for (; k < stop && w.idx[k] < limit; ++k)
                        if (at(r, w.idx[k], &e)) ++length[e.row];
                    end[r] = k;
                });
                for (int32_t first = 0; first < rows; first += grid.strip)
                    for (int32_t tile = 0; tile < high; ++tile) {
                        const int32_t* const length = lengths.data() + tile * width + first;
                        const int32_t segments = part.sort(length, std::min(grid.strip, rows - first));
                        for (int32_t i = 0; i < segments; ++i) {
                            next[tile * width + first + part.order[i]] = part.entry;
                            part.entry += length[part.order[i]];
                        }
                    }
                each_tile_row(top, bottom, height, [&](int32_t r, int32_t tile) {
                    Entry e;
                    int32_t* const to = next.data() + tile * width - row0;
                    const int32_t col0 = (b + tile) * grid.block, stop = end[r];
                    for (int32_t k = cursor[r]; k < stop; ++k) {
                        if (!at(r, w.idx[k], &e)) continue;
                        const int32_t here = to[e.row]++;
                        part.entry_col[here] = uint16_t(e.col - col0);
                        part.entry_value[here] = k;
                    }
                    cursor[r] = stop;
                });
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

ABI(plan, FORWARD, sizeof(Taps) / 4, kAlike);

// Builds the plan of CSR indices that the caller has validated, with Wᵀ in strips of `strip_back` and tiles of `block_back` if
// `backward`; *words is to be given back to sparselottery_free. Not a bit of it depends on the threads. wide: `block` of W, if
// more, for quads.
EXPORT int64_t sparselottery_plan(int32_t out_features, int32_t in_features, const int32_t* crow_indices,
                                  const int32_t* col_indices, int32_t strip, int32_t strip_back, int32_t block,
                                  int32_t block_back, int32_t wide, bool backward, int64_t threads, int32_t** words) {
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
    write_forward(out, {out_features, in_features, strip, block}, wide, w, threads);
    if (backward)
        write_transpose(out, 0, {in_features, out_features, strip_back, block_back}, 1, w, threads,
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
    write_forward(out, {out_channels, taps->channels * size, strip, block * size}, 0, w, threads);
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

// The first rows of the quads of a valid pattern, then -1: at most rows / kAlike + 1 of them -> quads; how many before -1.
EXPORT int64_t sparselottery_quads(int32_t rows, const int32_t* crow_indices, const int32_t* col_indices, int32_t* quads) {
    const std::vector<int32_t> found = quads_of({rows, crow_indices, col_indices}, INT32_MAX);
    *std::copy(found.begin(), found.end(), quads) = -1;
    return int64_t(found.size());
}

EXPORT void sparselottery_free(void* memory) { std::free(memory); }
