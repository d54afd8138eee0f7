// AVX-512: ggml's blocks -> packed, and activations as the kernels want them.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <type_traits>

#include "kernels.h"

namespace racdeploy {
namespace {

inline int64_t popcount(uint64_t bits) { return __builtin_popcountll(bits); }

// Chunk `chunk` of a group of `blocks` blocks, as unsigned codes: the zero point where there is no block.
template <Quant quant>
inline __m512i chunk_codes(const uint8_t* group, int64_t blocks, int chunk) {
    const uint8_t* from = group + 2 + 8 * (quant == Quant::q8_0 ? chunk : chunk % 2);
    int64_t eights[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        eights[i] = i < blocks             ? load<int64_t>(from + i * block_bytes(quant))
                    : quant == Quant::q8_0 ? 0
                                           : 0x8888888888888888;
    const __m512i codes =
        _mm512_set_epi64(eights[7], eights[6], eights[5], eights[4], eights[3], eights[2], eights[1], eights[0]);
    if (quant == Quant::q8_0) return _mm512_xor_si512(codes, _mm512_set1_epi8(static_cast<char>(0x80)));
    return _mm512_and_si512(chunk < 2 ? codes : _mm512_srli_epi16(codes, 4), _mm512_set1_epi8(15));
}

// Calls run(group, blocks) for each group of a row; blocks is known when compiled where there are 8.
template <typename Run>
inline void over_groups(int64_t columns, const Run& run) {
    int64_t group = 0;
    for (; (group + 1) * group_weights <= columns; group++) run(group, std::integral_constant<int64_t, 8>());
    if (columns % group_weights) run(group, columns % group_weights / block_weights);
}

template <Quant quant>
inline uint64_t stored_mask(__m512i codes) {
    return _mm512_cmpneq_epi8_mask(codes, _mm512_set1_epi8(static_cast<char>(zero_point(quant))));
}

inline uint32_t stored_mask_16(__m512i values) { return _mm512_test_epi16_mask(values, values); }

template <Quant quant>
void count_quantized(const Blocks& blocks, int64_t* counts, Rows rows) {
    for (int64_t r = rows.begin; r < rows.end; r++) {
        const uint8_t* row = blocks.row(r);
        int64_t stored[2] = {0, 0};
        over_groups(blocks.columns, [&](int64_t group, auto count) {
            const uint8_t* from = row + 8 * group * block_bytes(quant);
#pragma GCC unroll 4
            for (int chunk = 0; chunk < 4; chunk++)
                stored[chunk / 2] += popcount(stored_mask<quant>(chunk_codes<quant>(from, count, chunk)));
        });
        counts[r] = values_bytes(quant, stored[0], stored[1]);
    }
}

void count_floats(const Blocks& blocks, int64_t* counts, Rows rows) {
    for (int64_t r = rows.begin; r < rows.end; r++) {
        int64_t stored = 0;
        for (int64_t column = 0; column < blocks.columns; column += 32)
            stored += popcount(stored_mask_16(_mm512_loadu_si512(blocks.row(r) + column * 2)));
        counts[r] = stored * 2;
    }
}

void count(const Blocks& blocks, int64_t* counts, Rows rows) {
    const auto run = blocks.quant == Quant::q8_0   ? count_quantized<Quant::q8_0>
                     : blocks.quant == Quant::q4_0 ? count_quantized<Quant::q4_0>
                                                   : count_floats;
    run(blocks, counts, rows);
}

// Writes chunks [from, to) of every group of a row: masks, and values; those of Q4_0 into the low or the high bits.
template <Quant quant, int from, int to>
void pack_chunks(const uint8_t* row, int64_t columns, uint8_t* heads, uint8_t* values) {
    over_groups(columns, [&](int64_t group, auto count) {
        uint8_t* masks = heads + group * head_bytes(quant) + 16;
#pragma GCC unroll 4
        for (int chunk = from; chunk < to; chunk++) {
            const __m512i codes = chunk_codes<quant>(row + 8 * group * block_bytes(quant), count, chunk);
            const uint64_t mask = stored_mask<quant>(codes);
            std::memcpy(masks + 8 * chunk, &mask, 8);

            const uint64_t first = _bzhi_u64(~uint64_t{0}, static_cast<unsigned>(popcount(mask)));
            __m512i stored = _mm512_maskz_compress_epi8(mask, codes);
            if (quant == Quant::q4_0) {  // beside the other half's values, which share the bytes
                if (chunk >= 2) stored = _mm512_slli_epi16(stored, 4);
                stored = _mm512_or_si512(stored, _mm512_maskz_loadu_epi8(first, values));
            }
            _mm512_mask_storeu_epi8(values, first, stored);
            values += popcount(mask);
        }
    });
}

template <Quant quant>
void pack_quantized(const Blocks& blocks, const int64_t* offsets, uint8_t* heads, uint8_t* values, Rows rows) {
    const int64_t columns = blocks.columns, row_heads = heads_bytes(quant, columns);
    for (int64_t r = rows.begin; r < rows.end; r++) {
        const uint8_t* row = blocks.row(r);
        uint8_t* head = heads + r * row_heads;
        uint8_t* to = values + offsets[r];

        std::memset(head, 0, static_cast<size_t>(row_heads));
        for (int64_t block = 0; block < columns / block_weights; block++)
            std::memcpy(head + block / 8 * head_bytes(quant) + block % 8 * 2, row + block * block_bytes(quant), 2);

        if (quant == Quant::q8_0) {
            pack_chunks<quant, 0, 4>(row, columns, head, to);
        } else {
            std::memset(to, 0, static_cast<size_t>(offsets[r + 1] - offsets[r]));
            pack_chunks<quant, 0, 2>(row, columns, head, to);
            pack_chunks<quant, 2, 4>(row, columns, head, to);
        }
    }
}

void pack_floats(const Blocks& blocks, const int64_t* offsets, uint8_t* heads, uint8_t* values, Rows rows) {
    const int64_t row_heads = heads_bytes(blocks.quant, blocks.columns);
    for (int64_t r = rows.begin; r < rows.end; r++) {
        const uint8_t* row = blocks.row(r);
        uint8_t* masks = heads + r * row_heads;
        uint8_t* to = values + offsets[r];

        std::memset(masks, 0, static_cast<size_t>(row_heads));
        for (int64_t column = 0; column < blocks.columns; column += 32) {
            const __m512i from = _mm512_loadu_si512(row + column * 2);
            const uint32_t mask = stored_mask_16(from);
            std::memcpy(masks + column / 8, &mask, 4);
            const int64_t stored = popcount(mask);
            _mm512_mask_storeu_epi16(to, _bzhi_u32(~0u, static_cast<unsigned>(stored)),
                                     _mm512_maskz_compress_epi16(mask, from));
            to += stored * 2;
        }
    }
}

void pack(const Blocks& blocks, const int64_t* offsets, uint8_t* heads, uint8_t* values, Rows rows) {
    const auto run = blocks.quant == Quant::q8_0   ? pack_quantized<Quant::q8_0>
                     : blocks.quant == Quant::q4_0 ? pack_quantized<Quant::q4_0>
                                                   : pack_floats;
    run(blocks, offsets, heads, values, rows);
}

// ---- inputs ----

template <Quant quant>
void prepare_quantized(int64_t columns, int64_t tokens, int64_t token, const float* activation, void* workspace) {
    const QuantizedActivations to(columns, tokens, workspace);
    const int64_t start = token * to.padded_columns;
    const __m256i zeros = _mm256_set1_epi8(static_cast<char>(zero_point(quant)));
    for (int64_t column = 0; column < to.padded_columns; column += block_weights) {
        const int64_t at = start + column;
        __m256i codes = _mm256_setzero_si256();
        float scale = 0;
        if (column < columns) {
            const __m512 low = _mm512_loadu_ps(activation + column), high = _mm512_loadu_ps(activation + column + 16);
            const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
            const __m512 inverse = _mm512_set1_ps(largest != 0 ? 127.0f / largest : 0);
            const __m128i first = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(low, inverse)));
            const __m128i second = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(high, inverse)));
            codes = _mm256_set_m128i(second, first);
            scale = _cvtsh_ss(_cvtss_sh(largest / 127.0f, 0));
        }

