// AVX2, with VNNI where the file is compiled for it: which of a run's stored values each weight is, and the sums of
// products.
#pragma once
#include <immintrin.h>

#include "kernels.h"
#include "x86_prefetch.h"

#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#define RACDEPLOY_VNNI 1
#else
#define RACDEPLOY_VNNI 0
#endif

namespace racdeploy {
namespace {

constexpr bool vnni = RACDEPLOY_VNNI;

inline __m256i load_256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline __m128i load_128(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
inline __m256i in_both_lanes(__m128i lane) { return _mm256_broadcastsi128_si256(lane); }
inline int64_t popcount(uint64_t bits) { return __builtin_popcountll(bits); }

inline float sum_of(__m256 sums) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline float largest_of(__m256 values) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

// ---- sums of products ----

#if RACDEPLOY_VNNI
// Adds to each lane the products of 4 unsigned and 4 signed bytes.
inline __m256i add_quads(__m256i sums, __m256i unsigned_bytes, __m256i signed_bytes) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(sums, unsigned_bytes, signed_bytes);
#else
    return _mm256_dpbusd_epi32(sums, unsigned_bytes, signed_bytes);
#endif
}
#else
// No sum of two products may leave int16: |signed| <= 127 and unsigned <= 128.
inline __m256i add_quads(__m256i sums, __m256i unsigned_bytes, __m256i signed_bytes) {
    const __m256i pairs = _mm256_maddubs_epi16(unsigned_bytes, signed_bytes);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

// How the products of weights with inputs are summed up. Weights are unsigned, code + zero point, and the surplus is
// taken off by the offsets of the workspace; but codes of 8 bits with no VNNI are signed, or two products would not fit
// into 16 bits.
template <Quant quant>
struct Sums {
    static constexpr bool is_signed = quant == Quant::q8_0 && !vnni;
    static constexpr bool is_short = quant == Quant::q4_0 && !vnni;  // 16 bits hold 16 products of 15 * 127

    static inline __m256i add(__m256i sums, __m256i weights, __m256i magnitudes, __m256i inputs) {
        if (is_short) return _mm256_add_epi16(sums, _mm256_maddubs_epi16(weights, inputs));
        return add_quads(sums, magnitudes, is_signed ? _mm256_sign_epi8(inputs, weights) : inputs);
    }
    static inline __m256i magnitudes(__m256i weights) { return is_signed ? _mm256_abs_epi8(weights) : weights; }

    static inline __m256i whole(__m256i sums, __m256i offsets) {
        if (is_short) sums = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
        return is_signed ? sums : _mm256_add_epi32(sums, offsets);
    }
};

// ---- spreading ----

// For each 4 mask bits: how many are set, and for each of the 4 weights how many of those are set from it on, negative;
// or the top bit, where the weight is not stored.
struct Nibbles {
    alignas(16) uint8_t counts[16];
    alignas(16) uint8_t places[4][16];
    constexpr Nibbles() : counts(), places() {
        for (unsigned bits = 0; bits < 16; bits++) {
            counts[bits] = static_cast<uint8_t>(__builtin_popcount(bits));
            for (unsigned i = 0; i < 4; i++)
                places[i][bits] = static_cast<uint8_t>(bits >> i & 1 ? -__builtin_popcount(bits >> i) : 0x80);
        }
    }
};
constexpr Nibbles nibble_tables;

inline __m256i look_up(const uint8_t (&table)[16], __m256i nibbles) {
    return _mm256_shuffle_epi8(in_both_lanes(load_128(table)), nibbles);
}

// Two chunks of 64 weights: four runs of 32, in lanes of 16, as which of its lane's values each weight is.
struct Places {
    __m256i runs[4];

    Places() = default;

    // Three steps: a byte for every 4 mask bits, those of a lane's 16 weights in one dword; how many values of the lane
    // come before the end of each 4, by a product; and the four weights of every 4, which are then put in order.
    explicit Places(const uint8_t* mask) {
        const __m256i words = _mm256_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1,  //
                                               2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1);
        __m256i nibbles = _mm256_shuffle_epi8(in_both_lanes(load_128(mask)), words);
        nibbles = _mm256_and_si256(_mm256_or_si256(nibbles, _mm256_slli_epi16(nibbles, 4)), _mm256_set1_epi8(15));

        __m256i ones = _mm256_set1_epi8(1);
        asm("" : "+x"(ones));  // gcc would make two shifts and two additions of the product
        const __m256i ends = _mm256_mullo_epi32(look_up(nibble_tables.counts, nibbles), ones);

        __m256i weights[4];
        for (int i = 0; i < 4; i++) weights[i] = _mm256_add_epi8(look_up(nibble_tables.places[i], nibbles), ends);
        const __m256i low_01 = _mm256_unpacklo_epi8(weights[0], weights[1]);
        const __m256i low_23 = _mm256_unpacklo_epi8(weights[2], weights[3]);
        const __m256i high_01 = _mm256_unpackhi_epi8(weights[0], weights[1]);
        const __m256i high_23 = _mm256_unpackhi_epi8(weights[2], weights[3]);
        runs[0] = _mm256_unpacklo_epi16(low_01, low_23);
        runs[1] = _mm256_unpackhi_epi16(low_01, low_23);
        runs[2] = _mm256_unpacklo_epi16(high_01, high_23);
        runs[3] = _mm256_unpackhi_epi16(high_01, high_23);
    }
};

// A run's weights from the values of its two lanes; those of Q4_0 are in the low or the high bits.
template <Quant quant, bool high_bits>
inline __m256i spread(const uint8_t* lane_0, const uint8_t* lane_1, __m256i places) {
    const __m256i zero = _mm256_set1_epi8(static_cast<char>(zero_point(quant)));
    __m256i values = _mm256_inserti128_si256(_mm256_castsi128_si256(load_128(lane_0)), load_128(lane_1), 1);
    if (quant == Quant::q4_0)
        values = _mm256_and_si256(high_bits ? _mm256_srli_epi16(values, 4) : values, _mm256_set1_epi8(15));

    // What is not stored becomes 0, which in between is the zero point's.
    const __m256i weights = _mm256_shuffle_epi8(_mm256_xor_si256(values, zero), places);
    return Sums<quant>::is_signed ? weights : _mm256_xor_si256(weights, zero);
}

// Calls run(k, weights) for the four runs of two chunks, and moves on behind their values.
template <Quant quant, bool high_bits, typename Run>
[[gnu::always_inline]] inline void over_runs(const uint8_t* mask, const Places& places, const uint8_t*& values,
                                             const Run& run) {
#pragma GCC unroll 2
    for (int chunk = 0; chunk < 2; chunk++) {
        const uint64_t bits = load<uint64_t>(mask + 8 * chunk);
        const uint8_t *second = values + popcount(bits & 0xffff), *third = values + popcount(bits & 0xffffffff),
                      *fourth = values + popcount(bits << 16);
        run(2 * chunk, spread<quant, high_bits>(values, second, places.runs[2 * chunk]));
        run(2 * chunk + 1, spread<quant, high_bits>(third, fourth, places.runs[2 * chunk + 1]));
        values += popcount(bits);
    }
}

}  // namespace
}  // namespace racdeploy
