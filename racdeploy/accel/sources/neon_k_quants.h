// Q3_K and Q6_K at 2:4 with NEON: stored values pick their inputs by TBL, from 32 at once.
#pragma once
#include <arm_neon.h>

#include "k_rows.h"

namespace racdeploy {
namespace {

// Two runs at a time as nibbles: three bits each, of one lane's values or places.
struct KNibbles {
    uint8x16_t of[2];  // of runs 0 and 1, of runs 2 and 3

    // `third_bits` at k_third_bit_of_run.
    KNibbles(uint8x16_t two_bits, uint8x16_t third_bits) {
        of[0] = join(two_bits, third_bits);
        of[1] = join(vshrq_n_u8(two_bits, 2), vshrq_n_u8(third_bits, 1));
    }
    uint8x16_t run_of(int run) const {
        const uint8x16_t both = of[run / 2];
        return run % 2 ? vshrq_n_u8(both, 4) : vandq_u8(both, vdupq_n_u8(15));
    }

private:
    static uint8x16_t join(uint8x16_t two_bits, uint8x16_t third_bits) {
        return vorrq_u8(vandq_u8(two_bits, vdupq_n_u8(0x33)), vandq_u8(third_bits, vdupq_n_u8(0x44)));
    }
};

inline uint8x16_t third_bits_of_lane(uint8x16_t bits, int lane) { return lane ? vshlq_n_u8(bits, 2) : bits; }

// Which of 32 inputs, those of its eight codes, each of 16 values takes; a code is there twice.
inline uint8x16_t picks_of(uint8x16_t codes) {
    static constexpr uint8_t seconds[16] = {0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8};
    static constexpr uint8_t fours[16] = {0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28};
    const uint8x16_t places = vqtbl1q_u8(vld1q_u8(k_tables.places), vorrq_u8(codes, vld1q_u8(seconds)));
    return vorrq_u8(places, vld1q_u8(fours));
}

template <Quant quant>
struct KValues;

template <>
struct KValues<Quant::q3_k> {
    KNibbles nibbles;
    KValues(const uint8_t* group, int lane)
        : nibbles(vld1q_u8(group + 16 * lane), third_bits_of_lane(vld1q_u8(group + k_parts(Quant::q3_k).high), lane)) {}
    int8x16_t run_of(int run) const { return vsubq_s8(vreinterpretq_s8_u8(nibbles.run_of(run)), vdupq_n_s8(4)); }
};

template <>
struct KValues<Quant::q6_k> {
    uint8x16_t low[2], high;
    KValues(const uint8_t* group, int lane)
        : low{vld1q_u8(group + 16 * lane), vld1q_u8(group + 32 + 16 * lane)},
          high(vld1q_u8(group + k_parts(Quant::q6_k).high + 16 * lane)) {}
    int8x16_t run_of(int run) const {
        const uint8x16_t bits = run % 2 ? vshrq_n_u8(low[run / 2], 4) : vandq_u8(low[run / 2], vdupq_n_u8(15));
        const uint8x16_t others = vshlq_u8(high, vdupq_n_s8(static_cast<int8_t>(4 - k_bits_of_run[run])));
        const uint8x16_t code = vorrq_u8(bits, vandq_u8(others, vdupq_n_u8(0x30)));
        return vsubq_s8(vreinterpretq_s8_u8(code), vdupq_n_s8(32));
    }
};

// The scales of 16 sub-blocks.
template <Quant quant>
inline int8x16_t sub_scales(const uint8_t* scales) {
    if (quant == Quant::q6_k) return vld1q_s8(reinterpret_cast<const int8_t*>(scales));

    static constexpr int8_t shifts[16] = {0, 0, 0, 0, -2, -2, -2, -2, -4, -4, -4, -4, -6, -6, -6, -6};
    const uint8x8_t low = vld1_u8(scales);
    const uint8x16_t nibbles = vcombine_u8(vand_u8(low, vdup_n_u8(15)), vshr_n_u8(low, 4));
    const uint8x16_t four = vreinterpretq_u8_u32(vdupq_n_u32(load<uint32_t>(scales + 8)));
    const uint8x16_t high = vandq_u8(vshlq_u8(four, vld1q_s8(shifts)), vdupq_n_u8(3));
    return vsubq_s8(vreinterpretq_s8_u8(vorrq_u8(nibbles, vshlq_n_u8(high, 4))), vdupq_n_s8(32));
}

// A lane of a group, which is 8 sub-blocks: values and picks of all runs, which several tokens share.
template <Quant quant>
struct KLane {
    int8x16_t values[k_runs];
    uint8x16_t picks[k_runs];

