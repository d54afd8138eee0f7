// The kernels of AVX2, as the including file is compiled: without or with VNNI.
#pragma once
#include <cpuid.h>

#include "avx2_pack.h"
#include "avx2_multiply.h"

namespace racdeploy {
namespace {

void multiply(const SparseMatrix& matrix, int64_t tokens, const void* workspace, Outputs outputs, Rows rows) {
    const bool picks = matrix.pattern == Pattern::two_of_four, q4_0 = matrix.quant == Quant::q4_0;
    const auto multiply_two_of_four = q4_0 ? multiply_quantized<Quant::q4_0, Pattern::two_of_four>
                                           : multiply_quantized<Quant::q8_0, Pattern::two_of_four>;
    const auto multiply_unstructured = q4_0 ? multiply_quantized<Quant::q4_0, Pattern::unstructured>
                                            : multiply_quantized<Quant::q8_0, Pattern::unstructured>;
    const auto run = !is_quantized(matrix.quant) ? portable::multiply
                     : picks                     ? multiply_two_of_four
                                                 : multiply_unstructured;
    run(matrix, tokens, workspace, outputs, rows);
}

bool has_avx2() {
    unsigned a, b, features = 0, d;  // clang cannot be asked for F16C
    return __get_cpuid(1, &a, &b, &features, &d) && features >> 29 & 1 && __builtin_cpu_supports("avx2") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

}  // namespace
}  // namespace racdeploy
