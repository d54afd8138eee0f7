// Q3_K and Q6_K at 2:4 with AVX-512: two runs share a register, and one lookup in 128 inputs picks theirs.
#pragma once
#include <immintrin.h>

#include "k_rows.h"
#include "x86_prefetch.h"

namespace racdeploy {
namespace {

inline __m512i in_both_halves(const void* from) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
inline __m512i in_all_lanes(const void* from) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}

constexpr int or_and = 0xf8;  // of VPTERNLOG: a | (b & c)

// Constants in registers: gcc would compute them again for every group, of what it takes for less.
struct KConstants {
    __m512i pairs, thirds, shifts, turns, low_bits, third_bit, seconds, places, fours, values, zeros;
    __m128i nibble, high_bits, scale_zero;

    explicit KConstants(Quant quant) {
        const __m128i low = _mm_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        pairs = _mm512_broadcast_i64x4(_mm256_set_m128i(_mm_add_epi8(low, _mm_set1_epi8(8)), low));
        thirds = _mm512_broadcast_i32x4(low);
        shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1);
        turns = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 31, 31, 31, 31, 1, 1, 1, 1);
        low_bits = _mm512_set1_epi8(0x33);
        third_bit = _mm512_set1_epi8(0x44);
        seconds = _mm512_set1_epi16(static_cast<int16_t>(0x8800));
        places = in_all_lanes(k_tables.places);  // a lookup of 64 ignores the bits above
        const __m128i four = _mm_setr_epi8(0, 0, 4, 4, 8, 8, 12, 12, 32, 32, 36, 36, 40, 40, 44, 44);
        const __m256i of_run = _mm256_set_m128i(_mm_add_epi8(four, _mm_set1_epi8(16)), four);
        fours = _mm512_inserti64x4(_mm512_castsi256_si512(of_run), _mm256_add_epi8(of_run, _mm256_set1_epi8(64)), 1);
        values = _mm512_set1_epi8(quant == Quant::q3_k ? 7 : 15);
        zeros = _mm512_set1_epi8(static_cast<char>(k_zero_point(quant)));
        nibble = _mm_set1_epi8(15);
        high_bits = _mm_set1_epi8(0x30);
        scale_zero = _mm_set1_epi8(32);
        for (__m512i* each :
             {&pairs, &thirds, &shifts, &turns, &low_bits, &third_bit, &seconds, &places, &fours, &values, &zeros})
            asm("" : "+v"(*each));
        for (__m128i* each : {&nibble, &high_bits, &scale_zero}) asm("" : "+v"(*each));
    }

    // Runs 0 and 2, and runs 1 and 3, in the low and the high four bits: three bits each, of `two_bits` and `third` as
    // they are stored.
    inline __m512i join(__m512i two_bits, __m512i third, __m512i others) const {
        const __m512i high = _mm512_ternarylogic_epi64(others, _mm512_rolv_epi32(third, turns), third_bit, or_and);
        return _mm512_ternarylogic_epi64(high, _mm512_srlv_epi16(two_bits, shifts), low_bits, or_and);
    }
};

// Which of 128 inputs, those of two runs, each of their 64 values takes: of runs 0 and 2, and of 1 and 3.
struct KPicks {
    __m512i of[2];

    // The codes of runs 0 and 1, then of runs 2 and 3, in the low and the high four bits: each twice.
    static inline __m512i codes_of(const uint8_t* from, const KConstants& constants) {
        const __m512i two_bits = _mm512_shuffle_epi8(in_all_lanes(from), constants.pairs);
        const __m512i third = _mm512_shuffle_epi8(_mm512_set1_epi64(load<int64_t>(from + 16)), constants.thirds);
        return constants.join(two_bits, third, constants.seconds);
    }

    KPicks(const uint8_t* from, const KConstants& constants) {
        const __m512i codes = codes_of(from, constants);
        for (int two = 0; two < 2; two++) {
            const __m512i which = two ? _mm512_srli_epi16(codes, 4) : codes;
            of[two] = _mm512_or_si512(_mm512_permutexvar_epi8(which, constants.places), constants.fours);
        }
    }
};

template <Quant quant>
struct KValues;

template <>
struct KValues<Quant::q3_k> {
    __m512i of[2];
    KValues(const uint8_t* group, const KConstants& constants) {
        const __m512i third = in_all_lanes(group + k_parts(Quant::q3_k).high);
        const __m512i nibbles = constants.join(in_both_halves(group), third, _mm512_setzero_si512());
        of[0] = _mm512_and_si512(nibbles, constants.values);
        of[1] = _mm512_and_si512(_mm512_srli_epi16(nibbles, 4), constants.values);
    }
};

template <>
struct KValues<Quant::q6_k> {
    __m512i of[2];
    KValues(const uint8_t* group, const KConstants& constants) {
        // Two bits of runs 0 and 2 move up by 4 and 2, those of runs 1 and 3 by 0 and -2.
        const __m512i low = _mm512_loadu_si512(group);
        const __m512i moved = _mm512_srlv_epi16(in_both_halves(group + k_parts(Quant::q6_k).high), constants.shifts);
        const __m512i bits[2] = {_mm512_and_si512(low, constants.values),
                                 _mm512_and_si512(_mm512_srli_epi16(low, 4), constants.values)};
        const __m512i high = _mm512_set1_epi8(0x30);
        of[0] = _mm512_ternarylogic_epi64(bits[0], _mm512_slli_epi16(moved, 4), high, or_and);
        of[1] = _mm512_ternarylogic_epi64(bits[1], moved, high, or_and);
    }
};

