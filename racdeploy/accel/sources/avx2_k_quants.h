// Q3_K and Q6_K at 2:4 with AVX2, with VNNI where the file is compiled for it. Weights are not spread: stored values
// pick their inputs, by one lookup of the places and two shuffles.
#pragma once
#include "avx2_pick.h"
#include "k_rows.h"

namespace racdeploy {
namespace {

inline __m256i bytes_of(int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }

// Two runs at a time as nibbles: three bits each, of `two_bits` and `third_bits` as they are stored.
struct KNibbles {
    __m256i of[2];  // of runs 0 and 1, of runs 2 and 3

    KNibbles(__m256i two_bits, __m256i third_bits, __m256i others) {
        third_bits = _mm256_sllv_epi32(third_bits, _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2));
        of[0] = join(two_bits, third_bits, others);
        of[1] = join(_mm256_srli_epi16(two_bits, 2), _mm256_srli_epi16(third_bits, 1), others);
    }
    template <int run>
    __m256i run_of() const {
        const __m256i both = of[run / 2];
        return _mm256_and_si256(run % 2 ? _mm256_srli_epi16(both, 4) : both, bytes_of(15));
    }

private:
    static __m256i join(__m256i two_bits, __m256i third_bits, __m256i others) {
        const __m256i low = _mm256_and_si256(two_bits, bytes_of(0x33));
        const __m256i high = _mm256_and_si256(third_bits, bytes_of(0x44));
        return _mm256_or_si256(_mm256_or_si256(low, high), others);
    }
};

// Which of 16 inputs, those of its four codes, each of a run's 32 values takes.
struct KPicks {
    KNibbles codes;

    explicit KPicks(const uint8_t* places)
        : codes(_mm256_shuffle_epi8(in_both_lanes(load_128(places)), pairs(8)),
                _mm256_shuffle_epi8(_mm256_set1_epi64x(load<int64_t>(places + 16)), pairs(0)),
                _mm256_set1_epi16(static_cast<int16_t>(0x8800))) {}

    template <int run>
    __m256i run_of() const {
        const __m256i places = in_both_lanes(load_128(k_tables.places));
        const __m256i fours = in_both_lanes(_mm_setr_epi8(0, 0, 4, 4, 8, 8, 12, 12, 0, 0, 4, 4, 8, 8, 12, 12));
        return _mm256_or_si256(_mm256_shuffle_epi8(places, codes.run_of<run>()), fours);
    }

private:
    static __m256i pairs(char upper) {
        const __m128i low = _mm_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        return _mm256_inserti128_si256(in_both_lanes(low), _mm_add_epi8(low, _mm_set1_epi8(upper)), 1);
    }
};

template <Quant quant>
struct KValues;

template <>
struct KValues<Quant::q3_k> {
    KNibbles nibbles;
    explicit KValues(const uint8_t* group)
        : nibbles(load_256(group), in_both_lanes(load_128(group + k_parts(Quant::q3_k).high)),
                  _mm256_setzero_si256()) {}
    template <int run>
    __m256i run_of() const {
        return nibbles.run_of<run>();
    }
};

template <>
struct KValues<Quant::q6_k> {
    __m256i low[2], high;
    explicit KValues(const uint8_t* group)
        : low{load_256(group), load_256(group + 32)}, high(load_256(group + k_parts(Quant::q6_k).high)) {}
    template <int run>
    __m256i run_of() const {
        const __m256i bits = run % 2 ? _mm256_srli_epi16(low[run / 2], 4) : low[run / 2];
        constexpr int place = k_bits_of_run[run];
        const __m256i others = place < 4   ? _mm256_slli_epi16(high, place < 4 ? 4 - place : 0)
                               : place > 4 ? _mm256_srli_epi16(high, place > 4 ? place - 4 : 0)
                                           : high;
        return _mm256_or_si256(_mm256_and_si256(bits, bytes_of(15)), _mm256_and_si256(others, bytes_of(0x30)));
    }
};

template <Quant quant>
inline __m256i sub_scales(const uint8_t* scales) {
    __m128i bytes = load_128(scales);
    if (quant == Quant::q6_k) return _mm256_cvtepi8_epi16(bytes);

    const __m128i nibble = _mm_set1_epi8(15);
    const __m128i shifted = _mm_srli_epi16(bytes, 4);
    const __m128i low = _mm_and_si128(_mm_unpacklo_epi64(bytes, shifted), nibble);
    const __m128i four = _mm_srlv_epi32(_mm_shuffle_epi32(bytes, 0xaa), _mm_setr_epi32(0, 2, 4, 6));
    const __m128i high = _mm_slli_epi16(_mm_and_si128(four, _mm_set1_epi8(3)), 4);
    return _mm256_cvtepi8_epi16(_mm_sub_epi8(_mm_or_si128(low, high), _mm_set1_epi8(32)));
}

// The sums of the products with one token's inputs, of two runs that have the same eight sub-blocks: 32 bits each, or
// with no VNNI still in two halves of 16 bits. These may wrap around in between: a whole sum is at most 8 * 32 * 127.
template <Quant quant>
struct KSums {
    __m256i of_codes = _mm256_setzero_si256(), of_zeros = _mm256_setzero_si256();

