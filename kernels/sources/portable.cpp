// Every kernel in plain C++, weight by weight: for other processors, for what a set of kernels leaves out, and for the
// tests to compare the others with.
#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace racdeploy {
namespace {

// One row of ggml blocks, weight by weight.
struct BlockRow {
    Quant quant;
    int64_t columns;
    const uint8_t* row;

    uint16_t scale(int64_t block) const { return load<uint16_t>(row + block * block_bytes(quant)); }

    // The value as it is stored: code + 128, nibble, or the two bytes of a float; that of zero beyond the row.
    uint16_t value(int64_t column) const {
        if (column >= columns) return zero_value(quant);
        if (!is_quantized(quant)) return load<uint16_t>(row + 2 * column);
        const uint8_t* codes = row + column / block_weights * block_bytes(quant) + 2;
        const int64_t index = column % block_weights;
        if (quant == Quant::q8_0) return codes[index] ^ 0x80;
        return index < 16 ? codes[index] & 15 : codes[index - 16] >> 4;
    }
    bool is_zero(int64_t column) const { return value(column) == zero_value(quant); }
};

void set_value(Quant quant, uint8_t* row, int64_t column, uint16_t value) {
    if (!is_quantized(quant)) {
        std::memcpy(row + 2 * column, &value, 2);
        return;
    }

    uint8_t* codes = row + column / block_weights * block_bytes(quant) + 2;
    const int64_t index = column % block_weights;
    if (quant == Quant::q8_0) {
        codes[index] = static_cast<uint8_t>(value ^ 0x80);
        return;
    }
    uint8_t& pair = codes[index % 16];
    pair = index < 16 ? static_cast<uint8_t>((pair & 0xf0) | value) : static_cast<uint8_t>((pair & 15) | value << 4);
}

// Which weight the mask bit at a place of a row is.
int64_t column_at(Quant quant, int64_t place) { return is_quantized(quant) ? column_in_chunks(place) : place; }

// Where the n-th stored value of a row is, in values from the row's first (Q4_0: in nibbles).
struct Stream {
    Quant quant;
    int64_t stored[2] = {0, 0};

    int64_t next(int64_t place) {
        const int64_t half = quant == Quant::q4_0 ? place / 128 % 2 : 0;
        const int64_t position = stored[half]++;
        return quant == Quant::q4_0 ? 2 * position + half : position;
    }
    int64_t bytes() const { return values_bytes(quant, stored[0], stored[1]); }
};

uint16_t read_value(Quant quant, const uint8_t* values, int64_t position) {
    if (quant == Quant::q8_0) return values[position];
    if (quant == Quant::q4_0) return position & 1 ? values[position / 2] >> 4 : values[position / 2] & 15;
    return load<uint16_t>(values + 2 * position);
}

void write_value(Quant quant, uint8_t* values, int64_t position, uint16_t value) {
    if (quant == Quant::q8_0) {
        values[position] = static_cast<uint8_t>(value);
    } else if (quant == Quant::q4_0) {
        values[position / 2] |= static_cast<uint8_t>(position & 1 ? value << 4 : value);
    } else {
        std::memcpy(values + 2 * position, &value, 2);
    }
}

struct Mask {  // of a group
    uint8_t bytes[32];

