// AVX-512, many tokens: 16 rows are spread and transposed into a tile, 8 tokens at a time use it.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <type_traits>

#include "kernels.h"

namespace racdeploy {
namespace {

constexpr int64_t tile_rows = 16;
// As many tokens as keep both multipliers busy: a product waits 4 cycles for the one before.
constexpr int tile_tokens = 8;

// Dword d of row r becomes dword r of column d.
inline void transpose_16(__m512i (&rows)[16]) {
    __m512i pairs[16], quads[16];
    for (int i = 0; i < 8; i++) {
        pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }

    for (int i = 0; i < 4; i++)
        for (int half = 0; half < 2; half++) {
            quads[4 * i + 2 * half] = _mm512_unpacklo_epi64(pairs[4 * i + half], pairs[4 * i + 2 + half]);
            quads[4 * i + 2 * half + 1] = _mm512_unpackhi_epi64(pairs[4 * i + half], pairs[4 * i + 2 + half]);
        }

    for (int c = 0; c < 4; c++) {  // lane l of quads[4i + c]: column 4l + c of rows 4i to 4i + 3
        const __m512i even = _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(quads[8 + c], quads[12 + c], 0x88);
        const __m512i odd_high = _mm512_shuffle_i32x4(quads[8 + c], quads[12 + c], 0xdd);
        rows[c] = _mm512_shuffle_i32x4(even, even_high, 0x88);
        rows[8 + c] = _mm512_shuffle_i32x4(even, even_high, 0xdd);
        rows[4 + c] = _mm512_shuffle_i32x4(odd, odd_high, 0x88);
        rows[12 + c] = _mm512_shuffle_i32x4(odd, odd_high, 0xdd);
    }
}

// Calls run with a std::integral_constant of `count`, from 1 to `most`.
template <int most, typename Run>
inline void with_count(int64_t count, const Run& run) {
    if constexpr (most > 1)
        if (count < most) return with_count<most - 1>(count, run);
    run(std::integral_constant<int, most>());
}

// Spread 16 rows at a time into a tile, which every token then uses: calls spread(row, rows) and
// multiply(row, token, tokens, mask of the rows); how many tokens is known when compiled.
template <typename Spread, typename Multiply>
[[gnu::always_inline]] inline void over_tiles(int64_t tokens, Rows rows, const Spread& spread,
                                              const Multiply& multiply) {
    for (int64_t row = rows.begin; row < rows.end; row += tile_rows) {
        const int64_t count = std::min(rows.end - row, tile_rows);
        const __mmask16 mask = static_cast<__mmask16>((1 << count) - 1);
        spread(row, count);
        for (int64_t t = 0; t < tokens; t += tile_tokens)
            with_count<tile_tokens>(std::min<int64_t>(tokens - t, tile_tokens),
                                    [&](auto known) { multiply(row, t, known, mask); });
    }
}

}  // namespace
}  // namespace racdeploy
