// AVX-512 with VBMI, VBMI2, VNNI and BF16: one instruction spreads stored bytes over their mask.
//
// Weights are unsigned (code + zero point), inputs signed, as VPDPBUSD wants them; what is not stored is the zero point
// itself, so the surplus of a block is the zero point times the sum of its inputs, which `prepare` has taken off
// already.
//
// Few tokens: a row at a time, spread and multiplied in registers. Many tokens: 16 rows are spread and transposed into
// a tile that every token then uses.
#include "kernels.h"

#if defined(__AVX512VBMI2__) && defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__AVX512BF16__) && \
    defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__F16C__)
#include <immintrin.h>

#include <algorithm>
#include <type_traits>

#include "avx512_pack.h"
#include "avx512_tiles.h"
#include "x86_prefetch.h"

namespace racdeploy {
namespace {

// VPEXPANDB from memory is microcoded on Zen 4 and 5; the empty asm keeps gcc from folding the load into it.
inline __m512i load_apart(const void* from) {
    __m512i bytes = _mm512_loadu_si512(from);
    asm("" : "+v"(bytes));
    return bytes;
}

// VPEXPAND into a zeroed register waits on Zen 5 for what the register held before; a zero that gcc cannot see through,
// and so cannot turn into that form, does not.
inline __m512i apart_zero() {
    __m512i zero;
    asm("vpxord %0, %0, %0" : "=v"(zero));
    return zero;
}

// Where a row's next values are: one stream, or the low and the high bits of Q4_0.
struct Values {
    const uint8_t *first, *second;
    explicit Values(const uint8_t* row = nullptr) : first(row), second(row) {}
};

// Stored bytes of chunk `chunk`: in Q4_0 the low or the high bits.
template <Quant quant>
inline __m512i codes_of_chunk(int chunk, __m512i bytes) {
    if (quant == Quant::q8_0) return bytes;
    return _mm512_and_si512(chunk < 2 ? bytes : _mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
}

// 64 weights, chunk `chunk` of a group, as unsigned codes: the zero point where nothing is stored.
template <Quant quant>
inline __m512i spread(int chunk, uint64_t mask, Values& values) {
    const uint8_t*& from = quant == Quant::q4_0 && chunk >= 2 ? values.second : values.first;
    const __m512i codes = codes_of_chunk<quant>(chunk, load_apart(from));
    from += popcount(mask);
    return _mm512_mask_expand_epi8(_mm512_set1_epi8(static_cast<char>(zero_point(quant))), mask, codes);
}

// ---- Q8_0 and Q4_0 ----

// Few tokens: row by row.
//
// A group's four products are summed as integers, each lane within its block, and scaled once. On Zen 4 the mask, its
// spreading and the product of 64 weights alone keep the two multiplying pipes busy for 3.3 cycles; this takes 4.6.
// Rows two or four at a time, which share the inputs, take 4.4 and 4.1 from the cache, and no less from memory.
template <Quant quant, int tokens>
void multiply_row(const SparseMatrix& matrix, int64_t row, const QuantizedActivations& from, Outputs outputs) {
    const __m512i block_of_lane = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const int64_t padded_columns = from.padded_columns;
    const uint8_t* head = matrix.heads + row * heads_bytes(quant, matrix.columns);
    Values values(matrix.values + matrix.offsets[row]);

    __m512 sums[tokens];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (int64_t column = 0; column < matrix.columns; column += group_weights, head += head_bytes(quant)) {
        fetch_ahead(head, heads_ahead);
        fetch_ahead(values.first, values_ahead);
        if (quant == Quant::q8_0) fetch_ahead(values.first + 64, values_ahead);

        __m512i products[tokens];
        for (int t = 0; t < tokens; t++)
            products[t] = _mm512_loadu_si512(from.lane_offsets + (t * padded_columns + column) / 16);
#pragma GCC unroll 4
        for (int chunk = 0; chunk < 4; chunk++) {
            const __m512i weights = spread<quant>(chunk, load<uint64_t>(head + 16 + 8 * chunk), values);
#pragma GCC unroll 2
            for (int t = 0; t < tokens; t++) {
                const int8_t* codes = from.codes + t * padded_columns + column + chunk_weights * chunk;
                products[t] = _mm512_dpbusd_epi32(products[t], weights, _mm512_loadu_si512(codes));
            }
        }

        const __m256 weight_scales = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(head)));
        for (int t = 0; t < tokens; t++) {
            const __m256 input_scales = _mm256_loadu_ps(from.scales + (t * padded_columns + column) / block_weights);
            const __m512 scales = _mm512_castps256_ps512(_mm256_mul_ps(weight_scales, input_scales));
            sums[t] =
                _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[t]), _mm512_permutexvar_ps(block_of_lane, scales), sums[t]);
        }
    }

    for (int t = 0; t < tokens; t++) outputs.first[t * outputs.stride + row] = _mm512_reduce_add_ps(sums[t]);
}

