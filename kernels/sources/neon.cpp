// NEON with dot products (ARMv8.2 and newer: Raspberry Pi 5, phones and Macs since 2018 to 2020).
//
// One token: rows in pairs, which share the inputs, spread and multiplied in registers. With two of four weights stored
// the inputs are picked in place of that: TBL over 32 inputs gives those of 16 stored values, so that half as many are
// multiplied and nothing is looked up in memory. Many tokens: tiles.
#include "kernels.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include <type_traits>

#include "arm_features.h"
#include "neon_pack.h"
#include "neon_spread.h"
#include "neon_tiles.h"

namespace racdeploy {
namespace {

// ---- Q8_0 and Q4_0, one token ----

// A group's sums by block, times their scales, are added to the row's.
inline void add_group(int32x4_t low, int32x4_t high, const uint8_t* head, float32x4_t input_low, float32x4_t input_high,
                      float32x4_t (&sums)[2]) {
    const Scales scales(head);
    sums[0] = vfmaq_f32(sums[0], vcvtq_f32_s32(low), vmulq_f32(scales.low, input_low));
    sums[1] = vfmaq_f32(sums[1], vcvtq_f32_s32(high), vmulq_f32(scales.high, input_high));
}

// A compiler that moves the next row's loads ahead runs out of registers; the processor does so by itself.
inline void keep_order() { asm volatile("" ::: "memory"); }

// Ask memory for what a row reads a few hundred weights later.
inline void fetch_ahead(const uint8_t* from) { __builtin_prefetch(from + 1024); }

template <Quant quant, int rows>
[[gnu::noinline]] void multiply_rows(const SparseMatrix& matrix, int64_t row, const QuantizedActivations& from,
                                     float* output) {
    const int8_t* codes = from.codes;
    const float* scales = from.scales;
    const uint8_t* head[rows];
    Values values[rows];
    float32x4_t sums[rows][2];
    for (int r = 0; r < rows; r++) {
        head[r] = matrix.head(row + r);
        values[r] = Values(matrix.values + matrix.offsets[row + r]);
        sums[r][0] = sums[r][1] = vdupq_n_f32(0);
    }

    // What is stored of the next 128 weights is found out while these are multiplied: it takes longest.
    Masks next_masks(head[0] + 16);
    for (int64_t column = 0; column < matrix.columns; column += group_weights) {
        int32x4_t products[rows][4] = {};
#pragma GCC unroll 4
        for (int step = 0; step < 2 * rows; step++) {
            const int half = step / rows, r = step % rows, next = step + 1;
            const Masks masks = next_masks;
            const bool in_group = next < 2 * rows, is_last = column + group_weights >= matrix.columns;
            next_masks = Masks(in_group ? head[next % rows] + 16 + next / rows * 16
                                        : head[0] + 16 + (is_last ? 0 : head_bytes(quant)));

            const uint8_t*& from = quant == Quant::q4_0 && half ? values[r].second : values[r].first;
            fetch_ahead(from);
#pragma GCC unroll 8
            for (int part = 0; part < 8; part++) {
                const int i = part / 4, chunk = 2 * half + i;
                const int8x16_t weights = spread_16<quant>(chunk, part % 4, masks.bits[i], masks.sums[i], from);
                const int8x16_t inputs = vld1q_s8(codes + half * 2 * chunk_weights + 16 * part);
                products[r][part % 4] = vdotq_s32(products[r][part % 4], weights, inputs);
                if (part % 4 == 3) from += masks.sums[i] >> 56;
            }
            keep_order();
        }
        codes += group_weights;

        const float32x4_t input_low = vld1q_f32(scales), input_high = vld1q_f32(scales + 4);
        scales += 8;
        for (int r = 0; r < rows; r++) {
            const int32x4_t low = vpaddq_s32(products[r][0], products[r][1]);
            const int32x4_t high = vpaddq_s32(products[r][2], products[r][3]);
            add_group(low, high, head[r], input_low, input_high, sums[r]);
            fetch_ahead(head[r]);
            head[r] += head_bytes(quant);
        }
    }

    for (int r = 0; r < rows; r++) output[r] = vaddvq_f32(vaddq_f32(sums[r][0], sums[r][1])) * product_scale(quant);
}

// The pattern two_of_four.
template <Quant quant, int rows>
[[gnu::noinline]] void multiply_rows_of_picked(const SparseMatrix& matrix, int64_t row,
                                               const QuantizedActivations& from, float* output) {
    const int8_t* codes = from.codes;
    const float* scales = from.scales;
    const uint8_t *head[rows], *values[rows];
    float32x4_t sums[rows][2];
    for (int r = 0; r < rows; r++) {
        head[r] = matrix.head(row + r);
        values[r] = matrix.values + matrix.offsets[row + r];
        sums[r][0] = sums[r][1] = vdupq_n_f32(0);
    }

    for (int64_t column = 0; column < matrix.columns; column += group_weights) {
        int32x4_t products[rows][2] = {};
#pragma GCC unroll 8
        for (int run = 0; run < 8; run++, codes += 32) {
            const int8x16x2_t inputs = {{vld1q_s8(codes), vld1q_s8(codes + 16)}};
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) {
                const uint8x16_t places = places_in_32(run, vld1q_u8(head[r] + 16 + run / 4 * 16));
                const int8x16_t weights = signed_values<quant>(run, vld1q_u8(values[r] + run_bytes<quant>(run)));
                products[r][run % 2] = vdotq_s32(products[r][run % 2], weights, vqtbl2q_s8(inputs, places));
            }
        }

        const float32x4_t input_low = vld1q_f32(scales), input_high = vld1q_f32(scales + 4);
        scales += 8;
        for (int r = 0; r < rows; r++) {
            add_group(products[r][0], products[r][1], head[r], input_low, input_high, sums[r]);
            fetch_ahead(head[r]);
            fetch_ahead(values[r]);
            if (quant == Quant::q8_0) fetch_ahead(values[r] + 64);
            head[r] += head_bytes(quant);
            values[r] += group_values_bytes(quant);
        }
    }

