// Runs the kernels of csrc/ on THREADS threads, or ALONE as many in turn, without Python or torch, and compares them with plain loops: for processors
// that have no torch. Prints what differs; exits with the number of differences. Structs: as in the sources.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "chain.h"
#include "cut.h"
#include "net.h"

extern "C" {
extern const int64_t sparselottery_abi_net[], sparselottery_abi_rows[], sparselottery_abi_train[];
int64_t sparselottery_plan(int, int, const int32_t*, const int32_t*, int, int, int, int, int, bool, int64_t, int32_t**);
int64_t sparselottery_conv_plan(int, const Taps*, const int32_t*, const int32_t*, int, int, int, bool, int64_t, int32_t**);
int64_t sparselottery_quads(int32_t, const int32_t*, const int32_t*, int32_t*);
int64_t sparselottery_chain_forward(const ChainArgs*, const ChainLayer*);
int64_t sparselottery_chain_backward(const ChainArgs*, const ChainLayer*);
int64_t sparselottery_conv_forward(const ConvArgs*);
int64_t sparselottery_conv_backward(const ConvArgs*);
void sparselottery_rows(const void*, const float*, float*, int64_t);
void sparselottery_net(const void*, const float*, float*, int64_t);
void sparselottery_train(const void*);
int64_t sparselottery_mask_rows(const uint8_t*, int64_t, int64_t, int32_t*, int64_t);
int64_t sparselottery_mask_columns(const uint8_t*, int64_t, int64_t, const int32_t*, int32_t*, int64_t);
int64_t sparselottery_positions(int64_t, int64_t, const int32_t*, const int32_t*, int64_t*);
int64_t sparselottery_at_positions(int64_t, int64_t, int64_t, const int64_t*, int32_t*, int32_t*);
int64_t sparselottery_sources(int64_t, int64_t, const int32_t*, const int32_t*, const int32_t*, const int32_t*, int32_t*,
                              int64_t);
int64_t sparselottery_carry(const int32_t*, int64_t, int64_t, int64_t, const void*, void*, const void*, int64_t);
}