    Mask(Quant quant, Pattern pattern, const uint8_t* head) { read_mask(quant, pattern, head, bytes); }
    bool bit(int64_t place) const { return bytes[place / 8] >> place % 8 & 1; }
};

bool is_stored(Pattern pattern, const BlockRow& row, int64_t column) {
    if (pattern == Pattern::unstructured) return !row.is_zero(column);
    unsigned bits = 0;
    for (int i = 0; i < 4; i++) bits |= static_cast<unsigned>(!row.is_zero(column / 4 * 4 + i)) << i;
    return fill_up_to_two(bits) >> column % 4 & 1;
}

// Note in a group's mask that the weight at a place is stored, as the n-th value of the row.
void set_stored(Pattern pattern, uint8_t* mask, int64_t place, int64_t n) {
    if (pattern == Pattern::two_of_four) {
        const PlaceBits bits(n % (group_weights / 2));
        mask[bits.byte] |= static_cast<uint8_t>(place % 4 << bits.shift);
    } else {
        mask[place / 8] |= static_cast<uint8_t>(1 << place % 8);
    }
}

// Inputs as F16 and BF16 take them: `round` makes one of a float, and of 0 beyond the columns.
template <typename Input, typename Round>
void prepare_floats(int64_t columns, int64_t token, const float* activation, void* workspace, const Round& round) {
    Input* inputs = static_cast<Input*>(workspace) + token * padded(columns);
    for (int64_t i = 0; i < padded(columns); i++) inputs[i] = i < columns ? round(activation[i]) : Input{0};
}

void prepare_quantized(Quant quant, int64_t columns, int64_t tokens, int64_t token, const float* activation,
                       void* workspace) {
    const QuantizedActivations to(columns, tokens, workspace);
    for (int64_t first = 0; first < to.padded_columns; first += block_weights) {
        const float* from = activation + first;
        const int64_t at = token * to.padded_columns + first;
        const bool inside = first < columns;

        float largest = 0;
        for (int i = 0; inside && i < block_weights; i++) largest = std::fmax(largest, std::fabs(from[i]));
        to.scales[at / block_weights] = float_of_half(half_of_float(largest / 127.0f));
        const float inverse = inverse_of_scale(largest);

        int32_t sums[2] = {0, 0};  // of the two lanes that a block fills
        for (int i = 0; i < block_weights; i++) {
            const int8_t code = inside ? static_cast<int8_t>(std::nearbyintf(from[i] * inverse)) : int8_t{0};
            to.codes[place_in_chunks(at + i)] = code;
            sums[i / 4 % 2] += code;
        }
        to.lane_offsets[at / 16] = -zero_point(quant) * sums[0];
        to.lane_offsets[at / 16 + 1] = -zero_point(quant) * sums[1];
        to.block_offsets[at / block_weights] = -zero_point(quant) * (sums[0] + sums[1]);
    }
}

float multiply_row(const SparseMatrix& matrix, int64_t row, int64_t tokens, int64_t token, const void* workspace) {
    const Quant quant = matrix.quant;
    const int64_t at = token * padded(matrix.columns);
    const QuantizedActivations from(matrix.columns, tokens, const_cast<void*>(workspace));
    const uint8_t* values = matrix.values + matrix.offsets[row];
    Stream stream{quant};

    double total = 0;
    for (int64_t start = 0; start < matrix.columns; start += group_weights) {
        const uint8_t* head = matrix.head(row) + start / group_weights * head_bytes(quant);
        int32_t codes[8] = {};  // of each block
        const Mask mask(quant, matrix.pattern, head);
        for (int64_t bit = 0; bit < group_weights; bit++) {
            if (!mask.bit(bit)) continue;
            const int64_t column = column_at(quant, start + bit);
            const uint16_t value = read_value(quant, values, stream.next(bit)) ^ flipped_bits(quant, matrix.pattern);
            if (quant == Quant::f16)
                total += double(float_of_half(value)) * static_cast<const float*>(workspace)[at + column];
            else if (quant == Quant::bf16)
                total += double(float_of_bfloat(value)) *
                         float_of_bfloat(static_cast<const uint16_t*>(workspace)[at + column]);
            else
                codes[column % group_weights / block_weights] +=
                    (value - zero_point(quant)) * from.codes[place_in_chunks(at + column)];
        }

        if (!is_quantized(quant)) continue;
        const int64_t blocks = std::min<int64_t>(8, (matrix.columns - start) / block_weights);
        for (int64_t block = 0; block < blocks; block++)
            total += double(float_of_half(load<uint16_t>(head + block * 2))) *
                     from.scales[(at + start) / block_weights + block] * codes[block];
    }
    return static_cast<float>(total);
}

}  // namespace

