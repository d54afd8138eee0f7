// NEON, many tokens: 8 rows are spread into a tile of dense weights, which every token then uses, 4 tokens at a time.
//
// `Product` says how a block of a tile lies and how it is multiplied: by SDOT (neon.cpp) or SMMLA (neon_i8mm.cpp).
#pragma once
#include "neon_spread.h"

namespace racdeploy {
namespace {

constexpr int64_t tile_rows = 8;
constexpr int tile_tokens = 4;
constexpr int64_t tile_block_bytes = tile_rows * block_weights;

// A block of a tile: its weights, and the scales of its 8 rows in the order of the product.
template <typename Product>
struct Tile {
    int8_t* codes;  // [padded / 32][tile_block_bytes]
    float* scales;  // [padded / 32][Product::scales]

    static int64_t bytes(int64_t padded_columns) {
        return padded_columns / block_weights * (tile_block_bytes + Product::scales * 4);
    }
    Tile(int64_t padded_columns, void* memory)
        : codes(static_cast<int8_t*>(memory)),
          scales(reinterpret_cast<float*>(codes + padded_columns / block_weights * tile_block_bytes)) {}
};

// Chunk `chunk` of a group as 4 vectors of 16 weights.
template <Quant quant>
inline void spread_chunk(Pattern pattern, int chunk, const uint8_t* head, Values& values, int8x16_t* weights) {
    if (pattern == Pattern::unstructured) {
        const uint8_t*& from = quant == Quant::q4_0 && chunk >= 2 ? values.second : values.first;
        const Masks masks(head + 16 + chunk / 2 * 16);
        const uint64_t bits = masks.bits[chunk % 2], sums = masks.sums[chunk % 2];
        for (int part = 0; part < 4; part++) weights[part] = spread_16<quant>(chunk, part, bits, sums, from);
        from += sums >> 56;
        return;
    }

    for (int half = 0; half < 2; half++) {
        const int run = 2 * chunk + half;
        const uint8x16_t places = places_in_32(run, vld1q_u8(head + 16 + run / 4 * 16));
        const int8x16_t codes = signed_values<quant>(run, vld1q_u8(values.first + run_bytes<quant>(run)));
        weights[2 * half] = spread_places(0, codes, places);
        weights[2 * half + 1] = spread_places(1, codes, places);
    }
    if (chunk == 3) values.first += group_values_bytes(quant);
}

template <Quant quant, typename Product>
void spread_row(const SparseMatrix& matrix, int64_t row, int64_t tile_row, const Tile<Product>& tile) {
    const uint8_t* head = matrix.head(row);
    Values values(matrix.values + matrix.offsets[row]);
    for (int64_t block = 0; block < padded(matrix.columns) / block_weights; block += 8, head += head_bytes(quant)) {
        for (int64_t b = 0; b < 8; b++)
            Product::put_scale(tile.scales + (block + b) * Product::scales, tile_row,
                               float_of_half(load<uint16_t>(head + 2 * b)) * product_scale(quant));

        for (int chunk = 0; chunk < 4; chunk++) {
            int8x16_t weights[4];
            spread_chunk<quant>(matrix.pattern, chunk, head, values, weights);
            for (int part = 0; part < 4; part++) {
                int8_t* to = tile.codes + (block + 2 * part) * tile_block_bytes + chunk * tile_block_bytes / 4;
                Product::put_codes(to, tile_row, vget_low_s8(weights[part]));
                Product::put_codes(to + tile_block_bytes, tile_row, vget_high_s8(weights[part]));
            }
        }
    }
}

template <Quant quant, typename Product>
bool multiply_by_tile(const SparseMatrix& matrix, int64_t tokens, const QuantizedActivations& from, Outputs outputs,
                      Rows rows) {
    void* memory = scratch_of_thread(Tile<Product>::bytes(from.padded_columns));
    if (!memory) return false;

    const Tile<Product> tile(from.padded_columns, memory);
    std::memset(memory, 0, static_cast<size_t>(Tile<Product>::bytes(from.padded_columns)));
    for (int64_t row = rows.begin; row < rows.end; row += tile_rows) {
        const int64_t count = std::min(rows.end - row, tile_rows);
        for (int64_t r = 0; r < count; r++) spread_row<quant>(matrix, row + r, r, tile);

        for (int64_t t = 0; t < tokens; t += tile_tokens) {
            const int64_t last = std::min<int64_t>(tile_tokens, tokens - t) - 1;
            int64_t token[tile_tokens];  // the last one again where there are fewer
            for (int64_t i = 0; i < tile_tokens; i++) token[i] = t + std::min(i, last);

            float results[tile_tokens][tile_rows];
            Product::multiply(tile, matrix.columns, from, token, results);
            for (int64_t i = 0; i <= last; i++)
                std::memcpy(outputs.at(t + i, row), results[i], static_cast<size_t>(count) * sizeof(float));
        }
    }
    return true;
}

}  // namespace
}  // namespace racdeploy
