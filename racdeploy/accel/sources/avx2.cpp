// AVX2: Q8_0 with two of every four weights stored. The stride is fixed, and where a value goes is computed from its
// four mask bits, without a table. Unstructured masks are slower here than dense weights, so they are left to portable.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

namespace racdeploy {
namespace {

constexpr int64_t step_columns = 128;  // lane 0 holds the first 64 of them, lane 1 the others

inline __m256i load_256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

inline __m256i in_both_lanes(__m128i lane) { return _mm256_broadcastsi128_si256(lane); }

// Bit i set: the code of weight i of a block is not 0.
inline uint32_t non_zero(const uint8_t* block) {
    const __m256i zero = _mm256_cmpeq_epi8(load_256(block + 2), _mm256_setzero_si256());
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(zero));
}

bool three_in_some_four(uint32_t bits) {
    const uint32_t pairs = (bits & 0x55555555) + (bits >> 1 & 0x55555555);    // 0, 1 or 2
    const uint32_t fours = (pairs & 0x33333333) + (pairs >> 2 & 0x33333333);  // 0 to 4
    return (fours + 0x55555555) & 0x88888888;                                 // 3 + 5 reaches bit 3
}

bool prefers_two_of_four(Quant quant, int64_t rows, int64_t columns, const void* blocks) {
    if (quant != Quant::q8_0 || columns % step_columns) return false;
    const uint8_t* block = static_cast<const uint8_t*>(blocks);
    const uint8_t* end = block + rows * row_bytes(quant, columns);
    for (; block < end; block += block_bytes(quant))
        if (three_in_some_four(non_zero(block))) return false;
    return true;
}

// For each 4 mask bits, those of the two stored weights, and where the two are.
struct Pair {
    uint8_t bits, first, second;
};

struct Pairs {
    Pair of[16];
    constexpr Pairs() : of() {
        for (unsigned bits = 0; bits < 16; bits++) {
            const unsigned stored = fill_up_to_two(bits);
            uint8_t places[2] = {0, 0};
            for (unsigned i = 0, n = 0; i < 4 && n < 2; i++)
                if (stored >> i & 1) places[n++] = static_cast<uint8_t>(i);
            of[bits] = {static_cast<uint8_t>(stored), places[0], places[1]};
        }
    }
};
constexpr Pairs pairs;

void pack(const Blocks& blocks, const int64_t* offsets, uint8_t* heads, uint8_t* values, Rows rows) {
    const Quant quant = blocks.quant;
    if (blocks.pattern != Pattern::two_of_four) return portable::pack(blocks, offsets, heads, values, rows);

    const int64_t row_heads = heads_bytes(quant, blocks.columns);
    for (int64_t r = rows.begin; r < rows.end; r++) {
        const uint8_t* block = blocks.row(r);
        uint8_t* head = heads + r * row_heads;
        std::memset(head, 0, static_cast<size_t>(row_heads));

        for (int64_t b = 0; b < blocks.columns / block_weights; b++, block += block_bytes(quant)) {
            uint8_t* group = head + b / 8 * head_bytes(quant);
            uint8_t* to = values + offsets[r] + b / 4 * 64 + place_of_run[b % 4] * 16;
            std::memcpy(group + b % 8 * 2, block, 2);

            const uint32_t bits = non_zero(block);
            uint32_t stored = 0;
            for (unsigned i = 0; i < 32; i += 4) {
                const Pair& pair = pairs.of[bits >> i & 15];
                stored |= static_cast<uint32_t>(pair.bits) << i;
                *to++ = block[2 + i + pair.first] ^ 0x80;
                *to++ = block[2 + i + pair.second] ^ 0x80;
            }
            std::memcpy(group + 16 + b % 8 * 4, &stored, 4);
        }
    }
}

void count(const Blocks& blocks, int64_t* counts, Rows rows) {
    if (blocks.pattern != Pattern::two_of_four) return portable::count(blocks, counts, rows);
    for (int64_t r = rows.begin; r < rows.end; r++) counts[r] = blocks.columns / 2;
}

// 128 weights as signed codes: run i of 16 weights of lane 0 beside run i of lane 1.
struct Spread {
    __m256i runs[4];
};

inline Spread spread(const uint8_t* mask, const uint8_t* values) {
    // place[i] maps four mask bits to which of the two values is weight i: 0, 1 or none (the top bit set).
    const __m256i place[4] = {
        in_both_lanes(_mm_setr_epi8(-128, 0, -128, 0, -128, 0, -128, 0, -128, 0, -128, 0, -128, 0, -128, 0)),
        in_both_lanes(_mm_setr_epi8(-128, -128, 0, 1, -128, -128, 0, 1, -128, -128, 0, 1, -128, -128, 0, 1)),
        in_both_lanes(_mm_setr_epi8(-128, -128, -128, -128, 0, 1, 1, -128, -128, -128, -128, -128, 0, 1, 1, -128)),
        in_both_lanes(
            _mm_setr_epi8(-128, -128, -128, -128, -128, -128, -128, -128, 0, 1, 1, -128, 1, -128, -128, -128)),
    };

    const __m256i first_values = in_both_lanes(_mm_setr_epi8(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6));
    const __m256i later_values = _mm256_add_epi8(first_values, _mm256_set1_epi8(8));

    // Four shuffles look up where each of a nibble's weights is; unpacking brings the weights into their order.
    __m256i nibbles = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(mask)));
    nibbles = _mm256_and_si256(_mm256_or_si256(nibbles, _mm256_slli_epi16(nibbles, 4)), _mm256_set1_epi8(15));
    const __m256i a = _mm256_shuffle_epi8(place[0], nibbles), b = _mm256_shuffle_epi8(place[1], nibbles);
    const __m256i c = _mm256_shuffle_epi8(place[2], nibbles), d = _mm256_shuffle_epi8(place[3], nibbles);
    const __m256i ab_low = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
    const __m256i cd_low = _mm256_unpacklo_epi8(c, d), cd_high = _mm256_unpackhi_epi8(c, d);

    const __m256i signs = _mm256_set1_epi8(-128);
    const __m256i low = _mm256_xor_si256(load_256(values), signs),
                  high = _mm256_xor_si256(load_256(values + 32), signs);

    return {{
        _mm256_shuffle_epi8(low, _mm256_add_epi8(_mm256_unpacklo_epi16(ab_low, cd_low), first_values)),
        _mm256_shuffle_epi8(low, _mm256_add_epi8(_mm256_unpackhi_epi16(ab_low, cd_low), later_values)),
        _mm256_shuffle_epi8(high, _mm256_add_epi8(_mm256_unpacklo_epi16(ab_high, cd_high), first_values)),
        _mm256_shuffle_epi8(high, _mm256_add_epi8(_mm256_unpackhi_epi16(ab_high, cd_high), later_values)),
    }};
}

