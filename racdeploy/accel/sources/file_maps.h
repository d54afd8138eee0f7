// Memory and files that the plug-in maps: packed matrices in a file of the user's cache, checked and found by the name
// of their tensor; and what llama.cpp leaves mapped and allocated while it loads a model whose weights are packed.
//
// A matrix is offsets, heads and values, one behind the other, each padded to 64 bytes (see sparse_matrix.h), and
// slack_bytes behind the values. kept_weights.py writes the file and its table. Nothing throws.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "sparse_matrix.h"

#ifndef MADV_HUGEPAGE  // Linux alone lets a program ask
#define MADV_HUGEPAGE MADV_NORMAL
#define MADV_NOHUGEPAGE MADV_NORMAL
#endif

namespace racdeploy {

struct Unmap {
    int64_t bytes = 0;
    void operator()(void* memory) const { munmap(memory, bytes); }
};
using Mapped = std::unique_ptr<void, Unmap>;

// New memory, of PROT_NONE just addresses; null if there is none.
inline Mapped map_memory(int64_t bytes, int protection) {
    void* made = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return {made == MAP_FAILED ? nullptr : made, {bytes}};
}

// Where the parts of a packed matrix begin.
struct Parts {
    int64_t heads, values;

    Parts(Quant quant, int64_t rows, int64_t columns)
        : heads(round_up(kept_offsets(quant, rows) * static_cast<int64_t>(sizeof(int64_t)), 64)),
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

    // Does the system map it in huge pages? From smaller ones of the cache, products are slower than from memory.
    bool is_huge() const;

    bool add(const char* name, const Place& place);  // false where memory ended

    // The matrix of a tensor of this type and shape. False where there is none, or where a kernel would read beyond the
    // file. Masks are not counted, which would read all of them: of a spoiled one a row reads at most all of its
    // columns from its offset on, and the file is longer than that.
    bool find(const char* name, Quant quant, int64_t rows, int64_t columns, SparseMatrix& matrix) const;

private:
    KeptFile() = default;
    Mapped reserved_;
    uint8_t* data_ = nullptr;
    int64_t bytes_ = 0;
    std::map<std::string, Place, std::less<>> places_;
};

struct FileMap {
    uintptr_t begin = 0, end = 0;
};

// Give back the pages of a mapped file that were read for the last time; memory of any other kind is left alone: there
// it would be lost. `map` is where the file was mapped, and is kept up to date. A weight that is written for the first
// time comes from where the one before came from: until the model is loaded, its file stays mapped.
void forget_mapped(FileMap& map, const void* data, size_t size, bool first_time);

// llama.cpp has read every tensor into a place on the heap, which is free by the first product; glibc would keep it.
void give_back_heap();

}  // namespace racdeploy
