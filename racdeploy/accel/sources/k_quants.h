// Q3_K and Q6_K: packed rows of 2:4, and what their kernels share.
//
// ggml's super-blocks have 256 weights, 16 sub-blocks of 16 with a scale each. Of every 4 weights two values are stored
// and one code of 0 to 5: which two they are. A run has 8 weights of each of 8 sub-blocks, and so 32 values, 4 for each
// sub-block, whose products add up in one lane of 32 bits. Two runs have the same sub-blocks: runs 0 and 1 have 0 to 3
// and 8 to 11, runs 2 and 3 the others; the first of the two has the first 8 weights. So only the sums of the four runs
// meet the scales, and in the order of the sub-blocks once they are packed to 16 bits.
//
//   Q3_K, 86 bytes    32: 2 low bits of value i of each run; 16: its third bit; places; ggml's 12 scales; d
//   Q6_K, 138 bytes   64: 4 low bits, of runs 0 and 1, then of 2 and 3; 32: the 2 others; places; 16 scales; d
//   places, 24 bytes  16: 2 low bits of code i of each run; 8: the third bit
//
// Two bits of run k are at k_bits_of_run of their byte. Third bits are two to a byte and run: of the first half of the
// values (or codes) at k_third_bit_of_run, of the second half two bits below. So two runs at once become nibbles.
//
// Values are ggml's unsigned codes, and what is not stored is the code of zero. But ggml leaves the lowest code all
// over a sub-block of zeros, whose scale is 0: code 6 is the first two places, and says that the others have that.
//
// A matrix that is not 2:4 (unstructured) is ggml's blocks as they are, which nobody asks for: one is only written here
// over the 2:4 matrix that this place was made for.
#pragma once
#include "kernels.h"

namespace racdeploy {

constexpr int64_t k_sub_blocks = 16, k_runs = 4, k_run_weights = 64, k_run_codes = 16;
constexpr int k_bits_of_run[k_runs] = {0, 4, 2, 6};
constexpr int k_third_bit_of_run[k_runs] = {2, 6, 3, 7};
constexpr int k_zero_scale_code = 6;
constexpr uint8_t k_places[8][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}, {0, 1}, {0, 1}};

// The same as tables for lookups of bytes, by code.
struct KTables {
    uint8_t places[16] = {};  // the first places, then the second ones
    uint8_t masks[16] = {};   // a bit for each of the two
    constexpr KTables() {
        for (int code = 0; code < 8; code++)
            for (int i = 0; i < 2; i++) {
                places[8 * i + code] = k_places[code][i];
                masks[code] = static_cast<uint8_t>(masks[code] | 1 << k_places[code][i]);
            }
    }
};
constexpr KTables k_tables;

constexpr int k_zero_point(Quant quant) { return quant == Quant::q3_k ? 4 : 32; }

// Where the parts of a group are.
struct KParts {
    int64_t high, places, scales, scale;  // behind the values' low bits; `scale` is of the whole group
    int64_t bytes;
};
constexpr KParts k_parts(Quant quant) {
    return quant == Quant::q3_k ? KParts{32, 48, 72, 84, 86} : KParts{64, 96, 120, 136, 138};
}
constexpr bool k_parts_fill_rows(Quant quant) {
    return k_parts(quant).bytes == k_row_bytes(quant, Pattern::two_of_four, group_weights);
}
static_assert(k_parts_fill_rows(Quant::q3_k) && k_parts_fill_rows(Quant::q6_k));

// Four weights of a group: their run, and their code in it. Half of the codes are a lane's of 128 bits.
struct KFour {
    int64_t run, code;
    explicit constexpr KFour(int64_t weight)
        : run(weight / 64 % 2 * 2 + weight % 16 / 8), code(weight / 128 * 8 + weight / 16 % 4 * 2 + weight / 4 % 2) {}
};

// Inputs as ggml's Q8_K has them, up to the sign of a block's codes and scale. A run's 64 lie as two registers of 32:
// in each lane the first, in each lane the last four of its eight codes' inputs.
struct KActivations {
    int64_t columns;
    int8_t* codes;  // [tokens][columns]
    float* scales;  // [tokens][columns / 256]

    KActivations(int64_t columns, int64_t tokens, void* workspace)
        : columns(columns),
          codes(static_cast<int8_t*>(workspace)),
          scales(reinterpret_cast<float*>(codes + tokens * columns)) {}
    static int64_t bytes(int64_t columns, int64_t tokens) {
        return tokens * (columns + groups(columns) * static_cast<int64_t>(sizeof(float)));
    }
};

// The place among a run's inputs of the first of a code's.
constexpr int64_t k_place_of_code(int64_t code) { return code / 4 % 2 * 32 + code / 8 * 16 + code % 4 * 4; }

// The place of a weight of a group among the inputs.
constexpr int64_t k_input_place(int64_t weight) {
    const KFour four(weight);
    return four.run * k_run_weights + k_place_of_code(four.code) + weight % 4;
}

// ggml's `iscale` and `d`, but for the sign, of 256 inputs and their largest size. Where that is infinite `iscale` is
// 0, and `d` infinite: products are no numbers.
struct KScale {
    float inverse, scale;
    explicit KScale(float largest)
        : inverse(largest != 0 ? 127.0f / largest : 0), scale(largest != 0 ? 1 / inverse : 0) {}
};

// Its nearest_int: of iscale * x, which ggml's own compiler rounds once where the processor multiplies and adds in one
// step, as gcc does on AArch64.
inline int32_t k_code(float input, float inverse) {
    constexpr float shift = 12582912;  // 1.5 * 2^23: the sum's last bit is 1
#if defined(__aarch64__) && !defined(__clang__)
    const float sum = __builtin_fmaf(input, inverse, shift);
#else
    const float product = input * inverse, sum = product + shift;
#endif
    return static_cast<int32_t>(bits_of(sum) & 0x7fffff) - 0x400000;
}

namespace k_portable {
void count(const Blocks&, int64_t* counts, Rows rows);
void pack(const Blocks&, uint8_t* values, Rows rows);
void unpack(const SparseMatrix&, void* blocks, Rows rows);
void prepare(int64_t columns, int64_t tokens, int64_t token, const float* activation, void* workspace);
void multiply(const SparseMatrix&, int64_t tokens, const void* workspace, Outputs outputs, Rows rows);
}  // namespace k_portable

bool k_valid(const SparseMatrix& matrix, int64_t values_bytes);

}  // namespace racdeploy
