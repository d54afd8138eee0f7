// AVX2: ggml's blocks -> packed, and activations as the kernels want them.
#pragma once
#include <algorithm>

#include "avx2_spread.h"
#include "avx2_two_of_four_pack.h"

namespace racdeploy {
namespace {

// For each 8 mask bits, which of 8 bytes are stored, in their order.
struct Compressions {
    uint64_t of[256];
    constexpr Compressions() : of() {
        for (unsigned bits = 0; bits < 256; bits++)
            for (unsigned i = 0, n = 0; i < 8; i++)
                if (bits >> i & 1) of[bits] |= uint64_t{i} << 8 * n++;
    }
};
constexpr Compressions compressions;

template <Quant quant>
void count_unstructured(const Blocks& blocks, int64_t* counts, Rows rows) {
    for (int64_t r = rows.begin; r < rows.end; r++) {
        int64_t stored[2] = {0, 0};
        const uint8_t *block = blocks.row(r), *end = block + row_bytes(quant, blocks.columns);
        for (; block < end; block += block_bytes(quant)) {
            const uint32_t bits = stored_bits<quant>(block);
            stored[0] += popcount(bits & 0xffff);
            stored[1] += popcount(bits >> 16);
        }
        counts[r] = values_bytes(quant, stored[0], stored[1]);
    }
}

// A row's values, a byte each, into the streams of its first and second chunks; one stream for Q8_0. Eight bytes are
// written at a time.
template <Quant quant>
void compress_row(const uint8_t* row, int64_t columns, uint8_t* head, uint8_t* (&streams)[2]) {
    for (int64_t column = 0; column < columns; column += group_weights, head += head_bytes(quant)) {
        const int64_t blocks = std::min<int64_t>(8, (columns - column) / block_weights);
        uint32_t stored[8];
        for (int64_t b = 0; b < blocks; b++) {
            const uint8_t* block = row + (column / block_weights + b) * block_bytes(quant);
            std::memcpy(head + 2 * b, block, 2);
            stored[b] = stored_bits<quant>(block);
        }

        for (int chunk = 0; chunk < 4; chunk++) {
            uint8_t*& to = streams[quant == Quant::q4_0 ? chunk / 2 : 0];
            for (int64_t b = 0; b < blocks; b++) {
                const uint8_t* codes = row + (column / block_weights + b) * block_bytes(quant) + 2;
                uint64_t eight = load<uint64_t>(codes + 8 * (quant == Quant::q8_0 ? chunk : chunk % 2));
                if (quant == Quant::q8_0)
                    eight ^= 0x8080808080808080;
                else
                    eight = eight >> chunk / 2 * 4 & 0x0f0f0f0f0f0f0f0f;

                const uint8_t bits = static_cast<uint8_t>(stored[b] >> 8 * chunk);
                head[16 + 8 * chunk + b] = bits;
                const __m128i order = _mm_cvtsi64_si128(static_cast<int64_t>(compressions.of[bits]));
                const __m128i values = _mm_shuffle_epi8(_mm_cvtsi64_si128(static_cast<int64_t>(eight)), order);
                _mm_storel_epi64(reinterpret_cast<__m128i*>(to), values);
                to += popcount(bits);
            }
        }
    }
}

template <Quant quant>
void pack_unstructured(const Blocks& blocks, const int64_t* offsets, uint8_t* heads, uint8_t* values, Rows rows) {
    // Next to a row's place may be one that another thread writes: values are put together elsewhere.
    const int64_t row_heads = heads_bytes(quant, blocks.columns), room = padded(blocks.columns) + 8;
    auto* memory = static_cast<uint8_t*>(scratch_of_thread(2 * room));
    if (!memory) return portable::pack(blocks, offsets, heads, values, rows);

    for (int64_t r = rows.begin; r < rows.end; r++) {
        uint8_t *head = heads + r * row_heads, *ends[2] = {memory, memory + room};
        const int64_t bytes = offsets[r + 1] - offsets[r];
        std::memset(head, 0, static_cast<size_t>(row_heads));
        compress_row<quant>(blocks.row(r), blocks.columns, head, ends);

        uint8_t* to = values + offsets[r];
        if (quant == Quant::q8_0) {
            std::memcpy(to, memory, static_cast<size_t>(bytes));
            continue;
        }
        std::fill(ends[0], std::max(ends[0], memory + bytes), uint8_t{0});
        std::fill(ends[1], std::max(ends[1], memory + room + bytes), uint8_t{0});
        for (int64_t i = 0; i < bytes; i++) to[i] = static_cast<uint8_t>(memory[i] | memory[room + i] << 4);
    }
}

void count(const Blocks& blocks, int64_t* counts, Rows rows) {
    const auto run = blocks.pattern != Pattern::unstructured ? portable::count
                     : blocks.quant == Quant::q8_0           ? count_unstructured<Quant::q8_0>
                     : blocks.quant == Quant::q4_0           ? count_unstructured<Quant::q4_0>
                                                             : portable::count;
    run(blocks, counts, rows);
}

void pack(const Blocks& blocks, const int64_t* offsets, uint8_t* heads, uint8_t* values, Rows rows) {
    const bool fours = blocks.pattern == Pattern::two_of_four, q4_0 = blocks.quant == Quant::q4_0;
    const auto run = !is_quantized(blocks.quant) ? portable::pack
                     : fours ? (q4_0 ? pack_two_of_four<Quant::q4_0> : pack_two_of_four<Quant::q8_0>)
                             : (q4_0 ? pack_unstructured<Quant::q4_0> : pack_unstructured<Quant::q8_0>);
    run(blocks, offsets, heads, values, rows);
}

// ---- inputs ----

void prepare_quantized(Quant quant, int64_t columns, int64_t tokens, int64_t token, const float* activation,
                       void* workspace) {
    const QuantizedActivations to(columns, tokens, workspace);
    for (int64_t column = 0; column < to.padded_columns; column += block_weights) {
        const int64_t at = token * to.padded_columns + column;
        __m256 inputs[4];
        __m256 magnitudes = _mm256_setzero_ps();
        for (int i = 0; i < 4; i++) {
            inputs[i] = column < columns ? _mm256_loadu_ps(activation + column + 8 * i) : _mm256_setzero_ps();
            magnitudes = _mm256_max_ps(magnitudes, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), inputs[i]));
        }
        const float largest = largest_of(magnitudes);
        const __m256 inverse = _mm256_set1_ps(largest != 0 ? 127.0f / largest : 0);

        __m128i sums = _mm_setzero_si128();  // two lanes have 4 each of every 8 codes
        for (int i = 0; i < 4; i++) {
            const __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(inputs[i], inverse));
            const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(to.codes + place_in_chunks(at) + chunk_weights * i),
                             _mm_packs_epi16(words, words));
            const __m128i pairs = _mm_madd_epi16(words, _mm_set1_epi16(1));
            sums = _mm_add_epi32(sums, _mm_hadd_epi32(pairs, pairs));
        }

        const __m128i offsets = _mm_mullo_epi32(sums, _mm_set1_epi32(-zero_point(quant)));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to.lane_offsets + at / 16), offsets);
        to.block_offsets[at / block_weights] = _mm_cvtsi128_si32(offsets) + _mm_extract_epi32(offsets, 1);
        to.scales[at / block_weights] = _cvtsh_ss(_cvtss_sh(largest / 127.0f, 0));
    }
}

void prepare(Quant quant, int64_t columns, int64_t tokens, int64_t token, const float* activation, void* workspace) {
    const auto run = is_quantized(quant) ? prepare_quantized : portable::prepare;
    run(quant, columns, tokens, token, activation, workspace);
}

}  // namespace
}  // namespace racdeploy
