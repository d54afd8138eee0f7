// Q3_K and Q6_K in plain C++: packing for every instruction set, and the products that the others are compared with.
#include "k_quants.h"

#include <algorithm>
#include <cmath>

namespace racdeploy {
namespace {

// One of ggml's blocks: Q3_K is hmask, qs, scales, d; Q6_K is ql, qh, scales, d. `Byte` is const where it is only read.
template <typename Byte>
struct Block {
    Quant quant;
    Byte* data;

    Byte* scales() const { return data + (quant == Quant::q3_k ? 96 : 192); }
    Byte* scale() const { return data + block_bytes(quant) - 2; }
};
using ReadBlock = Block<const uint8_t>;

// Calls run(first weight, byte of its low bits, shift, byte of its high bits, shift) for every 32 weights: the others'
// bytes follow.
template <typename Run>
inline void over_bits(Quant quant, const Run& run) {
    for (int half = 0; half < 2; half++)
        for (int quarter = 0; quarter < 4; quarter++) {
            const int first = half * 128 + quarter * 32;
            if (quant == Quant::q3_k)
                run(first, 32 + half * 32, 2 * quarter, 0, half * 4 + quarter);
            else
                run(first, half * 64 + quarter % 2 * 32, quarter / 2 * 4, 128 + half * 32, 2 * quarter);
        }
}

// The unsigned codes of a block's weights.
struct Codes {
    uint8_t of[group_weights];

    explicit Codes(const ReadBlock& block) {
        const bool three = block.quant == Quant::q3_k;
        const int low_mask = three ? 3 : 15, high_mask = three ? 1 : 3, low_bits = three ? 2 : 4;
        over_bits(block.quant, [&](int first, int low, int low_shift, int high, int high_shift) {
            for (int i = 0; i < 32; i++)
                of[first + i] = static_cast<uint8_t>((block.data[low + i] >> low_shift & low_mask) |
                                                     (block.data[high + i] >> high_shift & high_mask) << low_bits);
        });
    }
    explicit Codes(Quant quant) { std::memset(of, k_zero_point(quant), sizeof of); }

    void write(const Block<uint8_t>& block) const {  // over bits that are 0
        const bool three = block.quant == Quant::q3_k;
        const int low_mask = three ? 3 : 15, low_bits = three ? 2 : 4;
        over_bits(block.quant, [&](int first, int low, int low_shift, int high, int high_shift) {
            for (int i = 0; i < 32; i++) {
                uint8_t &low_byte = block.data[low + i], &high_byte = block.data[high + i];
                low_byte = static_cast<uint8_t>(low_byte | (of[first + i] & low_mask) << low_shift);
                high_byte = static_cast<uint8_t>(high_byte | of[first + i] >> low_bits << high_shift);
            }
        });
    }
};

int64_t scales_bytes(Quant quant) { return quant == Quant::q3_k ? 12 : 16; }

int sub_scale(Quant quant, const uint8_t* scales, int64_t sub_block) {
    if (quant == Quant::q6_k) return static_cast<int8_t>(scales[sub_block]);
    const int low = scales[sub_block % 8] >> sub_block / 8 * 4 & 15;
    return (low | (scales[8 + sub_block % 4] >> sub_block / 4 * 2 & 3) << 4) - 32;
}

// Does the sub-block's scale make zeros of all its weights?
bool is_zero_scale(Quant quant, const uint8_t* scales, const uint8_t* scale, int64_t sub_block) {
    return !sub_scale(quant, scales, sub_block) || !(load<uint16_t>(scale) & 0x7fff);
}

// The code of every set of weights that are not zero among four; 7 where they are more than two.
struct CodeOfBits {
    uint8_t of[16];
    constexpr CodeOfBits() : of() {
        for (unsigned bits = 0; bits < 16; bits++) {
            const unsigned filled = fill_up_to(2, bits);
            of[bits] = 7;
            for (uint8_t code = 0; code < k_zero_scale_code; code++)
                if (k_tables.masks[code] == filled) of[bits] = code;
        }
    }
};
constexpr CodeOfBits code_of_bits;

// Which of every 4 weights are stored, as codes; 7 where more than two are not zero.
struct PlaceCodes {
    uint8_t of[group_weights / 4];

