// Runs the AVX-VNNI kernels on a processor without AVX-VNNI: VPDPBUSD raises SIGILL there, and a handler computes it.
// Prints the largest difference from the portable kernels, over the largest output, and how often the handler ran.
#include <cpuid.h>
#include <ucontext.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <random>
#include <vector>

// The kernels are asked whether they run here, and they do.
#define __get_cpuid_count(leaf, subleaf, a, b, c, d) (*(a) = 1 << 4, *(b) = *(c) = *(d) = 0, true)
#include "avx_vnni.cpp"

#ifndef __AVXVNNI__
#error "compile with -mavxvnni"
#endif

namespace racdeploy {
void* scratch_of_thread(int64_t bytes) {
    static Memory<uint8_t> memory;
    memory.reset(static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(round_up(bytes, 64)))));
    return memory.get();
}
}  // namespace racdeploy

using namespace racdeploy;

namespace {

long emulated = 0;

// A thread's registers as the kernel saves them for a signal: FXSAVE, then the header and the upper halves of XSAVE.
struct Registers {
    ucontext_t* context;
    uint8_t* saved;

    explicit Registers(void* given)
        : context(static_cast<ucontext_t*>(given)), saved(reinterpret_cast<uint8_t*>(context->uc_mcontext.fpregs)) {
        uint64_t& present = *reinterpret_cast<uint64_t*>(saved + 512);
        if (!(present & 4)) std::memset(saved + 576, 0, 256);
        present |= 6;
    }
    uint8_t* lane(int number, int half) { return saved + (half ? 576 : 160) + 16 * number; }

    int64_t general(int number) const {
        static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                      REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
        return context->uc_mcontext.gregs[order[number]];
    }
};

// VEX.66.0F38.W0 50 /r: VPDPBUSD.
bool is_vpdpbusd(const uint8_t* code) {
    return code[0] == 0xc4 && (code[1] & 0x1f) == 2 && (code[2] & 0x83) == 1 && code[3] == 0x50;
}

// The memory operand's address; moves `code` from the ModRM byte to the end of the instruction.
const uint8_t* address_of(const Registers& registers, const uint8_t*& code, int x, int b) {
    const int mod = *code >> 6, rm = *code & 7;
    code++;
    int64_t address = 0;
    if (rm == 4) {
        const int scale = *code >> 6, index = (*code >> 3 & 7) | x, base = (*code & 7) | b;
        const bool no_base = (*code & 7) == 5 && mod == 0;
        code++;
        if (index != 4) address = registers.general(index) << scale;
        if (no_base) {
            address += load<int32_t>(code);
            code += 4;
        } else {
            address += registers.general(base);
        }
    } else if (mod == 0 && rm == 5) {  // from the end of the instruction on
        address = reinterpret_cast<int64_t>(code + 4) + load<int32_t>(code);
        code += 4;
    } else {
        address = registers.general(rm | b);
    }

    if (mod == 1) address += static_cast<int8_t>(*code++);
    if (mod == 2) {
        address += load<int32_t>(code);
        code += 4;
    }
    return reinterpret_cast<const uint8_t*>(address);
}

void emulate(int, siginfo_t*, void* given) {
    Registers registers(given);
    auto& instruction = registers.context->uc_mcontext.gregs[REG_RIP];
    const uint8_t* code = reinterpret_cast<const uint8_t*>(instruction);
    if (!is_vpdpbusd(code)) std::_Exit(3);

    const int r = code[1] & 0x80 ? 0 : 8, x = code[1] & 0x40 ? 0 : 8, b = code[1] & 0x20 ? 0 : 8;
    const int first = ~code[2] >> 3 & 15, halves = code[2] & 4 ? 2 : 1;
    code += 4;
    const int to = (*code >> 3 & 7) | r, second = (*code & 7) | b;
    const uint8_t* memory = nullptr;
    if (*code >> 6 == 3)
        code++;
    else
        memory = address_of(registers, code, x, b);

    for (int half = 0; half < 2; half++) {
        uint8_t* sums = registers.lane(to, half);
        const uint8_t* factors = memory ? memory + 16 * half : registers.lane(second, half);
        for (int i = 0; i < 4; i++) {
            int32_t sum = 0;
            for (int j = 4 * i; half < halves && j < 4 * i + 4; j++)
                sum += registers.lane(first, half)[j] * static_cast<int8_t>(factors[j]);
            const int32_t total = half < halves ? load<int32_t>(sums + 4 * i) + sum : 0;
            std::memcpy(sums + 4 * i, &total, 4);
        }
    }
    instruction = reinterpret_cast<greg_t>(code);
    emulated++;
}

struct Packed {
    std::vector<int64_t> offsets;
    std::vector<uint8_t> heads, values;
    SparseMatrix matrix;

