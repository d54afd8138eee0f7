// Drives the plug-in in a process of its own: packing, partial writes, reading back and products, of each number format.
// Prints the largest difference from ggml's own products; the exit code says which check failed.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

extern "C" bool rac_ggml_enable(const char* const*, int64_t, int);
extern "C" double rac_ggml_difference(int, int64_t, int64_t, int64_t, double, bool, int, uint64_t);

int main() {
    if (!rac_ggml_enable(nullptr, 0, 3)) return 2;

    double worst = 0;
    uint64_t seed = 0;
    for (int quant : {8, 2, 1, 30})
        for (int64_t rows : {1, 17, 200})
            for (int64_t columns : {32, 256, 1184})
                for (int64_t tokens : {1, 3, 20}) {
                    const bool two_of_four = columns == 256;
                    const double found = rac_ggml_difference(quant, rows, columns, tokens, 0.5, two_of_four, 2, ++seed);
                    if (!(found >= 0)) return 3;
                    if (rows * tokens > 100 && found > worst) worst = found;
                }
    std::printf("%g", worst);
}
