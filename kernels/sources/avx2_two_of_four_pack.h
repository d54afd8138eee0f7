// AVX2: ggml's blocks of Q8_0 and Q4_0 -> the pattern two_of_four.
#pragma once
#include <immintrin.h>

#include <algorithm>

#include "kernels.h"

namespace racdeploy {
namespace {

// Bit i set: weight i of a block is not 0.
template <Quant quant>
inline uint32_t stored_bits(const uint8_t* block) {
    if (quant == Quant::q8_0) {
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 2));
        return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(codes, _mm256_setzero_si256())));
    }
    const __m128i nibbles = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 2));
    const __m128i low = _mm_cmpeq_epi8(_mm_and_si128(nibbles, _mm_set1_epi8(0x0f)), _mm_set1_epi8(0x08));
    const __m128i high = _mm_cmpeq_epi8(_mm_and_si128(nibbles, _mm_set1_epi8(-0x10)), _mm_set1_epi8(-0x80));
    return ~static_cast<uint32_t>(_mm_movemask_epi8(low) | _mm_movemask_epi8(high) << 16);
}

// For each 8 weights of which some are not 0: which 4 are stored, a byte each.
struct StoredFours {
    uint32_t of[256];
    constexpr StoredFours() : of() {
        for (unsigned bits = 0; bits < 256; bits++) {
            const unsigned filled = fill_up_to_two(bits & 15) | fill_up_to_two(bits >> 4) << 4;
            for (unsigned i = 0, n = 0; i < 8 && n < 4; i++)
                if (filled >> i & 1) of[bits] |= i << 8 * n++;
        }
    }
};
constexpr StoredFours stored_fours;

// The 8 codes that a block has in a chunk, a byte each, as values are stored: 0 for the code of zero.
template <Quant quant>
inline uint64_t eight_values(const uint8_t* block, int chunk) {
    if (quant == Quant::q8_0) return load<uint64_t>(block + 2 + 8 * chunk);
    return (load<uint64_t>(block + 2 + chunk % 2 * 8) >> chunk / 2 * 4 & 0x0f0f0f0f0f0f0f0f) ^ 0x0808080808080808;
}

inline __m128i load_16(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
inline void store_16(uint8_t* to, __m128i bytes) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes); }

template <Quant quant>
void pack_fours(const uint8_t* block, int64_t blocks, uint8_t* bits, uint8_t* values) {
    uint8_t stored[group_weights / 2], places[group_weights / 2];
    for (int chunk = 0; chunk < 4; chunk++)
        for (int64_t b = 0; b < 8; b++) {
            const uint64_t eight = b < blocks ? eight_values<quant>(block + b * block_bytes(quant), chunk) : 0;
            const __m128i codes = _mm_cvtsi64_si128(static_cast<int64_t>(eight));
            const int zeros = _mm_movemask_epi8(_mm_cmpeq_epi8(codes, _mm_setzero_si128()));
            const uint32_t four = stored_fours.of[~zeros & 255], in_fours = four & 0x03030303;
            const __m128i picked = _mm_shuffle_epi8(codes, _mm_cvtsi32_si128(static_cast<int>(four)));
            const int bytes = _mm_cvtsi128_si32(picked);
            std::memcpy(stored + 32 * chunk + 4 * b, &bytes, 4);
            std::memcpy(places + 32 * chunk + 4 * b, &in_fours, 4);
        }

    for (int half = 0; half < 2; half++) {
        __m128i all = _mm_setzero_si128();
        for (int run = 0; run < 4; run++)
            all = _mm_or_si128(all, _mm_slli_epi16(load_16(places + 64 * half + 16 * run), 2 * run));
        store_16(bits + 16 * half, all);
    }

    if (quant == Quant::q8_0) {
        std::memcpy(values, stored, sizeof(stored));
        return;
    }
    for (int i = 0; i < 64; i += 16)
        store_16(values + i, _mm_or_si128(load_16(stored + i), _mm_slli_epi16(load_16(stored + 64 + i), 4)));
}

template <Quant quant>
void pack_two_of_four(const Blocks& blocks, const int64_t* offsets, uint8_t* heads, uint8_t* values, Rows rows) {
    const int64_t row_heads = heads_bytes(quant, blocks.columns), count = blocks.columns / block_weights;
    for (int64_t r = rows.begin; r < rows.end; r++) {
        uint8_t *head = heads + r * row_heads, *to = values + offsets[r];
        const uint8_t* block = blocks.row(r);
        std::memset(head, 0, static_cast<size_t>(row_heads));
        for (int64_t b = 0; b < count; b += 8) {
            const int64_t here = std::min<int64_t>(8, count - b);
            for (int64_t i = 0; i < here; i++) std::memcpy(head + 2 * i, block + i * block_bytes(quant), 2);
            pack_fours<quant>(block, here, head + head_bytes(quant) - 32, to);
            head += head_bytes(quant);
            to += group_values_bytes(quant);
            block += 8 * block_bytes(quant);
        }
    }
}

}  // namespace
}  // namespace racdeploy
