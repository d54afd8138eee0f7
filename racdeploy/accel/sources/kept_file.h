// Packed matrices in a file that the system caches: mapped, checked, and found by the name of their tensor.
//
// A matrix is offsets, heads and values, one behind the other, each padded to 64 bytes (see sparse_matrix.h), and
// slack_bytes behind the values. kept_weights.py writes the file and its table. Nothing throws.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>

#include "sparse_matrix.h"

namespace racdeploy {

// Where the parts of a packed matrix begin.
struct Parts {
    int64_t heads, values;

    Parts(Quant quant, int64_t rows, int64_t columns)
        : heads(round_up((rows + 1) * static_cast<int64_t>(sizeof(int64_t)), 64)),
          values(heads + round_up(rows * heads_bytes(quant, columns), 64)) {}
    SparseMatrix matrix(const void* memory, Quant quant, Pattern pattern, int64_t rows, int64_t columns) const {
        const auto* bytes = static_cast<const uint8_t*>(memory);
        return {quant, pattern, rows, columns, bytes + heads, bytes + values, static_cast<const int64_t*>(memory)};
    }
};

// One matrix of the file, as its table says it.
struct Place {
    int64_t quant, pattern, rows, columns, begin, bytes;
};

class KeptFile {
public:
    // Map so many bytes of an open file; nullptr where that is not possible.
    static std::shared_ptr<KeptFile> map(int descriptor, int64_t bytes);
    ~KeptFile();
    KeptFile(const KeptFile&) = delete;
    KeptFile& operator=(const KeptFile&) = delete;

    // Does the system map it in huge pages? From smaller ones of the cache, products are slower than from memory.
    bool is_huge() const;

    bool add(const char* name, const Place& place);  // false where memory ended

    // The matrix of a tensor of this type and shape. False where there is none, or where a kernel would read beyond the
    // file. Masks are not counted, which would read all of them: a spoiled one makes a wrong product, as any spoiled
    // weight does. A row then reads at most all of its columns from its offset on, and the file goes on for longer.
    bool find(const char* name, Quant quant, int64_t rows, int64_t columns, SparseMatrix& matrix) const;

private:
    KeptFile() = default;
    void* reserved_ = nullptr;
    uint8_t* data_ = nullptr;
    int64_t bytes_ = 0;
    std::unordered_map<std::string, Place> places_;
};

}  // namespace racdeploy
