#include "gguf_header.h"

#include <algorithm>
#include <iterator>
#include <set>
#include <string_view>
#include <utility>

#include "failure.h"

namespace racdeploy::c {
namespace {

constexpr int64_t text_bytes = 1 << 16;  // of a string that are looked at together
constexpr uint64_t least_key_bytes = 13, least_info_bytes = 32;
constexpr uint64_t largest_weights = uint64_t{1} << 62, largest_bytes = uint64_t{1} << 62;
constexpr uint64_t largest_alignment = 1 << 20;

// Number, weights and bytes of a quant block: those of racdeploy/storage/ggml_types.toml, as a test says.
struct GgmlType {
    uint32_t number;
    uint32_t block_weights, block_bytes;
};
constexpr GgmlType ggml_types[] = {
    {0, 1, 4},      {1, 1, 2},      {2, 32, 18},    {3, 32, 20},    {6, 32, 22},    {7, 32, 24},   {8, 32, 34},
    {9, 32, 36},    {10, 256, 84},  {11, 256, 110}, {12, 256, 144}, {13, 256, 176}, {14, 256, 210}, {15, 256, 292},
    {16, 256, 66},  {17, 256, 74},  {18, 256, 98},  {19, 256, 50},  {20, 32, 18},   {21, 256, 110}, {22, 256, 82},
    {23, 256, 136}, {24, 1, 1},     {25, 1, 2},     {26, 1, 4},     {27, 1, 8},     {28, 1, 8},    {29, 256, 56},
    {30, 1, 2},     {34, 256, 54},  {35, 256, 66},  {39, 32, 17},   {40, 64, 36},   {41, 128, 18}, {42, 64, 18},
};

// Bytes of a value of the metadata by its type; 0 where it has no fixed size, or there is no such type.
constexpr int scalar_bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
int bytes_of_scalar(uint32_t type) { return type < std::size(scalar_bytes) ? scalar_bytes[type] : 0; }
bool is_integer(uint32_t type) { return type < 6 || type == type_u64 || type == 11; }
bool is_signed(uint32_t type) { return type == 1 || type == 3 || type == 5 || type == 11; }

template <typename T>
T little_endian(const uint8_t* bytes) {
    T value = 0;
    for (size_t i = 0; i < sizeof(T); i++) value = static_cast<T>(value | static_cast<T>(bytes[i]) << 8 * i);
    return value;
}

// UTF-8, in pieces that may end within a letter: no overlong forms, no surrogates, nothing above U+10FFFF.
class Utf8 {
public:
    bool take(const uint8_t* bytes, int64_t count) {
        for (int64_t i = 0; i < count; i++)
            if (!take(bytes[i])) return false;
        return true;
    }
    bool is_whole() const { return !left_; }

private:
    bool take(uint8_t byte) {
        if (left_) {
            if (byte < least_ || byte > most_) return false;
            left_--;
            least_ = 0x80, most_ = 0xbf;
            return true;
        }
        if (byte < 0x80) return true;
        if (byte < 0xc2 || byte > 0xf4) return false;
        left_ = byte < 0xe0 ? 1 : byte < 0xf0 ? 2 : 3;
        least_ = byte == 0xe0 ? 0xa0 : byte == 0xf0 ? 0x90 : 0x80;
        most_ = byte == 0xed ? 0x9f : byte == 0xf4 ? 0x8f : 0xbf;
        return true;
    }

    int left_ = 0;
    uint8_t least_ = 0x80, most_ = 0xbf;
};

class Reader {
public:
    Reader(const Input& input, uint32_t least_version, Header& header)
        : stream_(input, 0, input.size()), size_(static_cast<uint64_t>(input.size())), least_version_(least_version),
          header_(header) {}

