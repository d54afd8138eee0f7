#include "container.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "failure.h"
#include "sha256.h"

namespace racdeploy::c {
namespace {

constexpr uint64_t version = 2;
constexpr const char* own_keys[] = {"racgguf.version", "racgguf.packing", "racgguf.size_bytes", "racgguf.sha256",
                                    "racgguf.tensors"};
constexpr size_t own_count = std::size(own_keys);
constexpr uint32_t packed_type = 24;  // I8, which no tensor of a model has
constexpr int64_t copy_bytes = 1 << 18;

bool is_own(const Key& key) { return key.name.rfind("racgguf.", 0) == 0; }

bool is_digest(const std::string& text) {
    const auto is_digit = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
    return text.size() == 64 && std::all_of(text.begin(), text.end(), is_digit);
}

void append(std::string& text, uint64_t value, int bytes) {
    for (int i = 0; i < bytes; i++) text += static_cast<char>(value >> 8 * i & 0xff);
}

bool write_zeros(const Sink& sink, int64_t bytes) {
    static constexpr char zeros[4096] = {};
    for (; bytes > 0; bytes -= static_cast<int64_t>(sizeof zeros))
        if (!sink(zeros, static_cast<size_t>(std::min<int64_t>(bytes, sizeof zeros)))) return false;
    return true;
}

// The array of racgguf.tensors, number by number.
class Recorded {
public:
    Recorded(const Input& input, const Value& value)
        : stream_(input, value.position, value.position + static_cast<int64_t>(value.count) * 8) {}

