// NEON: which pattern ggml's blocks are packed in, and activations as the kernels want them.
#pragma once
#include <arm_neon.h>

#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace racdeploy {
namespace {

// 0xff for each of 32 codes of a block that is not 0, in the order of the weights.
inline uint8x16x2_t non_zero(Quant quant, const uint8_t* block) {
    if (quant == Quant::q8_0) {
        const uint8x16_t first = vld1q_u8(block + 2), second = vld1q_u8(block + 18);
        return {{vtstq_u8(first, first), vtstq_u8(second, second)}};
    }
    const uint8x16_t nibbles = veorq_u8(vld1q_u8(block + 2), vdupq_n_u8(0x88));
    return {{vtstq_u8(nibbles, vdupq_n_u8(15)), vtstq_u8(nibbles, vdupq_n_u8(0xf0))}};
}

// Is there a four of which three are not 0? `marks` are 0xff or 0: -1 or 0.
inline uint8x16_t three_in_fours(uint8x16_t marks) {
    const int32x4_t counts = vdotq_s32(vdupq_n_s32(0), vreinterpretq_s8_u8(marks), vdupq_n_s8(1));
    return vreinterpretq_u8_u32(vcltq_s32(counts, vdupq_n_s32(-2)));
}

// Two of every four weights at most, and whole groups: a short one would be stored as a whole one.
inline Pattern preferred_pattern(Quant quant, int64_t rows, int64_t columns, const void* blocks) {
    if (!is_quantized(quant) || columns % group_weights) return Pattern::unstructured;

    const uint8_t* block = static_cast<const uint8_t*>(blocks);
    const uint8_t* end = block + rows * row_bytes(quant, columns);
    for (; block < end; block += block_bytes(quant)) {
        const uint8x16x2_t marks = non_zero(quant, block);
        const uint8x16_t full = vorrq_u8(three_in_fours(marks.val[0]), three_in_fours(marks.val[1]));
        if (vmaxvq_u8(full)) return Pattern::unstructured;
    }
    return Pattern::two_of_four_places;
}

// Codes of 32 inputs, as ggml rounds them, each 8 at their place in a chunk; returns the scale. The offsets of the
// workspace are for unsigned weights: nothing here reads them.
inline float prepare_block(const float* from, int8_t* place) {
    float32x4_t inputs[8], sizes = vdupq_n_f32(0);
    for (int i = 0; i < 8; i++) {
        inputs[i] = vld1q_f32(from + 4 * i);
        sizes = vmaxq_f32(sizes, vabsq_f32(inputs[i]));
    }

    const float largest = vmaxvq_f32(sizes), inverse = inverse_of_scale(largest);
    for (int i = 0; i < 8; i += 2) {
        const int32x4_t first = vcvtnq_s32_f32(vmulq_n_f32(inputs[i], inverse));
        const int32x4_t second = vcvtnq_s32_f32(vmulq_n_f32(inputs[i + 1], inverse));
        const int16x8_t codes = vcombine_s16(vmovn_s32(first), vmovn_s32(second));
        vst1_s8(place + i / 2 * chunk_weights, vmovn_s16(codes));
    }
    return float_of_half(half_of_float(largest / 127.0f));
}

inline void prepare(Quant quant, int64_t columns, int64_t tokens, int64_t token, const float* activation,
                    void* workspace) {
    if (!is_quantized(quant)) return portable::prepare(quant, columns, tokens, token, activation, workspace);

    const QuantizedActivations to(columns, tokens, workspace);
    for (int64_t first = 0; first < to.padded_columns; first += block_weights) {
        const int64_t at = token * to.padded_columns + first;
        int8_t* place = to.codes + place_in_chunks(at);
        if (first < columns) {
            to.scales[at / block_weights] = prepare_block(activation + first, place);
        } else {
            for (int chunk = 0; chunk < 4; chunk++) std::memset(place + chunk * chunk_weights, 0, 8);
            to.scales[at / block_weights] = 0;
        }
    }
}

}  // namespace
}  // namespace racdeploy
