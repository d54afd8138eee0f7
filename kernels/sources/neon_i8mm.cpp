// NEON with matrix products of 8-bit integers (ARMv8.6: phones since 2021, Macs since the M2, Neoverse V1 and N2): many
// tokens. SMMLA multiplies 8 weights of 2 rows with 8 inputs of 2 tokens. One token is left to the dot products.
#include "kernels.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_MATMUL_INT8)
#include "arm_features.h"
#include "neon_tiles.h"

namespace racdeploy {
namespace {

struct MatrixProduct {
    static constexpr int64_t scales = 16;  // of a block: each twice, as the 2 x 2 outputs of two rows want them

    static void put_codes(int8_t* to, int64_t row, int8x8_t weights) { vst1_s8(to + row * 8, weights); }
    static void put_scale(float* to, int64_t row, float scale) { to[2 * row] = to[2 * row + 1] = scale; }

    static void multiply(const Tile<MatrixProduct>& tile, int64_t columns, const QuantizedActivations& from,
                         const int64_t (&token)[tile_tokens], float (&results)[tile_tokens][tile_rows]) {
        float32x4_t sums[2][4] = {};  // of two tokens and two rows
        const int8_t* weights = tile.codes;
        const float* scales_of_rows = tile.scales;
        for (int64_t column = 0; column < columns; column += block_weights) {
            int32x4_t products[2][4] = {};
            const int8_t* codes = from.codes + place_in_chunks(column);
#pragma GCC unroll 4
            for (int chunk = 0; chunk < 4; chunk++, weights += 64, codes += chunk_weights)
#pragma GCC unroll 2
                for (int pair = 0; pair < 2; pair++) {
                    const int8x16_t inputs = vcombine_s8(vld1_s8(codes + token[2 * pair] * from.padded_columns),
                                                         vld1_s8(codes + token[2 * pair + 1] * from.padded_columns));
#pragma GCC unroll 4
                    for (int two = 0; two < 4; two++)
                        products[pair][two] = vmmlaq_s32(products[pair][two], vld1q_s8(weights + 16 * two), inputs);
                }

            for (int pair = 0; pair < 2; pair++) {
                const float* input_scales = from.scales + column / block_weights;
                const int64_t step = from.padded_columns / block_weights;
                const float32x2_t both = {input_scales[token[2 * pair] * step],
                                          input_scales[token[2 * pair + 1] * step]};
                for (int two = 0; two < 4; two++) {
                    const float32x4_t scale = vmulq_f32(vld1q_f32(scales_of_rows + 4 * two), vcombine_f32(both, both));
                    sums[pair][two] = vfmaq_f32(sums[pair][two], vcvtq_f32_s32(products[pair][two]), scale);
                }
            }
            scales_of_rows += scales;
        }

        for (int pair = 0; pair < 2; pair++)
            for (int two = 0; two < 4; two++) {
                const float32x4_t sum = sums[pair][two];  // row 0: both tokens, row 1: both tokens
                const float32x2_t first = vget_low_f32(sum), second = vget_high_f32(sum);
                vst1_f32(results[2 * pair] + 2 * two, vzip1_f32(first, second));
                vst1_f32(results[2 * pair + 1] + 2 * two, vzip2_f32(first, second));
            }
    }
};

template <Quant quant>
void multiply_quantized(const SparseMatrix& matrix, int64_t tokens, const void* workspace, Outputs outputs, Rows rows) {
    const QuantizedActivations from(matrix.columns, tokens, const_cast<void*>(workspace));
    if (!multiply_by_tile<quant, MatrixProduct>(matrix, tokens, from, outputs, rows))
        portable::multiply(matrix, tokens, workspace, outputs, rows);
}

void multiply(const SparseMatrix& matrix, int64_t tokens, const void* workspace, Outputs outputs, Rows rows) {
    const bool by_tile = tokens > 1 && is_quantized(matrix.quant);
    const auto run = !by_tile                      ? neon::multiply
                     : matrix.quant == Quant::q8_0 ? multiply_quantized<Quant::q8_0>
                                                   : multiply_quantized<Quant::q4_0>;
    run(matrix, tokens, workspace, outputs, rows);
}

bool runs_here() {  // HWCAP2_I8MM
    return neon_kernels.runs_here() && has_arm_feature(more_capabilities, 13, "hw.optional.arm.FEAT_I8MM");
}

}  // namespace

const Kernels neon_i8mm_kernels = {
    "neon_i8mm",
    runs_here,
    true,
    neon::count,
    neon::pack,
    portable::unpack,
    neon::prepare,
    multiply,
};

}  // namespace racdeploy

#else

namespace racdeploy {
const Kernels neon_i8mm_kernels = {"neon_i8mm", [] { return false; }};
}  // namespace racdeploy

#endif