    for (int r = 0; r < rows; r++) output[r] = vaddvq_f32(vaddq_f32(sums[r][0], sums[r][1])) * product_scale(quant);
}

// Calls run(row, std::integral_constant of how many rows): two by two, and one that is left.
template <typename Run>
inline void over_pairs(Rows rows, const Run& run) {
    int64_t row = rows.begin;
    for (; row + 2 <= rows.end; row += 2) run(row, std::integral_constant<int, 2>());
    if (row < rows.end) run(row, std::integral_constant<int, 1>());
}

template <Quant quant>
void multiply_one(const SparseMatrix& matrix, const QuantizedActivations& from, Outputs outputs, Rows rows) {
    over_pairs(rows, [&](int64_t row, auto count) {
        const auto run = matrix.pattern == Pattern::unstructured ? multiply_rows<quant, count.value>
                                                               : multiply_rows_of_picked<quant, count.value>;
        run(matrix, row, from, outputs.at(0, row));
    });
}

// ---- many tokens: SDOT multiplies 4 weights of 4 rows with 4 inputs of one token ----

struct DotProduct {
    static constexpr int64_t scales = 8;  // of a block

    // Weights 0 to 3 of 8 rows, then weights 4 to 7.
    static void put_codes(int8_t* to, int64_t row, int8x8_t weights) {
        const int32x2_t fours = vreinterpret_s32_s8(weights);
        vst1_lane_s32(reinterpret_cast<int32_t*>(to + row * 4), fours, 0);
        vst1_lane_s32(reinterpret_cast<int32_t*>(to + row * 4 + 32), fours, 1);
    }
    static void put_scale(float* to, int64_t row, float scale) { to[row] = scale; }

