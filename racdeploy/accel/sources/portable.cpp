// Every kernel in plain C++, weight by weight: what the tests hold the others against.
#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace racdeploy {
namespace {

// One row of ggml blocks, weight by weight.
class BlockRow {
public:
    BlockRow(Quant quant, const void* row) : quant_(quant), row_(static_cast<const uint8_t*>(row)) {}
    uint16_t scale(int64_t block) const { return load<uint16_t>(row_ + block * block_bytes()); }
    // The value as it is stored: code + 128, nibble, or the two bytes of a float.
    uint16_t value(int64_t column) const {
        if (!is_quantized(quant_)) return load<uint16_t>(row_ + 2 * column);
        const uint8_t* codes = row_ + column / block_weights * block_bytes() + 2;
        const int64_t index = column % block_weights;
        if (quant_ == Quant::q8_0) return codes[index] ^ 0x80;
        return index < 16 ? codes[index] & 15 : codes[index - 16] >> 4;
    }
    bool is_zero(int64_t column) const {
        return value(column) == (is_quantized(quant_) ? static_cast<uint16_t>(zero_point(quant_)) : 0);
    }

private:
    int64_t block_bytes() const { return quant_ == Quant::q8_0 ? q8_block_bytes : q4_block_bytes; }
    Quant quant_;
    const uint8_t* row_;
};

void set_value(Quant quant, uint8_t* row, int64_t column, uint16_t value) {
    if (!is_quantized(quant)) {
        std::memcpy(row + 2 * column, &value, 2);
        return;
    }
    const int64_t index = column % block_weights;
    if (quant == Quant::q8_0) {
        row[column / block_weights * q8_block_bytes + 2 + index] = static_cast<uint8_t>(value ^ 0x80);
        return;
    }
    uint8_t& pair = row[column / block_weights * q4_block_bytes + 2 + index % 16];
    pair = index < 16 ? static_cast<uint8_t>((pair & 0xf0) | value) : static_cast<uint8_t>((pair & 15) | value << 4);
}

// Which weight the mask bit at a place of a row is.
int64_t column_at(Quant quant, Pattern pattern, int64_t place) {
    return pattern == Pattern::unstructured && is_quantized(quant) ? column_in_chunks(place) : place;
}

// Where the n-th stored value of a row stands, in values from the row's first (Q4_0: in nibbles).
class Stream {
public:
    Stream(Quant quant, Pattern pattern) : quant_(quant), pattern_(pattern) {}
    int64_t next(int64_t place) {
        const int64_t half = quant_ == Quant::q4_0 ? place / 128 % 2 : 0;
        const int64_t position = stored_[half]++;
        if (quant_ == Quant::q4_0) return 2 * position + half;
        if (pattern_ == Pattern::unstructured) return position;
        static constexpr int64_t place_of_run[4] = {0, 2, 1, 3};
        return position / 64 * 64 + place_of_run[position / 16 % 4] * 16 + position % 16;
    }
    int64_t bytes() const {
        if (quant_ == Quant::q4_0) return std::max(stored_[0], stored_[1]);
        return stored_[0] * (quant_ == Quant::q8_0 ? 1 : 2);
    }

private:
    Quant quant_;
    Pattern pattern_;
    int64_t stored_[2] = {0, 0};
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

const uint8_t* mask_of(Quant quant, const uint8_t* head) { return head + head_bytes(quant) - 32; }
bool mask_bit(const uint8_t* mask, int64_t weight) { return mask[weight / 8] >> weight % 8 & 1; }

// Which of 4 weights are stored: the non-zero ones, filled up to two with the first zeros.
int two_of_four(const BlockRow& row, int64_t column) {
    int stored = 0, bits = 0;
    for (int i = 0; i < 4; i++)
        if (!row.is_zero(column + i)) bits |= 1 << i, stored++;
    for (int i = 0; i < 4 && stored < 2; i++)
        if (!(bits >> i & 1)) bits |= 1 << i, stored++;
    return bits;
}

bool is_stored(Pattern pattern, const BlockRow& row, int64_t column) {
    if (pattern == Pattern::unstructured) return !row.is_zero(column);
    return two_of_four(row, column / 4 * 4) >> column % 4 & 1;
}

void count_rows(Quant quant, Pattern pattern, int64_t columns, const void* blocks, int64_t* counts, int64_t row_begin,
                int64_t row_end) {
    for (int64_t r = row_begin; r < row_end; r++) {
        const BlockRow row(quant, static_cast<const uint8_t*>(blocks) + r * row_bytes(quant, columns));
        Stream stream(quant, pattern);
        for (int64_t place = 0; place < padded(columns); place++) {
            const int64_t column = column_at(quant, pattern, place);
            if (column < columns && is_stored(pattern, row, column)) stream.next(place);
        }
        counts[r] = stream.bytes();
    }
}

void pack_rows(Quant quant, Pattern pattern, int64_t columns, const void* blocks, const int64_t* offsets,
               uint8_t* heads, uint8_t* values, int64_t row_begin, int64_t row_end) {
    const int64_t heads_of_row = groups(columns) * head_bytes(quant);
    for (int64_t r = row_begin; r < row_end; r++) {
        const BlockRow row(quant, static_cast<const uint8_t*>(blocks) + r * row_bytes(quant, columns));
        uint8_t* head = heads + r * heads_of_row;
        std::memset(head, 0, static_cast<size_t>(heads_of_row));
        std::memset(values + offsets[r], 0, static_cast<size_t>(offsets[r + 1] - offsets[r]));
        Stream stream(quant, pattern);
        for (int64_t place = 0; place < padded(columns); place++) {
            const int64_t column = column_at(quant, pattern, place), bit = place % group_weights;
            if (column >= columns) continue;
            uint8_t* group = head + column / group_weights * head_bytes(quant);
            if (is_quantized(quant) && column % block_weights == 0) {
                const uint16_t scale = row.scale(column / block_weights);
                std::memcpy(group + column % group_weights / block_weights * 2, &scale, 2);
            }
            if (!is_stored(pattern, row, column)) continue;
            group[head_bytes(quant) - 32 + bit / 8] |= static_cast<uint8_t>(1 << bit % 8);
            write_value(quant, values + offsets[r], stream.next(place), row.value(column));
        }
    }
}

void unpack_rows(const SparseMatrix& matrix, void* blocks, int64_t row_begin, int64_t row_end) {
    const Quant quant = matrix.quant;
    for (int64_t r = row_begin; r < row_end; r++) {
        uint8_t* row = static_cast<uint8_t*>(blocks) + r * row_bytes(quant, matrix.columns);
        Stream stream(quant, matrix.pattern);
        for (int64_t place = 0; place < padded(matrix.columns); place++) {
            const int64_t column = column_at(quant, matrix.pattern, place);
            if (column >= matrix.columns) continue;
            const uint8_t* head =
                matrix.heads + (r * groups(matrix.columns) + place / group_weights) * head_bytes(quant);
            if (is_quantized(quant) && column % block_weights == 0) {
                const int64_t block_bytes = quant == Quant::q8_0 ? q8_block_bytes : q4_block_bytes;
                const int64_t block = column / block_weights;
                std::memcpy(row + block * block_bytes, head + block % 8 * 2, 2);
            }
            const uint16_t zero = is_quantized(quant) ? static_cast<uint16_t>(zero_point(quant)) : 0;
            const bool stored = mask_bit(mask_of(quant, head), place % group_weights);
            set_value(quant, row, column,
                      stored ? read_value(quant, matrix.values + matrix.offsets[r], stream.next(place)) : zero);
        }
    }
}

void prepare_row(Quant quant, int64_t columns, int64_t tokens, int64_t token, const float* activation,
                 void* workspace) {
    const int64_t padded_columns = padded(columns);
    if (quant == Quant::f16) {
        float* inputs = static_cast<float*>(workspace) + token * padded_columns;
        for (int64_t i = 0; i < padded_columns; i++)
            inputs[i] = i < columns ? float_of_half(half_of_float(activation[i])) : 0;
        return;
    }
    if (quant == Quant::bf16) {
        uint16_t* inputs = static_cast<uint16_t*>(workspace) + token * padded_columns;
        for (int64_t i = 0; i < padded_columns; i++) inputs[i] = i < columns ? bfloat_of_float(activation[i]) : 0;
        return;
    }
    const QuantizedActivations to(columns, tokens, workspace);
    for (int64_t block = 0; block < padded_columns / block_weights; block++) {
        const float* from = activation + block * block_weights;
        const int64_t at = token * padded_columns + block * block_weights;
        const bool inside = block * block_weights < columns;
        float largest = 0;
        for (int i = 0; inside && i < block_weights; i++) largest = std::fmax(largest, std::fabs(from[i]));
        to.scales[at / block_weights] = float_of_half(half_of_float(largest / 127.0f));
        const float inverse = largest != 0 ? 127.0f / largest : 0;
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
    Stream stream(quant, matrix.pattern);
    double total = 0;
    for (int64_t group = 0; group < groups(matrix.columns); group++) {
        const uint8_t* head = matrix.heads + (row * groups(matrix.columns) + group) * head_bytes(quant);
        int32_t codes[8] = {};  // of each block
        for (int64_t bit = 0; bit < group_weights; bit++) {
            if (!mask_bit(mask_of(quant, head), bit)) continue;
            const int64_t column = column_at(quant, matrix.pattern, group * group_weights + bit);
            const uint16_t value = read_value(quant, matrix.values + matrix.offsets[row], stream.next(bit));
            if (quant == Quant::f16)
                total += double(float_of_half(value)) * static_cast<const float*>(workspace)[at + column];
            else if (quant == Quant::bf16)
                total += double(float_of_bfloat(value)) *
                         float_of_bfloat(static_cast<const uint16_t*>(workspace)[at + column]);
            else
                codes[column % group_weights / block_weights] +=
                    (value - zero_point(quant)) * from.codes[place_in_chunks(at + column)];
        }
        const int64_t blocks =
            is_quantized(quant) ? std::min<int64_t>(8, matrix.columns / block_weights - group * 8) : 0;
        for (int64_t block = 0; block < blocks; block++)
            total += double(float_of_half(load<uint16_t>(head + block * 2))) *
                     from.scales[at / block_weights + group * 8 + block] * codes[block];
    }
    return static_cast<float>(total);
}

void multiply_rows(const SparseMatrix& matrix, int64_t tokens, const void* workspace, float* output,
                   int64_t output_stride, int64_t row_begin, int64_t row_end) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t r = row_begin; r < row_end; r++)
            output[t * output_stride + r] = multiply_row(matrix, r, tokens, t, workspace);
}

}  // namespace

const Kernels portable_kernels = {
    "portable",  [] { return true; }, [](Quant, int64_t, int64_t, const void*) { return false; },
    count_rows,  pack_rows,           unpack_rows,
    prepare_row, multiply_rows,
};

}  // namespace racdeploy