    bool read() {
        uint64_t tensors = 0, keys = 0;
        return fixed_part(tensors, keys) && all_keys(keys) && alignment() && all_infos(tensors) && place();
    }

private:
    bool fixed_part(uint64_t& tensors, uint64_t& keys) {
        if (size_ < fixed_bytes) return fail(RACDEPLOY_DAMAGED, "so few bytes are no GGUF file");

        uint32_t magic = 0, version = 0;
        if (!number(magic) || !number(version) || !number(tensors) || !number(keys)) return false;
        if (magic != 0x46554747) return fail(RACDEPLOY_DAMAGED, "it does not begin with GGUF");
        if (version < least_version_ || version > 3)
            return fail(RACDEPLOY_DAMAGED, "it is of GGUF version %#x; what can be read is little-endian, version 3",
                        static_cast<unsigned>(version));

        const bool fit = tensors <= size_ / least_info_bytes && keys <= size_ / least_key_bytes &&
                         tensors * least_info_bytes + keys * least_key_bytes <= size_;
        return fit || fail(RACDEPLOY_DAMAGED, "its tensors and keys do not fit into it");
    }

    bool all_keys(uint64_t count) {
        std::set<std::string> names;
        for (uint64_t i = 0; i < count; i++) {
            Key key;
            key.start = stream_.position();
            if (!text(&key.name)) return false;
            if (key.name.empty() || !names.insert(key.name).second)
                return fail(RACDEPLOY_DAMAGED, "the key %.80s is there twice, or empty", key.name.c_str());
            if (!value(key)) return false;
            header_.keys.push_back(std::move(key));
        }
        return true;
    }

    bool value(Key& key) {
        Value& value = key.value;
        if (!number(value.type)) return false;
        if (value.type == type_string) return text(key.name.rfind("racgguf.", 0) == 0 ? &value.text : nullptr);
        if (value.type == type_array) return array(value);

        const int bytes = bytes_of_scalar(value.type);
        if (!bytes) return fail(RACDEPLOY_DAMAGED, "metadata type %u is unknown", static_cast<unsigned>(value.type));
        const uint8_t* data = stream_.take(bytes);
        if (!data) return false;

        value.is_integer = is_integer(value.type);
        value.is_negative = is_signed(value.type) && data[bytes - 1] >> 7;
        for (int i = 0; i < bytes; i++) value.number |= static_cast<uint64_t>(data[i]) << 8 * i;
        return true;
    }

    bool array(Value& value) {
        if (!number(value.element_type) || !number(value.count)) return false;
        value.position = stream_.position();

        const auto left = static_cast<uint64_t>(stream_.left());
        if (value.element_type == type_string) {
            if (value.count > left / 8) return fail(RACDEPLOY_DAMAGED, "an array of strings does not fit into it");
            for (uint64_t i = 0; i < value.count; i++) {
                uint64_t bytes = 0;
                if (!number(bytes) || !skip(bytes)) return false;
            }
            return true;
        }

        const int bytes = bytes_of_scalar(value.element_type);
        if (!bytes)
            return fail(RACDEPLOY_DAMAGED, "an array of metadata type %u", static_cast<unsigned>(value.element_type));
        if (value.count > left / static_cast<uint64_t>(bytes))
            return fail(RACDEPLOY_DAMAGED, "an array does not fit into it");
        return stream_.skip(static_cast<int64_t>(value.count) * bytes);
    }

    bool alignment() {
        for (const Key& key : header_.keys)
            if (key.name == "general.alignment") {
                const uint64_t found = key.value.number;
                const bool usable = key.value.is_integer && !key.value.is_negative && found > 0 &&
                                    found <= largest_alignment && !(found & (found - 1));
                if (!usable) return fail(RACDEPLOY_DAMAGED, "its alignment is no power of two");
                header_.alignment = static_cast<int64_t>(found);
            }
        return true;
    }

    bool all_infos(uint64_t count) {
        std::set<std::string> names;
        for (uint64_t i = 0; i < count; i++) {
            Tensor tensor{};
            uint32_t dimensions = 0;
            uint64_t offset = 0;
            if (!text(&tensor.name) || !number(dimensions)) return false;
            if (!names.insert(tensor.name).second || dimensions < 1 || dimensions > most_dimensions)
                return fail(RACDEPLOY_DAMAGED, "the tensor %.80s is there twice, or has %u dimensions",
                            tensor.name.c_str(), static_cast<unsigned>(dimensions));

            tensor.shape.count = static_cast<int>(dimensions);
            for (uint32_t d = 0; d < dimensions; d++)
                if (!number(tensor.shape.dimensions[d])) return false;
            if (!number(tensor.type) || !number(offset)) return false;
            offsets_.push_back(offset);
            header_.tensors.push_back(std::move(tensor));
        }
        return true;
    }

