// Inference of frozen linear layers with a ReLU between them, for some samples at once: lanes are samples.
//
// A thread takes a tile of samples from the first layer to the last, in its own caches: nobody waits. Whole rows of W are
// summed, straight from CSR; where weights are few, that beats the tiles of chain.cpp, which read x from L1. Four rows with
// the same columns, a quad, share each load of x.
#include <algorithm>

#include "net.h"
#include "pack.h"
#include "plan.h"
#include "team.h"
#include "tile.h"

namespace {

struct Layer {  // mirrored in cpu_net.py
    int64_t rows, columns;
    const int32_t *crow_indices, *col_indices;
    const float *values, *bias;  // bias: null if none
    const int32_t* quads;        // their first rows, then -1
};

struct Rows {  // mirrored in cpu_net.py; its layers follow
    int64_t layers, threads, widest;  // widest: of all inputs and outputs
};

thread_local Scratch buffers;

constexpr int64_t kGroups = 2;  // lane groups of a tile: its activations stay in L2

// y (rows, width) = relu?(W x + b), x (columns, width).
void layer_forward(const Layer& l, const float* x, float* y, int64_t width, bool relu) {
    const Sums sums = taps_of<VECTOR_BYTES, true>(width / kWidth<float>);
    const int32_t* quads = l.quads;
    for (int64_t r = 0, alike; r < l.rows; r += alike) {
        alike = r == *quads ? kAlike : 1;
        const int32_t* columns = l.col_indices + l.crow_indices[r];
        const float* values = l.values + l.crow_indices[r];
        const int32_t length = l.crow_indices[r + 1] - l.crow_indices[r];
        float* const out = y + r * width;
        if (alike == 1) {
            sums(columns, values, length, x, width, out);
        } else {
            ++quads;
            std::fill_n(out, kAlike * width, 0.0f);
            with_registers<float>(width / kLanes, [&](auto R) {
                const float* const v[] = {values, values + length, values + 2 * length, values + 3 * length};
                float* const to[] = {out, out + width, out + 2 * width, out + 3 * width};
                quad_in_parts<float, R>(v, columns, length, x, Packed<R * kWidth<float>>(), to);
            });
        }
        for (int64_t i = 0; i < alike; ++i) {
            const float bias = l.bias ? l.bias[r + i] : 0.0f;
            for (int64_t n = 0; n < width; ++n) {
                const float v = out[i * width + n] + bias;
                out[i * width + n] = relu ? relu_of(v) : v;
            }
        }
    }
}

}  // namespace

ABI(rows, words_of<Rows>, words_of<Layer>);

// x (batch, in_features) -> y (batch, out_features), both row-major.
EXPORT void sparselottery_rows(const Rows* net, const float* x, float* y, int64_t batch) {
    const Layer* layers = reinterpret_cast<const Layer*>(net + 1);
    const int64_t groups = padded(batch) / kLanes, in = layers[0].columns, out = layers[net->layers - 1].rows;
    const int64_t most = kWidth<float> * 8 / kLanes;  // vectors that `taps` has
    const int64_t per_tile = groups > kGroups ? std::min(kGroups, most) : 1;  // whatever the threads, as sums depend on it
    const int64_t tiles = (groups + per_tile - 1) / per_tile, threads = std::min(net->threads, tiles);
    one_by_one(threads, [&] {
        float* from = buffers.get<float>(2 * net->widest * kGroups * kLanes);
        float* to = from + net->widest * kGroups * kLanes;
        const int64_t size = team_size(), me = thread_index();
        for (int64_t t = tiles * me / size; t < tiles * (me + 1) / size; ++t) {
            const int64_t first = t * per_tile, width = std::min(per_tile, groups - first) * kLanes;
            const int64_t sample = first * kLanes, valid = std::min(width, batch - sample);
            pack<float>(x + sample * in, in, valid, 0, in, from, width, width);
            for (int64_t l = 0; l < net->layers; ++l, std::swap(from, to))
                layer_forward(layers[l], from, to, width, l + 1 < net->layers);
            unpack<float>(from, width, out, valid, y + sample * out, out);
        }
    });
}
