// NEON: packed weights as dense signed bytes, 16 at a time.
//
// TBL writes 0 for an index of 16 and more, and 0 is the code of what is not stored once codes are signed. The 16
// indices of 16 weights are the sum of two rows of tables, one for each byte of their mask: the first one's row has the
// number of its values in the second half, so that the second one's indices begin behind them.
#pragma once
#include <arm_neon.h>

#include <algorithm>

#include "kernels.h"

namespace racdeploy {
namespace {

struct IndexTables {
    alignas(64) uint8_t first[256][16];
    alignas(64) uint8_t second[256][16];

    constexpr IndexTables() : first(), second() {
        for (unsigned mask = 0; mask < 256; mask++) {
            uint8_t stored = 0;
            for (unsigned i = 0; i < 8; i++) {
                const uint8_t index = mask >> i & 1 ? stored++ : uint8_t{0x80};
                first[mask][i] = index;
                second[mask][8 + i] = index;
            }
            for (unsigned i = 8; i < 16; i++) first[mask][i] = stored;
        }
    }
};
constexpr IndexTables index_tables;

// A row of a table. Compilers shift the index apart, which is one instruction more, and these kernels wait for nothing
// but instructions: of the 4 that a Cortex-A76 decodes in a cycle.
inline uint8x16_t table_row(const uint8_t (&table)[256][16], uint64_t index) {
    uint8x16_t row;
    asm("ldr %q0, [%1, %2, lsl 4]" : "=w"(row) : "r"(table), "r"(index), "m"(table));
    return row;
}

// Bits 8 * byte to 8 * byte + 7.
inline uint64_t byte_of(uint64_t bits, int byte) { return bits >> (8 * byte) & 255; }

// Where the 8 bytes of 4 half floats lie for each 4 mask bits, twice: so 8 half floats take two nibbles.
struct PairTables {
    alignas(64) uint8_t of[256][16];

    constexpr PairTables() : of() {
        for (unsigned mask = 0; mask < 256; mask++) {
            uint8_t stored = 0;
            for (unsigned i = 0; i < 8; i++) {
                const bool is_stored = mask >> i & 1;
                of[mask][2 * i] = is_stored ? stored : uint8_t{0x80};
                of[mask][2 * i + 1] = is_stored ? static_cast<uint8_t>(stored + 1) : uint8_t{0x80};
                if (is_stored) stored = static_cast<uint8_t>(stored + 2);
            }
        }
    }
};
constexpr PairTables pair_tables;

// Mask bits of 128 weights, 64 each; and how many of the first 8, 16, ... 64 of them are set, a byte each.
struct Masks {
    uint64_t bits[2], sums[2];

    explicit Masks(const uint8_t* from) {
        const uint64x2_t counts = vreinterpretq_u64_u8(vcntq_u8(vld1q_u8(from)));
        for (int i = 0; i < 2; i++) bits[i] = load<uint64_t>(from + 8 * i);
        sums[0] = vgetq_lane_u64(counts, 0) * 0x0101010101010101;
        sums[1] = vgetq_lane_u64(counts, 1) * 0x0101010101010101;
    }
};

// 16 stored bytes as signed codes, of chunk `chunk`.
template <Quant quant>
inline int8x16_t signed_codes(int chunk, uint8x16_t bytes) {
    if (quant == Quant::q8_0) return vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(0x80)));
    bytes = chunk < 2 ? vshlq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(0xf0));
    return vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(0x80)));
}

// Where a row's next values are: one stream, or the low and the high bits of Q4_0.
struct Values {
    const uint8_t *first, *second;
    explicit Values(const uint8_t* row = nullptr) : first(row), second(row) {}
};

// Weights 16 * part to 16 * part + 15 of a chunk, of which `bits` are stored.
template <Quant quant>
inline int8x16_t spread_16(int chunk, int part, uint64_t bits, uint64_t sums, const uint8_t* values) {
    const uint8_t* from = part ? values + byte_of(sums, 2 * part - 1) : values;
    const uint8x16_t first = table_row(index_tables.first, byte_of(bits, 2 * part));
    const uint8x16_t second = table_row(index_tables.second, byte_of(bits, 2 * part + 1));
    return vqtbl1q_s8(signed_codes<quant>(chunk, vld1q_u8(from)), vaddq_u8(first, second));
}

// The places of two_of_four: of 16 values of a group, run `run`, which of 32 weights each is.
inline uint8x16_t places_in_32(int run, uint8x16_t bits) {
    const uint8x16_t fours = {0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7};
    if (run % 4 == 1) bits = vshrq_n_u8(bits, 2);
    if (run % 4 == 2) bits = vshrq_n_u8(bits, 4);
    if (run % 4 == 3) bits = vshrq_n_u8(bits, 6);
    return vsliq_n_u8(bits, fours, 2);  // the lowest two bits stay
}

// 16 values of a run of two_of_four; `bytes` of Q4_0 are shared by runs 4 apart.
template <Quant quant>
inline int8x16_t signed_values(int run, uint8x16_t bytes) {
    if (quant == Quant::q4_0) bytes = run < 4 ? vshlq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(0xf0));
    return vreinterpretq_s8_u8(bytes);
}
template <Quant quant>
constexpr int64_t run_bytes(int run) {  // from a group's first value to those of a run
    return 16 * (quant == Quant::q4_0 ? run % 4 : run);
}

// The same as dense weights: 16 of the 32 weights of a run, `half` saying which.
inline int8x16_t spread_places(int half, int8x16_t values, uint8x16_t places) {
    const uint8x16_t evens = {0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6};
    const uint8x16_t weights = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const uint8x16_t first = vaddq_u8(evens, vdupq_n_u8(static_cast<uint8_t>(8 * half)));
    const uint8x16_t second = vaddq_u8(first, vdupq_n_u8(1));
    const uint8x16_t wanted = vaddq_u8(weights, vdupq_n_u8(static_cast<uint8_t>(16 * half)));

    const uint8x16_t is_first = vceqq_u8(vqtbl1q_u8(places, first), wanted);
    const uint8x16_t is_second = vceqq_u8(vqtbl1q_u8(places, second), wanted);
    const uint8x16_t bytes = vreinterpretq_u8_s8(values);
    const uint8x16_t one = vandq_u8(vqtbl1q_u8(bytes, first), is_first);
    const uint8x16_t other = vandq_u8(vqtbl1q_u8(bytes, second), is_second);
    return vreinterpretq_s8_u8(vorrq_u8(one, other));
}

// Scales of the 8 blocks of a group.
struct Scales {
    float32x4_t low, high;
    explicit Scales(const uint8_t* head) {
        const float16x8_t halves = vreinterpretq_f16_u8(vld1q_u8(head));
        low = vcvt_f32_f16(vget_low_f16(halves));
        high = vcvt_high_f32_f16(halves);
    }
};

}  // namespace
}  // namespace racdeploy