    // Values are unsigned: what they have too much is the zero point times the picked inputs.
    inline void add(__m256i values, __m256i picked) {
        const __m256i zeros = bytes_of(k_zero_point(quant));
        if (vnni) {
            of_codes = add_quads(of_codes, values, picked);
            of_zeros = add_quads(of_zeros, zeros, picked);
        } else {
            of_codes = _mm256_add_epi16(of_codes, _mm256_maddubs_epi16(values, picked));
            of_zeros = _mm256_add_epi16(of_zeros, _mm256_maddubs_epi16(zeros, picked));
        }
    }
    inline __m256i whole() const {
        return vnni ? _mm256_sub_epi32(of_codes, of_zeros) : _mm256_sub_epi16(of_codes, of_zeros);
    }
};

// Those of all sub-blocks in order, 16 bits each.
inline __m256i join_sums(__m256i first, __m256i second) {
    return vnni ? _mm256_packs_epi32(first, second) : _mm256_hadd_epi16(first, second);
}

struct KRow {
    template <Quant quant, int tokens>
    [[gnu::always_inline]] static inline void multiply(const uint8_t* group, const KActivations& from, int64_t token,
                                                       float* output, int64_t stride) {
        constexpr KParts parts = k_parts(quant);
        const int64_t row_groups = groups(from.columns);
        const int8_t* inputs = from.codes + token * from.columns;
        __m256 totals[tokens];
        for (auto& total : totals) total = _mm256_setzero_ps();

        for (int64_t g = 0; g < row_groups; g++, group += parts.bytes, inputs += group_weights) {
            fetch_ahead(group, values_ahead);
            fetch_ahead(group + 64, values_ahead);
            if (quant == Quant::q6_k) fetch_ahead(group + 128, values_ahead);

            const KPicks picks(group + parts.places);
            const KValues<quant> values(group);
            const __m256i value_of[k_runs] = {values.template run_of<0>(), values.template run_of<1>(),
                                              values.template run_of<2>(), values.template run_of<3>()};
            const __m256i pick_of[k_runs] = {picks.run_of<0>(), picks.run_of<1>(), picks.run_of<2>(),
                                             picks.run_of<3>()};
            const __m256i scales = sub_scales<quant>(group + parts.scales);
            const float scale = _cvtsh_ss(load<uint16_t>(group + parts.scale));

#pragma GCC unroll 4
            for (int t = 0; t < tokens; t++) {
                const auto* of_token = reinterpret_cast<const uint8_t*>(inputs + t * from.columns);
                KSums<quant> sums[2];
#pragma GCC unroll 4
                for (int run = 0; run < k_runs; run++)
                    sums[run / 2].add(value_of[run], pick(of_token + run * k_run_weights, pick_of[run]));

                const __m256i products = _mm256_madd_epi16(join_sums(sums[0].whole(), sums[1].whole()), scales);
                const __m256 both = _mm256_set1_ps(scale * from.scales[(token + t) * row_groups + g]);
                totals[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), both, totals[t]);
            }
        }
        for (int t = 0; t < tokens; t++) output[t * stride] = sum_of(totals[t]);
    }
};

void multiply_k_quant(const SparseMatrix& matrix, int64_t tokens, const void* workspace, Outputs outputs, Rows rows) {
    multiply_k_matrix<KRow>(matrix, tokens, workspace, outputs, rows);
}

// ---- inputs ----

inline __m256i codes_of_8(const float* from, __m256 inverse) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from), inverse));
}

inline __m128i codes_of_16(const float* from, __m256 inverse) {
    const __m256i words = _mm256_packs_epi32(codes_of_8(from, inverse), codes_of_8(from + 8, inverse));
    const __m256i in_order = _mm256_permute4x64_epi64(words, 0xd8);
    return _mm_packs_epi16(_mm256_castsi256_si128(in_order), _mm256_extracti128_si256(in_order, 1));
}

void prepare_k_quant(int64_t columns, int64_t tokens, int64_t token, const float* activation, void* workspace) {
    const KActivations to(columns, tokens, workspace);
    for (int64_t g = 0; g < groups(columns); g++) {
        const float* from = activation + g * group_weights;
        __m256 sizes = _mm256_setzero_ps();
        for (int64_t i = 0; i < group_weights; i += 8)
            sizes = _mm256_max_ps(sizes, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_loadu_ps(from + i)));
        const KScale of_inputs(largest_of(sizes));
        to.scales[token * groups(columns) + g] = of_inputs.scale;

        int8_t* codes = to.codes + token * columns + g * group_weights;
        // Of two sub-blocks that follow each other, the first and the second 8 codes lie together.
        for (int64_t first = 0; first < group_weights; first += 32) {
            const __m128i one = codes_of_16(from + first, _mm256_set1_ps(of_inputs.inverse));
            const __m128i other = codes_of_16(from + first + 16, _mm256_set1_ps(of_inputs.inverse));
            auto* place = reinterpret_cast<__m128i*>(codes + k_input_place(first));
            _mm_storeu_si128(place, _mm_unpacklo_epi64(one, other));
            _mm_storeu_si128(place + k_run_weights / 16, _mm_unpackhi_epi64(one, other));
        }
    }
}

}  // namespace
}  // namespace racdeploy
