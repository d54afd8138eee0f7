// A sparse weight matrix as bitmasks and stored values, and its product with activations.
//
// A row is cut into groups of 256 weights. A group has a head; its stored values follow in the row's stream:
//
//   Q8_0, Q4_0   head of 48 bytes: 8 scales (float16, one per 32 weights), 256 mask bits
//   F16, BF16    head of 32 bytes: 256 mask bits
//
// The mask's bits, counted from the lowest bit of the first byte, are the group's weights, and the values follow in the
// same order; 1 means stored. F16 and BF16 keep the weights in order. Q8_0 and Q4_0 take them in four chunks of 64:
// chunk i has weights 8i to 8i + 7 of each of the 8 blocks. A place is of the same block in every chunk, so that the
// chunks' products are added up as integers before they meet their scales.
//
// A value is one byte, the code + 128 (Q8_0); four bits, ggml's nibble (Q4_0); or two bytes (F16, BF16). In Q4_0 a
// row's values are two streams side by side, of which the shorter one ends in zeros: the low bits have chunks 0 and 1
// of every group, which are ggml's low nibbles, and the high bits chunks 2 and 3. So nibbles come apart without a
// shuffle. A row's last group may be short: mask bits and scales beyond the row are 0. Little-endian throughout.
//
// Unpacking restores ggml's blocks byte for byte: what is not stored has the code of +0.
//
// Nothing here throws or starts a thread: callers give the memory and share the rows out.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace racdeploy {

enum class Quant : int32_t { f16 = 1, q4_0 = 2, q8_0 = 8, bf16 = 30 };  // ggml's type numbers

// unstructured: exactly the non-zero weights are stored. two_of_four: of every 4 weights exactly 2 are, zero or not, in
// whole groups; Q8_0 and Q4_0. Places are in chunks and values in streams as they are unstructured, but values are
// signed (the top bit is flipped), and in place of a mask each value has two bits that say which of its four it is:
// values 16v to 16v + 15 of a group have bits 2(v % 4) and on of the 16 bytes from byte 16(v / 4) on.
enum class Pattern : int32_t { unstructured = 0, two_of_four = 1 };

constexpr int64_t group_weights = 256;
constexpr int64_t block_weights = 32;  // share a scale in Q8_0 and Q4_0
constexpr int64_t slack_bytes = 128;   // readable behind the values
constexpr int layout = 2;              // changes with this form: graphs of ONNX say it

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
template <typename T>
using Memory = std::unique_ptr<T[], Free>;  // of malloc, which does not throw

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

constexpr bool is_quantized(Quant quant) { return quant == Quant::q8_0 || quant == Quant::q4_0; }
constexpr bool can_have(Quant quant, Pattern pattern) {
    return pattern == Pattern::unstructured || is_quantized(quant);
}
constexpr int64_t groups(int64_t columns) { return (columns + group_weights - 1) / group_weights; }
constexpr int64_t padded(int64_t columns) { return round_up(columns, group_weights); }
constexpr int64_t head_bytes(Quant quant) { return is_quantized(quant) ? 48 : 32; }
constexpr int64_t heads_bytes(Quant quant, int64_t columns) { return groups(columns) * head_bytes(quant); }  // of a row

// ggml's own blocks: a scale and 32 codes, or just 32 floats.
constexpr int64_t block_bytes(Quant quant) { return quant == Quant::q8_0 ? 34 : quant == Quant::q4_0 ? 18 : 64; }
constexpr int64_t row_bytes(Quant quant, int64_t columns) { return columns / block_weights * block_bytes(quant); }

// A whole matrix in ggml's blocks, and the pattern that it is packed in.
struct Blocks {
    Quant quant;
    Pattern pattern;
    int64_t columns;
    const void* data;

    const uint8_t* row(int64_t r) const { return static_cast<const uint8_t*>(data) + r * row_bytes(quant, columns); }
};

struct SparseMatrix {  // a view: owns nothing
    Quant quant;
    Pattern pattern;
    int64_t rows;            // O, outputs
    int64_t columns;         // I, inputs; a multiple of 32
    const uint8_t* heads;    // rows * heads_bytes(quant, columns)
    const uint8_t* values;   // slack_bytes readable behind the last one
    const int64_t* offsets;  // rows + 1: bytes from `values` to each row's first value

    const uint8_t* head(int64_t r) const { return heads + r * heads_bytes(quant, columns); }
    SparseMatrix row(int64_t r) const {  // alone
        return {quant, pattern, 1, columns, head(r), values, offsets + r};
    }
};

struct Rows {  // those that a call reads and writes; pointers are those of the whole matrix
    int64_t begin, end;
};

struct Outputs {  // one token's behind the other's
    float* first;
    int64_t stride;

    float* at(int64_t token, int64_t row) const { return first + token * stride + row; }
};

// What a set of kernels does.
struct Kernels {
    const char* name;
    bool (*runs_here)();

    // Is a matrix that fits two_of_four faster in that pattern? If not, only portable ones take it.
    bool prefers_two_of_four = false;

    // ggml blocks -> packed. First count (bytes of values of each row), sum up to offsets, then pack.
    void (*count)(const Blocks&, int64_t* counts, Rows rows) = nullptr;
    void (*pack)(const Blocks&, const int64_t* offsets, uint8_t* heads, uint8_t* values, Rows rows) = nullptr;
    void (*unpack)(const SparseMatrix&, void* blocks, Rows rows) = nullptr;

    // Activations as the kernels want them: for Q8_0 and Q4_0 ggml's Q8_0 rounding of every 32 inputs, for F16 and BF16
    // the inputs rounded to that type. `workspace` has workspace_bytes, is aligned to 64 bytes, and serves one `quant`.
    void (*prepare)(Quant, int64_t columns, int64_t tokens, int64_t token, const float* activation,
                    void* workspace) = nullptr;

    // output[t][o] = sum over i of weight[o][i] * activation[t][i] for every token t.
    void (*multiply)(const SparseMatrix&, int64_t tokens, const void* workspace, Outputs outputs, Rows rows) = nullptr;

    Pattern preferred_pattern(Quant quant, int64_t rows, int64_t columns, const void* blocks) const;
};

// Of "avx512", "avx_vnni", "avx2", "neon_i8mm", "neon" and "portable" the best that this processor runs, or those that
// RACDEPLOY_KERNELS names.
const Kernels& kernels();
bool use_instruction_set(const char* name);  // false if this processor or this build lacks it; "" for the best

int64_t workspace_bytes(Quant quant, int64_t columns, int64_t tokens);

// True if heads, offsets and values agree: offsets ascend from 0 to values_bytes, each row's masks count as many values
// as it has bytes, and no mask bit is set beyond the row. A matrix that comes from a file is used only if it is valid.
bool valid(const SparseMatrix& matrix, int64_t values_bytes);

}  // namespace racdeploy
