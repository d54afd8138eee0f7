// AVX2, Q8_0 and Q4_0: products.
//
// Few tokens: a row at a time, spread and multiplied in registers. Many tokens: 8 rows are spread and transposed into a
// tile that every token then uses.
#pragma once
#include <algorithm>
#include <type_traits>

#include "avx2_spread.h"
#include "avx2_two_of_four.h"

namespace racdeploy {
namespace {

// Where a row's next values are: one stream, or the low and the high bits of Q4_0.
struct Values {
    const uint8_t *low, *high;
    explicit Values(const uint8_t* row = nullptr) : low(row), high(row) {}
};

// Calls run(k, weights) for a group's 8 runs of 32 weights. `places` are those of its first two chunks, and then those
// of the group at `next`: found while the products before them are under way.
template <Quant quant, typename Run>
[[gnu::always_inline]] inline void over_group(const uint8_t* head, const uint8_t* next, Places& places, Values& values,
                                              const Run& run) {
    const uint8_t *first = mask_of(quant, head), *second = first + 16;
    const Places late(second);
    over_runs<quant, false>(first, places, values.low, run);

    const auto run_late = [&](int k, __m256i weights) { run(4 + k, weights); };
    if (quant == Quant::q4_0)
        over_runs<quant, true>(second, late, values.high, run_late);
    else
        over_runs<quant, false>(second, late, values.low, run_late);
    places = Places(mask_of(quant, next));
}

// A group's sums: of blocks 0 to 3 and 4 to 7, two lanes each.
struct GroupSums {
    __m256i halves[2];
};

// `places` are those of the row's first two chunks, and then of the next row's; there is none from `last_head` on.
template <Quant quant, int tokens>
void multiply_row(const SparseMatrix& matrix, int64_t row, const uint8_t* last_head, Places& places,
                  const QuantizedActivations& from, Outputs outputs) {
    const int64_t padded_columns = from.padded_columns;
    const uint8_t* head = matrix.head(row);
    Values values(matrix.values + matrix.offsets[row]);

    __m256 totals[tokens];
    for (auto& total : totals) total = _mm256_setzero_ps();
    for (int64_t column = 0; column < matrix.columns; column += group_weights, head += head_bytes(quant)) {
        fetch_ahead(head, heads_ahead);
        fetch_ahead(values.low, values_ahead);
        if (quant == Quant::q8_0) fetch_ahead(values.low + 64, values_ahead);

        GroupSums sums[tokens];
        for (auto& each : sums) each = {{_mm256_setzero_si256(), _mm256_setzero_si256()}};
        const uint8_t* next = std::min(head + head_bytes(quant), last_head);
        over_group<quant>(head, next, places, values, [&](int k, __m256i weights) {
            const __m256i magnitudes = Sums<quant>::magnitudes(weights);
#pragma GCC unroll 2
            for (int t = 0; t < tokens; t++) {
                __m256i& half = sums[t].halves[k % 2];
                half = Sums<quant>::add(half, weights, magnitudes,
                                        load_256(from.codes + t * padded_columns + column + 32 * k));
            }
        });

        const __m256 weight_scales = _mm256_cvtph_ps(load_128(head));
        for (int t = 0; t < tokens; t++) {
            const int64_t at = t * padded_columns + column;
            const __m256 scales = _mm256_mul_ps(weight_scales, _mm256_loadu_ps(from.scales + at / block_weights));
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                const __m256i lanes = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
                const __m256i blocks = _mm256_add_epi32(lanes, _mm256_set1_epi32(4 * half));
                const __m256i offsets = load_256(from.lane_offsets + at / 16 + 8 * half);
                const __m256i whole = Sums<quant>::whole(sums[t].halves[half], offsets);
                totals[t] =
                    _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), _mm256_permutevar8x32_ps(scales, blocks), totals[t]);
            }
        }
    }

    for (int t = 0; t < tokens; t++) *outputs.at(t, row) = sum_of(totals[t]);
}