    bool is_done() const { return !stream_.left(); }
    bool take(uint64_t& value) {
        const uint8_t* data = stream_.left() ? stream_.take(8) : nullptr;
        if (!data) return fail(RACDEPLOY_DAMAGED, "racgguf.tensors ends early");
        value = 0;
        for (int i = 0; i < 8; i++) value |= static_cast<uint64_t>(data[i]) << 8 * i;
        return true;
    }

private:
    Stream stream_;
};

}  // namespace

bool Container::open(Input input) {
    input_ = std::move(input);
    if (!read_header(input_, 3, header_) || !check_keys() || !read_values() || !read_tensors()) return false;
    build_header();
    return check_size();
}

bool Container::check_keys() const {
    const auto& keys = header_.keys;
    if (std::none_of(keys.begin(), keys.end(), is_own))
        return fail(RACDEPLOY_DAMAGED, "it is a plain GGUF file, no .racgguf container: use it as it is");

    const auto found = std::find_if(keys.begin(), keys.end(), [](const Key& key) { return key.name == own_keys[0]; });
    if (found != keys.end() && found->value.is_integer && found->value.number != version)
        return fail(RACDEPLOY_DAMAGED, "it is of container version %llu, known is 2: update the app",
                    static_cast<unsigned long long>(found->value.number));

    bool at_the_end = keys.size() >= own_count &&
                      static_cast<size_t>(std::count_if(keys.begin(), keys.end(), is_own)) == own_count;
    for (size_t i = 0; at_the_end && i < own_count; i++)
        at_the_end = keys[keys.size() - own_count + i].name == own_keys[i];
    return at_the_end || fail(RACDEPLOY_DAMAGED, "its five keys are not at the end of the metadata");
}

bool Container::read_values() {
    const Key* own = &header_.keys[header_.keys.size() - own_count];
    const Value &version_value = own[0].value, &packing = own[1].value, &size = own[2].value, &digest = own[3].value,
                &recorded = own[4].value;
    if (!version_value.is_integer || packing.type != type_string || packing.text != "bitmask")
        return fail(RACDEPLOY_DAMAGED, "its version or packing is not known: update the app");

    const bool has_size = size.is_integer && !size.is_negative && size.number >> 62 == 0;
    if (!has_size || digest.type != type_string || !is_digest(digest.text))
        return fail(RACDEPLOY_DAMAGED, "its size or SHA-256 of the plain file is malformed");
    if (recorded.type != type_array || recorded.element_type != type_u64)
        return fail(RACDEPLOY_DAMAGED, "racgguf.tensors is no array of u64");

    plain_bytes_ = static_cast<int64_t>(size.number);
    sha256_ = digest.text;
    return true;
}

bool Container::read_tensors() {
    Recorded recorded(input_, header_.keys.back().value);
    for (const Tensor& info : header_.tensors) {
        uint64_t type = 0, count = 0;
        if (!recorded.take(type) || !recorded.take(count)) return false;
        if (count < 1 || count > most_dimensions)
            return fail(RACDEPLOY_DAMAGED, "%.80s is recorded with an impossible number of dimensions",
                        info.name.c_str());

        Shape shape;
        shape.count = static_cast<int>(count);
        for (uint64_t d = 0; d < count; d++)
            if (!recorded.take(shape.dimensions[d])) return false;
        if (!describe(info, shape, type)) return false;
    }
    return recorded.is_done() || fail(RACDEPLOY_DAMAGED, "racgguf.tensors records more tensors than there are");
}

bool Container::describe(const Tensor& info, const Shape& shape, uint64_t type) {
    const int64_t plain_bytes = tensor_bytes(shape, type);
    if (plain_bytes < 0) return false;

    const Layout* layout = nullptr;
    if (info.type == type) {
        if (!(shape == info.shape))
            return fail(RACDEPLOY_DAMAGED, "the dimensions of %.80s are not those recorded", info.name.c_str());
    } else {
        layout = info.type == packed_type ? find_layout(type) : nullptr;
        if (!layout)
            return fail(RACDEPLOY_DAMAGED, "%.80s is of a type that cannot be packed", info.name.c_str());
        if (!may_be_packed(*layout, plain_bytes, info.bytes)) return false;
    }

    tensors_.push_back({shape, static_cast<uint32_t>(type), plain_bytes, layout, info.bytes, info.position});
    return true;
}

void Container::build_header() {
    front_ = "GGUF";
    append(front_, 3, 4);
    append(front_, tensors_.size(), 8);
    append(front_, header_.keys.size() - own_count, 8);
    metadata_end_ = header_.keys[header_.keys.size() - own_count].start;

    int64_t offset = 0;
    for (size_t i = 0; i < tensors_.size(); i++) {
        const Stored& tensor = tensors_[i];
        const std::string& name = header_.tensors[i].name;
        append(infos_, name.size(), 8);
        infos_ += name;
        append(infos_, static_cast<uint64_t>(tensor.shape.count), 4);
        for (int d = 0; d < tensor.shape.count; d++) append(infos_, tensor.shape.dimensions[d], 8);
        append(infos_, tensor.type, 4);
        append(infos_, static_cast<uint64_t>(offset), 8);
        offset = padded_to(offset + tensor.plain_bytes, header_.alignment);
    }
}

bool Container::check_size() const {
    int64_t bytes = metadata_end_ + static_cast<int64_t>(infos_.size());
    for (const Stored& tensor : tensors_) bytes = padded_to(bytes, header_.alignment) + tensor.plain_bytes;
    if (bytes <= plain_bytes_ && plain_bytes_ <= padded_to(bytes, header_.alignment)) return true;
    return fail(RACDEPLOY_DAMAGED, "its tensors make %lld bytes and racgguf.size_bytes is %lld",
                static_cast<long long>(bytes), static_cast<long long>(plain_bytes_));
}

bool Container::unpack(const Sink& sink) const {
    Sha256 digest;
    int64_t written = 0;
    const Sink hashed = [&](const void* data, size_t bytes) {
        digest.update(data, bytes);
        written += static_cast<int64_t>(bytes);
        return sink(data, bytes);
    };

    if (!hashed(front_.data(), front_.size()) || !copy(fixed_bytes, metadata_end_, hashed)) return false;
    if (!hashed(infos_.data(), infos_.size())) return false;
    for (const Stored& tensor : tensors_) {
        if (!write_zeros(hashed, padded_to(written, header_.alignment) - written)) return false;
        if (!unpack_tensor(tensor, hashed)) return false;
    }
    if (!write_zeros(hashed, plain_bytes_ - written)) return false;

    return digest.hex() == sha256_ ||
           fail(RACDEPLOY_DAMAGED, "it unpacks to a file of another SHA-256: copy it again, or pack it again");
}

bool Container::copy(int64_t begin, int64_t end, const Sink& sink) const {
    Stream stored(input_, begin, end);
    while (stored.left()) {
        const int64_t bytes = std::min(stored.left(), copy_bytes);
        const uint8_t* data = stored.take(bytes);
        if (!data || !sink(data, static_cast<size_t>(bytes))) return false;
    }
    return true;
}

bool Container::unpack_tensor(const Stored& tensor, const Sink& sink) const {
    if (!tensor.layout) return copy(tensor.position, tensor.position + tensor.bytes, sink);

    Stream stored(input_, tensor.position, tensor.position + tensor.bytes);
    Unpacker unpacker(*tensor.layout, tensor.plain_bytes, stored);
    if (!unpacker.begin()) return false;
    std::vector<uint8_t> plain;
    while (!unpacker.is_done())
        if (!unpacker.next(plain) || !sink(plain.data(), plain.size())) return false;
    return !stored.left() || fail(RACDEPLOY_DAMAGED, "bytes follow the last chunk of a tensor");
}

}  // namespace racdeploy::c