// Sums of 4 products; |weight| <= 128 and |input| <= 127, so two products stay below 2^15.
inline __m256i dot(__m256i weights, const int8_t* inputs) {
    const __m256i products =
        _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(load_256(inputs), weights));
    return _mm256_madd_epi16(products, _mm256_set1_epi16(1));
}

inline float sum_of(__m256 sums) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// `inputs` are the codes in the order of Spread.
template <int tokens>
void multiply_row(const SparseMatrix& matrix, int64_t row, const QuantizedActivations& from, const int8_t* inputs,
                  int64_t token, Outputs outputs) {
    const uint8_t* head = matrix.head(row);
    const uint8_t* values = matrix.values + matrix.offsets[row];
    __m256 sums[tokens];
    for (auto& sum : sums) sum = _mm256_setzero_ps();
    for (int64_t column = 0; column < matrix.columns; column += step_columns, values += 64) {
        const int64_t half = column % group_weights / step_columns;
        const uint8_t* group = head + column / group_weights * head_bytes(matrix.quant);
        const Spread weights = spread(group + 16 + 16 * half, values);
        const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(group + 8 * half));
        const __m128 weight_scales = _mm_cvtph_ps(halves);

        for (int t = 0; t < tokens; t++) {
            const int64_t at = (token + t) * from.padded_columns + column;
            const __m128 scales = _mm_mul_ps(weight_scales, _mm_loadu_ps(from.scales + at / block_weights));
            const __m256 both = _mm256_set_m128(scales, scales);  // lane 0 takes blocks 0 and 1, lane 1 blocks 2 and 3
            const __m256 even = _mm256_permutevar_ps(both, _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2));
            const __m256 odd = _mm256_permutevar_ps(both, _mm256_setr_epi32(1, 1, 1, 1, 3, 3, 3, 3));
            const int8_t* codes = inputs + at;
            const __m256i first = _mm256_add_epi32(dot(weights.runs[0], codes), dot(weights.runs[1], codes + 32));
            const __m256i second = _mm256_add_epi32(dot(weights.runs[2], codes + 64), dot(weights.runs[3], codes + 96));
            sums[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(first), even, sums[t]);
            sums[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(second), odd, sums[t]);
        }
    }

    for (int t = 0; t < tokens; t++) outputs.first[(token + t) * outputs.stride + row] = sum_of(sums[t]);
}

void multiply(const SparseMatrix& matrix, int64_t tokens, const void* workspace, Outputs outputs, Rows rows) {
    const QuantizedActivations from(matrix.columns, tokens, const_cast<void*>(workspace));
    int8_t* inputs = matrix.pattern == Pattern::two_of_four
                         ? static_cast<int8_t*>(scratch_of_thread(tokens * from.padded_columns))
                         : nullptr;
    if (!inputs) return portable::multiply(matrix, tokens, workspace, outputs, rows);

    for (int64_t at = 0; at < tokens * from.padded_columns; at += step_columns)
        for (int64_t i = 0; i < step_columns; i += 8)  // run i / 16 % 4 of lane i / 64
            std::memcpy(inputs + at + i % 64 / 16 * 32 + i / 64 * 16 + i % 16, from.codes + place_in_chunks(at + i), 8);

    for (int64_t row = rows.begin; row < rows.end; row++) {
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4) multiply_row<4>(matrix, row, from, inputs, t, outputs);
        for (; t < tokens; t++) multiply_row<1>(matrix, row, from, inputs, t, outputs);
    }
}

bool runs_here() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

}  // namespace

const Kernels avx2_kernels = {
    "avx2", runs_here, prefers_two_of_four, count, pack, portable::unpack, portable::prepare, multiply,
};

}  // namespace racdeploy

#else

namespace racdeploy {
const Kernels avx2_kernels = {"avx2", [] { return false; }};
}  // namespace racdeploy

#endif
