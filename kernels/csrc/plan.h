// The schedule of one sparse matrix W (O, I), compiled once from its CSR indices and read by every kernel.
//
// W is cut into strips of rows, and strips into tiles of `block` columns, so that the `block` packed input rows that a
// tile reads stay in L1 while the strip's output rows are accumulated. A segment is what one row owns inside a tile.
// Segments of a tile are grouped in buckets of equal length: the inner loop's trip count is then constant over a bucket
// and its end is predicted. The same is held for Wᵀ, whose entries say where their value stands in CSR order.
//
// Rows of W that follow each other may have the same columns: blocks of weights were pruned. Four of them are a quad.
// Their segments stand together, in buckets of their own, so that a loop can read x once for all four.
//
// A convolution is the same product: W is (O, taps), a tap being a channel and a place in the kernel. Its Wᵀ is (C, taps
// of the outputs), one for each phase: input pixels with the same coordinates modulo the stride see the same taps.
#pragma once
#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

// What Python knows of a source by heart, compared with kernels/abi.py when the library is loaded: numbers, and words of
// the structs that are packed there.
#define ABI(source, ...) EXPORT const int64_t sparselottery_abi_##source[] = {__VA_ARGS__}
template <class S>
constexpr int64_t words_of = sizeof(S) / 8;

constexpr int kSlack = 256;  // zeros after each array, for kernels that look ahead
constexpr int kAhead = 256;  // entries: how far they look to hide a miss
constexpr int kAlike = 4;    // rows with the same columns that are multiplied together: a quad
static_assert(kAhead <= kSlack, "the plan's arrays are read this far past their end");

struct Tile {  // where its buckets, segments and entries begin; the next tile's beginnings are its ends
    int32_t bucket, segment, entry;
};

struct Bucket {
    int32_t length, count;  // entries per segment, number of segments
    int32_t alike;          // so many segments at a time have the same columns: kAlike, or 1
};

struct Schedule {  // of W or of Wᵀ: `rows` x `cols`
    int32_t rows, cols, strip, block, strips, blocks;
    const Tile* tiles;             // [strips * blocks + 1], strip-major
    const Bucket* buckets;
    const uint16_t* segment_row;   // within the strip
    const int32_t* segment_value;  // W: index of the segment's first value, the others follow
    const uint16_t* entry_col;     // within the block
    const int32_t* entry_value;    // Wᵀ: index of the entry's value
};

struct Plan {
    int32_t out_features, in_features, nnz, phases;
    // CSR, of a linear layer alone. Columns are in half the bytes where in_features fits; the other pointer is null.
    const int32_t *crow_indices, *wide_columns;
    const uint16_t* columns;
    Schedule forward;
    const int32_t* words;
    Schedule transpose(int phase = 0) const;
};

struct Taps {  // mirrored in cpu_conv.py: what of a convolution's geometry decides which weights meet
    int32_t channels, kernel[2], stride[2], before[2], dilation[2], groups;  // rows, then columns; before: padding
    int32_t size() const { return kernel[0] * kernel[1]; }
    int phases() const { return stride[0] * stride[1]; }
    // In pixels of the phase that starts at `first` (0 <= first < stride), which output does tap `k` of axis `d` reach?
    bool reaches(int d, int first, int k, int* shift) const {
        const int at = first + before[d] - k * dilation[d];
        *shift = at >= 0 ? at / stride[d] : -(-at / stride[d]);
        return at % stride[d] == 0;
    }
};

// A plan is stored as a flat int32 array; this reads it in place.
Plan read_plan(const int32_t* words);

// Are these `size` words a plan, whole, of such a matrix, or of a convolution with these taps? With its Wᵀ if `backward`?
// Kernels follow no indices but those of a plan, so that what passes here keeps them inside of their arrays.
bool is_plan(const int32_t* words, int64_t size, int64_t rows, int64_t columns, int64_t nnz, bool backward,
             const Taps* taps = nullptr);

enum Outcome : int64_t { DONE = 0, TOO_LARGE = 1, NO_PLAN = 2 };  // of a call
