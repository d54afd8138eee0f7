// NEON: ggml's blocks -> packed, and activations as the kernels want them.
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

// For each 8 mask bits: where the set ones are, then what is nowhere; and the bits filled up as two_of_four
// does.
struct PackTables {
    uint8_t set[256][8];
    uint8_t filled[256];

    constexpr PackTables() : set(), filled() {
        for (unsigned mask = 0; mask < 256; mask++) {
            unsigned n = 0;
            for (unsigned i = 0; i < 8; i++)
                if (mask >> i & 1) set[mask][n++] = static_cast<uint8_t>(i);
            while (n < 8) set[mask][n++] = 0xff;
            filled[mask] = static_cast<uint8_t>(fill_up_to_two(mask & 15) | fill_up_to_two(mask >> 4) << 4);
        }
    }
};
constexpr PackTables pack_tables;

// The 8 codes that a block has in a chunk, unsigned.
template <Quant quant>
inline uint8x8_t eight_codes(const uint8_t* block, int chunk) {
    if (quant == Quant::q8_0) return veor_u8(vld1_u8(block + 2 + 8 * chunk), vdup_n_u8(0x80));
    const uint8x8_t bytes = vld1_u8(block + 2 + 8 * (chunk % 2));
    return chunk < 2 ? vand_u8(bytes, vdup_n_u8(15)) : vshr_n_u8(bytes, 4);
}

template <Quant quant>
inline uint8_t stored_bits(uint8x8_t codes) {
    const uint8x8_t bits = {1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x8_t zeros = vceq_u8(codes, vdup_n_u8(static_cast<uint8_t>(zero_point(quant))));
    return vaddv_u8(vbic_u8(bits, zeros));
}

// Where a row's values are gathered: Q4_0's two streams are beside each other only when both are complete.
struct Gathered {
    uint8_t *first, *second;
    int64_t counts[2] = {0, 0};

    static int64_t bytes(int64_t columns) { return 2 * (padded(columns) + 8); }
    Gathered(int64_t columns, void* memory)
        : first(static_cast<uint8_t*>(memory)), second(first + padded(columns) + 8) {}

    void add(int stream, uint8x8_t codes, uint8_t bits) {  // 8 are written, of which those that count come first
        vst1_u8((stream ? second : first) + counts[stream], vtbl1_u8(codes, vld1_u8(pack_tables.set[bits])));
        counts[stream] += __builtin_popcount(bits);
    }
    void write(Quant quant, uint8_t* to) const {
        if (quant == Quant::q8_0) {
            std::memcpy(to, first, static_cast<size_t>(counts[0]));
            return;
        }
        for (int64_t i = 0; i < std::max(counts[0], counts[1]); i++) {
            const int low = i < counts[0] ? first[i] : 0, high = i < counts[1] ? second[i] : 0;
            to[i] = static_cast<uint8_t>(low | high << 4);
        }
    }
};

template <Quant quant>
void pack_group(const uint8_t* block, int64_t blocks, uint8_t* mask, Gathered& to) {
    for (int chunk = 0; chunk < 4; chunk++)
        for (int64_t b = 0; b < blocks; b++) {
            const uint8x8_t codes = eight_codes<quant>(block + b * block_bytes(quant), chunk);
            mask[8 * chunk + b] = stored_bits<quant>(codes);
            to.add(quant == Quant::q4_0 && chunk >= 2, codes, mask[8 * chunk + b]);
        }
}

template <Quant quant>
void pack_two_of_four(const uint8_t* block, int64_t blocks, uint8_t* mask, Gathered& to) {
    const uint8x8_t flipped = vdup_n_u8(static_cast<uint8_t>(zero_point(quant)));
    uint8_t places[group_weights / 2 + 4];
    for (int chunk = 0; chunk < 4; chunk++)
        for (int64_t b = 0; b < 8; b++) {
            const bool inside = b < blocks;
            const uint8x8_t codes = inside ? eight_codes<quant>(block + b * block_bytes(quant), chunk) : flipped;
            const uint8_t bits = pack_tables.filled[stored_bits<quant>(codes)];
            mask[8 * chunk + b] = bits;
            to.add(quant == Quant::q4_0 && chunk >= 2, veor_u8(codes, flipped), bits);
            vst1_u8(places + chunk * 32 + b * 4, vand_u8(vld1_u8(pack_tables.set[bits]), vdup_n_u8(3)));
        }

    for (int half = 0; half < 2; half++) {
        const uint8_t* from = places + 64 * half;
        const uint8x16_t low = vsliq_n_u8(vld1q_u8(from), vld1q_u8(from + 16), 2);
        const uint8x16_t high = vsliq_n_u8(vld1q_u8(from + 32), vld1q_u8(from + 48), 2);
        vst1q_u8(mask + 16 * half, vsliq_n_u8(low, high, 4));
    }
}

template <Quant quant>
bool pack_quantized(const Blocks& blocks, const int64_t* offsets, uint8_t* heads, uint8_t* values, Rows rows) {
    void* memory = scratch_of_thread(Gathered::bytes(blocks.columns));
    if (!memory) return false;

    const int64_t row_heads = heads_bytes(quant, blocks.columns), count = blocks.columns / block_weights;
    for (int64_t r = rows.begin; r < rows.end; r++) {
        uint8_t* head = heads + r * row_heads;
        std::memset(head, 0, static_cast<size_t>(row_heads));
        Gathered gathered(blocks.columns, memory);
        const uint8_t* block = blocks.row(r);
        for (int64_t b = 0; b < count; b += 8, head += head_bytes(quant), block += 8 * block_bytes(quant)) {
            const int64_t here = std::min<int64_t>(8, count - b);
            for (int64_t i = 0; i < here; i++) std::memcpy(head + 2 * i, block + i * block_bytes(quant), 2);
            if (blocks.pattern == Pattern::unstructured)
                pack_group<quant>(block, here, head + 16, gathered);
            else
                pack_two_of_four<quant>(block, here, head + 16, gathered);
        }
        gathered.write(quant, values + offsets[r]);
    }
    return true;
}

inline void pack(const Blocks& blocks, const int64_t* offsets, uint8_t* heads, uint8_t* values, Rows rows) {
    const bool ours = is_quantized(blocks.quant);
    const auto run = blocks.quant == Quant::q8_0 ? pack_quantized<Quant::q8_0> : pack_quantized<Quant::q4_0>;
    if (!ours || !run(blocks, offsets, heads, values, rows)) portable::pack(blocks, offsets, heads, values, rows);
}

inline void count(const Blocks& blocks, int64_t* counts, Rows rows) {
    const bool ours = is_quantized(blocks.quant) && blocks.pattern == Pattern::unstructured;
    if (!ours) return portable::count(blocks, counts, rows);

    for (int64_t r = rows.begin; r < rows.end; r++) {
        int64_t stored[2] = {0, 0};  // of the first and the second 16 weights of the blocks
        const uint8_t* block = blocks.row(r);
        for (int64_t b = 0; b < blocks.columns / block_weights; b++, block += block_bytes(blocks.quant)) {
            const uint8x16x2_t marks = non_zero(blocks.quant, block);
            for (int i = 0; i < 2; i++) stored[i] += vaddvq_u8(vandq_u8(marks.val[i], vdupq_n_u8(1)));
        }
        counts[r] = values_bytes(blocks.quant, stored[0], stored[1]);
    }
}

// ---- inputs ----

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
