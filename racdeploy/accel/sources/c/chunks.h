// The packed tensors of a .racgguf file, chunk by chunk. Form: docs/racgguf.md; a chunk depends on no other.
#pragma once
#include <cstdint>
#include <vector>

#include "input.h"

namespace racdeploy::c {

constexpr int64_t chunk_weights = 262144;

// How the blocks of a number format split: scales in front, then the codes.
struct Layout {
    uint32_t type;  // ggml's number
    int block_weights, block_bytes;
    int head_bytes;   // of scales
    int code_planes;  // of a chunk
    bool in_words;    // four codes of four bits are a word
    bool in_fives;    // codes of five bits
    uint8_t zero;     // the code of zero, in words

    int planes() const { return head_bytes + code_planes; }
    int64_t weights(int64_t plain_bytes) const { return plain_bytes / block_bytes * block_weights; }
};

const Layout* find_layout(uint64_t type);  // nullptr where such tensors cannot be packed

// False after fail() where so few bytes cannot be a packed tensor: this bounds the work by the size of the file.
bool may_be_packed(const Layout& layout, int64_t plain_bytes, int64_t stored_bytes);

// Unpacks one tensor.
class Unpacker {
public:
    Unpacker(const Layout& layout, int64_t plain_bytes, Stream& stored)
        : layout_(layout), stored_(stored), weights_(layout.weights(plain_bytes)) {}

    bool begin();                                   // false after fail()
    bool is_done() const { return weights_ == 0; }
    bool next(std::vector<uint8_t>& plain);         // whole blocks; false after fail()

private:
    bool plane(uint32_t size, int64_t bytes, std::vector<uint8_t>& into);
    bool words(const std::vector<uint8_t>& numbers, uint32_t size, uint8_t* blocks);
    bool fives(const std::vector<uint8_t>& mask, const uint32_t* sizes, uint8_t* blocks);
    bool bytes(const std::vector<uint8_t>& mask, int64_t weights, const uint32_t* sizes, uint8_t* blocks);

    const Layout& layout_;
    Stream& stored_;
    int64_t weights_;              // that are left
    std::vector<uint16_t> ranked_;  // words by their rank
    uint32_t width_[32] = {}, start_[32] = {};  // bits and first rank of each bucket
    std::vector<uint8_t> first_, heads_[2], planes_[4];
};

}  // namespace racdeploy::c