namespace {

std::mt19937 random_bits(1);
int64_t threads = 1;
int differences = 0;

template <class T>
std::vector<T> noise(int64_t count) {
    std::uniform_real_distribution<T> between(-1, 1);
    std::vector<T> out(count);
    for (T& v : out) v = between(random_bits);
    return out;
}

template <class T>
void same(const char* what, const std::vector<T>& found, const std::vector<T>& expected) {
    const double tolerance = sizeof(T) == 8 ? 1e-11 : 2e-5;
    double worst = found.size() == expected.size() ? 0 : INFINITY;
    for (size_t i = 0; i < expected.size() && worst < INFINITY; ++i) {
        const double error = std::abs(double(found[i]) - double(expected[i])) / (1 + std::abs(double(expected[i])));
        worst = error <= worst ? worst : error == error ? error : INFINITY;
    }
    if (worst > tolerance) std::printf("%s, %zu bytes an element: off by %g\n", what, sizeof(T), worst), ++differences;
}

int64_t word(const void* pointer) { return reinterpret_cast<int64_t>(pointer); }

template <class T>
struct Matrix {  // CSR, with an empty row and a full one, and eight with the same columns
    Matrix(int rows, int columns) : rows(rows), columns(columns), begin(1, 0) {
        for (int r = 0; r < rows; ++r) {
            const std::vector<int32_t> last(at.end() - (r ? begin[r] - begin[r - 1] : 0), at.end());
            if (r > 12 && r < 20) at.insert(at.end(), last.begin(), last.end());
            else
                for (int c = 0; c < columns; ++c)
                    if (r == 1 || (r && random_bits() % 4 == 0)) at.push_back(c);
            begin.push_back(int(at.size()));
        }
        values = noise<T>(at.size()), bias = noise<T>(rows);
    }
    template <class F>
    void each(F f) const {  // f(row, column, index of the value)
        for (int r = 0; r < rows; ++r)
            for (int k = begin[r]; k < begin[r + 1]; ++k) f(r, at[k], k);
    }
    int rows, columns;
    std::vector<int32_t> begin, at;
    std::vector<T> values, bias;
};

// y (batch, rows) = x Wᵀ + b, then a ReLU if `relu`.
template <class T>
std::vector<T> product(const Matrix<T>& w, const std::vector<T>& x, int64_t batch, bool relu) {
    std::vector<T> y;
    for (int64_t n = 0; n < batch; ++n) y.insert(y.end(), w.bias.begin(), w.bias.end());
    for (int64_t n = 0; n < batch; ++n)
        w.each([&](int r, int c, int k) { y[n * w.rows + r] += w.values[k] * x[n * w.columns + c]; });
    for (T& v : y) v = relu && v < 0 ? 0 : v;
    return y;
}

// Two layers with a ReLU between them: y, and the gradients for gy.
template <class T>
void chain(int64_t batch) {
    const Matrix<T> layers[2] = {{70, 45}, {21, 70}};
    const int64_t ld = (batch + 15) / 16 * 16;
    const std::vector<T> x = noise<T>(batch * 45), gy = noise<T>(batch * 21);
    const std::vector<T> hidden = product(layers[0], x, batch, true), out = product(layers[1], hidden, batch, false);
    std::vector<T> y(out.size()), gx(x.size()), inputs[2], gvalues[2], gbias[2], ghidden(71 * ld), packed(22 * ld);
    const ChainMatrix of_x{const_cast<T*>(x.data()), 45, 0}, of_y{y.data(), 21, 0};
    const ChainMatrix of_gy{const_cast<T*>(gy.data()), 21, 0}, of_gx{gx.data(), 45, 0};
    const ChainArgs args{sizeof(T) == 8 ? FLOAT64 : FLOAT32, threads, 2, batch, 45, of_x, of_y, {}, nullptr, 0};
    const ChainArgs back{sizeof(T) == 8 ? FLOAT64 : FLOAT32, threads, 2, batch, 45, of_gy, of_gx, {}, packed.data(), 0};
    std::vector<ChainLayer> all;
    int32_t* plans[2];
    for (int l = 0; l < 2; ++l) {
        const Matrix<T>& w = layers[l];
        const auto size = sparselottery_plan(w.rows, w.columns, w.begin.data(), w.at.data(), 32, 16, 32, 48, 64, true, 1,
                                             plans + l);
        inputs[l].resize(w.columns * ld), gvalues[l].resize(w.values.size()), gbias[l].resize(w.rows);
        all.push_back({plans[l], size, w.rows, int64_t(w.values.size()), w.values.data(), w.bias.data(), inputs[l].data(),
                       gvalues[l].data(), gbias[l].data(), l ? ghidden.data() : nullptr, nullptr});
    }
    ChainArgs inference = args;
    inference.inference = 1;
    sparselottery_chain_forward(&inference, all.data());
    same("chain inference", y, out);
    std::fill(y.begin(), y.end(), T(0));
    sparselottery_chain_forward(&args, all.data());
    same("chain forward", y, out);
    sparselottery_chain_backward(&back, all.data());
    std::vector<T> gradient = gy;
    for (int l = 1; l >= 0; --l) {
        const Matrix<T>& w = layers[l];
        const std::vector<T>& in = l ? hidden : x;
        std::vector<T> gw(w.values.size()), gb(w.rows), gin(in.size());
        for (int64_t n = 0; n < batch; ++n) {
            for (int r = 0; r < w.rows; ++r) gb[r] += gradient[n * w.rows + r];
            w.each([&](int r, int c, int k) {
                gw[k] += gradient[n * w.rows + r] * in[n * w.columns + c];
                gin[n * w.columns + c] += gradient[n * w.rows + r] * w.values[k];
            });
        }
        for (size_t i = 0; l && i < gin.size(); ++i) gin[i] = in[i] > 0 ? gin[i] : 0;
        same("chain backward, values", gvalues[l], gw);
        same("chain backward, bias", gbias[l], gb);
        gradient = gin;
        std::free(plans[l]);
    }
    same("chain backward, input", gx, gradient);
}

// f(offset in y, index of the value, offset in x) for all products of a convolution without groups.
template <class T, class F>
void each_product(const Matrix<T>& w, const ConvArgs& a, F f) {
    const Taps& t = *a.taps;
    for (int64_t n = 0; n < a.batch; ++n)
        for (int64_t h = 0; h < a.out_height; ++h)
            for (int64_t v = 0; v < a.out_width; ++v)
                w.each([&](int o, int tap, int k) {
                    const int64_t c = tap / t.size(), row = h * t.stride[0] + tap % t.size() / t.kernel[1] - t.before[0];
                    const int64_t column = v * t.stride[1] + tap % t.kernel[1] - t.before[1];
                    if (row >= 0 && row < a.height && column >= 0 && column < a.width)
                        f(((n * w.rows + o) * a.out_height + h) * a.out_width + v, k,
                          ((n * a.channels + c) * a.height + row) * a.width + column);
                });
}

// 3 x 3 with a padding of 1 and a ReLU: y, and the gradients for gy.
template <class T>
void convolution(int64_t batch, int stride, bool flat) {
    const int64_t channels = 5, height = 9, width = 11, outputs = 18;
    const int64_t out_height = (height - 1) / stride + 1, out_width = (width - 1) / stride + 1;
    const Taps taps{int32_t(channels), {3, 3}, {stride, stride}, {1, 1}, {1, 1}, 1};
    const Matrix<T> w(outputs, channels * 9);
    const std::vector<T> x = noise<T>(batch * channels * height * width);
    const std::vector<T> gy = noise<T>(batch * outputs * out_height * out_width);
    std::vector<T> y(gy.size()), out(gy.size()), gx(x.size()), gin(x.size());
    std::vector<T> gvalues(w.values.size()), gw(w.values.size()), gbias(outputs), gb(outputs);
    int32_t* plan;
    ConvArgs a{sizeof(T) == 8, threads, flat, 1, 1, batch, channels, height, width, outputs, out_height, out_width, &taps};
    a.plan_size = sparselottery_conv_plan(outputs, &taps, w.begin.data(), w.at.data(), 256, 2, 4, true, 1, &plan);
    a.plan = plan, a.nnz = int64_t(w.values.size()), a.values = w.values.data(), a.bias = w.bias.data();
    a.x = const_cast<T*>(x.data()), a.y = y.data();
    const int64_t of_x[3] = {channels * height * width, height * width, 1};
    const int64_t of_y[3] = {outputs * out_height * out_width, out_height * out_width, 1};
    for (int i = 0; i < 3; ++i)
        a.x_strides[i] = a.gx_strides[i] = of_x[i], a.y_strides[i] = a.gy_strides[i] = of_y[i];
    for (size_t i = 0; i < out.size(); ++i) out[i] = w.bias[i / of_y[1] % outputs];
    each_product(w, a, [&](int64_t to, int k, int64_t from) { out[to] += w.values[k] * x[from]; });
    for (T& v : out) v = v < 0 ? 0 : v;
    sparselottery_conv_forward(&a);
    same("convolution forward", y, out);
    a.gy = const_cast<T*>(gy.data()), a.gvalues = gvalues.data(), a.gbias = gbias.data();
    const auto gradient = [&](int64_t i) { return out[i] > 0 ? gy[i] : T(0); };
    each_product(w, a, [&](int64_t to, int k, int64_t from) {
        gw[k] += gradient(to) * x[from];
        gin[from] += gradient(to) * w.values[k];
    });
    for (size_t i = 0; i < out.size(); ++i) gb[i / of_y[1] % outputs] += gradient(i);
    for (void* input : {static_cast<void*>(nullptr), static_cast<void*>(gx.data())}) {
        a.gx = input;
        sparselottery_conv_backward(&a);
        same("convolution backward, values", gvalues, gw);
        same("convolution backward, bias", gbias, gb);
    }
    same("convolution backward, input", gx, gin);
    std::free(plan);
}

// A frozen net: two linear layers, from CSR.
void rows(int64_t batch) {
    const Matrix<float> layers[2] = {{70, 45}, {21, 70}};
    std::vector<int64_t> args{2, threads, 70};
    std::vector<int32_t> quads[2];
    for (int l = 0; l < 2; ++l) {
        const Matrix<float>& w = layers[l];
        quads[l].resize(w.rows / 4 + 1);
        if (sparselottery_quads(w.rows, w.begin.data(), w.at.data(), quads[l].data()) != 2 || quads[l][0] != 12)
            std::puts("other quads"), ++differences;
        args.insert(args.end(), {w.rows, w.columns, word(w.begin.data()), word(w.at.data()), word(w.values.data()),
                                 word(w.bias.data()), word(quads[l].data())});
    }
    const std::vector<float> x = noise<float>(batch * 45);
    std::vector<float> y(batch * 21);
    sparselottery_rows(args.data(), x.data(), y.data(), batch);
    same("frozen rows", y, product(layers[1], product(layers[0], x, batch, true), batch, false));
}

// A frozen net: 3 x 3 with a padding of 1, a ReLU and a max pooling of 2 x 2, then a linear layer.
void net(int64_t batch) {
    const int64_t channels = 3, side = 8, outputs = 10, classes = 13, features = outputs * 16;
    const Matrix<float> w(outputs, channels * 9), v(classes, features);
    const Taps taps{int32_t(channels), {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1};
    const Field image{channels, side, side, side, 3, 1, 1, 1, 1, side + 2, 1};
    const Field plain{outputs, 4, 4, 4, 1, 1, 1, 0, 1, 4, 0}, logits{classes, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0};
    std::vector<int32_t> taps_at, begin(1, 0), columns, order;
    std::vector<float> values, shift;
    for (int tap : w.at)
        taps_at.push_back(int32_t(tap / 9 * image.channel() + tap % 3 * image.plane() + tap % 9 / 3 * image.columns));
    for (int first = 0; first < classes; first += 8) {  // 8 rows entry by entry; a zero follows the features
        int longest = 0;
        const auto length = [&](int r) { return r < classes ? v.begin[r + 1] - v.begin[r] : 0; };
        for (int r = first; r < first + 8; ++r) {
            longest = std::max(longest, length(r));
            order.push_back(r < classes ? r : -1), shift.push_back(r < classes ? v.bias[r] : 0.0f);
        }
        for (int k = 0; k < longest; ++k)
            for (int r = first; r < first + 8; ++r) {
                columns.push_back(k < length(r) ? v.at[v.begin[r] + k] : int32_t(features));
                values.push_back(k < length(r) ? v.values[v.begin[r] + k] : 0.0f);
            }
        begin.push_back(begin.back() + longest);
    }
    struct {
        int64_t stages, threads, sharers, in_elements, out_elements, field_elements, scratch_elements;
        Field output;
        Stage each[2];
    } args{2, threads, threads, channels * side * side, classes, channels * image.channel() + 64, 400, logits};
    args.each[0] = {CONVOLUTION, outputs, w.begin.data(), taps_at.data(), w.values.data(), nullptr, nullptr, w.bias.data(),
                    1, 2, 0, side, side, 1, image};
    args.each[1] = {LINEAR, classes, begin.data(), columns.data(), values.data(), order.data(), nullptr, shift.data(),
                    0, 1, 1, 0, 0, 0, plain};
    const std::vector<float> x = noise<float>(batch * channels * side * side);
    std::vector<float> y(batch * classes), convolved(batch * outputs * side * side), pooled(batch * features);
    ConvArgs a{0, 1, 0, 0, 1, batch, channels, side, side, outputs, side, side, &taps};
    for (size_t i = 0; i < convolved.size(); ++i) convolved[i] = w.bias[i / (side * side) % outputs];
    each_product(w, a, [&](int64_t to, int k, int64_t from) { convolved[to] += w.values[k] * x[from]; });
    for (size_t i = 0; i < convolved.size(); ++i) {
        float& to = pooled[i / (side * side) * 16 + i % (side * side) / side / 2 * 4 + i % side / 2];
        to = std::max(to, convolved[i]);  // which begins with 0: the ReLU
    }
    sparselottery_net(&args, x.data(), y.data(), batch);
    same("frozen net", y, product(v, pooled, batch, false));
}

// One step of SGD of a single layer.
template <class T>
void train(int64_t batch) {
    Matrix<T> w(21, 45);
    const std::vector<T> x = noise<T>(batch * 45);
    std::vector<int64_t> labels(batch), order(batch);
    for (int64_t n = 0; n < batch; ++n) labels[n] = random_bits() % 21, order[n] = n;
    std::vector<T> trained = w.values, bias = w.bias, moments(w.values.size()), bias_moments(21);
    std::vector<T> expected = w.values, expected_bias = w.bias;
    const double rate = 0.5, constants[2] = {0, 0};
    double pace[3] = {};
    int32_t* plan;
    sparselottery_plan(21, 45, w.begin.data(), w.at.data(), 16, 16, 32, 32, 32, true, 1, &plan);
    const std::vector<int64_t> args{
        sizeof(T) == 8, threads, 1, batch, word(x.data()), word(labels.data()), word(order.data()), word(&rate), 1, 0, 1,
        word(constants), word(pace), word(plan), word(trained.data()), word(moments.data()), 0, word(bias.data()),
        word(bias_moments.data()), 0};
    sparselottery_train(args.data());
    const std::vector<T> logits = product(w, x, batch, false);
    for (int64_t n = 0; n < batch; ++n) {
        T total = 0;
        const T* z = logits.data() + n * 21;
        for (int c = 0; c < 21; ++c) total += std::exp(z[c]);
        const auto gradient = [&](int c) { return (std::exp(z[c]) / total - (labels[n] == c)) * T(rate) / T(batch); };
        w.each([&](int r, int c, int k) { expected[k] -= gradient(r) * x[n * 45 + c]; });
        for (int c = 0; c < 21; ++c) expected_bias[c] -= gradient(c);
    }
    same("training, values", trained, expected);
    same("training, bias", bias, expected_bias);
    std::free(plan);
}

// The mask of a matrix as CSR, and the values of another one that survive in it.
template <class T>
void patterns(int rows, int columns) {
    const Matrix<T> before(rows, columns), after(rows, columns);
    std::vector<uint8_t> mask(rows * columns);
    after.each([&](int r, int c, int) { mask[r * columns + c] = 1 + random_bits() % 255; });
    std::vector<int32_t> begin(rows + 1), at(after.at.size()), sources(at.size());
    const int64_t found = sparselottery_mask_rows(mask.data(), rows, columns, begin.data(), threads);
    sparselottery_mask_columns(mask.data(), rows, columns, begin.data(), at.data(), threads);
    if (found != int64_t(at.size()) || begin != after.begin || at != after.at) std::puts("another pattern"), ++differences;
    std::vector<int64_t> positions(at.size()), places(at.size());
    after.each([&](int r, int c, int k) { places[k] = int64_t(r) * columns + c; });
    sparselottery_positions(rows, columns, begin.data(), at.data(), positions.data());
    std::vector<int32_t> again(rows + 1), columns_again(at.size());
    const bool ascend = sparselottery_at_positions(rows, columns, at.size(), places.data(), again.data(), columns_again.data());
    if (positions != places || !ascend || again != begin || columns_again != at) std::puts("other positions"), ++differences;
    sparselottery_sources(rows, columns, begin.data(), at.data(), before.begin.data(), before.at.data(), sources.data(),
                          threads);
    std::vector<T> dense(rows * columns, T(7)), moved(at.size()), expected(at.size());
    before.each([&](int r, int c, int k) { dense[r * columns + c] = before.values[k]; });
    after.each([&](int r, int c, int k) { expected[k] = dense[r * columns + c]; });
    const T fill = 7;
    sparselottery_carry(sources.data(), at.size(), before.at.size(), sizeof(T), before.values.data(), moved.data(), &fill,
                        threads);
    same("carried", moved, expected);
}

template <class T>
void all() {
    for (int64_t batch : {1, 3, 7, 37, 150}) chain<T>(batch), train<T>(batch);
    for (int64_t batch : {1, 19})
        for (int stride : {1, 2})
            for (bool flat : {false, true}) convolution<T>(batch, stride, flat);
}

}  // namespace

int main(int count, char** arguments) {
    const int64_t* train = sparselottery_abi_train;
    if (train[1] != 13 || train[2] != 7 || sparselottery_abi_rows[1] != 7 ||
        sparselottery_abi_net[4] != 7 + sizeof(Field) / 8) {
        std::puts("structs of the sources have changed: so must the driver's");
        return 100;
    }
    threads = std::atoll(arguments[1]);
    if (count > 2) company.lost(1e6);  // as where other processes have the processors
    all<float>(), all<double>();
    for (int64_t batch : {1, 5, 40}) rows(batch), net(batch);
    patterns<float>(9, 150), patterns<double>(700, 600);
    if (!differences) std::printf("equal, vectors of %d bits\n", VECTOR_BYTES * 8);
    return differences;
}
