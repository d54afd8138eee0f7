// What llama.cpp multiplies dense weights with on AArch64 (ggml 0.25.3, ggml-cpu/arch/arm/repack.cpp): 4 rows side by
// side, a block of 32 weights of each with SDOT by lanes. Compiled for board_forecast.py alone, never run.
#include <arm_neon.h>

#include <cstdint>

struct Block {
    uint16_t scale;
    int8_t codes[32];
} __attribute__((packed));
struct FourQ8 {
    uint16_t scales[4];
    int8_t codes[128];
};
struct FourQ4 {
    uint16_t scales[4];
    uint8_t codes[64];
};

inline float32x4_t widen(const uint16_t* halves) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves))); }
inline float32x4_t widen_one(const uint16_t* half) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_dup_u16(half))); }

extern "C" void dense_q8_0(int64_t blocks, const FourQ8* weights, const Block* inputs, float* output) {
    float32x4_t sum = vdupq_n_f32(0);
    for (int64_t b = 0; b < blocks; b++, weights++, inputs++) {
        const int8x16x4_t first = vld1q_s8_x4(weights->codes), second = vld1q_s8_x4(weights->codes + 64);
        const int8x16x2_t codes = vld1q_s8_x2(inputs->codes);
        int32x4_t products = vdupq_n_s32(0);
        products = vdotq_laneq_s32(products, first.val[0], codes.val[0], 0);
        products = vdotq_laneq_s32(products, first.val[1], codes.val[0], 1);
        products = vdotq_laneq_s32(products, first.val[2], codes.val[0], 2);
        products = vdotq_laneq_s32(products, first.val[3], codes.val[0], 3);
        products = vdotq_laneq_s32(products, second.val[0], codes.val[1], 0);
        products = vdotq_laneq_s32(products, second.val[1], codes.val[1], 1);
        products = vdotq_laneq_s32(products, second.val[2], codes.val[1], 2);
        products = vdotq_laneq_s32(products, second.val[3], codes.val[1], 3);
        const float32x4_t scales = vmulq_f32(widen_one(&inputs->scale), widen(weights->scales));
        sum = vfmaq_f32(sum, vcvtq_f32_s32(products), scales);
    }
    vst1q_f32(output, sum);
}

extern "C" void dense_q4_0(int64_t blocks, const FourQ4* weights, const Block* inputs, float* output) {
    float32x4_t sum = vdupq_n_f32(0);
    for (int64_t b = 0; b < blocks; b++, weights++, inputs++) {
        const uint8x16x4_t bytes = vld1q_u8_x4(weights->codes);
        const int8x16x2_t codes = vld1q_s8_x2(inputs->codes);
        int32x4_t products = vdupq_n_s32(0);
        const auto low = [&](int i) { return vreinterpretq_s8_u8(vshlq_n_u8(bytes.val[i], 4)); };
        const auto high = [&](int i) { return vreinterpretq_s8_u8(vandq_u8(bytes.val[i], vdupq_n_u8(0xf0))); };
        products = vdotq_laneq_s32(products, low(0), codes.val[0], 0);
        products = vdotq_laneq_s32(products, high(0), codes.val[1], 0);
        products = vdotq_laneq_s32(products, low(1), codes.val[0], 1);
        products = vdotq_laneq_s32(products, high(1), codes.val[1], 1);
        products = vdotq_laneq_s32(products, low(2), codes.val[0], 2);
        products = vdotq_laneq_s32(products, high(2), codes.val[1], 2);
        products = vdotq_laneq_s32(products, low(3), codes.val[0], 3);
        products = vdotq_laneq_s32(products, high(3), codes.val[1], 3);
        const float32x4_t scales = vmulq_f32(widen_one(&inputs->scale), widen(weights->scales));
        sum = vfmaq_f32(sum, vcvtq_n_f32_s32(products, 4), scales);
    }
    vst1q_f32(output, sum);
}