template <Quant quant, int tokens>
void multiply_by_row(const SparseMatrix& matrix, const QuantizedActivations& from, Outputs outputs, Rows rows) {
    fetch_first(matrix, rows.begin);

    const uint8_t* last_head = matrix.head(rows.end) - head_bytes(quant);
    Places places(mask_of(quant, matrix.head(rows.begin)));
    for (int64_t row = rows.begin; row < rows.end; row++)
        multiply_row<quant, tokens>(matrix, row, last_head, places, from, outputs);
}

// ---- tiles: many tokens, 8 rows at a time ----

constexpr int64_t tile_rows = 8;
constexpr int tile_tokens = 4;  // their sums, the weights and what is between fit into 16 registers

// For every 4 columns a register of 8 dwords, one a row, and for every block 8 scales.
struct Tile {
    __m256i* quads;  // [padded / 4]
    __m256* scales;  // [padded / 32]
};

// Dword d of row r becomes dword r of column d.
inline void transpose_8(__m256i (&rows)[8]) {
    __m256i pairs[8], quads[8];
    for (int i = 0; i < 4; i++) {
        pairs[2 * i] = _mm256_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++)
        for (int half = 0; half < 2; half++) {
            quads[4 * i + 2 * half] = _mm256_unpacklo_epi64(pairs[4 * i + half], pairs[4 * i + 2 + half]);
            quads[4 * i + 2 * half + 1] = _mm256_unpackhi_epi64(pairs[4 * i + half], pairs[4 * i + 2 + half]);
        }
    for (int c = 0; c < 4; c++) {  // lane l of quads[4i + c]: column 4l + c of rows 4i to 4i + 3
        rows[c] = _mm256_permute2x128_si256(quads[c], quads[4 + c], 0x20);
        rows[4 + c] = _mm256_permute2x128_si256(quads[c], quads[4 + c], 0x31);
    }
}

template <Quant quant, Pattern pattern>
void spread_tile(const SparseMatrix& matrix, int64_t row_begin, int64_t rows, const Tile& tile) {
    Values values[tile_rows];
    Places places[tile_rows];
    for (int64_t r = 0; r < rows; r++) {
        values[r] = Values(matrix.values + matrix.offsets[row_begin + r]);
        places[r] = Places(mask_of(quant, matrix.head(row_begin + r)));
    }

    alignas(32) float scales[8][tile_rows] = {};
    __m256i lines[8][tile_rows] = {};  // by run; of rows that are not there nothing is used
    for (int64_t column = 0; column < matrix.columns; column += group_weights) {
        const bool is_last = column + group_weights >= matrix.columns;
        for (int64_t r = 0; r < rows; r++) {
            const uint8_t* head = matrix.head(row_begin + r) + column / group_weights * head_bytes(quant);
            for (int64_t block = 0; block < 8; block++)
                scales[block][r] = _cvtsh_ss(load<uint16_t>(head + 2 * block));
            if (pattern == Pattern::unstructured) {
                over_group<quant>(head, is_last ? head : head + head_bytes(quant), places[r], values[r],
                                  [&](int k, __m256i weights) { lines[k][r] = weights; });
                continue;
            }
#pragma GCC unroll 8
            for (int run = 0; run < 8; run++) lines[run][r] = spread_run<quant>(run, head, values[r].low);
            values[r].low += group_values_bytes(quant);
        }

        for (int64_t block = 0; block < 8; block++)
            tile.scales[column / block_weights + block] = _mm256_load_ps(scales[block]);
        for (int64_t k = 0; k < 8; k++) {  // weights 8 * (k / 2) and on of blocks 4 * (k % 2) and on
            transpose_8(lines[k]);
            for (int64_t i = 0; i < 8; i++)
                tile.quads[column / 4 + (k % 2 * 4 + i / 2) * 8 + k / 2 * 2 + i % 2] = lines[k][i];
        }
    }
}