    KLane(const uint8_t* group, int lane) {
        const uint8_t* at = group + k_parts(quant).places;
        const uint8x8_t two_bits = vld1_u8(at + 8 * lane), third = vld1_u8(at + 16);
        const uint8x16_t both = vcombine_u8(vzip1_u8(two_bits, two_bits), vzip2_u8(two_bits, two_bits));
        const uint8x16_t thirds = vcombine_u8(vzip1_u8(third, third), vzip2_u8(third, third));
        const KNibbles codes(both, third_bits_of_lane(thirds, lane));
        const KValues<quant> of_lane(group, lane);
#pragma GCC unroll 4
        for (int run = 0; run < k_runs; run++) {
            values[run] = of_lane.run_of(run);
            picks[run] = picks_of(codes.run_of(run));
        }
    }

    // The products' sums of four sub-blocks, and of the next four.
    inline void add(int32x4_t (&sums)[2], const int8_t* inputs, int lane) const {
#pragma GCC unroll 4
        for (int run = 0; run < k_runs; run++) {
            const int8_t* of_run = inputs + run * k_run_weights + 16 * lane;
            const int8x16x2_t table = {{vld1q_s8(of_run), vld1q_s8(of_run + 32)}};
            sums[run / 2] = vdotq_s32(sums[run / 2], values[run], vqtbl2q_s8(table, picks[run]));
        }
    }
};

struct KRow {
    template <Quant quant, int tokens>
    static inline void multiply(const uint8_t* group, const KActivations& from, int64_t token, float* output,
                                int64_t stride) {
        constexpr KParts parts = k_parts(quant);
        const int64_t row_groups = groups(from.columns);
        const int8_t* inputs = from.codes + token * from.columns;
        float32x4_t totals[tokens];
        for (auto& total : totals) total = vdupq_n_f32(0);

        for (int64_t g = 0; g < row_groups; g++, group += parts.bytes, inputs += group_weights) {
            const int8x16_t scales = sub_scales<quant>(group + parts.scales);
            const float scale = float_of_half(load<uint16_t>(group + parts.scale));
            int32x4_t products[tokens];
            for (auto& product : products) product = vdupq_n_s32(0);
#pragma GCC unroll 2
            for (int lane = 0; lane < 2; lane++) {
                const KLane<quant> of_lane(group, lane);
                const int16x8_t wide = vmovl_s8(lane ? vget_high_s8(scales) : vget_low_s8(scales));
                const int32x4_t first = vmovl_s16(vget_low_s16(wide)), second = vmovl_high_s16(wide);
                for (int t = 0; t < tokens; t++) {
                    int32x4_t sums[2] = {};
                    of_lane.add(sums, inputs + t * from.columns, lane);
                    products[t] = vmlaq_s32(vmlaq_s32(products[t], sums[0], first), sums[1], second);
                }
            }
            for (int t = 0; t < tokens; t++)
                totals[t] = vfmaq_n_f32(totals[t], vcvtq_f32_s32(products[t]),
                                        scale * from.scales[(token + t) * row_groups + g]);
        }
        for (int t = 0; t < tokens; t++) output[t * stride] = vaddvq_f32(totals[t]);
    }
};

void multiply_k_quant(const SparseMatrix& matrix, int64_t tokens, const void* workspace, Outputs outputs, Rows rows) {
    multiply_k_matrix<KRow>(matrix, tokens, workspace, outputs, rows);
}

}  // namespace
}  // namespace racdeploy
