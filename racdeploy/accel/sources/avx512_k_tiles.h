// Q3_K and Q6_K at 2:4 with AVX-512, many tokens: 16 rows are spread into a tile, which every token then uses.
#pragma once
#include "avx512_k_quants.h"
#include "avx512_tiles.h"

namespace racdeploy {
namespace {

constexpr int64_t k_fours = group_weights / 4;

// Sixteen rows, a dword each: for every four weights of a group the signed codes, for every sub-block the scales, and
// what all products of the group are too large by, since 128 is added to the inputs; then the scales of the groups.
struct KTileGroup {
    __m512i fours[k_fours], scales[k_sub_blocks], surplus;
    __m512 scale;
};

// The inputs of some tokens, 128 added.
inline void add_128(const KActivations& from, int64_t tokens, uint8_t* to) {
    for (int64_t i = 0; i < tokens * from.columns; i += 64)
        _mm512_store_si512(to + i, _mm512_xor_si512(_mm512_loadu_si512(from.codes + i), _mm512_set1_epi8(-128)));
}

// The 64 weights of a run as signed codes, in the order of its codes.
template <Quant quant>
inline __m512i spread_run(const KGroup<quant>& group, __m512i codes, int run) {
    const __m512i which = run % 2 ? _mm512_srli_epi16(codes, 4) : codes;
    const __m512i first = _mm512_setr_epi32(0, 0x02020202, 0x04040404, 0x06060606, 0x08080808, 0x0a0a0a0a, 0x0c0c0c0c,
                                            0x0e0e0e0e, 0x10101010, 0x12121212, 0x14141414, 0x16161616, 0x18181818,
                                            0x1a1a1a1a, 0x1c1c1c1c, 0x1e1e1e1e);
    const __m512i index = _mm512_add_epi8(first, _mm512_set1_epi8(static_cast<char>(run / 2 * 32)));
    const __m512i code = _mm512_and_si512(_mm512_permutexvar_epi8(index, which), _mm512_set1_epi8(7));
    const __m512i masks = in_all_lanes(k_tables.masks);
    const __mmask64 stored = _mm512_test_epi8_mask(_mm512_shuffle_epi8(masks, code), _mm512_set1_epi32(0x08040201));

    const __m512i values = group.values.of[run % 2], zeros = _mm512_set1_epi8(static_cast<char>(k_zero_point(quant)));
    const __m512i of_run = run / 2 ? _mm512_shuffle_i64x2(values, values, 0xee) : values;
    return _mm512_maskz_expand_epi8(stored, _mm512_sub_epi8(of_run, zeros));
}

template <Quant quant>
void spread_k_tile(const SparseMatrix& matrix, int64_t row, int64_t rows, KTileGroup* tile) {
    const KConstants constants(quant);
    const int64_t bytes = matrix.offsets[1], group_bytes = k_parts(quant).bytes;
    for (int64_t g = 0; g < groups(matrix.columns); g++, tile++) {
        alignas(64) float scales[tile_rows] = {};
        alignas(64) int32_t surplus[tile_rows] = {};
        __m512i lines[k_runs][tile_rows];
        for (int64_t r = 0; r < tile_rows; r++) {
            tile->scales[r] = _mm512_setzero_si512();
            for (auto& line : lines) line[r] = _mm512_setzero_si512();
            if (r >= rows) continue;

            const uint8_t* packed = matrix.values + (row + r) * bytes + g * group_bytes;
            const KGroup<quant> group(packed, constants);
            const __m512i codes = KPicks::codes_of(packed + k_parts(quant).places, constants);
            tile->scales[r] = group.scales;
            scales[r] = group.scale;

            __m512i sums[2] = {};  // of runs 0 and 1, and of runs 2 and 3: two lanes for each sub-block
            for (int run = 0; run < k_runs; run++) {
                lines[run][r] = spread_run<quant>(group, codes, run);
                sums[run / 2] = _mm512_dpbusd_epi32(sums[run / 2], _mm512_set1_epi8(-128), lines[run][r]);
            }
            const __m512i pairs_first = _mm512_add_epi32(sums[0], _mm512_srli_epi64(sums[0], 32));
            const __m512i pairs_second = _mm512_add_epi32(sums[1], _mm512_srli_epi64(sums[1], 32));
            const __m512i of_sub_blocks = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(pairs_first)),
                                                             _mm512_cvtepi64_epi32(pairs_second), 1);
            surplus[r] = _mm512_reduce_add_epi32(_mm512_mullo_epi32(of_sub_blocks, group.scales));
        }