    static void multiply(const Tile<DotProduct>& tile, int64_t columns, const QuantizedActivations& from,
                         const int64_t (&token)[tile_tokens], float (&results)[tile_tokens][tile_rows]) {
        float32x4_t sums[tile_tokens][2] = {};
        const int8_t* weights = tile.codes;
        const float* scales_of_rows = tile.scales;
        for (int64_t column = 0; column < columns; column += block_weights) {
            int32x4_t products[tile_tokens][2] = {};
            const int8_t* codes = from.codes + place_in_chunks(column);
#pragma GCC unroll 4
            for (int chunk = 0; chunk < 4; chunk++, weights += 64) {
                const int8x16_t first_low = vld1q_s8(weights), first_high = vld1q_s8(weights + 16);
                const int8x16_t second_low = vld1q_s8(weights + 32), second_high = vld1q_s8(weights + 48);
#pragma GCC unroll 4
                for (int t = 0; t < tile_tokens; t++) {
                    const int8x8_t inputs = vld1_s8(codes + token[t] * from.padded_columns + chunk_weights * chunk);
                    products[t][0] = vdotq_lane_s32(products[t][0], first_low, inputs, 0);
                    products[t][1] = vdotq_lane_s32(products[t][1], first_high, inputs, 0);
                    products[t][0] = vdotq_lane_s32(products[t][0], second_low, inputs, 1);
                    products[t][1] = vdotq_lane_s32(products[t][1], second_high, inputs, 1);
                }
            }

            const float32x4_t low = vld1q_f32(scales_of_rows), high = vld1q_f32(scales_of_rows + 4);
            scales_of_rows += scales;
            for (int t = 0; t < tile_tokens; t++) {
                const float scale = from.scales[(token[t] * from.padded_columns + column) / block_weights];
                sums[t][0] = vfmaq_f32(sums[t][0], vcvtq_f32_s32(products[t][0]), vmulq_n_f32(low, scale));
                sums[t][1] = vfmaq_f32(sums[t][1], vcvtq_f32_s32(products[t][1]), vmulq_n_f32(high, scale));
            }
        }

        for (int t = 0; t < tile_tokens; t++) {
            vst1q_f32(results[t], sums[t][0]);
            vst1q_f32(results[t] + 4, sums[t][1]);
        }
    }
};

template <Quant quant>
void multiply_quantized(const SparseMatrix& matrix, int64_t tokens, const void* workspace, Outputs outputs, Rows rows) {
    const QuantizedActivations from(matrix.columns, tokens, const_cast<void*>(workspace));
    if (tokens == 1)
        multiply_one<quant>(matrix, from, outputs, rows);
    else if (!multiply_by_tile<quant, DotProduct>(matrix, tokens, from, outputs, rows))
        portable::multiply(matrix, tokens, workspace, outputs, rows);
}

// ---- F16 and BF16 ----

struct Half {
    static constexpr int64_t input_bytes = 4;
    static void widen(uint8x16_t weights, float32x4_t (&wide)[2]) {
        const float16x8_t halves = vreinterpretq_f16_u8(weights);
        wide[0] = vcvt_f32_f16(vget_low_f16(halves));
        wide[1] = vcvt_high_f32_f16(halves);
    }
    static void read_inputs(const uint8_t* inputs, float32x4_t (&wide)[2]) {
        wide[0] = vreinterpretq_f32_u8(vld1q_u8(inputs));
        wide[1] = vreinterpretq_f32_u8(vld1q_u8(inputs + 16));
    }
};

struct Bfloat {
    static constexpr int64_t input_bytes = 2;
    static void widen(uint8x16_t weights, float32x4_t (&wide)[2]) {
        const uint16x8_t halves = vreinterpretq_u16_u8(weights);
        wide[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16));
        wide[1] = vreinterpretq_f32_u32(vshll_high_n_u16(halves, 16));
    }
    static void read_inputs(const uint8_t* inputs, float32x4_t (&wide)[2]) { widen(vld1q_u8(inputs), wide); }
};

