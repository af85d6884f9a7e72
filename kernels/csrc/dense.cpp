// A dense tensor and the values that survive in it: at places, which ascend, or where bits are set, the lowest bit of a
// word first. Bits are a thirtieth of what places are to read, and a vector of values is spread by them, or closes up.
#include "plan.h"
#include "team.h"

namespace {

// spread: the first elements to the lanes whose bits are set, zero to the others. closed: the inverse, then anything.
#if defined(__AVX512F__)
template <class T>
constexpr bool kSpreads = sizeof(T) >= 4;

INLINE Vec<float> spread(uint64_t bits, Vec<float> v) { return (Vec<float>)_mm512_maskz_expand_ps(__mmask16(bits), (__m512)v); }
INLINE Vec<double> spread(uint64_t bits, Vec<double> v) { return (Vec<double>)_mm512_maskz_expand_pd(__mmask8(bits), (__m512d)v); }
INLINE Vec<float> closed(uint64_t bits, Vec<float> v) { return (Vec<float>)_mm512_maskz_compress_ps(__mmask16(bits), (__m512)v); }
INLINE Vec<double> closed(uint64_t bits, Vec<double> v) { return (Vec<double>)_mm512_maskz_compress_pd(__mmask8(bits), (__m512d)v); }
#elif defined(__AVX2__)
template <class T>
constexpr bool kSpreads = sizeof(T) == 4;

struct Lanes {  // of eight bits
    int8_t ranks[256][8] = {}, set[256][8] = {};  // of each lane its number among the set ones, or -1; the set ones, in order
    constexpr Lanes() {
        for (int bits = 0; bits < 256; ++bits)
            for (int lane = 0, rank = 0; lane < 8; ++lane) {
                const bool is_set = bits >> lane & 1;
                if (is_set) set[bits][rank] = int8_t(lane);
                ranks[bits][lane] = is_set ? int8_t(rank++) : int8_t(-1);
            }
    }
};
constexpr Lanes kLanesOf;

INLINE __m256i numbers(const int8_t* lanes) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(lanes)));
}
INLINE Vec<float> spread(uint64_t bits, Vec<float> v) {
    const __m256i ranks = numbers(kLanesOf.ranks[bits & 255]);
    const __m256 nothing = _mm256_castsi256_ps(_mm256_srai_epi32(ranks, 31));
    return (Vec<float>)_mm256_andnot_ps(nothing, _mm256_permutevar8x32_ps((__m256)v, ranks));
}
INLINE Vec<float> closed(uint64_t bits, Vec<float> v) {
    return (Vec<float>)_mm256_permutevar8x32_ps((__m256)v, numbers(kLanesOf.set[bits & 255]));
}
#else
template <class T>
constexpr bool kSpreads = false;
#endif

int64_t ones(const uint64_t* words, int64_t begin, int64_t end) {
    int64_t found = 0;
    for (int64_t i = begin; i < end; ++i) found += __builtin_popcountll(words[i]);
    return found;
}

// Some words of a dense tensor of `size`, from the values that end at `last`, or to them if BACK: whole vectors, as long as
// these stay within both.
template <class T, bool BACK>
void by_bits(const uint64_t* words, int64_t begin, int64_t end, int64_t size, T* values, const T* last, T* dense) {
    constexpr int W = kWidth<T>;
    for (int64_t word = begin; word < end; ++word) {
        uint64_t bits = words[word];
        const int64_t first = word * 64;
        if (last - values >= 64 && size - first >= 64) {
            for (int i = 0; i < 64; i += W, bits >>= W) {
                T* const at = dense + first + i;
                if constexpr (BACK) store<T>(values, closed(bits, load<T>(at)));
                else store<T>(at, spread(bits, load<T>(values)));
                values += __builtin_popcount(uint32_t(bits) & ((1u << W) - 1));
            }
            continue;
        }
        for (int64_t i = first; i < size && i < first + 64; ++i, bits >>= 1) {
            const bool set = bits & 1;
            if (!BACK) dense[i] = set ? *values : T(0);
            else if (set) *values = dense[i];
            values += set;
        }
    }
}

// values[k] = dense[places[k]] if BACK, else the inverse.
template <class T, bool BACK>
void by_places(const int32_t* places, int64_t begin, int64_t end, T* values, T* dense) {
    for (int64_t k = begin; k < end; ++k)
        if (BACK) values[k] = dense[places[k]];
        else dense[places[k]] = values[k];
}

template <class T, bool BACK>
void move(const int32_t* places, const uint64_t* bits, int64_t count, int64_t size, void* values, void* dense, int64_t threads) {
    T* const v = static_cast<T*>(values);
    T* const d = static_cast<T*>(dense);
    if constexpr (kSpreads<T>)
        if (bits)
            return shared((size + 63) / 64, size * sizeof(T), threads, [=](int64_t begin, int64_t end) {
                T* const first = v + ones(bits, 0, begin);
                by_bits<T, BACK>(bits, begin, end, size, first, BACK ? first + ones(bits, begin, end) : v + count, d);
            });
    shared(count, count * sizeof(T), threads, [=](int64_t begin, int64_t end) { by_places<T, BACK>(places, begin, end, v, d); });
}

template <bool BACK>
int64_t move(const int32_t* places, const uint64_t* bits, int64_t count, int64_t size, int64_t bytes, void* values,
             void* dense, int64_t threads) {
    const auto f = bytes == 8 ? move<double, BACK> : bytes == 4 ? move<float, BACK> : move<uint16_t, BACK>;
    f(places, bits, count, size, values, dense, threads);
    return DONE;
}

}  // namespace

// values (count,) to their places in dense (size,), which ascend; elements of 2, 4 or 8 bytes. bits: of the places, or null;
// they put zeros to all others.
EXPORT int64_t sparselottery_scatter(const int32_t* places, const uint64_t* bits, int64_t count, int64_t size, int64_t bytes,
                                     void* values, void* dense, int64_t threads) {
    return move<false>(places, bits, count, size, bytes, values, dense, threads);
}

// The inverse.
EXPORT int64_t sparselottery_gather(const int32_t* places, const uint64_t* bits, int64_t count, int64_t size, int64_t bytes,
                                    void* values, void* dense, int64_t threads) {
    expect_writes(values, count * bytes);
    return move<true>(places, bits, count, size, bytes, values, dense, threads);
}