// The 16 scales in the order of the sums: runs 0 and 1 have sub-blocks 0 to 3 and 8 to 11.
template <Quant quant>
inline __m512i sub_scales(const uint8_t* scales, const KConstants& constants) {
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
    if (quant == Quant::q3_k) {
        const __m128i nibbles = _mm_unpacklo_epi64(bytes, _mm_srli_epi16(bytes, 4));
        const __m128i up = _mm_sllv_epi32(_mm_shuffle_epi32(bytes, 0xaa), _mm_setr_epi32(4, 2, 0, 0));
        const __m128i high = _mm_srlv_epi32(up, _mm_setr_epi32(0, 0, 0, 2));
        const __m128i low = _mm_and_si128(nibbles, constants.nibble);
        bytes = _mm_sub_epi8(_mm_ternarylogic_epi32(low, high, constants.high_bits, or_and), constants.scale_zero);
    }
    return _mm512_cvtepi8_epi32(_mm_shuffle_epi32(bytes, 0xd8));
}

template <Quant quant>
struct KGroup {
    KPicks picks;
    KValues<quant> values;
    __m512i scales;
    float scale;

    KGroup(const uint8_t* group, const KConstants& constants)
        : picks(group + k_parts(quant).places, constants),
          values(group, constants),
          scales(sub_scales<quant>(group + k_parts(quant).scales, constants)),
          scale(_cvtsh_ss(load<uint16_t>(group + k_parts(quant).scale))) {}
};

struct KRow {
    template <Quant quant, int tokens>
    [[gnu::always_inline]] static inline void multiply(const uint8_t* packed, const KActivations& from, int64_t token,
                                                       float* output, int64_t stride) {
        const int64_t row_groups = groups(from.columns);
        const int8_t* inputs = from.codes + token * from.columns;
        const KConstants constants(quant);
        __m512 totals[tokens];
        for (auto& total : totals) total = _mm512_setzero_ps();

        for (int64_t g = 0; g < row_groups; g++, packed += k_parts(quant).bytes, inputs += group_weights) {
            fetch_ahead(packed, values_ahead);
            fetch_ahead(packed + 64, values_ahead);
            if (quant == Quant::q6_k) fetch_ahead(packed + 128, values_ahead);

            const KGroup<quant> group(packed, constants);
#pragma GCC unroll 4
            for (int t = 0; t < tokens; t++) {
                __m512i of_codes = _mm512_setzero_si512(), of_zeros = of_codes;
#pragma GCC unroll 2
                for (int two = 0; two < 2; two++) {
                    const int8_t* of_runs = inputs + t * from.columns + two * k_run_weights;
                    const __m512i first = _mm512_loadu_si512(of_runs), second = _mm512_loadu_si512(of_runs + 128);
                    const __m512i picked = _mm512_permutex2var_epi8(first, group.picks.of[two], second);
                    of_codes = _mm512_dpbusd_epi32(of_codes, group.values.of[two], picked);
                    of_zeros = _mm512_dpbusd_epi32(of_zeros, constants.zeros, picked);
                }
                const __m512i products = _mm512_mullo_epi32(_mm512_sub_epi32(of_codes, of_zeros), group.scales);
                const __m512 both = _mm512_set1_ps(group.scale * from.scales[(token + t) * row_groups + g]);
                totals[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), both, totals[t]);
            }
        }
        for (int t = 0; t < tokens; t++) output[t * stride] = _mm512_reduce_add_ps(totals[t]);
    }
};

// ---- inputs ----

inline __m128i codes_of_16(__m512 inputs, __m512 inverse) {
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(inputs, inverse)));
}

void prepare_k_quant(int64_t columns, int64_t tokens, int64_t token, const float* activation, void* workspace) {
    const KActivations to(columns, tokens, workspace);
    for (int64_t g = 0; g < groups(columns); g++) {
        const float* from = activation + g * group_weights;
        __m512 sizes = _mm512_setzero_ps();
        for (int64_t i = 0; i < group_weights; i += 16)
            sizes = _mm512_max_ps(sizes, _mm512_abs_ps(_mm512_loadu_ps(from + i)));
        const KScale of_inputs(_mm512_reduce_max_ps(sizes));
        to.scales[token * groups(columns) + g] = of_inputs.scale;

        // Of two sub-blocks that follow each other, the first and the second 8 codes lie together.
        int8_t* codes = to.codes + token * columns + g * group_weights;
        for (int64_t first = 0; first < group_weights; first += 32) {
            const __m128i one = codes_of_16(_mm512_loadu_ps(from + first), _mm512_set1_ps(of_inputs.inverse));
            const __m128i other = codes_of_16(_mm512_loadu_ps(from + first + 16), _mm512_set1_ps(of_inputs.inverse));
            auto* place = reinterpret_cast<__m128i*>(codes + k_input_place(first));
            _mm_storeu_si128(place, _mm_unpacklo_epi64(one, other));
            _mm_storeu_si128(place + k_run_weights / 16, _mm_unpackhi_epi64(one, other));
        }
    }
}

}  // namespace
}  // namespace racdeploy