    Packed(Quant quant, Pattern pattern, int64_t rows, int64_t columns, const std::vector<uint8_t>& blocks)
        : offsets(static_cast<size_t>(rows + 1)), heads(static_cast<size_t>(rows * heads_bytes(quant, columns))) {
        const Blocks given{quant, pattern, columns, blocks.data()};
        avx_vnni_kernels.count(given, &offsets[1], {0, rows});
        for (size_t row = 1; row < offsets.size(); row++) offsets[row] += offsets[row - 1];
        values.resize(static_cast<size_t>(offsets.back() + slack_bytes));
        avx_vnni_kernels.pack(given, offsets.data(), heads.data(), values.data(), {0, rows});
        matrix = {quant, pattern, rows, columns, heads.data(), values.data(), offsets.data()};
    }
};

std::vector<float> product(const Kernels& kernels, const SparseMatrix& matrix, int64_t tokens,
                           const std::vector<float>& inputs) {
    const int64_t bytes = round_up(QuantizedActivations::bytes(matrix.columns, tokens) + slack_bytes, 64);
    const Memory<uint8_t> workspace(static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(bytes))));
    for (int64_t t = 0; t < tokens; t++)
        kernels.prepare(matrix.quant, matrix.columns, tokens, t, inputs.data() + t * matrix.columns, workspace.get());
    std::vector<float> outputs(static_cast<size_t>(tokens * matrix.rows));
    kernels.multiply(matrix, tokens, workspace.get(), {outputs.data(), matrix.rows}, {0, matrix.rows});
    return outputs;
}

// Scales are 1, and two of every four bytes of codes are those of zeros.
std::vector<uint8_t> draw_blocks(Quant quant, int64_t rows, int64_t columns, std::mt19937& random) {
    std::vector<uint8_t> blocks(static_cast<size_t>(rows * row_bytes(quant, columns)));
    size_t first = 0, second = 0;
    for (size_t at = 0; at < blocks.size(); at++) {
        const size_t place = at % static_cast<size_t>(block_bytes(quant)), in_four = (place + 2) % 4;
        const uint8_t zero = quant == Quant::q8_0 ? 0 : 0x88;
        if (in_four == 0) first = random() % 4, second = (first + 1 + random() % 3) % 4;
        const bool is_zero = in_four == first || in_four == second;
        blocks[at] = place == 0 ? 0 : place == 1 ? 0x3c : is_zero ? zero : static_cast<uint8_t>(random());
    }
    return blocks;
}

double difference(const SparseMatrix& matrix, int64_t tokens, std::mt19937& random) {
    std::vector<float> inputs(static_cast<size_t>(tokens * matrix.columns));
    for (float& input : inputs) input = static_cast<float>(random() % 2001) / 1000 - 1;

    const auto expected = product(portable_kernels, matrix, tokens, inputs);
    const auto found = product(avx_vnni_kernels, matrix, tokens, inputs);
    double largest = 0, worst = 0;
    for (size_t i = 0; i < expected.size(); i++) {
        largest = std::max(largest, std::abs(double(expected[i])));
        worst = std::max(worst, std::abs(double(expected[i]) - found[i]));
    }
    return worst / largest;
}

double difference(Quant quant, Pattern pattern, int64_t tokens, std::mt19937& random) {
    const int64_t rows = 11, columns = 32 * 19;
    const Packed packed(quant, pattern, rows, columns, draw_blocks(quant, rows, columns, random));
    return difference(packed.matrix, tokens, random);
}

}  // namespace

int main() {
    struct sigaction action {};
    action.sa_sigaction = emulate;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
    if (!avx_vnni_kernels.runs_here()) return 2;

    std::mt19937 random(1);
    double worst = 0;
    for (Quant quant : {Quant::q8_0, Quant::q4_0})
        for (Pattern pattern : {Pattern::unstructured, Pattern::two_of_four})
            for (int64_t tokens : {1, 2, 7}) worst = std::max(worst, difference(quant, pattern, tokens, random));
    std::printf("%g %ld\n", worst, static_cast<long>(emulated));
}