    // Each tensor begins where the one before it ends, rounded up.
    bool place() {
        const int64_t data_start = padded_to(stream_.position(), header_.alignment);
        int64_t expected = 0;
        for (size_t i = 0; i < header_.tensors.size(); i++) {
            Tensor& tensor = header_.tensors[i];
            tensor.bytes = tensor_bytes(tensor.shape, tensor.type);
            if (tensor.bytes < 0) return false;

            if (offsets_[i] != static_cast<uint64_t>(expected))
                return fail(RACDEPLOY_DAMAGED, "the tensor %.80s does not lie behind the one before it",
                            tensor.name.c_str());
            tensor.position = data_start + expected;
            if (tensor.position > static_cast<int64_t>(size_) ||
                tensor.bytes > static_cast<int64_t>(size_) - tensor.position)
                return fail(RACDEPLOY_DAMAGED, "it is cut off: the tensor %.80s ends behind the file",
                            tensor.name.c_str());
            expected = padded_to(expected + tensor.bytes, header_.alignment);
        }
        return true;
    }

    template <typename T>
    bool number(T& value) {
        const uint8_t* data = stream_.take(sizeof(T));
        if (data) value = little_endian<T>(data);
        return data;
    }

    bool skip(uint64_t bytes) {
        if (bytes > size_) return fail(RACDEPLOY_DAMAGED, "a string ends behind the file");
        return stream_.skip(static_cast<int64_t>(bytes));
    }

    // A string, which has to be UTF-8; it is kept where there is a place for it.
    bool text(std::string* kept) {
        uint64_t bytes = 0;
        if (!number(bytes)) return false;
        if (bytes > static_cast<uint64_t>(stream_.left()))
            return fail(RACDEPLOY_DAMAGED, "a string ends behind the file");

        Utf8 letters;
        for (auto left = static_cast<int64_t>(bytes); left > 0;) {
            const int64_t count = std::min(left, text_bytes);
            const uint8_t* data = stream_.take(count);
            if (!data) return false;
            if (!letters.take(data, count)) return fail(RACDEPLOY_DAMAGED, "a string is not UTF-8");
            if (kept) kept->append(reinterpret_cast<const char*>(data), static_cast<size_t>(count));
            left -= count;
        }
        return letters.is_whole() || fail(RACDEPLOY_DAMAGED, "a string is not UTF-8");
    }

    Stream stream_;
    uint64_t size_;
    uint32_t least_version_;
    Header& header_;
    std::vector<uint64_t> offsets_;
};

}  // namespace

bool Shape::operator==(const Shape& other) const {
    return count == other.count && std::equal(dimensions, dimensions + count, other.dimensions);
}

int64_t tensor_bytes(const Shape& shape, uint64_t type) {
    const auto* found = std::find_if(std::begin(ggml_types), std::end(ggml_types),
                                     [&](const GgmlType& each) { return each.number == type; });
    if (found == std::end(ggml_types)) {
        fail(RACDEPLOY_DAMAGED, "tensor type %llu is unknown", static_cast<unsigned long long>(type));
        return -1;
    }

    uint64_t weights = 1;
    bool possible = shape.count >= 1 && shape.count <= most_dimensions;
    for (int d = 0; possible && d < shape.count; d++) {
        const uint64_t dimension = shape.dimensions[d];
        possible = dimension > 0 && weights <= (largest_weights - 1) / dimension;
        weights *= dimension;
    }
    possible = possible && shape.dimensions[0] % found->block_weights == 0 &&
               weights / found->block_weights <= largest_bytes / found->block_bytes;
    if (!possible) {
        fail(RACDEPLOY_DAMAGED, "a tensor of type %u cannot have its dimensions", static_cast<unsigned>(found->number));
        return -1;
    }

    return static_cast<int64_t>(weights / found->block_weights * found->block_bytes);
}

bool read_header(const Input& input, uint32_t least_version, Header& header) {
    return Reader(input, least_version, header).read();
}

}  // namespace racdeploy::c
