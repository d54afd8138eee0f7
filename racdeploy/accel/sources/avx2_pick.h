// AVX2: inputs picked for the stored values of 2:4 weights, in place of weights spread for all inputs.
//
// A register has two runs of 16 values. A lane is a run: its values are 2 of every 4 of 32 weights, so values 0 to 7 take
// the first 16 inputs of the run and values 8 to 15 the others.
#pragma once
#include "avx2_spread.h"

namespace racdeploy {
namespace {

inline __m256i two_lanes(const void* first, const void* second) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load_128(first)), load_128(second), 1);
}

// The 64 inputs of two runs.
struct RunInputs {
    __m256i first, second;  // half of each run's
    explicit RunInputs(const int8_t* codes)
        : first(two_lanes(codes, codes + 32)), second(two_lanes(codes + 16, codes + 48)) {}
};

// Which of its 16 inputs each value of two runs takes: runs 0 and 1, or 2 and 3 of the four that `bits` are of, which
// are in both lanes (PlaceBits).
template <int first_run>
inline __m256i places_in_16(__m256i bits) {
    const __m256i fours = in_both_lanes(_mm_setr_epi8(0, 0, 4, 4, 8, 8, 12, 12, 0, 0, 4, 4, 8, 8, 12, 12));
    constexpr int low = 2 * first_run, high = low + 2;
    const __m256i shifted = _mm256_srlv_epi32(bits, _mm256_setr_epi32(low, low, low, low, high, high, high, high));
    return _mm256_or_si256(_mm256_and_si256(shifted, _mm256_set1_epi8(3)), fours);
}

inline __m256i pick(const RunInputs& inputs, __m256i places) {
    const __m256i first = _mm256_shuffle_epi8(inputs.first, places);
    return _mm256_blend_epi32(first, _mm256_shuffle_epi8(inputs.second, places), 0xcc);
}

// Adds to each lane of 32 bits the products of 4 weights, from -128 on, and 4 inputs.
inline __m256i add_signed(__m256i sums, __m256i weights, __m256i inputs) {
    return add_quads(sums, _mm256_abs_epi8(weights), _mm256_sign_epi8(inputs, weights));
}

}  // namespace
}  // namespace racdeploy