        transpose_16(tile->scales);
        for (int run = 0; run < k_runs; run++) {
            transpose_16(lines[run]);
            std::copy_n(lines[run], k_run_codes, tile->fours + run * k_run_codes);
        }
        tile->surplus = _mm512_load_si512(surplus);
        tile->scale = _mm512_load_ps(scales);
    }
}

template <int tokens>
[[gnu::always_inline]] inline void multiply_k_tile(const KTileGroup* tile, const KActivations& from,
                                                   const uint8_t* inputs, int64_t token, float* output,
                                                   int64_t output_stride, __mmask16 rows) {
    const int64_t row_groups = groups(from.columns), step = from.columns;
    inputs += token * step;
    __m512 totals[tokens];
    for (auto& total : totals) total = _mm512_setzero_ps();
    for (int64_t g = 0; g < row_groups; g++, tile++, inputs += group_weights) {
        __m512i sums[tokens];
        for (auto& sum : sums) sum = _mm512_sub_epi32(_mm512_setzero_si512(), tile->surplus);
#pragma GCC unroll 1
        for (int i = 0; i < k_sub_blocks; i++) {  // in the order of the scales: 0 to 3, 8 to 11, and the others
            const int run = i / 8 * 2, code = i % 8 * 2;
            __m512i products[tokens] = {};
#pragma GCC unroll 4
            for (int four = 0; four < 4; four++) {  // two of either run
                const int64_t place = k_place_of_code(code + four % 2) + (run + four / 2) * k_run_weights;
                const __m512i weights = tile->fours[(run + four / 2) * k_run_codes + code + four % 2];
#pragma GCC unroll 8
                for (int t = 0; t < tokens; t++) {
                    const __m512i codes = _mm512_set1_epi32(load<int32_t>(inputs + t * step + place));
                    products[t] = _mm512_dpbusd_epi32(products[t], codes, weights);
                }
            }
            const __m512i scales = tile->scales[i];
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++)
                sums[t] = _mm512_add_epi32(sums[t], _mm512_mullo_epi32(products[t], scales));
        }
        for (int t = 0; t < tokens; t++) {
            const __m512 both = _mm512_mul_ps(tile->scale, _mm512_set1_ps(from.scales[(token + t) * row_groups + g]));
            totals[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t]), both, totals[t]);
        }
    }
    for (int t = 0; t < tokens; t++) _mm512_mask_storeu_ps(output + t * output_stride, rows, totals[t]);
}

template <Quant quant>
bool multiply_k_by_tile(const SparseMatrix& matrix, int64_t tokens, const KActivations& from, Outputs outputs,
                        Rows rows) {
    const int64_t tile_bytes = groups(matrix.columns) * static_cast<int64_t>(sizeof(KTileGroup));
    auto* memory = static_cast<uint8_t*>(scratch_of_thread(tile_bytes + tokens * matrix.columns));
    if (!memory) return false;

    auto* tile = reinterpret_cast<KTileGroup*>(memory);
    const uint8_t* inputs = memory + tile_bytes;
    add_128(from, tokens, memory + tile_bytes);
    over_tiles(
        tokens, rows, [&](int64_t row, int64_t count) { spread_k_tile<quant>(matrix, row, count, tile); },
        [&](int64_t row, int64_t t, auto known, __mmask16 mask) {
            multiply_k_tile<known.value>(tile, from, inputs, t, outputs.at(t, row), outputs.stride, mask);
        });
    return true;
}

void multiply_k_quant(const SparseMatrix& matrix, int64_t tokens, const void* workspace, Outputs outputs, Rows rows) {
    const KActivations from(matrix.columns, tokens, const_cast<void*>(workspace));
    const bool q3_k = matrix.quant == Quant::q3_k;
    const auto by_tile = q3_k ? multiply_k_by_tile<Quant::q3_k> : multiply_k_by_tile<Quant::q6_k>;
    const bool in_tiles = tokens > 4 && matrix.pattern == Pattern::two_of_four;
    if (in_tiles && by_tile(matrix, tokens, from, outputs, rows)) return;

    multiply_k_matrix<KRow>(matrix, tokens, workspace, outputs, rows);
}

}  // namespace
}  // namespace racdeploy
