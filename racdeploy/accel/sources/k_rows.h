// Q3_K and Q6_K at 2:4 row by row, whatever the instruction set.
//
// A `Row` has multiply<quant, tokens>(packed row, inputs, first token, output, stride of the outputs).
#pragma once
#include "k_quants.h"

namespace racdeploy {
namespace {

template <typename Row, Quant quant>
void multiply_k_rows(const SparseMatrix& matrix, int64_t tokens, const KActivations& from, Outputs outputs, Rows rows) {
    const int64_t bytes = k_row_bytes(quant, matrix.pattern, matrix.columns);
    for (int64_t row = rows.begin; row < rows.end; row++) {
        const uint8_t* packed = matrix.values + row * bytes;
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4)
            Row::template multiply<quant, 4>(packed, from, t, outputs.at(t, row), outputs.stride);
        for (; t < tokens; t++) Row::template multiply<quant, 1>(packed, from, t, outputs.at(t, row), outputs.stride);
    }
}

template <typename Row>
void multiply_k_matrix(const SparseMatrix& matrix, int64_t tokens, const void* workspace, Outputs outputs, Rows rows) {
    if (matrix.pattern == Pattern::unstructured) return k_portable::multiply(matrix, tokens, workspace, outputs, rows);

    const KActivations from(matrix.columns, tokens, const_cast<void*>(workspace));
    const bool q3_k = matrix.quant == Quant::q3_k;
    const auto by_row = q3_k ? multiply_k_rows<Row, Quant::q3_k> : multiply_k_rows<Row, Quant::q6_k>;
    by_row(matrix, tokens, from, outputs, rows);
}

}  // namespace
}  // namespace racdeploy