    PlaceCodes(const ReadBlock& block, const Codes& codes) {
        uint8_t stored[group_weights];
        for (int i = 0; i < group_weights; i++) stored[i] = codes.of[i] != k_zero_point(block.quant);
        for (int first = 0; first < group_weights; first += 4) {
            const unsigned bits = load<uint32_t>(stored + first) * 0x01020408u >> 24 & 15;  // one of each byte
            of[first / 4] = code_of_bits.of[bits];
            if (of[first / 4] == 7 && !codes.of[first + 2] && !codes.of[first + 3] &&
                is_zero_scale(block.quant, block.scales(), block.scale(), first / 16))
                of[first / 4] = k_zero_scale_code;
        }
    }
    bool fit() const { return *std::max_element(of, of + group_weights / 4) <= k_zero_scale_code; }
};

// A packed group, value by value.
template <typename Byte>
struct Group {
    Quant quant;
    Byte* data;

    struct Bit {
        int64_t byte;
        int shift;
    };
    // The third bit of entry i of so many, and of a run.
    static Bit third(int64_t i, int64_t entries, int64_t run) {
        return {i % (entries / 2), k_third_bit_of_run[run] - (i < entries / 2 ? 0 : 2)};
    }

    unsigned value(int64_t run, int64_t i) const {
        const Byte* high = data + k_parts(quant).high;
        if (quant == Quant::q6_k) {
            const unsigned low = data[run / 2 * 32 + i] >> run % 2 * 4 & 15;
            return low | (high[i] >> k_bits_of_run[run] & 3) << 4;
        }
        const Bit bit = third(i, 32, run);
        return (data[i] >> k_bits_of_run[run] & 3) | (high[bit.byte] >> bit.shift & 1) << 2;
    }
    void set_value(int64_t run, int64_t i, unsigned value) const {
        Byte* high = data + k_parts(quant).high;
        if (quant == Quant::q6_k) {
            add_bits(data[run / 2 * 32 + i], (value & 15) << run % 2 * 4);
            add_bits(high[i], value >> 4 << k_bits_of_run[run]);
            return;
        }
        const Bit bit = third(i, 32, run);
        add_bits(data[i], (value & 3) << k_bits_of_run[run]);
        add_bits(high[bit.byte], value >> 2 << bit.shift);
    }

    unsigned place(KFour four) const {
        const Byte* places = data + k_parts(quant).places;
        const Bit bit = third(four.code, k_run_codes, four.run);
        return (places[four.code] >> k_bits_of_run[four.run] & 3) | (places[16 + bit.byte] >> bit.shift & 1) << 2;
    }
    void set_place(KFour four, unsigned code) const {
        Byte* places = data + k_parts(quant).places;
        const Bit bit = third(four.code, k_run_codes, four.run);
        add_bits(places[four.code], (code & 3) << k_bits_of_run[four.run]);
        add_bits(places[16 + bit.byte], code >> 2 << bit.shift);
    }

