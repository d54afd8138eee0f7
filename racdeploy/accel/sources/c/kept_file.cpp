#include "kept_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>

#include "failure.h"
#include "kept_paths.h"
#include "partial_file.h"
#include "plugin_functions.h"
#include "sha256.h"

namespace racdeploy::c {
namespace {

constexpr char magic[] = "racdeploy kept c1";
constexpr int64_t digest_bytes = 64, trailer_bytes = 8 + digest_bytes + sizeof magic - 1;
constexpr int64_t most_table_bytes = 1 << 28;
constexpr size_t chunk_bytes = 2 << 20;  // written at once: the system caches each in one huge page, where it can
constexpr int64_t piece_bytes = 1 << 20;
constexpr int pieces_a_load = 4;
constexpr int64_t place_alignment = 64;

std::string hash_of(const void* data, size_t bytes) {
    Sha256 digest;
    digest.update(data, bytes);
    return digest.hex();
}

// A table: numbers of eight bytes, little-endian, and texts with their length in front.
class TableWriter {
public:
    void number(int64_t value) {
        for (int i = 0; i < 8; i++) table_ += static_cast<char>(static_cast<uint64_t>(value) >> 8 * i & 0xff);
    }
    void text(const std::string& value) {
        number(static_cast<int64_t>(value.size()));
        table_ += value;
    }
    const std::string& table() const { return table_; }

private:
    std::string table_;
};

class TableReader {  // what it gives behind the end is 0 and empty; then it is not done
public:
    explicit TableReader(const std::string& table) : table_(table) {}

    int64_t number() {
        uint64_t value = 0;
        if (left() < 8) return end();
        for (int i = 0; i < 8; i++) value |= static_cast<uint64_t>(static_cast<uint8_t>(table_[at_++])) << 8 * i;
        return static_cast<int64_t>(value);
    }
    std::string text() {
        const int64_t bytes = number();
        if (bytes < 0 || bytes > left()) {
            end();
            return "";
        }
        at_ += static_cast<size_t>(bytes);
        return table_.substr(at_ - static_cast<size_t>(bytes), static_cast<size_t>(bytes));
    }
    int64_t count(int64_t least_bytes) {  // of items of so many bytes at the least
        const int64_t items = number();
        return items >= 0 && items <= left() / least_bytes ? items : end();
    }
    bool is_done() const { return !overran_ && !left(); }

private:
    int64_t left() const { return static_cast<int64_t>(table_.size() - at_); }
    int64_t end() {
        overran_ = true;
        at_ = table_.size();
        return 0;
    }

    const std::string& table_;
    size_t at_ = 0;
    bool overran_ = false;
};

// The bytes in front of the table, written as they come.
class DataWriter {
public:
    explicit DataWriter(int descriptor) : descriptor_(descriptor) {}

    bool add(const uint8_t* data, size_t bytes) {
        pending_.insert(pending_.end(), data, data + bytes);
        pending_.resize(static_cast<size_t>(round_up(static_cast<int64_t>(pending_.size()), place_alignment)));
        return write(pending_.size() / chunk_bytes * chunk_bytes);
    }
    bool end(size_t zeros) {
        pending_.resize(pending_.size() + zeros);
        return write(pending_.size());
    }
    int64_t bytes() const { return written_ + static_cast<int64_t>(pending_.size()); }
    const std::vector<std::string>& pieces() const { return pieces_; }

private:
    bool write(size_t bytes) {
        for (size_t first = 0; first < bytes; first += piece_bytes)
            pieces_.push_back(hash_of(&pending_[first], std::min<size_t>(piece_bytes, bytes - first)));
        if (!write_all(descriptor_, pending_.data(), bytes)) return false;
        pending_.erase(pending_.begin(), pending_.begin() + static_cast<std::ptrdiff_t>(bytes));
        written_ += static_cast<int64_t>(bytes);
        return true;
    }

