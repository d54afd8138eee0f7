// What all sets of kernels share: ggml's blocks, half floats, the workspace.
#pragma once
#include <cstdint>
#include <cstring>

#include "sparse_matrix.h"

namespace racdeploy {

extern const Kernels portable_kernels;
extern const Kernels avx2_kernels;  // runs_here is false where the compiler or the processor lacks it
extern const Kernels avx_vnni_kernels;
extern const Kernels evex_vnni_kernels;  // the same, encoded for others
extern const Kernels avx512_kernels;
extern const Kernels neon_kernels;
extern const Kernels neon_i8mm_kernels;

// The functions of portable_kernels, for what the others leave to it.
namespace portable {
void count(const Blocks&, int64_t* counts, Rows rows);
void pack(const Blocks&, const int64_t* offsets, uint8_t* heads, uint8_t* values, Rows rows);
void unpack(const SparseMatrix&, void* blocks, Rows rows);
void prepare(Quant, int64_t columns, int64_t tokens, int64_t token, const float* activation, void* workspace);
void multiply(const SparseMatrix&, int64_t tokens, const void* workspace, Outputs outputs, Rows rows);
}  // namespace portable

// The functions of neon_kernels, for neon_i8mm_kernels.
namespace neon {
void count(const Blocks&, int64_t* counts, Rows rows);
void pack(const Blocks&, const int64_t* offsets, uint8_t* heads, uint8_t* values, Rows rows);
void prepare(Quant, int64_t columns, int64_t tokens, int64_t token, const float* activation, void* workspace);
void multiply(const SparseMatrix&, int64_t tokens, const void* workspace, Outputs outputs, Rows rows);
}  // namespace neon

// What an unsigned code is above the signed one: the kernels multiply unsigned weights with signed activations.
constexpr int32_t zero_point(Quant quant) { return quant == Quant::q8_0 ? 128 : 8; }
// What is not stored: the code of +0.
constexpr uint16_t zero_value(Quant quant) {
    return is_quantized(quant) ? static_cast<uint16_t>(zero_point(quant)) : uint16_t{0};
}

// Where codes of Q4_0 fill the upper half of a byte, products are 16 times too large; nothing has to move their sign.
constexpr float product_scale(Quant quant) { return quant == Quant::q4_0 ? 1.0f / 16 : 1.0f; }

// What the values of a pattern differ in from unsigned codes.
constexpr uint16_t flipped_bits(Quant quant, Pattern pattern) {
    return pattern == Pattern::two_of_four ? zero_value(quant) : uint16_t{0};
}

// A group's mask is at the end of its head, behind the scales.
inline const uint8_t* mask_of(Quant quant, const uint8_t* head) { return head + head_bytes(quant) - 32; }

// Bytes of a row's values, of which so many are in the first and in the second half of its groups: Q4_0's two streams.
constexpr int64_t values_bytes(Quant quant, int64_t first, int64_t second) {
    if (quant == Quant::q4_0) return first > second ? first : second;
    return (first + second) * (quant == Quant::q8_0 ? 1 : 2);
}

// Bytes of a group's values in two_of_four.
constexpr int64_t group_values_bytes(Quant quant) { return values_bytes(quant, group_weights / 4, group_weights / 4); }

// Of the mask bits of four weights, those that two_of_four stores: the set ones, filled up to two from the lowest.
constexpr unsigned fill_up_to_two(unsigned bits) {
    for (unsigned bit = 1; __builtin_popcount(bits) < 2; bit <<= 1) bits |= bit;
    return bits;
}

// The place of a weight among those of its group, in chunks; and the weight of a place.
constexpr int64_t chunk_weights = 64;
constexpr int64_t place_in_chunks(int64_t column) {
    const int64_t group = column / group_weights * group_weights, block = column % group_weights / block_weights;
    return group + column % block_weights / 8 * chunk_weights + block * 8 + column % 8;
}
constexpr int64_t column_in_chunks(int64_t place) {
    const int64_t group = place / group_weights * group_weights, chunk = place % group_weights / chunk_weights;
    return group + place % chunk_weights / 8 * block_weights + chunk * 8 + place % 8;
}

// The workspace of a quantized matrix: inputs in chunks, whatever the pattern. Inputs beyond `columns` are 0, so their
// weights do not matter.
struct QuantizedActivations {
    int64_t padded_columns;
    int8_t* codes;           // [tokens][padded]
    int32_t* lane_offsets;   // [tokens][padded / 16], -zero_point times the sum of the 16 codes under a 32-bit lane
    int32_t* block_offsets;  // [tokens][padded / 32], the same over the 32 codes of a block
    float* scales;           // [tokens][padded / 32]

