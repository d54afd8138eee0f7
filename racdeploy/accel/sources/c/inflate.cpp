#include "inflate.h"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace racdeploy::c {
namespace {

constexpr int most_bits = 15, look_bits = 10;
constexpr int length_symbols = 288, distance_symbols = 32, order_symbols = 19;

// Bits from the lowest of the first byte on; zeros behind the end, which is noticed when they are used.
class Bits {
public:
    Bits(const uint8_t* data, size_t bytes) : data_(data), bytes_(bytes) {}

    uint32_t peek(int count) {
        while (held_ < count) {
            waiting_ |= static_cast<uint64_t>(next_ < bytes_ ? data_[next_] : 0) << held_;
            next_++;
            held_ += 8;
        }
        return static_cast<uint32_t>(waiting_ & ((uint64_t{1} << count) - 1));
    }
    void drop(int count) {
        waiting_ >>= count;
        held_ -= count;
    }
    uint32_t take(int count) {
        const uint32_t value = peek(count);
        drop(count);
        return value;
    }

    void end_byte() { drop(held_ % 8); }
    size_t used() const { return next_ - static_cast<size_t>(held_ / 8); }  // bytes, the last one begun
    bool overran() const { return used() > bytes_; }

    const uint8_t* take_bytes(size_t count) {  // where a byte begins
        const size_t begin = used();
        if (begin > bytes_ || count > bytes_ - begin) return nullptr;
        next_ = begin + count;
        waiting_ = 0;
        held_ = 0;
        return data_ + begin;
    }

private:
    const uint8_t* data_;
    size_t bytes_, next_ = 0;
    uint64_t waiting_ = 0;
    int held_ = 0;
};

// A canonical prefix code. Codes of up to look_bits are looked up, longer ones counted down.
class Code {
public:
    // Take the bits of each symbol's code, 0 where it has none. As zlib: too many codes are refused, and too few but
    // for a single one of one bit or none at all, which the codes of code lengths may not be.
    bool build(const uint8_t* lengths, int symbols, bool may_be_single) {
        std::fill(std::begin(count_), std::end(count_), uint16_t{0});
        for (int s = 0; s < symbols; s++) count_[lengths[s]]++;
        count_[0] = 0;

        int left = 1, longest = 0;
        for (int bits = 1; bits <= most_bits; bits++) {
            left = 2 * left - count_[bits];
            if (left < 0) return false;
            if (count_[bits]) longest = bits;
        }
        if (left > 0 && !(may_be_single && longest <= 1)) return false;

        uint16_t place[most_bits + 2] = {}, code[most_bits + 2] = {};
        for (int bits = 1; bits <= most_bits; bits++) {
            place[bits + 1] = static_cast<uint16_t>(place[bits] + count_[bits]);
            code[bits + 1] = static_cast<uint16_t>((code[bits] + count_[bits]) << 1);
        }

        std::fill(std::begin(look_), std::end(look_), uint16_t{0});
        for (int s = 0; s < symbols; s++) {
            const int bits = lengths[s];
            if (!bits) continue;
            symbol_[place[bits]++] = static_cast<uint16_t>(s);
            const unsigned mine = code[bits]++;
            if (bits > look_bits) continue;
            for (unsigned i = reversed(mine, bits); i < 1u << look_bits; i += 1u << bits)
                look_[i] = static_cast<uint16_t>(s << 4 | bits);
        }
        return true;
    }

    int symbol(Bits& bits) const {  // -1 where no symbol has such a code
        const uint32_t ahead = bits.peek(most_bits);
        if (const uint16_t found = look_[ahead & ((1u << look_bits) - 1)]) {
            bits.drop(found & 15);
            return found >> 4;
        }

        int code = 0, first = 0, index = 0;
        for (int length = 1; length <= most_bits; length++) {
            code |= static_cast<int>(ahead >> (length - 1) & 1);
            if (code - first < count_[length]) {
                bits.drop(length);
                return symbol_[index + code - first];
            }
            index += count_[length];
            first = (first + count_[length]) << 1;
            code <<= 1;
        }
        return -1;
    }

private:
    static unsigned reversed(unsigned code, int bits) {
        unsigned value = 0;
        for (int i = 0; i < bits; i++) value |= (code >> i & 1) << (bits - 1 - i);
        return value;
    }

    uint16_t count_[most_bits + 1] = {};
    uint16_t symbol_[length_symbols] = {};
    uint16_t look_[1 << look_bits] = {};
};

class Inflater {
public:
    Inflater(const uint8_t* stored, size_t stored_bytes, uint8_t* plain, size_t plain_bytes)
        : bits_(stored, stored_bytes), stored_bytes_(stored_bytes), plain_(plain), plain_bytes_(plain_bytes) {}

