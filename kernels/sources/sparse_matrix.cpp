// The public functions: checks that no kernel repeats, and the choice of the kernels.
#include "sparse_matrix.h"

#include <algorithm>
#include <cstdlib>

#include "kernels.h"

namespace racdeploy {
namespace {

// The best first.
const Kernels* const all_kernels[] = {&avx512_kernels,    &avx_vnni_kernels, &evex_vnni_kernels, &avx2_kernels,
                                      &neon_i8mm_kernels, &neon_kernels,     &portable_kernels};

const Kernels* find(const char* name) {
    for (const Kernels* kernels : all_kernels)
        if (!std::strcmp(kernels->name, name) && kernels->runs_here()) return kernels;
    return nullptr;
}

// Those that RACDEPLOY_KERNELS names, or the best; Python refuses a name that is not found.
const Kernels& best() {
    const char* wanted = std::getenv("RACDEPLOY_KERNELS");
    if (const Kernels* kernels = wanted ? find(wanted) : nullptr) return *kernels;
    for (const Kernels* kernels : all_kernels)
        if (kernels->runs_here()) return *kernels;
    return portable_kernels;
}

const Kernels* chosen = nullptr;

// Are at most 2 of every 4 weights not 0, and are whole groups stored? Where far fewer are not 0, a fixed stride would
// store too many zeros. A word has 8 codes of Q8_0, or 16 of Q4_0; those of one four are 8 bits from each other.
template <Quant quant>
bool fits_two_of_four(int64_t rows, int64_t columns, const void* blocks) {
    constexpr int bits = quant == Quant::q8_0 ? 8 : 4;
    constexpr uint64_t ones = bits == 8 ? 0x0101010101010101 : 0x1111111111111111, tops = ones << (bits - 1);
    constexpr uint64_t firsts = ones & 0x000000ff000000ff;  // where the sum over a four is
    if (columns % group_weights) return false;

    int64_t all = 0;
    const uint8_t* block = static_cast<const uint8_t*>(blocks);
    const uint8_t* end = block + rows * row_bytes(quant, columns);
    for (; block < end; block += block_bytes(quant)) {
        uint64_t sums = 0, too_many = 0;
        for (int word = 0; word < bits / 2; word++) {
            const uint64_t codes = load<uint64_t>(block + 2 + 8 * word) ^ (bits == 8 ? 0 : tops);
            const uint64_t stored = (((codes & ~tops) + ~tops) | codes) >> (bits - 1) & ones;
            const uint64_t pairs = stored + (stored >> 8), fours = (pairs + (pairs >> 16)) & 7 * firsts;
            sums += fours;
            too_many |= (fours + firsts) & 4 * firsts;
        }
        if (too_many) return false;
        sums += sums >> 32;
        all += static_cast<int64_t>(bits == 8 ? sums & 0xff : (sums & 15) + (sums >> 4 & 15));
    }
    return 5 * all >= 2 * rows * columns;
}

// The 64 mask bits from a place of a row on.
uint64_t mask_bits(const SparseMatrix& matrix, int64_t row, int64_t place) {
    const uint8_t* head = matrix.head(row) + place / group_weights * head_bytes(matrix.quant);
    return load<uint64_t>(mask_of(matrix.quant, head) + place % group_weights / 8);
}

// How many of these 64 mask bits are of weights of the row: the first ones.
int64_t bits_inside(const SparseMatrix& matrix, int64_t place) {
    if (!is_quantized(matrix.quant)) return matrix.columns - place;
    return (matrix.columns - place / group_weights * group_weights) / block_weights * 8;
}

// Of every two values of one four the second is behind the first; beyond the row they are the first two.
bool ascending_places(const SparseMatrix& matrix, int64_t row) {
    for (int64_t group = 0; group < groups(matrix.columns); group++) {
        const uint8_t* bits = mask_of(matrix.quant, matrix.head(row) + group * head_bytes(matrix.quant));
        for (int64_t value = 0; value < group_weights / 2; value += 2) {
            const PlaceBits first_bits(value), second_bits(value + 1);
            const int first = bits[first_bits.byte] >> first_bits.shift & 3;
            const int second = bits[second_bits.byte] >> second_bits.shift & 3;
            const bool inside = column_in_chunks(group * group_weights + value * 2) < matrix.columns;
            if (inside ? first >= second : first != 0 || second != 1) return false;
        }
    }
    return true;
}

bool valid_row(const SparseMatrix& matrix, int64_t row) {
    if (matrix.offsets[row] < 0 || matrix.offsets[row + 1] < matrix.offsets[row]) return false;

    if (matrix.pattern == Pattern::two_of_four) {
        const int64_t bytes = groups(matrix.columns) * group_values_bytes(matrix.quant);
        return bytes == matrix.offsets[row + 1] - matrix.offsets[row] && ascending_places(matrix, row);
    }

    int64_t stored[2] = {0, 0};  // in the first and the second half of each group
    for (int64_t place = 0; place < padded(matrix.columns); place += 64) {
        const uint64_t bits = mask_bits(matrix, row, place);
        const int64_t inside = bits_inside(matrix, place);
        if (inside < 64 && bits >> (inside > 0 ? inside : 0)) return false;
        stored[place / 128 % 2] += __builtin_popcountll(bits);
    }

    const int64_t bytes = values_bytes(matrix.quant, stored[0], stored[1]);
    return bytes == matrix.offsets[row + 1] - matrix.offsets[row];
}

}  // namespace

void* scratch_of_thread(int64_t bytes) {
    static thread_local Memory<uint8_t> memory;
    static thread_local int64_t size = 0;
    if (bytes <= size) return memory.get();

    memory.reset();  // first: both at once would be twice as much
    memory.reset(static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(round_up(bytes, 64)))));
    size = memory ? bytes : 0;
    return memory.get();
}

const Kernels& kernels() {
    static const Kernels& here = best();
    return chosen ? *chosen : here;
}

Pattern Kernels::preferred_pattern(Quant quant, int64_t rows, int64_t columns, const void* blocks) const {
    if (!prefers_two_of_four || !is_quantized(quant)) return Pattern::unstructured;
    const bool fits = quant == Quant::q8_0 ? fits_two_of_four<Quant::q8_0>(rows, columns, blocks)
                                           : fits_two_of_four<Quant::q4_0>(rows, columns, blocks);
    return fits ? Pattern::two_of_four : Pattern::unstructured;
}

bool valid(const SparseMatrix& matrix, int64_t values_bytes) {
    if (matrix.rows < 0 || matrix.columns <= 0 || matrix.columns % block_weights) return false;
    if (!can_have(matrix.quant, matrix.pattern)) return false;
    if (matrix.offsets[0] != 0 || matrix.offsets[matrix.rows] != values_bytes) return false;
    for (int64_t r = 0; r < matrix.rows; r++)
        if (!valid_row(matrix, r)) return false;
    return true;
}

int64_t workspace_bytes(Quant quant, int64_t columns, int64_t tokens) {
    if (is_quantized(quant)) return QuantizedActivations::bytes(columns, tokens) + slack_bytes;
    return tokens * padded(columns) * input_bytes(quant) + slack_bytes;
}

bool use_instruction_set(const char* name) {
    chosen = find(name);
    return chosen || !*name;
}

}  // namespace racdeploy

EXPORT const char* rac_instruction_set() { return racdeploy::kernels().name; }