template <Quant quant, int tokens>
void multiply_by_row(const SparseMatrix& matrix, const QuantizedActivations& from, Outputs outputs, Rows rows) {
    fetch_first(matrix, rows.begin);
    for (int64_t row = rows.begin; row < rows.end; row++) multiply_row<quant, tokens>(matrix, row, from, outputs);
}

// Sixteen rows, spread: for every 4 columns a register of 16 dwords, and for every block 16 scales.
struct Tile {
    __m512i* quads;  // [padded / 4]
    __m512* scales;  // [padded / 32]
};

template <Quant quant>
void spread_tile(const SparseMatrix& matrix, int64_t row_begin, int64_t rows, const Tile& tile) {
    const int64_t padded_columns = padded(matrix.columns);
    Values values[tile_rows];
    for (int64_t r = 0; r < rows; r++) values[r] = Values(matrix.values + matrix.offsets[row_begin + r]);
    const int64_t row_heads = heads_bytes(quant, matrix.columns);

    alignas(64) float scales[8][tile_rows] = {};
    for (int64_t column = 0; column < padded_columns; column += group_weights) {
        const uint8_t* head = matrix.heads + row_begin * row_heads + column / group_weights * head_bytes(quant);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t block = 0; block < 8; block++)
                scales[block][r] = _cvtsh_ss(load<uint16_t>(head + r * row_heads + 2 * block));

        for (int64_t block = 0; block < 8; block++)
            tile.scales[column / block_weights + block] = _mm512_load_ps(scales[block]);
#pragma GCC unroll 4
        for (int chunk = 0; chunk < 4; chunk++) {
            __m512i lines[tile_rows];
            for (int64_t r = 0; r < tile_rows; r++) {
                if (r >= rows) {
                    lines[r] = _mm512_setzero_si512();
                    continue;
                }
                const uint8_t* bits = mask_of(quant, head + r * row_heads);
                lines[r] = spread<quant>(chunk, load<uint64_t>(bits + 8 * chunk), values[r]);
            }

            transpose_16(lines);
            for (int64_t i = 0; i < 16; i++)  // weights 8 * chunk and on of block i / 2
                _mm512_store_si512(tile.quads + column / 4 + i / 2 * 8 + chunk * 2 + i % 2, lines[i]);
        }
    }
}

template <int tokens>
[[gnu::always_inline]] inline void multiply_tile(const Tile& tile, int64_t columns, const QuantizedActivations& from,
                                                 int64_t token, float* output, int64_t output_stride, __mmask16 rows) {
    __m512 sums[tokens];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    const int64_t at = token * from.padded_columns, step = from.padded_columns;
    for (int64_t column = 0; column < columns; column += block_weights) {
        const int8_t* inputs = from.codes + place_in_chunks(at + column);
        __m512i products[tokens];
        for (int t = 0; t < tokens; t++)
            products[t] = _mm512_set1_epi32(from.block_offsets[(at + t * step + column) / block_weights]);
#pragma GCC unroll 8
        for (int quad = 0; quad < 8; quad++) {
            const __m512i weights = _mm512_load_si512(tile.quads + column / 4 + quad);
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++) {
                const int32_t codes = load<int32_t>(inputs + t * step + quad / 2 * chunk_weights + quad % 2 * 4);
                products[t] = _mm512_dpbusd_epi32(products[t], weights, _mm512_set1_epi32(codes));
            }
        }

        const __m512 weight_scales = tile.scales[column / block_weights];
        for (int t = 0; t < tokens; t++) {
            const __m512 scale = _mm512_set1_ps(from.scales[(at + t * step + column) / block_weights]);
            sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[t]), _mm512_mul_ps(weight_scales, scale), sums[t]);
        }
    }

    for (int t = 0; t < tokens; t++) _mm512_mask_storeu_ps(output + t * output_stride, rows, sums[t]);
}

