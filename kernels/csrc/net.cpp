// Inference of a frozen net, a whole image (or sample) in one call: stages in order, a barrier between them.
//
// Few images: `sharers` threads share each one. A convolution is shared by pixels where its images outweigh its weights (a
// thread then finds its own rows in its own caches), else by channels. Many images: each thread has its own.
#include "net.h"
#include "plan.h"
#include "team.h"

namespace {

struct Net {  // mirrored in cpu_net.py; its stages follow
    int64_t stages, threads, sharers, in_elements, out_elements, field_elements, scratch_elements;
    Field output;
};

thread_local Scratch fields;  // of the team that shares an image
thread_local Scratch temporary;

constexpr int64_t kPixels = 128;  // of a row of a convolution that are summed and handed on together, if a row is not longer
constexpr int64_t kStrip = 64;  // rows of a linear layer that are sorted by length together
constexpr int64_t kSlackElements = 64;  // vectors run over the end of fields

// Where the share of thread `part` of `parts` begins, in rows whose entries begin at `begin`: all shares are about as large,
// in units such that a line of the output is one thread's.
int64_t share_by_entries(const int32_t* begin, int64_t rows, int64_t part, int64_t parts, int64_t unit) {
    if (part == 0 || part == parts) return part ? rows : 0;
    const int64_t wanted = begin[rows] * part / parts;
    const int64_t row = std::lower_bound(begin, begin + rows + 1, wanted) - begin;
    return std::min<int64_t>(rows, (row + unit / 2) / unit * unit);
}

void finish(const Stage& s, int64_t row, float* y, int64_t count) {
    const float scale = s.scale ? s.scale[row] : 1.0f, shift = s.shift ? s.shift[row] : 0.0f;
    if (s.relu)
        for (int64_t i = 0; i < count; ++i) y[i] = relu_of(y[i] * scale + shift);
    else
        for (int64_t i = 0; i < count; ++i) y[i] = y[i] * scale + shift;
}

INLINE float larger(float a, float b) { return b > a || b != b ? b : a; }  // NaN if either is

// Max pooling of `rows` x `width` pixels, in place; `line` is room for a row.
void pool(float* y, int64_t rows, int64_t width, int64_t size, float* __restrict line) {
    float* out = y;
    for (int64_t r = 0; r + size <= rows; r += size, out += width / size) {
        const float* __restrict from = y + r * width;
        std::copy_n(from, width, line);
        for (int64_t i = 1; i < size; ++i)
            for (int64_t w = 0; w < width; ++w) line[w] = larger(line[w], from[i * width + w]);
        float* __restrict to = out;
        if (size == 2) {
            for (int64_t w = 0; w < width / 2; ++w) to[w] = larger(line[2 * w], line[2 * w + 1]);
            continue;
        }
        for (int64_t w = 0; w < width / size; ++w) {
            to[w] = line[w * size];
            for (int64_t i = 1; i < size; ++i) to[w] = larger(to[w], line[w * size + i]);
        }
    }
}

template <int B>
void convolution(const Stage& s, const Field& to, const float* x, float* y, float* sums, int64_t part, int64_t parts) {
    const int64_t unit = s.pool, height = s.height / unit * unit;
    int64_t top = 0, bottom = height, from = 0, until = s.rows;
    if (s.by_pixels) {
        top = height / unit * part / parts * unit, bottom = height / unit * (part + 1) / parts * unit;
    } else {
        from = share_by_entries(s.begin, s.rows, part, parts, 1);
        until = share_by_entries(s.begin, s.rows, part + 1, parts, 1);
    }
    const int64_t step = std::max<int64_t>(1, kPixels / s.width / unit) * unit;
    const int32_t* at = static_cast<const int32_t*>(s.at);
    for (int64_t r = top; r < bottom; r += step) {
        const int64_t end = std::min(bottom, r + step), count = (end - r) * s.width, vectors = (count + B / 4 - 1) / (B / 4);
        const int64_t pieces = (vectors + 7) / 8;
        for (int64_t row = from; row < until; ++row) {
            const int64_t begin = s.begin[row], n = s.begin[row + 1] - begin;
            for (int64_t p = 0; p < pieces; ++p) {
                const int64_t first = vectors * p / pieces, last = vectors * (p + 1) / pieces, pixel = first * (B / 4);
                taps_of<B>(last - first)(at + begin, s.values + begin, n, x + r * s.width + pixel, 0, sums + pixel);
            }
            finish(s, row, sums, count);
            if (unit > 1) pool(sums, end - r, s.width, unit, sums + vectors * (B / 4));
            put(to, y, row, sums, r / unit, end / unit);
        }
    }
}

template <class Index>
void linear(const Stage& s, const float* x, float* y, int64_t part, int64_t parts) {
    const Index* columns = static_cast<const Index*>(s.at);
    const int64_t groups = ceil_div(s.rows, kRows), unit = kStrip / kRows;
    const int64_t until = share_by_entries(s.begin, groups, part + 1, parts, unit);
    for (int64_t i = share_by_entries(s.begin, groups, part, parts, unit); i < until; ++i) {
        Four sums[2];
        const int64_t at = kRows * int64_t(s.begin[i]);
        dots(s.values + at, columns + at, s.begin[i + 1] - s.begin[i], x, sums);
        const float* shift = s.shift + kRows * i;
        const int32_t* order = s.order + kRows * i;
        for (int half = 0; half < 2; ++half) {
            Four y4 = sums[half] + *reinterpret_cast<const Four*>(shift + 4 * half);
            if (s.relu) y4 = relu_of(y4);
            for (int r = 0; r < 4; ++r)
                if (order[4 * half + r] >= 0) y[order[4 * half + r]] = y4[r];
        }
    }
}

void mean(const Stage& s, const float* x, float* y, int64_t part, int64_t parts) {
    const int64_t pixels = s.input.plane();
    for (int64_t c = s.rows * part / parts; c < s.rows * (part + 1) / parts; ++c) {
        float total = 0;
        for (int64_t i = 0; i < pixels; ++i) total += x[c * pixels + i];
        y[c] = total / float(pixels);
    }
}

// One image; `buffers` are two fields of the team, `mine` is of the thread.
void run(const Net& net, const float* x, float* y, float* buffers, float* mine, int64_t part, int64_t parts) {
    const Stage* stages = reinterpret_cast<const Stage*>(&net + 1);
    const auto wait = [&] {
        if (parts > 1) barrier();
    };
    const float* in = buffers;
    const Field& first = stages[0].input;
    if (stages[0].kind == LINEAR) {  // everybody a copy: cheaper than to wait for one
        std::copy_n(x, net.in_elements, mine);
        mine[net.in_elements] = 0;
        in = mine;
    } else {
        const int64_t pixels = first.height * first.width;
        for (int64_t c = first.channels * part / parts; c < first.channels * (part + 1) / parts; ++c)
            put(first, buffers, c, x + c * pixels, 0, first.height);
        wait();
    }
    for (int64_t l = 0; l < net.stages; ++l) {
        const Stage& s = stages[l];
        const bool last = l + 1 == net.stages;
        const Field& to = last ? net.output : stages[l + 1].input;
        float* out = last ? y : buffers + (l + 1) % 2 * net.field_elements;
        float* sums = mine + (l ? 0 : net.in_elements + 1);
        if (s.kind == LINEAR)
            s.wide ? linear<int32_t>(s, in, out, part, parts) : linear<uint16_t>(s, in, out, part, parts);
        else if (s.kind == MEAN)
            mean(s, in, out, part, parts);
        else if (VECTOR_BYTES == 64 && s.width % 16 == 0)
            convolution<VECTOR_BYTES>(s, to, in, out, sums, part, parts);
        else if (s.width * s.height <= 4 || VECTOR_BYTES == 16)
            convolution<16>(s, to, in, out, sums, part, parts);
        else
            convolution<VECTOR_BYTES == 16 ? 16 : 32>(s, to, in, out, sums, part, parts);
        if (!last) {
            if (stages[l + 1].kind == LINEAR && part == 0) out[to.channels * to.plane()] = 0;
            wait();
        }
        in = out;
    }
}

}  // namespace

ABI(net, kPixels, kStrip, kSlackElements, kRows, words_of<Net>, words_of<Stage>, words_of<Field>);

// x (batch, in_elements) -> y (batch, out_elements).
EXPORT void sparselottery_net(const Net* net, const float* x, float* y, int64_t batch) {
    const int64_t pair = 2 * net->field_elements + kSlackElements, mine = net->scratch_elements + kSlackElements;
    if (batch < 2 || (batch < net->threads && net->sharers > 1)) {
        float* shared = fields.get<float>(pair);
        together(net->sharers, [&] {
            for (int64_t i = 0; i < batch; ++i) {
                run(*net, x + i * net->in_elements, y + i * net->out_elements, shared, temporary.get<float>(mine),
                    thread_index(), team_size());
                if (i + 1 < batch) barrier();
            }
        });
        return;
    }
    const int64_t threads = std::min(net->threads, batch);
    one_by_one(threads, [&] {
        const int64_t size = team_size(), me = thread_index();
        float *own = fields.get<float>(pair), *scratch = temporary.get<float>(mine);
        for (int64_t i = batch * me / size; i < batch * (me + 1) / size; ++i)
            run(*net, x + i * net->in_elements, y + i * net->out_elements, own, scratch, 0, 1);
    });
}