    bool run() {
        for (bool last = false; !last;) {
            last = bits_.take(1);
            const uint32_t kind = bits_.take(2);
            const bool good = kind == 0 ? copy() : kind == 1 ? fixed() && codes() : kind == 2 && dynamic() && codes();
            if (!good || bits_.overran()) return false;
        }
        return made_ == plain_bytes_ && bits_.used() == stored_bytes_;
    }

private:
    bool copy() {
        bits_.end_byte();
        const uint32_t count = bits_.take(16), check = bits_.take(16);
        if (count != (check ^ 0xffff) || count > plain_bytes_ - made_) return false;
        const uint8_t* data = bits_.take_bytes(count);
        if (!data) return false;
        if (count) std::memcpy(plain_ + made_, data, count);
        made_ += count;
        return true;
    }

    bool fixed() {
        uint8_t lengths[length_symbols];
        for (int s = 0; s < length_symbols; s++)
            lengths[s] = static_cast<uint8_t>(s < 144 ? 8 : s < 256 ? 9 : s < 280 ? 7 : 8);
        uint8_t distances[distance_symbols];
        std::fill(std::begin(distances), std::end(distances), uint8_t{5});
        return lengths_.build(lengths, length_symbols, false) && distances_.build(distances, distance_symbols, false);
    }

    bool dynamic() {
        static constexpr uint8_t order[order_symbols] = {16, 17, 18, 0, 8,  7, 9,  6, 10, 5,
                                                         11, 4,  12, 3, 13, 2, 14, 1, 15};
        const int symbols = 257 + static_cast<int>(bits_.take(5)), distances = 1 + static_cast<int>(bits_.take(5)),
                  given = 4 + static_cast<int>(bits_.take(4));
        if (symbols > 286 || distances > 30) return false;

        uint8_t lengths[286 + 30] = {};
        for (int i = 0; i < given; i++) lengths[order[i]] = static_cast<uint8_t>(bits_.take(3));
        if (!lengths_.build(lengths, order_symbols, false)) return false;

        std::fill(std::begin(lengths), std::end(lengths), uint8_t{0});
        for (int done = 0; done < symbols + distances;) {
            const int symbol = lengths_.symbol(bits_);
            if (symbol < 0 || bits_.overran()) return false;
            if (symbol < 16) {
                lengths[done++] = static_cast<uint8_t>(symbol);
                continue;
            }

            if (symbol == 16 && !done) return false;
            const uint8_t repeated = symbol == 16 ? lengths[done - 1] : uint8_t{0};
            const uint32_t times = symbol == 16   ? 3 + bits_.take(2)
                                   : symbol == 17 ? 3 + bits_.take(3)
                                                  : 11 + bits_.take(7);
            if (done + static_cast<int>(times) > symbols + distances) return false;
            std::fill_n(lengths + done, times, repeated);
            done += static_cast<int>(times);
        }

        return lengths[256] && lengths_.build(lengths, symbols, true) &&
               distances_.build(lengths + symbols, distances, true);
    }

    bool codes() {
        static constexpr uint16_t length_base[29] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                                     31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
        static constexpr uint8_t length_extra[29] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                                     2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
        static constexpr uint16_t distance_base[30] = {1,   2,   3,   4,   5,   7,    9,    13,   17,   25,
                                                       33,  49,  65,  97,  129, 193,  257,  385,  513,  769,
                                                       1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
        while (!bits_.overran()) {
            const int symbol = lengths_.symbol(bits_);
            if (symbol == 256) return true;
            if (symbol < 0 || symbol > 285) return false;
            if (symbol < 256) {
                if (made_ == plain_bytes_) return false;
                plain_[made_++] = static_cast<uint8_t>(symbol);
                continue;
            }

            const size_t length = length_base[symbol - 257] + bits_.take(length_extra[symbol - 257]);
            const int far = distances_.symbol(bits_);
            if (far < 0 || far > 29) return false;
            const size_t distance = distance_base[far] + bits_.take(far < 2 ? 0 : far / 2 - 1);
            if (distance > made_ || length > plain_bytes_ - made_) return false;
            for (size_t i = 0; i < length; i++, made_++) plain_[made_] = plain_[made_ - distance];
        }
        return false;
    }

    Bits bits_;
    size_t stored_bytes_;
    uint8_t* plain_;
    size_t plain_bytes_, made_ = 0;
    Code lengths_, distances_;
};

}  // namespace

bool inflate(const uint8_t* stored, size_t stored_bytes, uint8_t* plain, size_t plain_bytes) {
    return Inflater(stored, stored_bytes, plain, plain_bytes).run();
}

}  // namespace racdeploy::c