// So many rows times so many tokens; 128 weights of each row at a time.
template <typename Value, int rows, int tokens>
[[gnu::noinline]] void multiply_floats(const SparseMatrix& matrix, int64_t row, const uint8_t* inputs, float* output,
                                       int64_t stride) {
    const int64_t token_bytes = padded(matrix.columns) * Value::input_bytes;
    const uint8_t *mask[rows], *values[rows];
    for (int r = 0; r < rows; r++) {
        mask[r] = matrix.head(row + r);
        values[r] = matrix.values + matrix.offsets[row + r];
    }

    float32x4_t totals[rows][tokens] = {};
    for (int64_t column = 0; column < matrix.columns; column += 128) {
        float32x4_t sums[rows][tokens][2] = {};  // short sums, then their sum: rounds less
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++) {
            const Masks masks(mask[r] + column / 8);
            fetch_ahead(values[r]);
            fetch_ahead(values[r] + 64);
#pragma GCC unroll 16
            for (int part = 0; part < 16; part++) {
                const uint64_t bits = masks.bits[part / 8], ends = masks.sums[part / 8];
                const uint8_t* from = part % 8 ? values[r] + 2 * byte_of(ends, part % 8 - 1) : values[r];
                const uint8x16_t index = table_row(pair_tables.of, byte_of(bits, part % 8));
                float32x4_t weights[2];
                Value::widen(vqtbl1q_u8(vld1q_u8(from), index), weights);
                if (part % 8 == 7) values[r] += 2 * (ends >> 56);
#pragma GCC unroll 4
                for (int t = 0; t < tokens; t++) {
                    float32x4_t wide[2];
                    Value::read_inputs(inputs + t * token_bytes + (column + 8 * part) * Value::input_bytes, wide);
                    sums[r][t][0] = vfmaq_f32(sums[r][t][0], weights[0], wide[0]);
                    sums[r][t][1] = vfmaq_f32(sums[r][t][1], weights[1], wide[1]);
                }
            }
            keep_order();
        }

        for (int r = 0; r < rows; r++)
            for (int t = 0; t < tokens; t++)
                totals[r][t] = vaddq_f32(totals[r][t], vaddq_f32(sums[r][t][0], sums[r][t][1]));
    }

    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) output[t * stride + r] = vaddvq_f32(totals[r][t]);
}

template <typename Value>
void multiply_16(const SparseMatrix& matrix, int64_t tokens, const void* workspace, Outputs outputs, Rows rows) {
    const int64_t token_bytes = padded(matrix.columns) * Value::input_bytes;
    const auto* inputs = static_cast<const uint8_t*>(workspace);
    over_pairs(rows, [&](int64_t row, auto count) {
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4)
            multiply_floats<Value, count.value, 4>(matrix, row, inputs + t * token_bytes, outputs.at(t, row),
                                                   outputs.stride);
        for (; t < tokens; t++)
            multiply_floats<Value, count.value, 1>(matrix, row, inputs + t * token_bytes, outputs.at(t, row),
                                                   outputs.stride);
    });
}

bool runs_here() { return has_arm_feature(capabilities, 20, "hw.optional.arm.FEAT_DotProd"); }  // HWCAP_ASIMDDP

}  // namespace

namespace neon {

void multiply(const SparseMatrix& matrix, int64_t tokens, const void* workspace, Outputs outputs, Rows rows) {
    const auto run = matrix.quant == Quant::q8_0   ? multiply_quantized<Quant::q8_0>
                     : matrix.quant == Quant::q4_0 ? multiply_quantized<Quant::q4_0>
                     : matrix.quant == Quant::f16  ? multiply_16<Half>
                                                   : multiply_16<Bfloat>;
    run(matrix, tokens, workspace, outputs, rows);
}

void count(const Blocks& blocks, int64_t* counts, Rows rows) { racdeploy::count(blocks, counts, rows); }
void pack(const Blocks& blocks, const int64_t* offsets, uint8_t* heads, uint8_t* values, Rows rows) {
    racdeploy::pack(blocks, offsets, heads, values, rows);
}
void prepare(Quant quant, int64_t columns, int64_t tokens, int64_t token, const float* activation, void* workspace) {
    racdeploy::prepare(quant, columns, tokens, token, activation, workspace);
}

}  // namespace neon

const Kernels neon_kernels = {
    "neon",
    runs_here,
    true,
    neon::count,
    neon::pack,
    portable::unpack,
    neon::prepare,
    neon::multiply,
};

}  // namespace racdeploy

#else

namespace racdeploy {
const Kernels neon_kernels = {"neon", [] { return false; }};
}  // namespace racdeploy

#endif
