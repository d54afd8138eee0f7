// AVX2: products of 2:4 weights in Q8_0 and Q4_0. Inputs are picked for the stored values, in place of weights that are
// spread for all inputs.
//
// A register has two runs of 16 values. A lane is a run: its values are 2 of every 4 of 32 weights, so values 0 to 7
// take the first 16 inputs of the run and values 8 to 15 the others.
//
// The 32 values of two runs are 4 of each of the 8 blocks of a group, in their order: the sums of a register's lanes of
// 32 bits are those of the blocks.
#pragma once
#include "avx2_spread.h"

namespace racdeploy {
namespace {

// The inputs of some tokens, a byte each: of every two runs the first half of each run's, then the second halves. Null
// if there is no memory. Where the caller wants it, as for VPDPBUSD, they are unsigned: 128 is added to them.
template <bool is_unsigned>
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

// How the products are summed up. Without VPDPBUSD those of Q4_0 fit into 16 bits: inputs have 128 added to them, and
// what that makes too much is 128 times the weights' sum, of which 4 fit into a byte.
template <Quant quant>
struct PickedSums {
    static constexpr bool is_short = quant == Quant::q4_0 && !vnni;
    // Codes of Q4_0 in the upper half of a byte need nothing to move their sign; products are then 16 times too large.
    static constexpr float product_scale = quant == Quant::q4_0 && vnni ? 1.0f / 16 : 1.0f;

    static inline __m256i add(__m256i sums, __m256i weights, __m256i inputs) {
        if (is_short) return _mm256_add_epi16(sums, _mm256_maddubs_epi16(inputs, weights));
        return add_picked(sums, weights, inputs);
    }
    static inline __m256i add_weights(__m256i surplus, __m256i weights) {
        return is_short ? _mm256_add_epi8(surplus, weights) : add_surplus(surplus, weights);
    }
    static inline __m256i whole(__m256i sums, __m256i surplus) {
        if (!is_short) return _mm256_sub_epi32(sums, surplus);
        const __m256i added = _mm256_maddubs_epi16(_mm256_set1_epi8(-0x80), surplus);
        return _mm256_madd_epi16(_mm256_sub_epi16(sums, added), _mm256_set1_epi16(1));
    }
};

// The values of runs 2 * pair and 2 * pair + 1 of a group.
template <Quant quant>
inline __m256i values_of_pair(int pair, const uint8_t* group) {
    if (quant == Quant::q8_0) return load_256(group + 32 * pair);
    const __m256i bytes = load_256(group + 32 * (pair % 2));
    if (vnni) return _mm256_and_si256(pair < 2 ? _mm256_slli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(-0x10));

    const __m256i codes = in_both_lanes(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
    const __m256i nibbles = pair < 2 ? bytes : _mm256_srli_epi16(bytes, 4);
    return _mm256_shuffle_epi8(codes, _mm256_and_si256(nibbles, _mm256_set1_epi8(15)));
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

        __m256i sums[tokens], surplus = _mm256_setzero_si256();
        for (auto& sum : sums) sum = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int pair = 0; pair < 4; pair++) {
            const __m256i bits = in_both_lanes(load_128(mask_of(quant, head) + pair / 2 * 16));
            const __m256i places = pair % 2 ? places_in_16<2>(bits) : places_in_16<0>(bits);
            const __m256i weights = values_of_pair<quant>(pair, values);
            surplus = PickedSums<quant>::add_weights(surplus, weights);
#pragma GCC unroll 2
            for (int t = 0; t < tokens; t++) {
                const uint8_t* of_pair = inputs + t * padded_columns + column + chunk_weights * pair;
                sums[t] = PickedSums<quant>::add(sums[t], weights, pick(of_pair, places));
            }
        }

        const __m256 weight_scales = _mm256_cvtph_ps(load_128(head));
        for (int t = 0; t < tokens; t++) {
            const float* input_scales = from.scales + (t * padded_columns + column) / block_weights;
            const __m256 scales = _mm256_mul_ps(weight_scales, _mm256_loadu_ps(input_scales));
            const __m256i whole = PickedSums<quant>::whole(sums[t], surplus);
            totals[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), scales, totals[t]);
        }
        head += head_bytes(quant);
        values += group_values_bytes(quant);
    }

    for (int t = 0; t < tokens; t++) *outputs.at(t, row) = sum_of(totals[t]) * PickedSums<quant>::product_scale;
}

// A row at a time: from memory, two rows side by side took twice as long.
template <Quant quant, int tokens>
bool multiply_picked(const SparseMatrix& matrix, const QuantizedActivations& from, Outputs outputs, Rows rows) {
    const uint8_t* inputs = arrange_inputs<vnni || quant == Quant::q4_0>(from, tokens);
    if (!inputs) return false;

    fetch_first(matrix, rows.begin);
    for (int64_t row = rows.begin; row < rows.end; row++)
        multiply_row_of_picked<quant, tokens>(matrix, row, from, inputs, outputs);
    return true;
}

// ---- the same as dense weights ----

// The 32 weights of run `run` of a group.
template <Quant quant>
inline __m256i spread_run(int run, const uint8_t* head, const uint8_t* group) {
    const __m256i fours = in_both_lanes(_mm_setr_epi8(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3));
    const __m256i first = _mm256_setr_epi8(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6,  //
                                           8, 8, 8, 8, 10, 10, 10, 10, 12, 12, 12, 12, 14, 14, 14, 14);
    const __m256i second = _mm256_add_epi8(first, _mm256_set1_epi8(1));

    const __m256i bits = in_both_lanes(load_128(mask_of(quant, head) + run / 4 * 16));
    const __m256i places = _mm256_and_si256(_mm256_srli_epi16(bits, run % 4 * 2), _mm256_set1_epi8(3));
    __m256i values = in_both_lanes(load_128(group + 16 * (quant == Quant::q4_0 ? run % 4 : run)));
    if (quant == Quant::q4_0)
        values = _mm256_and_si256(run < 4 ? values : _mm256_srli_epi16(values, 4), _mm256_set1_epi8(15));

    const __m256i is_first = _mm256_cmpeq_epi8(_mm256_shuffle_epi8(places, first), fours);
    const __m256i is_second = _mm256_cmpeq_epi8(_mm256_shuffle_epi8(places, second), fours);
    const __m256i weights = _mm256_or_si256(_mm256_and_si256(_mm256_shuffle_epi8(values, first), is_first),
                                            _mm256_and_si256(_mm256_shuffle_epi8(values, second), is_second));
    const __m256i zero = _mm256_set1_epi8(static_cast<char>(zero_point(quant)));
    return Sums<quant>::is_signed ? weights : _mm256_xor_si256(weights, zero);
}

}  // namespace
}  // namespace racdeploy