    Byte* scales() const { return data + k_parts(quant).scales; }
    Byte* scale() const { return data + k_parts(quant).scale; }

private:
    static void add_bits(Byte& byte, unsigned bits) { byte = static_cast<uint8_t>(byte | bits); }
};
using ReadGroup = Group<const uint8_t>;

bool fits(Quant quant, int64_t blocks, const uint8_t* data) {
    for (int64_t b = 0; b < blocks; b++, data += block_bytes(quant)) {
        const ReadBlock block{quant, data};
        if (!PlaceCodes(block, Codes(block)).fit()) return false;
    }
    return true;
}

void pack_block(const ReadBlock& block, uint8_t* packed) {
    const KParts parts = k_parts(block.quant);
    const Group<uint8_t> group{block.quant, packed};
    std::memset(packed, 0, static_cast<size_t>(parts.bytes));
    std::memcpy(group.scales(), block.scales(), static_cast<size_t>(scales_bytes(block.quant)));
    std::memcpy(group.scale(), block.scale(), 2);
    const Codes codes(block);
    const PlaceCodes places(block, codes);
    for (int64_t first = 0; first < group_weights; first += 4) {
        const KFour four(first);
        const unsigned code = places.of[first / 4];
        group.set_place(four, code);
        for (int i = 0; i < 2; i++) group.set_value(four.run, 2 * four.code + i, codes.of[first + k_places[code][i]]);
    }
}

void unpack_group(const ReadGroup& group, uint8_t* data) {
    const Block<uint8_t> block{group.quant, data};
    std::memset(data, 0, static_cast<size_t>(block_bytes(group.quant)));
    std::memcpy(block.scales(), group.scales(), static_cast<size_t>(scales_bytes(group.quant)));
    std::memcpy(block.scale(), group.scale(), 2);
    Codes codes(group.quant);
    for (int64_t first = 0; first < group_weights; first += 4) {
        const KFour four(first);
        const unsigned code = group.place(four);
        if (code == k_zero_scale_code) std::memset(codes.of + first, 0, 4);
        for (int i = 0; i < 2; i++)
            codes.of[first + k_places[code][i]] = static_cast<uint8_t>(group.value(four.run, 2 * four.code + i));
    }
    codes.write(block);
}

// The product of one group, but for the scales of the whole group and of the inputs.
int32_t multiply_group(const ReadGroup& group, const int8_t* inputs) {
    int32_t total = 0;
    for (int64_t first = 0; first < group_weights; first += 4) {
        const KFour four(first);
        const int scale = sub_scale(group.quant, group.scales(), first / 16);
        for (int i = 0; i < 2; i++) {
            const int32_t value = static_cast<int32_t>(group.value(four.run, 2 * four.code + i));
            const int8_t input = inputs[k_input_place(first + k_places[group.place(four)][i])];
            total += (value - k_zero_point(group.quant)) * input * scale;
        }
    }
    return total;
}

int32_t multiply_block(const ReadBlock& block, const int8_t* inputs) {
    const Codes codes(block);
    int32_t total = 0;
    for (int64_t weight = 0; weight < group_weights; weight++) {
        const int32_t code = codes.of[weight] - k_zero_point(block.quant);
        total += code * inputs[k_input_place(weight)] * sub_scale(block.quant, block.scales(), weight / 16);
    }
    return total;
}

float multiply_row(const SparseMatrix& matrix, int64_t row, const KActivations& from, int64_t token) {
    const int64_t row_groups = groups(matrix.columns);
    const int64_t bytes = k_row_bytes(matrix.quant, matrix.pattern, matrix.columns);
    const uint8_t* data = matrix.values + row * bytes;
    double total = 0;
    for (int64_t g = 0; g < row_groups; g++, data += bytes / row_groups) {
        const int8_t* inputs = from.codes + token * from.columns + g * group_weights;
        const bool is_packed = matrix.pattern != Pattern::unstructured;
        const int32_t sum =
            is_packed ? multiply_group({matrix.quant, data}, inputs) : multiply_block({matrix.quant, data}, inputs);
        const float scale = float_of_half(load<uint16_t>(data + bytes / row_groups - 2));
        total += double(scale) * from.scales[token * row_groups + g] * sum;
    }
    return static_cast<float>(total);
}

}  // namespace

Pattern k_pattern(Quant quant, int64_t rows, int64_t columns, const void* blocks) {
    const bool fitting = fits(quant, rows * groups(columns), static_cast<const uint8_t*>(blocks));
    return fitting ? Pattern::two_of_four : Pattern::unstructured;
}

int64_t k_stored_bits(Quant quant, int64_t rows, int64_t columns, const void* blocks) {
    const auto* data = static_cast<const uint8_t*>(blocks);
    int64_t stored = 0;
    for (int64_t b = 0; b < rows * groups(columns); b++, data += block_bytes(quant)) {
        const ReadBlock block{quant, data};
        const Codes codes(block);
        for (int64_t first = 0; first < group_weights; first += 16) {
            if (is_zero_scale(quant, block.scales(), block.scale(), first / 16)) continue;
            for (int64_t i = first; i < first + 16; i++) stored += codes.of[i] != k_zero_point(quant);
        }
    }
    return stored * (quant == Quant::q3_k ? 3 : 6);
}

bool k_valid(const SparseMatrix& matrix, int64_t values_bytes) {
    const int64_t row_groups = groups(matrix.columns);
    const int64_t bytes = k_row_bytes(matrix.quant, matrix.pattern, matrix.columns);
    if (matrix.columns % group_weights) return false;
    if (matrix.offsets[0] != 0 || matrix.offsets[1] != bytes || matrix.rows * bytes != values_bytes) return false;
    if (matrix.pattern == Pattern::unstructured) return true;

    for (int64_t g = 0; g < matrix.rows * row_groups; g++) {
        const ReadGroup group{matrix.quant, matrix.values + g * k_parts(matrix.quant).bytes};
        for (int64_t first = 0; first < group_weights; first += 4) {
            const unsigned code = group.place(KFour(first));
            if (code > k_zero_scale_code) return false;
            if (code < k_zero_scale_code) continue;
            if (!is_zero_scale(matrix.quant, group.scales(), group.scale(), first / 16)) return false;
        }
    }
    return true;
}

namespace k_portable {

void count(const Blocks& blocks, int64_t* counts, Rows rows) {
    for (int64_t r = rows.begin; r < rows.end; r++)
        counts[r] = k_row_bytes(blocks.quant, blocks.pattern, blocks.columns);
}

void pack(const Blocks& blocks, uint8_t* values, Rows rows) {
    const int64_t row_groups = groups(blocks.columns);
    const int64_t bytes = k_row_bytes(blocks.quant, blocks.pattern, blocks.columns);
    for (int64_t r = rows.begin; r < rows.end; r++) {
        const uint8_t* from = blocks.row(r);
        uint8_t* to = values + r * bytes;
        if (blocks.pattern == Pattern::unstructured) {
            std::memcpy(to, from, static_cast<size_t>(bytes));
            continue;
        }
        for (int64_t g = 0; g < row_groups; g++)
            pack_block({blocks.quant, from + g * block_bytes(blocks.quant)}, to + g * k_parts(blocks.quant).bytes);
    }
}

void unpack(const SparseMatrix& matrix, void* blocks, Rows rows) {
    const int64_t row_groups = groups(matrix.columns);
    const int64_t bytes = k_row_bytes(matrix.quant, matrix.pattern, matrix.columns);
    for (int64_t r = rows.begin; r < rows.end; r++) {
        const uint8_t* from = matrix.values + r * bytes;
        uint8_t* to = static_cast<uint8_t*>(blocks) + r * row_bytes(matrix.quant, matrix.columns);
        if (matrix.pattern == Pattern::unstructured) {
            std::memcpy(to, from, static_cast<size_t>(bytes));
            continue;
        }
        for (int64_t g = 0; g < row_groups; g++)
            unpack_group({matrix.quant, from + g * k_parts(matrix.quant).bytes}, to + g * block_bytes(matrix.quant));
    }
}

void prepare(int64_t columns, int64_t tokens, int64_t token, const float* activation, void* workspace) {
    const KActivations to(columns, tokens, workspace);
    for (int64_t g = 0; g < groups(columns); g++) {
        const float* from = activation + g * group_weights;
        int8_t* codes = to.codes + token * columns + g * group_weights;
        float largest = 0;
        for (int64_t i = 0; i < group_weights; i++) largest = std::fmax(largest, std::fabs(from[i]));

        const KScale of_inputs(largest);
        for (int64_t i = 0; i < group_weights; i++)
            codes[k_input_place(i)] = static_cast<int8_t>(k_code(from[i], of_inputs.inverse));
        to.scales[token * groups(columns) + g] = of_inputs.scale;
    }
}

void multiply(const SparseMatrix& matrix, int64_t tokens, const void* workspace, Outputs outputs, Rows rows) {
    const KActivations from(matrix.columns, tokens, const_cast<void*>(workspace));
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t r = rows.begin; r < rows.end; r++) *outputs.at(t, r) = multiply_row(matrix, r, from, t);
}

}  // namespace k_portable
}  // namespace racdeploy
