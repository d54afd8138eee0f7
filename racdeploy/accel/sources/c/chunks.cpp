#include "chunks.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "failure.h"
#include "inflate.h"

namespace racdeploy::c {
namespace {

constexpr int64_t table_bytes = 48, least_word_weights = 4096;
constexpr int codes = 16, buckets = 32, words_of_table = 1 << 16;
constexpr uint32_t deflated = uint32_t{1} << 31;

constexpr Layout layouts[] = {
    {0, 1, 4, 0, 4, false, false, 0},    // f32
    {1, 1, 2, 0, 2, false, false, 0},    // f16
    {2, 32, 18, 2, 1, true, false, 8},   // q4_0
    {6, 32, 22, 2, 2, false, true, 0},   // q5_0
    {8, 32, 34, 2, 1, false, false, 0},  // q8_0
    {30, 1, 2, 0, 2, false, false, 0},   // bf16
    {39, 32, 17, 1, 1, true, false, 0},  // mxfp4
};

uint32_t u32(const uint8_t* bytes) {
    return bytes[0] | static_cast<uint32_t>(bytes[1]) << 8 | static_cast<uint32_t>(bytes[2]) << 16 |
           static_cast<uint32_t>(bytes[3]) << 24;
}

int64_t count_bits(const std::vector<uint8_t>& mask) {
    int64_t count = 0;
    for (const uint8_t byte : mask) count += __builtin_popcount(byte);
    return count;
}

// All words, cheap ones first, equal ones by number.
std::vector<uint16_t> rank_words(const uint8_t* costs, uint8_t zero) {
    const auto cost_of = [&](int word) {
        return costs[word & 15] + costs[word >> 4 & 15] + costs[word >> 8 & 15] + costs[word >> 12];
    };

    int begin[4 * 255 + 2] = {};
    for (int word = 0; word < words_of_table; word++) begin[cost_of(word) + 1]++;
    for (size_t cost = 1; cost < std::size(begin); cost++) begin[cost] += begin[cost - 1];

    std::vector<uint16_t> ranked(words_of_table);
    for (int word = 0; word < words_of_table; word++)
        ranked[static_cast<size_t>(begin[cost_of(word)]++)] = static_cast<uint16_t>(word ^ 0x1111 * zero);
    return ranked;
}

// A stream of numbers of a few bits each, from the lowest bit on.
class Numbers {
public:
    explicit Numbers(const uint8_t* data) : data_(data) {}