        // Eight codes each go to the block's place in the four chunks.
        int8_t* place = to.codes + place_in_chunks(at);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(place), _mm256_castsi256_si128(codes));
        _mm_storeh_pd(reinterpret_cast<double*>(place + 64), _mm_castsi128_pd(_mm256_castsi256_si128(codes)));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(place + 128), _mm256_extracti128_si256(codes, 1));
        _mm_storeh_pd(reinterpret_cast<double*>(place + 192), _mm_castsi128_pd(_mm256_extracti128_si256(codes, 1)));

        // A lane has 4 of every 8 codes: a product sums 4 of them, and two additions the fours of a lane.
        const __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), zeros, codes);
        const __m128i of_16 = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        const __m128i offsets = _mm_sub_epi32(_mm_setzero_si128(), _mm_add_epi32(of_16, _mm_srli_si128(of_16, 8)));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to.lane_offsets + at / 16), offsets);
        to.block_offsets[at / block_weights] = _mm_cvtsi128_si32(offsets) + _mm_extract_epi32(offsets, 1);
        to.scales[at / block_weights] = scale;
    }
}

void prepare(Quant quant, int64_t columns, int64_t tokens, int64_t token, const float* activation, void* workspace) {
    if (quant == Quant::q8_0) return prepare_quantized<Quant::q8_0>(columns, tokens, token, activation, workspace);
    if (quant == Quant::q4_0) return prepare_quantized<Quant::q4_0>(columns, tokens, token, activation, workspace);
    if (quant == Quant::bf16) return portable::prepare(quant, columns, tokens, token, activation, workspace);
    float* inputs = static_cast<float*>(workspace) + token * padded(columns);
    for (int64_t column = 0; column < padded(columns); column += 16) {
        const __m512 from = column < columns ? _mm512_loadu_ps(activation + column) : _mm512_setzero_ps();
        _mm512_storeu_ps(inputs + column, _mm512_cvtph_ps(_mm512_cvtps_ph(from, _MM_FROUND_TO_NEAREST_INT)));
    }
}

}  // namespace
}  // namespace racdeploy
