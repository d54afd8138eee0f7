// AVX-512: inputs picked for the stored values of 2:4 weights, in place of weights spread for all inputs.
//
// A register has four runs of 16 values, half of a group. A lane is a run: its values are 2 of every 4 of 32 weights,
// so values 0 to 7 take the first 16 inputs of the run and values 8 to 15 the others.
#pragma once
#include <immintrin.h>

#include "kernels.h"

namespace racdeploy {
namespace {

// The inputs of some tokens, a byte each, with 128 added: of every four runs the first half of each run's, then the
// second halves. Null if there is no memory.
inline const uint8_t* arrange_inputs(const QuantizedActivations& from, int64_t tokens) {
    const int64_t bytes = tokens * from.padded_columns;
    auto* memory = static_cast<uint8_t*>(scratch_of_thread(bytes));
    const __m512i added = _mm512_set1_epi8(-0x80);
    for (int64_t i = 0; memory && i < bytes; i += 128) {
        const __m512i low = _mm512_loadu_si512(from.codes + i), high = _mm512_loadu_si512(from.codes + i + 64);
        _mm512_store_si512(memory + i, _mm512_xor_si512(_mm512_shuffle_i64x2(low, high, 0x88), added));
        _mm512_store_si512(memory + i + 64, _mm512_xor_si512(_mm512_shuffle_i64x2(low, high, 0xdd), added));
    }
    return memory;
}

// Which of its 16 inputs each value of four runs takes; `bits` are theirs (PlaceBits).
inline __m512i places_in_16(const uint8_t* bits) {
    const __m512i fours = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 4, 4, 8, 8, 12, 12, 0, 0, 4, 4, 8, 8, 12, 12));
    const __m512i shifts = _mm512_set_epi32(6, 6, 6, 6, 4, 4, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0);
    const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bits)));
    const int and_or = 0xea;  // the first and the second, or the third
    return _mm512_ternarylogic_epi32(_mm512_srlv_epi32(all, shifts), _mm512_set1_epi8(3), fours, and_or);
}

// The inputs of the values of four runs; `inputs` are 128 of arrange_inputs.
inline __m512i pick(const uint8_t* inputs, __m512i places) {
    const __m512i first = _mm512_shuffle_epi8(_mm512_load_si512(inputs), places);
    return _mm512_mask_shuffle_epi8(first, 0xff00ff00ff00ff00, _mm512_load_si512(inputs + 64), places);
}

}  // namespace
}  // namespace racdeploy