    uint32_t take(int bits) {  // which have to be there
        while (held_ < bits) {
            waiting_ |= static_cast<uint64_t>(*data_++) << held_;
            held_ += 8;
        }
        const auto value = static_cast<uint32_t>(waiting_ & ((uint64_t{1} << bits) - 1));
        waiting_ >>= bits;
        held_ -= bits;
        return value;
    }

private:
    const uint8_t* data_;
    uint64_t waiting_ = 0;
    int held_ = 0;
};

}  // namespace

const Layout* find_layout(uint64_t type) {
    for (const Layout& layout : layouts)
        if (layout.type == type) return &layout;
    return nullptr;
}

bool may_be_packed(const Layout& layout, int64_t plain_bytes, int64_t stored_bytes) {
    const int64_t blocks = plain_bytes / layout.block_bytes, weights = layout.weights(plain_bytes);
    if (stored_bytes < (layout.in_words ? 5 * blocks : weights / 8))
        return fail(RACDEPLOY_DAMAGED, "a packed tensor has fewer bytes than its mask");
    if (layout.in_words && weights < least_word_weights)
        return fail(RACDEPLOY_DAMAGED, "a packed tensor has fewer than %lld weights",
                    static_cast<long long>(least_word_weights));
    return true;
}

bool Unpacker::begin() {
    if (!layout_.in_words) return true;

    const uint8_t* table = stored_.take(table_bytes);
    if (!table) return false;

    uint64_t words = 0;
    for (int bucket = 0; bucket < buckets; bucket++) {
        const uint8_t width = table[codes + bucket];
        if (width > 16) return fail(RACDEPLOY_DAMAGED, "a bucket has %d bits", width);
        width_[bucket] = width;
        start_[bucket] = static_cast<uint32_t>(words);
        words += uint64_t{1} << width;
    }
    if (words != words_of_table) return fail(RACDEPLOY_DAMAGED, "its buckets do not hold 65536 words");

    ranked_ = rank_words(table, layout_.zero);
    return true;
}

bool Unpacker::next(std::vector<uint8_t>& plain) {
    const int fields = 1 + layout_.planes();
    const uint8_t* found = stored_.take(4 * fields);
    if (!found) return false;
    uint32_t sizes[8] = {};
    for (int i = 0; i < fields; i++) sizes[i] = u32(found + 4 * i);

    // A chunk of more weights is refused before there is memory for it.
    const int64_t blocks = sizes[0], weights = blocks * layout_.block_weights;
    if (weights <= 0 || weights > std::min(weights_, chunk_weights))
        return fail(RACDEPLOY_DAMAGED, "a chunk has %lld weights", static_cast<long long>(weights));

    // Numbers of buckets or a mask, then planes: those of scales, then those of codes.
    const int64_t first_bytes = layout_.in_words ? 5 * blocks : (weights + 7) / 8;
    const uint8_t* first = stored_.take(first_bytes);
    if (!first) return false;
    first_.assign(first, first + first_bytes);

    plain.resize(static_cast<size_t>(blocks * layout_.block_bytes));
    for (int head = 0; head < layout_.head_bytes; head++) {
        if (!plane(sizes[1 + head], blocks, heads_[head])) return false;
        for (int64_t b = 0; b < blocks; b++) plain[b * layout_.block_bytes + head] = heads_[head][b];
    }

    const uint32_t* of_codes = sizes + 1 + layout_.head_bytes;
    const bool good = layout_.in_words   ? words(first_, of_codes[0], plain.data())
                      : layout_.in_fives ? fives(first_, of_codes, plain.data())
                                         : bytes(first_, weights, of_codes, plain.data());
    weights_ -= weights;
    return good;
}

// Read a plane, whose size field and bytes have to agree.
bool Unpacker::plane(uint32_t size, int64_t bytes, std::vector<uint8_t>& into) {
    const int64_t stored = size & ~deflated;
    const bool is_deflated = size & deflated;
    if (is_deflated ? stored >= bytes : stored != bytes)
        return fail(RACDEPLOY_DAMAGED, "%lld bytes of codes where the mask keeps %lld", static_cast<long long>(stored),
                    static_cast<long long>(bytes));

    const uint8_t* data = stored_.take(stored);
    if (!data) return false;
    if (!is_deflated) {
        into.assign(data, data + stored);
        return true;
    }

    into.resize(static_cast<size_t>(bytes));
    return inflate(data, static_cast<size_t>(stored), into.data(), into.size()) ||
           fail(RACDEPLOY_DAMAGED, "codes do not inflate to %lld bytes", static_cast<long long>(bytes));
}

bool Unpacker::words(const std::vector<uint8_t>& numbers, uint32_t size, uint8_t* blocks) {
    const size_t pairs = numbers.size() / 5 * 4;
    const auto pair_of = [&](size_t i) { return numbers[i] | (numbers[pairs + i / 4] >> i % 4 * 2 & 3) << 8; };

    int64_t bits = 0;
    for (size_t i = 0; i < pairs; i++) bits += width_[pair_of(i) & 31] + width_[pair_of(i) >> 5];
    const uint8_t* payload = size == (bits + 7) / 8 ? stored_.take(size) : nullptr;
    if (!payload || (bits % 8 && payload[size - 1] >> bits % 8))
        return fail(RACDEPLOY_DAMAGED, "%lld bytes of codes where their buckets need %lld bits",
                    static_cast<long long>(size), static_cast<long long>(bits));

    Numbers places(payload);
    for (size_t i = 0; i < pairs; i++) {
        const int pair = pair_of(i);
        uint8_t* four = blocks + i / 4 * layout_.block_bytes + layout_.head_bytes + i % 4 * 4;
        for (const int bucket : {pair & 31, pair >> 5}) {
            const uint16_t word = ranked_[start_[bucket] + places.take(static_cast<int>(width_[bucket]))];
            *four++ = static_cast<uint8_t>(word);
            *four++ = static_cast<uint8_t>(word >> 8);
        }
    }
    return true;
}

// The bits of a block's mask are its weights 0, 16, 1, 17, …, which is the order of nibbles.
bool Unpacker::fives(const std::vector<uint8_t>& mask, const uint32_t* sizes, uint8_t* blocks) {
    const int64_t kept = count_bits(mask);
    if (!plane(sizes[0], (kept + 1) / 2, planes_[0]) || !plane(sizes[1], (kept + 7) / 8, planes_[1])) return false;

    int64_t next = 0;
    const size_t count = mask.size() / 4;
    for (size_t b = 0; b < count; b++) {
        uint8_t* fifths = blocks + b * layout_.block_bytes + layout_.head_bytes;
        uint8_t* nibbles = fifths + 4;
        std::memset(nibbles, 0, 16);

        uint32_t high = 0xffffffff;  // a code is stored XOR 16
        for (uint32_t bits = u32(&mask[4 * b]); bits; bits &= bits - 1, next++) {
            const int place = __builtin_ctz(bits);
            const int low = planes_[0][next / 2] >> next % 2 * 4 & 15;
            nibbles[place / 2] = static_cast<uint8_t>(nibbles[place / 2] | low << place % 2 * 4);
            if (planes_[1][next / 8] >> next % 8 & 1) high &= ~(uint32_t{1} << (place / 2 + place % 2 * 16));
        }
        for (int i = 0; i < 4; i++) fifths[i] = static_cast<uint8_t>(high >> 8 * i);
    }
    return true;
}

bool Unpacker::bytes(const std::vector<uint8_t>& mask, int64_t weights, const uint32_t* sizes, uint8_t* blocks) {
    if (weights % 8 && mask.back() >> weights % 8)
        return fail(RACDEPLOY_DAMAGED, "a mask keeps weights behind the end of its chunk");

    const int64_t kept = count_bits(mask);
    const int width = layout_.code_planes;
    for (int i = 0; i < width; i++)
        if (!plane(sizes[i], kept, planes_[i])) return false;

    size_t next = 0;
    for (int64_t first = 0; first < weights; first += 8) {
        // Eight weights are in the same block, or each is a block of its own without scales.
        uint8_t* eight = blocks + first / layout_.block_weights * layout_.block_bytes + layout_.head_bytes +
                         first % layout_.block_weights * width;
        const auto count = static_cast<size_t>(std::min<int64_t>(8, weights - first) * width);
        std::memset(eight, 0, count);
        for (uint32_t bits = mask[static_cast<size_t>(first / 8)]; bits; bits &= bits - 1, next++)
            for (int i = 0; i < width; i++) eight[__builtin_ctz(bits) * width + i] = planes_[i][next];
    }
    return true;
}

}  // namespace racdeploy::c
