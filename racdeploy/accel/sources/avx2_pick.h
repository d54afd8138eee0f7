// AVX2: inputs picked for the stored values of 2:4 weights, in place of weights spread for all inputs.
//
// A register has two runs of 16 values. A lane is a run: its values are 2 of every 4 of 32 weights, so values 0 to 7
// take the first 16 inputs of the run and values 8 to 15 the others.
#pragma once
#include "avx2_spread.h"

namespace racdeploy {
namespace {

// The inputs of some tokens, a byte each: of every two runs the first half of each run's, then the second halves. Null
// if there is no memory. For VPDPBUSD, and where the caller wants it, they are unsigned: 128 is added to them.
template <bool is_unsigned = vnni>
inline const uint8_t* arrange_inputs(const QuantizedActivations& from, int64_t tokens) {
    const int64_t bytes = tokens * from.padded_columns;
    auto* memory = static_cast<uint8_t*>(scratch_of_thread(bytes));
    const __m256i added = _mm256_set1_epi8(is_unsigned ? -0x80 : 0);
    for (int64_t i = 0; memory && i < bytes; i += chunk_weights) {
        const __m256i low = load_256(from.codes + i), high = load_256(from.codes + i + 32);
        auto* to = reinterpret_cast<__m256i*>(memory + i);
        _mm256_store_si256(to, _mm256_xor_si256(_mm256_permute2x128_si256(low, high, 0x20), added));
        _mm256_store_si256(to + 1, _mm256_xor_si256(_mm256_permute2x128_si256(low, high, 0x31), added));
    }
    return memory;
}

// Which of its 16 inputs each value of two runs takes: runs 0 and 1, or 2 and 3 of the four that `bits` are of, which
// are in both lanes (PlaceBits).
template <int first_run>
inline __m256i places_in_16(__m256i bits) {
    const __m256i fours = in_both_lanes(_mm_setr_epi8(0, 0, 4, 4, 8, 8, 12, 12, 0, 0, 4, 4, 8, 8, 12, 12));
    constexpr int low = 2 * first_run, high = low + 2;
    const __m256i shifted = _mm256_srlv_epi32(bits, _mm256_setr_epi32(low, low, low, low, high, high, high, high));
    return _mm256_or_si256(_mm256_and_si256(shifted, _mm256_set1_epi8(3)), fours);
}

// The inputs of the values of two runs; `inputs` are 64 of arrange_inputs.
inline __m256i pick(const uint8_t* inputs, __m256i places) {
    const __m256i first = _mm256_shuffle_epi8(load_256(inputs), places);
    return _mm256_blend_epi32(first, _mm256_shuffle_epi8(load_256(inputs + 32), places), 0xcc);
}

// Products of signed weights with picked inputs: each lane of 32 bits has the sum of 4. With VPDPBUSD they are too
// large by what 128 added to the inputs gives, the surplus; without it the weights' signs move to the inputs.
inline __m256i add_picked(__m256i sums, __m256i weights, __m256i inputs) {
    if (vnni) return add_quads(sums, inputs, weights);
    return add_quads(sums, _mm256_abs_epi8(weights), _mm256_sign_epi8(inputs, weights));
}
inline __m256i add_surplus(__m256i surplus, __m256i weights) {
    return vnni ? add_quads(surplus, _mm256_set1_epi8(-0x80), weights) : surplus;
}

}  // namespace
}  // namespace racdeploy
