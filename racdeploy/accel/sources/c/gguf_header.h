// The header of a GGUF file, trusting none of it: as strict as racdeploy/storage/gguf_header.py, and as ggml itself.
// Needs nothing of ggml. Source: ggml/docs/gguf.md and gguf_init_from_file in gguf.cpp.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "input.h"

namespace racdeploy::c {

constexpr int64_t fixed_bytes = 24;  // in front of the metadata
constexpr int most_dimensions = 4;

constexpr uint32_t type_string = 8, type_array = 9, type_u64 = 10;  // of metadata

// A value of the metadata. The text is that of racdeploy's own keys alone, others are only checked.
struct Value {
    uint32_t type = 0;
    bool is_integer = false, is_negative = false;
    uint64_t number = 0;  // of an integer
    std::string text;
    uint32_t element_type = 0;  // of an array
    int64_t position = 0;       // of its first element
    uint64_t count = 0;
};

struct Key {
    std::string name;
    int64_t start;
    Value value;
};

struct Shape {
    int count = 0;
    uint64_t dimensions[most_dimensions] = {};  // row length first

    bool operator==(const Shape& other) const;
};

struct Tensor {
    std::string name;
    Shape shape;
    uint32_t type;
    int64_t bytes, position;
};

struct Header {
    std::vector<Key> keys;
    std::vector<Tensor> tensors;
    int64_t alignment = 32;
};

constexpr int64_t padded_to(int64_t bytes, int64_t alignment) {
    return (bytes + alignment - 1) / alignment * alignment;
}

// Bytes of a tensor; -1 after fail() where it cannot have that type or shape.
int64_t tensor_bytes(const Shape& shape, uint64_t type);

// Read the header; false after fail() unless its tensors lie inside the file, in order. Versions: this one and 3.
bool read_header(const Input& input, uint32_t least_version, Header& header);

}  // namespace racdeploy::c
