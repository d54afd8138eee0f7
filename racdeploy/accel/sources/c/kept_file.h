// Packed matrices of a model in one file of the app's folder: written once, mapped at every later start.
//
// The matrices one behind the other, zeros, a table, and a trailer with the table's size and SHA-256. The file is whole
// or absent. All pieces are compared with their hashes once, and some whenever it is used; file_maps.cpp checks what
// kernels would follow. Python's kept files have a table in JSON and another magic: neither reads the other's.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "gguf_header.h"
#include "input.h"

namespace racdeploy::c {

class KeptWeights {
public:
    // Look for the file that fits: `key` is all that decides what is in it. False where there is none.
    bool find(const std::string& path, const std::string& key);
    std::vector<std::string> names() const;

    // Write it; false where there is no place for it, or small pages are no place. The key begins with the file_state
    // of `gguf`, which may not change meanwhile.
    static bool write(const std::string& gguf, const std::vector<std::string>& names, const std::string& path,
                      const std::string& key, bool in_small_pages);
    bool use();  // have the enabled weights taken from what was found; false where it cannot be mapped

private:
    struct Matrix {
        std::string name;
        int64_t place[6];  // as racdeploy::Place
    };

    bool read_table(const std::string& key);
    bool is_intact(const std::string& path) const;
    bool is_right(size_t piece) const;

    Input file_;
    int64_t data_bytes_ = 0;
    std::vector<Matrix> matrices_;
    std::vector<std::string> pieces_;  // their hashes
};

}  // namespace racdeploy::c