template <Quant quant>
bool multiply_by_tile(const SparseMatrix& matrix, int64_t tokens, const QuantizedActivations& from, Outputs outputs,
                      Rows rows) {
    const int64_t quads = from.padded_columns / 4, blocks = from.padded_columns / block_weights;
    void* memory = scratch_of_thread((quads + blocks) * 64);
    if (!memory) return false;
    auto* rows_of_quads = static_cast<__m512i*>(memory);
    const Tile tile{rows_of_quads, reinterpret_cast<__m512*>(rows_of_quads + quads)};
    over_tiles(
        tokens, rows, [&](int64_t row, int64_t rows) { spread_tile<quant>(matrix, row, rows, tile); },
        [&](int64_t row, int64_t t, auto known, __mmask16 mask) {
            multiply_tile<known.value>(tile, matrix.columns, from, t, outputs.at(t, row), outputs.stride, mask);
        });
    return true;
}

template <Quant quant>
void multiply_quantized(const SparseMatrix& matrix, int64_t tokens, const void* workspace, Outputs outputs, Rows rows) {
    const QuantizedActivations from(matrix.columns, tokens, const_cast<void*>(workspace));
    if (rows.begin == rows.end) return;
    if (tokens == 1)
        multiply_by_row<quant, 1>(matrix, from, outputs, rows);
    else if (tokens == 2)
        multiply_by_row<quant, 2>(matrix, from, outputs, rows);
    else if (!multiply_by_tile<quant>(matrix, tokens, from, outputs, rows))
        portable::multiply(matrix, tokens, workspace, outputs, rows);
}

// ---- F16 and BF16 ----

struct Half {
    static constexpr int64_t input_bytes = 4, tile_columns = 1;  // columns that share a register of a tile
    static inline __m512 add(__m512 sum, __m512i weights, const uint8_t* inputs) {
        const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(weights));
        const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(weights, 1));
        sum = _mm512_fmadd_ps(low, _mm512_loadu_ps(inputs), sum);
        return _mm512_fmadd_ps(high, _mm512_loadu_ps(inputs + 64), sum);
    }
    // `pairs` holds two columns of 16 rows.
    static inline void store_tile(__m512i* tile, __m512i pairs) {
        _mm512_store_ps(tile, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs)));
        _mm512_store_ps(tile + 1, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16))));
    }
    static inline __m512 add_tile(__m512 sum, __m512i weights, const uint8_t* input) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(weights), _mm512_set1_ps(load<float>(input)), sum);
    }
};

struct Bfloat {
    static constexpr int64_t input_bytes = 2, tile_columns = 2;
    static inline __m512 add(__m512 sum, __m512i weights, const uint8_t* inputs) {
        return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_loadu_si512(inputs));
    }
    static inline void store_tile(__m512i* tile, __m512i pairs) { _mm512_store_si512(tile, pairs); }
    static inline __m512 add_tile(__m512 sum, __m512i weights, const uint8_t* input) {
        return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(load<int32_t>(input)));
    }
};

template <typename Value, int rows>
void multiply_rows_16(const SparseMatrix& matrix, int64_t row, const uint8_t* inputs, float* output) {
    const uint8_t *masks[rows], *values[rows];
    __m512 sums[rows][2];
    for (int r = 0; r < rows; r++) {
        masks[r] = matrix.heads + (row + r) * groups(matrix.columns) * 32;
        values[r] = matrix.values + matrix.offsets[row + r];
        sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    }
    for (int64_t column = 0; column < matrix.columns; column += 64) {  // a last half chunk has an empty mask
        for (int r = 0; r < rows; r++) fetch_ahead(values[r], values_ahead);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const uint32_t mask = load<uint32_t>(masks[r] + column / 8 + 4 * half);
                const __m512i weights = _mm512_mask_expand_epi16(apart_zero(), mask, load_apart(values[r]));
                values[r] += 2 * popcount(mask);
                sums[r][half] = Value::add(sums[r][half], weights, inputs + (column + 32 * half) * Value::input_bytes);
            }
    }

    for (int r = 0; r < rows; r++) output[row + r] = _mm512_reduce_add_ps(_mm512_add_ps(sums[r][0], sums[r][1]));
}

