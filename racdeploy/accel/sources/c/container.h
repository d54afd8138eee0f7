// The .racgguf container: what its header says, checked, and the plain file that it stands for. Form: docs/racgguf.md.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "chunks.h"
#include "gguf_header.h"
#include "input.h"

namespace racdeploy::c {

// Takes the next bytes of the plain file; false after fail().
using Sink = std::function<bool(const void*, size_t)>;

class Container {
public:
    bool open(Input input);  // check everything but the chunks; false after fail()
    int64_t plain_bytes() const { return plain_bytes_; }
    bool unpack(const Sink& sink) const;  // false after fail(), as where the SHA-256 is another one

private:
    struct Stored {
        Shape shape;  // of the plain file, as all but the last two
        uint32_t type;
        int64_t plain_bytes;
        const Layout* layout;  // nullptr: stored as it is
        int64_t bytes, position;
    };

    bool check_keys() const;
    bool read_values();
    bool read_tensors();
    bool describe(const Tensor& info, const Shape& shape, uint64_t type);
    bool check_size() const;
    void build_header();
    bool copy(int64_t begin, int64_t end, const Sink& sink) const;
    bool unpack_tensor(const Stored& tensor, const Sink& sink) const;

    Input input_;
    Header header_;
    std::vector<Stored> tensors_;
    std::string front_, infos_;  // of the plain file's header; between them is the metadata, which may be megabytes
    int64_t metadata_end_ = 0;
    std::string sha256_;
    int64_t plain_bytes_ = 0;
};

}  // namespace racdeploy::c