    QuantizedActivations(int64_t columns, int64_t tokens, void* workspace) : padded_columns(padded(columns)) {
        const int64_t weights = tokens * padded_columns;
        codes = static_cast<int8_t*>(workspace);
        lane_offsets = reinterpret_cast<int32_t*>(codes + weights);
        block_offsets = lane_offsets + weights / 16;
        scales = reinterpret_cast<float*>(block_offsets + weights / block_weights);
    }
    static int64_t bytes(int64_t columns, int64_t tokens) {
        const int64_t weights = tokens * padded(columns);
        return weights + weights / 16 * 4 + weights / block_weights * 8;
    }
};

// F16 keeps inputs as float32 (rounded through float16), BF16 as bfloat16; both [tokens][padded].
constexpr int64_t input_bytes(Quant quant) { return quant == Quant::f16 ? 4 : 2; }

template <typename T>
inline T load(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
}

inline uint32_t bits_of(float value) { return load<uint32_t>(&value); }
inline float float_of(uint32_t bits) { return load<float>(&bits); }

inline float float_of_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
    uint32_t bits;
    if (magnitude >= 0x7c00) {
        bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
    } else if (magnitude >= 0x400) {
        bits = (magnitude << 13) + (112u << 23);
    } else {  // subnormal: magnitude * 2^-24, exact in float32
        bits = bits_of(static_cast<float>(magnitude) * 0x1p-24f);
    }
    return float_of(bits | sign);
}

inline uint16_t half_of_float(float value) {  // to nearest, ties to even
    uint32_t bits = bits_of(value);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and above
    if (bits < 0x38800000)  // below 2^-14: adding 0.5 leaves the rounded subnormal in the low bits
        return sign | static_cast<uint16_t>(bits_of(float_of(bits) + 0.5f) - 0x3f000000);

    bits += 0xfff + (bits >> 13 & 1);
    return sign | static_cast<uint16_t>((bits - 0x38000000) >> 13);
}

inline float float_of_bfloat(uint16_t bfloat) { return float_of(static_cast<uint32_t>(bfloat) << 16); }

inline uint16_t bfloat_of_float(float value) {  // to nearest, ties to even
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 64);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Where two_of_four has the two bits of a group's value: the lowest of them.
struct PlaceBits {
    int64_t byte;
    int shift;
    explicit constexpr PlaceBits(int64_t value)
        : byte(value / 64 * 16 + value % 16), shift(static_cast<int>(value / 16 % 4 * 2)) {}
};

// The 256 mask bits of a group, whatever its pattern; `head` is the group's.
inline void read_mask(Quant quant, Pattern pattern, const uint8_t* head, uint8_t* mask) {
    std::memcpy(mask, mask_of(quant, head), 32);
    if (pattern != Pattern::two_of_four) return;

    std::memset(mask, 0, 32);
    for (int64_t value = 0; value < group_weights / 2; value++) {
        const PlaceBits bits(value);
        const int64_t place = value / 2 * 4 + (mask_of(quant, head)[bits.byte] >> bits.shift & 3);
        mask[place / 8] |= static_cast<uint8_t>(1 << place % 8);
    }
}

// What ggml multiplies 32 inputs with to make codes of them, `largest` being their largest size. Its code for ARM
// rounds once more than its code for x86, and one code in ten thousand differs.
inline float inverse_of_scale(float largest) {
#ifdef __aarch64__
    const float scale = largest / 127.0f;
    return scale != 0 ? 1.0f / scale : 0;
#else
    return largest != 0 ? 127.0f / largest : 0;
#endif
}

// Memory of this thread, aligned to 64 and kept between calls; null if there is none.
void* scratch_of_thread(int64_t bytes);

}  // namespace racdeploy
