// AVX-512: 2:4 weights in Q8_0 and Q4_0.
//
// The 64 values of four runs are 8 of each of the 8 blocks of a group: 4 in the lower half of the register and 4 in the
// upper one, in the order of the blocks. VPDPBUSD wants unsigned inputs, so 128 is added to them, and the surplus
// summed beside the products.
#pragma once
#include "avx512_pick.h"
#include "x86_prefetch.h"

namespace racdeploy {
namespace {

// The values of runs 4 * half to 4 * half + 3 of a group.
template <Quant quant>
inline __m512i values_of_half(int half, const uint8_t* group) {
    if (quant == Quant::q8_0) return _mm512_loadu_si512(group + 64 * half);
    const __m512i bytes = _mm512_loadu_si512(group);
    return _mm512_and_si512(half ? bytes : _mm512_slli_epi16(bytes, 4), _mm512_set1_epi8(-0x10));
}

template <Quant quant, int tokens>
void multiply_row_of_picked(const SparseMatrix& matrix, int64_t row, const QuantizedActivations& from,
                            const uint8_t* inputs, Outputs outputs) {
    const int64_t padded_columns = from.padded_columns;
    const uint8_t *head = matrix.head(row), *values = matrix.values + matrix.offsets[row];

    __m256 totals[tokens];
    for (auto& total : totals) total = _mm256_setzero_ps();
    for (int64_t column = 0; column < matrix.columns; column += group_weights) {
        fetch_ahead(head, heads_ahead);
        fetch_ahead(values, values_ahead);
        if (quant == Quant::q8_0) fetch_ahead(values + 64, values_ahead);

        __m512i sums[tokens], surplus = _mm512_setzero_si512();
        for (auto& sum : sums) sum = _mm512_setzero_si512();
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const __m512i places = places_in_16(mask_of(quant, head) + 16 * half);
            const __m512i weights = values_of_half<quant>(half, values);
            surplus = _mm512_dpbusd_epi32(surplus, _mm512_set1_epi8(-0x80), weights);
#pragma GCC unroll 2
            for (int t = 0; t < tokens; t++) {
                const uint8_t* of_half = inputs + t * padded_columns + column + 2 * chunk_weights * half;
                sums[t] = _mm512_dpbusd_epi32(sums[t], pick(of_half, places), weights);
            }
        }

        const __m256 weight_scales = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(head)));
        for (int t = 0; t < tokens; t++) {
            const float* input_scales = from.scales + (t * padded_columns + column) / block_weights;
            const __m256 scales = _mm256_mul_ps(weight_scales, _mm256_loadu_ps(input_scales));
            const __m512i halves = _mm512_sub_epi32(sums[t], surplus);
            const __m256i blocks =
                _mm256_add_epi32(_mm512_castsi512_si256(halves), _mm512_extracti64x4_epi64(halves, 1));
            totals[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(blocks), scales, totals[t]);
        }
        head += head_bytes(quant);
        values += group_values_bytes(quant);
    }

    for (int t = 0; t < tokens; t++)
        *outputs.at(t, row) = _mm512_reduce_add_ps(_mm512_zextps256_ps512(totals[t])) * product_scale(quant);
}

// A row at a time: from memory, two rows side by side took twice as long.
template <Quant quant, int tokens>
bool multiply_picked(const SparseMatrix& matrix, const QuantizedActivations& from, Outputs outputs, Rows rows) {
    const uint8_t* inputs = arrange_inputs(from, tokens);
    if (!inputs) return false;

    fetch_first(matrix, rows.begin);
    for (int64_t row = rows.begin; row < rows.end; row++)
        multiply_row_of_picked<quant, tokens>(matrix, row, from, inputs, outputs);
    return true;
}

// Which of the 64 weights of chunk `chunk` of a group are stored.
inline uint64_t mask_of_places(int chunk, const uint8_t* bits) {
    const __m512i fours = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3));
    const __m512i first = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6));
    const __m512i second = _mm512_add_epi8(first, _mm512_set1_epi8(1));

    const __m512i all =
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bits + chunk / 2 * 16)));
    const __m512i runs = _mm512_inserti64x4(all, _mm256_srli_epi16(_mm512_castsi512_si256(all), 2), 1);
    const __m512i shifted = chunk % 2 ? _mm512_srli_epi16(runs, 4) : runs;
    const __m512i halves = _mm512_permutex_epi64(shifted, 0x50);  // a half of a run is for 16 weights
    const __m512i places = _mm512_and_si512(halves, _mm512_set1_epi8(3));
    return _mm512_cmpeq_epi8_mask(_mm512_shuffle_epi8(places, first), fours) |
           _mm512_cmpeq_epi8_mask(_mm512_shuffle_epi8(places, second), fours);
}

}  // namespace
}  // namespace racdeploy
