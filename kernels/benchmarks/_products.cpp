// Times one token's products for products.py, ours beside ggml's own dot products, in processor time.
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"

using namespace racdeploy;

namespace {

using Dot = void (*)(int, float*, size_t, const void*, size_t, const void*, size_t, int);

double now_ns() {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return 1e9 * static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec);
}

// In huge pages, where the system has them, as the plug-in keeps its weights.
Memory<uint8_t> huge(int64_t bytes) {
    constexpr int64_t page = 2 << 20;
    Memory<uint8_t> memory(static_cast<uint8_t*>(std::aligned_alloc(page, round_up(bytes, page))));
    madvise(memory.get(), round_up(bytes, page), MADV_HUGEPAGE);
    return memory;
}

template <typename Work>
void keep_fastest(double& fastest, int passes, const Work& work) {
    const double start = now_ns();
    for (int pass = 0; pass < passes; pass++) work();
    fastest = std::min(fastest, (now_ns() - start) / passes);
}

}  // namespace

// Nanoseconds for 64 weights of a matrix of Q8_0 or Q4_0, the fastest of alternating runs; false where this processor
// lacks the instruction set. `input` is a token in ggml's Q8_0 blocks.
EXPORT bool rac_time(const char* instruction_set, int quant_number, int pattern_number, int64_t rows, int64_t columns,
                     const uint8_t* data, const float* activation, const void* input, Dot dot, int runs, int passes,
                     double* dense_ns, double* sparse_ns) {
    if (!use_instruction_set(instruction_set)) return false;
    const Quant quant = Quant(quant_number);
    const Pattern pattern = Pattern(pattern_number);
    const Blocks blocks{quant, pattern, columns, data};

    std::vector<int64_t> offsets(rows + 1);
    kernels().count(blocks, &offsets[1], {0, rows});
    for (int64_t r = 0; r < rows; r++) offsets[r + 1] += offsets[r];
    const Memory<uint8_t> heads = huge(rows * heads_bytes(quant, columns)), values = huge(offsets[rows] + slack_bytes);
    kernels().pack(blocks, offsets.data(), heads.get(), values.get(), {0, rows});
    const SparseMatrix matrix{quant, pattern, rows, columns, heads.get(), values.get(), offsets.data()};

    const Memory<void*> workspace(
        static_cast<void**>(std::aligned_alloc(64, round_up(workspace_bytes(quant, columns, 1), 64))));
    kernels().prepare(quant, columns, 1, 0, activation, workspace.get());

    std::vector<float> outputs(rows);
    *dense_ns = *sparse_ns = INFINITY;
    for (int run = 0; run < runs; run++) {
        keep_fastest(*dense_ns, passes, [&] {
            const int n = static_cast<int>(columns);
            for (int64_t r = 0; r < rows; r++) dot(n, &outputs[r], 0, blocks.row(r), 0, input, 0, 1);
        });
        keep_fastest(*sparse_ns, passes, [&] {
            kernels().multiply(matrix, 1, workspace.get(), {outputs.data(), rows}, {0, rows});
        });
    }
    *dense_ns /= static_cast<double>(rows * columns) / 64;
    *sparse_ns /= static_cast<double>(rows * columns) / 64;
    return true;
}