namespace portable {

void count(const Blocks& blocks, int64_t* counts, Rows rows) {
    if (blocks.pattern == Pattern::two_of_four) {
        std::fill(counts + rows.begin, counts + rows.end, groups(blocks.columns) * group_values_bytes(blocks.quant));
        return;
    }

    for (int64_t r = rows.begin; r < rows.end; r++) {
        const BlockRow row{blocks.quant, blocks.columns, blocks.row(r)};
        Stream stream{blocks.quant};
        for (int64_t place = 0; place < padded(blocks.columns); place++) {
            const int64_t column = column_at(blocks.quant, place);
            if (!row.is_zero(column)) stream.next(place);
        }
        counts[r] = stream.bytes();
    }
}

void pack(const Blocks& blocks, const int64_t* offsets, uint8_t* heads, uint8_t* values, Rows rows) {
    const Quant quant = blocks.quant;

    const int64_t row_heads = heads_bytes(quant, blocks.columns);
    for (int64_t r = rows.begin; r < rows.end; r++) {
        const BlockRow row{quant, blocks.columns, blocks.row(r)};
        uint8_t* head = heads + r * row_heads;
        std::memset(head, 0, static_cast<size_t>(row_heads));
        std::memset(values + offsets[r], 0, static_cast<size_t>(offsets[r + 1] - offsets[r]));

        if (is_quantized(quant))
            for (int64_t block = 0; block < blocks.columns / block_weights; block++) {
                const uint16_t scale = row.scale(block);
                std::memcpy(head + block / 8 * head_bytes(quant) + block % 8 * 2, &scale, 2);
            }

        Stream stream{quant};
        for (int64_t place = 0; place < padded(blocks.columns); place++) {
            const int64_t column = column_at(quant, place);
            if (!is_stored(blocks.pattern, row, column)) continue;

            uint8_t* mask = head + place / group_weights * head_bytes(quant) + head_bytes(quant) - 32;
            set_stored(blocks.pattern, mask, place % group_weights, stream.stored[0] + stream.stored[1]);
            const uint16_t value = row.value(column) ^ flipped_bits(quant, blocks.pattern);
            write_value(quant, values + offsets[r], stream.next(place), value);
        }
    }
}

void unpack(const SparseMatrix& matrix, void* blocks, Rows rows) {
    const Quant quant = matrix.quant;

    for (int64_t r = rows.begin; r < rows.end; r++) {
        uint8_t* row = static_cast<uint8_t*>(blocks) + r * row_bytes(quant, matrix.columns);
        const uint8_t* values = matrix.values + matrix.offsets[r];
        Stream stream{quant};
        for (int64_t start = 0; start < matrix.columns; start += group_weights) {
            const uint8_t* head = matrix.head(r) + start / group_weights * head_bytes(quant);
            const Mask mask(quant, matrix.pattern, head);
            for (int64_t place = 0; place < group_weights; place++) {
                uint16_t value = zero_value(quant);
                if (mask.bit(place))
                    value = read_value(quant, values, stream.next(place)) ^ flipped_bits(quant, matrix.pattern);

                const int64_t column = column_at(quant, start + place);
                if (column >= matrix.columns) continue;
                if (is_quantized(quant) && column % block_weights == 0) {
                    const int64_t block = column / block_weights;
                    std::memcpy(row + block * block_bytes(quant), head + block % 8 * 2, 2);
                }
                set_value(quant, row, column, value);
            }
        }
    }
}

void prepare(Quant quant, int64_t columns, int64_t tokens, int64_t token, const float* activation, void* workspace) {
    if (quant == Quant::f16)
        prepare_floats<float>(columns, token, activation, workspace,
                              [](float input) { return float_of_half(half_of_float(input)); });
    else if (quant == Quant::bf16)
        prepare_floats<uint16_t>(columns, token, activation, workspace, bfloat_of_float);
    else
        prepare_quantized(quant, columns, tokens, token, activation, workspace);
}

void multiply(const SparseMatrix& matrix, int64_t tokens, const void* workspace, Outputs outputs, Rows rows) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t r = rows.begin; r < rows.end; r++)
            outputs.first[t * outputs.stride + r] = multiply_row(matrix, r, tokens, t, workspace);
}

}  // namespace portable

const Kernels portable_kernels = {
    "portable",       [] { return true; }, false,             portable::count,
    portable::pack,   portable::unpack,    portable::prepare, portable::multiply,
};

}  // namespace racdeploy