template <Quant quant, int tokens>
[[gnu::always_inline]] inline void multiply_tile(const Tile& tile, int64_t columns, const QuantizedActivations& from,
                                                 int64_t token, int64_t row, int64_t rows, Outputs outputs) {
    const int64_t at = token * from.padded_columns, step = from.padded_columns;
    __m256 totals[tokens];
    for (auto& total : totals) total = _mm256_setzero_ps();
    for (int64_t column = 0; column < columns; column += block_weights) {
        const int8_t* inputs = from.codes + place_in_chunks(at + column);
        __m256i sums[tokens];
        for (auto& sum : sums) sum = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int quad = 0; quad < 8; quad++) {
            const __m256i weights = tile.quads[column / 4 + quad], magnitudes = Sums<quant>::magnitudes(weights);
#pragma GCC unroll 4
            for (int t = 0; t < tokens; t++) {
                const int32_t codes = load<int32_t>(inputs + t * step + quad / 2 * chunk_weights + quad % 2 * 4);
                sums[t] = Sums<quant>::add(sums[t], weights, magnitudes, _mm256_set1_epi32(codes));
            }
        }

        for (int t = 0; t < tokens; t++) {
            const int64_t block = (at + t * step + column) / block_weights;
            const __m256i whole = Sums<quant>::whole(sums[t], _mm256_set1_epi32(from.block_offsets[block]));
            const __m256 input_scale = _mm256_set1_ps(from.scales[block]);
            const __m256 scales = _mm256_mul_ps(tile.scales[column / block_weights], input_scale);
            totals[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), scales, totals[t]);
        }
    }

    for (int t = 0; t < tokens; t++) {
        alignas(32) float found[tile_rows];
        _mm256_store_ps(found, totals[t]);
        std::copy_n(found, rows, outputs.at(token + t, row));
    }
}

template <Quant quant, Pattern pattern>
bool multiply_by_tile(const SparseMatrix& matrix, int64_t tokens, const QuantizedActivations& from, Outputs outputs,
                      Rows rows) {
    const int64_t quads = from.padded_columns / 4, blocks = from.padded_columns / block_weights;
    void* memory = scratch_of_thread((quads + blocks) * 32);
    if (!memory) return false;
    auto* rows_of_quads = static_cast<__m256i*>(memory);
    const Tile tile{rows_of_quads, reinterpret_cast<__m256*>(rows_of_quads + quads)};

    for (int64_t row = rows.begin; row < rows.end; row += tile_rows) {
        const int64_t count = std::min(rows.end - row, tile_rows);
        spread_tile<quant, pattern>(matrix, row, count, tile);
        int64_t t = 0;
        for (; t + tile_tokens <= tokens; t += tile_tokens)
            multiply_tile<quant, tile_tokens>(tile, matrix.columns, from, t, row, count, outputs);
        for (; t < tokens; t++) multiply_tile<quant, 1>(tile, matrix.columns, from, t, row, count, outputs);
    }
    return true;
}

template <Quant quant, Pattern pattern>
void multiply_quantized(const SparseMatrix& matrix, int64_t tokens, const void* workspace, Outputs outputs, Rows rows) {
    const QuantizedActivations from(matrix.columns, tokens, const_cast<void*>(workspace));
    const bool unstructured = pattern == Pattern::unstructured;
    if (rows.begin == rows.end) return;
    if (!unstructured && tokens == 1 && multiply_picked<quant, 1>(matrix, from, outputs, rows)) return;
    if (!unstructured && tokens == 2 && multiply_picked<quant, 2>(matrix, from, outputs, rows)) return;
    if (unstructured && tokens == 1)
        multiply_by_row<quant, 1>(matrix, from, outputs, rows);
    else if (unstructured && tokens == 2)
        multiply_by_row<quant, 2>(matrix, from, outputs, rows);
    else if (!multiply_by_tile<quant, pattern>(matrix, tokens, from, outputs, rows))
        portable::multiply(matrix, tokens, workspace, outputs, rows);
}

}  // namespace
}  // namespace racdeploy