    int descriptor_;
    std::vector<uint8_t> pending_;
    std::vector<std::string> pieces_;
    int64_t written_ = 0;
};

// Two bytes a weight, and heads, offsets and padding: no packed matrix is larger.
int64_t most_packed_bytes(int64_t rows, int64_t columns) {
    return rows * (groups(columns) * (2 * group_weights + 48) + 8) + 512;
}

bool maps_huge(const std::string& path) {  // it depends on the system and on the file system
    PartialFile probe(path + ".probe");
    const std::vector<char> zeros(chunk_bytes);
    return probe.create(0600) && write_all(probe.descriptor(), zeros.data(), zeros.size()) &&
           rac_ggml_maps_huge(probe.descriptor(), static_cast<int64_t>(zeros.size()));
}

bool write_table(int descriptor, const TableWriter& table) {
    TableWriter trailer;
    trailer.number(static_cast<int64_t>(table.table().size()));
    const std::string all =
        table.table() + trailer.table() + hash_of(table.table().data(), table.table().size()) + magic;
    return write_all(descriptor, all.data(), all.size());
}

// Pack the matrices of these names behind each other, and tell the table where they are.
bool write_matrices(const Input& model, const Header& header, const std::vector<std::string>& names, DataWriter& data,
                    TableWriter& table) {
    std::vector<uint8_t> blocks, packed;
    int64_t most_columns = 0;
    table.number(static_cast<int64_t>(names.size()));
    for (const Tensor& tensor : header.tensors) {
        if (std::find(names.begin(), names.end(), tensor.name) == names.end()) continue;
        const auto columns = static_cast<int64_t>(tensor.shape.dimensions[0]),
                   rows = static_cast<int64_t>(tensor.shape.dimensions[1]);
        blocks.resize(static_cast<size_t>(tensor.bytes));
        if (!model.read(tensor.position, blocks.data(), blocks.size())) return false;

        int pattern = 0;
        const int64_t room = most_packed_bytes(rows, columns);
        packed.resize(static_cast<size_t>(room));
        const int64_t bytes = rac_ggml_pack(static_cast<int>(tensor.type), rows, columns, blocks.data(), packed.data(),
                                            room, &pattern);
        if (bytes < 0) return fail(RACDEPLOY_MEMORY, "there is not enough memory to pack");

        table.text(tensor.name);
        for (const int64_t value : {static_cast<int64_t>(tensor.type), static_cast<int64_t>(pattern), rows, columns,
                                    data.bytes(), bytes})
            table.number(value);
        if (!data.add(packed.data(), static_cast<size_t>(bytes))) return false;
        most_columns = std::max(most_columns, columns);
    }
    // A row of a damaged mask is read as long as one can be.
    return data.end(static_cast<size_t>(2 * most_columns + 1024));
}

}  // namespace

bool KeptWeights::write(const std::string& gguf, const std::vector<std::string>& names, const std::string& path,
                        const std::string& key, bool in_small_pages) {
    Input model;
    Header header;
    if (!model.open(gguf.c_str()) || !read_header(model, 2, header)) return false;

    if (!in_small_pages && !maps_huge(path)) return fail(RACDEPLOY_SYSTEM, "it would be mapped in small pages");
    PartialFile file(path);
    if (!file.create(0600) || !file.has_space(2 * model.size())) return false;

    DataWriter data(file.descriptor());
    TableWriter matrices, table;
    if (!write_matrices(model, header, names, data, matrices)) return false;
    table.text(key);
    table.text(matrices.table());
    table.number(static_cast<int64_t>(data.pieces().size()));
    for (const std::string& piece : data.pieces()) table.text(piece);

    if (!write_table(file.descriptor(), table)) return false;
    const std::string state = file_state(gguf);
    if (state.empty() || key.compare(0, state.size(), state) != 0)
        return fail(RACDEPLOY_SYSTEM, "the model changed while it was packed");
    return file.finish();
}

bool KeptWeights::find(const std::string& path, const std::string& key) {
    return is_private(path) && file_.open(path.c_str()) && read_table(key) && is_intact(path);
}

bool KeptWeights::read_table(const std::string& key) {
    const int64_t end = file_.size() - trailer_bytes;
    std::string trailer(static_cast<size_t>(trailer_bytes), '\0');
    if (end < 0 || !file_.read(end, &trailer[0], trailer.size())) return false;

    const int64_t bytes = TableReader(trailer).number();
    if (trailer.compare(8 + digest_bytes, std::string::npos, magic) != 0) return false;
    if (bytes < 0 || bytes > most_table_bytes || bytes > end) return false;
    std::string text(static_cast<size_t>(bytes), '\0');
    if (!file_.read(end - bytes, &text[0], text.size())) return false;
    if (trailer.compare(8, digest_bytes, hash_of(text.data(), text.size())) != 0) return false;

    TableReader table(text);
    if (table.text() != key) return false;
    const std::string places = table.text();
    for (int64_t i = table.count(8); i > 0; i--) pieces_.push_back(table.text());

    TableReader matrices(places);
    for (int64_t i = matrices.count(56); i > 0; i--) {
        Matrix matrix;
        matrix.name = matrices.text();
        for (int64_t& value : matrix.place) value = matrices.number();
        matrices_.push_back(std::move(matrix));
    }

    data_bytes_ = end - bytes;
    const bool all_hashed = static_cast<int64_t>(pieces_.size()) == (data_bytes_ + piece_bytes - 1) / piece_bytes;
    return table.is_done() && matrices.is_done() && all_hashed && !matrices_.empty() && !pieces_.empty();
}

bool KeptWeights::is_right(size_t piece) const {
    const int64_t first = static_cast<int64_t>(piece) * piece_bytes;
    std::vector<uint8_t> data(static_cast<size_t>(std::min(piece_bytes, data_bytes_ - first)));
    return file_.read(first, data.data(), data.size()) && hash_of(data.data(), data.size()) == pieces_[piece];
}

bool KeptWeights::is_intact(const std::string& path) const {
    const CheckedOnce record(path);
    if (!record.is_known()) {
        for (size_t piece = 0; piece < pieces_.size(); piece++)
            if (!is_right(piece)) return false;
        record.remember();
    }

    std::mt19937 random{std::random_device{}()};
    for (int i = 0; i < pieces_a_load; i++)
        if (!is_right(random() % pieces_.size())) return false;
    return true;
}

std::vector<std::string> KeptWeights::names() const {
    std::vector<std::string> found;
    for (const Matrix& matrix : matrices_) found.push_back(matrix.name);
    return found;
}

bool KeptWeights::use() {
    std::vector<const char*> names;
    std::vector<Place> places;
    for (const Matrix& matrix : matrices_) {
        const auto& [quant, pattern, rows, columns, begin, bytes] = matrix.place;
        names.push_back(matrix.name.c_str());
        places.push_back({quant, pattern, rows, columns, begin, bytes});
    }
    return rac_ggml_keep(file_.descriptor(), data_bytes_, names.data(), places.data(),
                         static_cast<int64_t>(names.size()));
}

}  // namespace racdeploy::c