template <typename Value>
void spread_tile_16(const SparseMatrix& matrix, int64_t row_begin, int64_t rows, __m512i* tile) {
    const int64_t masks_of_row = groups(matrix.columns) * 32;
    const uint8_t* values[tile_rows];
    for (int64_t r = 0; r < rows; r++) values[r] = matrix.values + matrix.offsets[row_begin + r];

    for (int64_t column = 0; column < matrix.columns; column += 32) {
        __m512i lines[tile_rows];
        for (int64_t r = 0; r < tile_rows; r++) {
            lines[r] = _mm512_setzero_si512();
            if (r >= rows) continue;
            const uint32_t mask = load<uint32_t>(matrix.heads + (row_begin + r) * masks_of_row + column / 8);
            lines[r] = _mm512_mask_expand_epi16(apart_zero(), mask, load_apart(values[r]));
            values[r] += 2 * popcount(mask);
        }
        transpose_16(lines);
        for (int64_t i = 0; i < 16; i++) Value::store_tile(tile + (column + 2 * i) / Value::tile_columns, lines[i]);
    }
}

template <typename Value, int tokens>
[[gnu::always_inline]] inline void multiply_tile_16(const __m512i* tile, int64_t columns, const uint8_t* inputs,
                                                    int64_t token_bytes, float* output, int64_t output_stride,
                                                    __mmask16 rows) {
    __m512 totals[tokens];
    for (auto& total : totals) total = _mm512_setzero_ps();
    for (int64_t start = 0; start < columns; start += group_weights) {  // short sums, then their sum: rounds less
        __m512 sums[tokens];
        for (auto& sum : sums) sum = _mm512_setzero_ps();
        const int64_t end = std::min(columns, start + group_weights);
        for (int64_t column = start; column < end; column += Value::tile_columns) {
            const __m512i weights = _mm512_load_si512(tile + column / Value::tile_columns);
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++)
                sums[t] = Value::add_tile(sums[t], weights, inputs + t * token_bytes + column * Value::input_bytes);
        }
        for (int t = 0; t < tokens; t++) totals[t] = _mm512_add_ps(totals[t], sums[t]);
    }

    for (int t = 0; t < tokens; t++) _mm512_mask_storeu_ps(output + t * output_stride, rows, totals[t]);
}

template <typename Value>
bool multiply_by_tile_16(const SparseMatrix& matrix, int64_t tokens, const uint8_t* inputs, Outputs outputs,
                         Rows rows) {
    const int64_t token_bytes = padded(matrix.columns) * Value::input_bytes;
    __m512i* tile = static_cast<__m512i*>(scratch_of_thread(matrix.columns / Value::tile_columns * 64));
    if (!tile) return false;
    over_tiles(
        tokens, rows, [&](int64_t row, int64_t rows) { spread_tile_16<Value>(matrix, row, rows, tile); },
        [&](int64_t row, int64_t t, auto known, __mmask16 mask) {
            multiply_tile_16<Value, known.value>(tile, matrix.columns, inputs + t * token_bytes, token_bytes,
                                                 outputs.at(t, row), outputs.stride, mask);
        });
    return true;
}

template <typename Value>
void multiply_16(const SparseMatrix& matrix, int64_t tokens, const void* workspace, Outputs outputs, Rows rows) {
    const uint8_t* inputs = static_cast<const uint8_t*>(workspace);
    if (tokens > 4 && multiply_by_tile_16<Value>(matrix, tokens, inputs, outputs, rows)) return;
    for (int64_t row = rows.begin; row < rows.end;) {
        const int64_t step = rows.end - row >= 4 ? 4 : 1;
        for (int64_t t = 0; t < tokens; t++) {
            const uint8_t* from = inputs + t * padded(matrix.columns) * Value::input_bytes;
            if (step == 4)
                multiply_rows_16<Value, 4>(matrix, row, from, outputs.at(t, 0));
            else
                multiply_rows_16<Value, 1>(matrix, row, from, outputs.at(t, 0));
        }
        row += step;
    }
}

// ---- the kernels ----

void multiply(const SparseMatrix& matrix, int64_t tokens, const void* workspace, Outputs outputs, Rows rows) {
    const auto run = matrix.quant == Quant::f16    ? multiply_16<Half>
                     : matrix.quant == Quant::bf16 ? multiply_16<Bfloat>
                     : matrix.quant == Quant::q8_0 ? multiply_quantized<Quant::q8_0>
                                                   : multiply_quantized<Quant::q4_0>;
    run(matrix, tokens, workspace, outputs, rows);
}

bool runs_here() {
    return __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

}  // namespace

const Kernels avx512_kernels = {
    "avx512", runs_here, false, count, pack, portable::unpack, prepare, multiply,
};

}  // namespace racdeploy

#else

namespace racdeploy {
const Kernels avx512_kernels = {"avx512", [] { return false; }};
}  // namespace racdeploy

#endif
