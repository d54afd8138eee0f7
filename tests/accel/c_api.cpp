// The kernels as C functions, for the tests.
#include "sparse_matrix.h"

using namespace racdeploy;

EXPORT int64_t rac_row_bytes(int quant, int64_t columns) { return row_bytes(Quant(quant), columns); }
EXPORT int64_t rac_heads_bytes(int quant, int64_t rows, int64_t columns) {
    return rows * groups(columns) * head_bytes(Quant(quant));
}
EXPORT int rac_wanted_pattern(int quant, int64_t rows, int64_t columns, const void* blocks) {
    return int(wanted_pattern(Quant(quant), rows, columns, blocks));
}
EXPORT void rac_count(int quant, int pattern, int64_t columns, const void* blocks, int64_t* counts, int64_t row_begin,
                      int64_t row_end) {
    count(Quant(quant), Pattern(pattern), columns, blocks, counts, row_begin, row_end);
}
EXPORT void rac_pack(int quant, int pattern, int64_t columns, const void* blocks, const int64_t* offsets,
                     uint8_t* heads, uint8_t* values, int64_t row_begin, int64_t row_end) {
    pack(Quant(quant), Pattern(pattern), columns, blocks, offsets, heads, values, row_begin, row_end);
}
EXPORT void rac_unpack(const SparseMatrix* matrix, void* blocks, int64_t row_begin, int64_t row_end) {
    unpack(*matrix, blocks, row_begin, row_end);
}
EXPORT int rac_valid(const SparseMatrix* matrix, int64_t values_bytes) { return valid(*matrix, values_bytes); }
EXPORT int64_t rac_workspace_bytes(int quant, int64_t columns, int64_t tokens) {
    return workspace_bytes(Quant(quant), columns, tokens);
}
EXPORT void rac_prepare(int quant, int64_t columns, int64_t tokens, int64_t token, const float* activation,
                        void* workspace) {
    prepare(Quant(quant), columns, tokens, token, activation, workspace);
}
EXPORT void rac_multiply(const SparseMatrix* matrix, int64_t tokens, const void* workspace, float* output,
                         int64_t output_stride, int64_t row_begin, int64_t row_end) {
    multiply(*matrix, tokens, workspace, output, output_stride, row_begin, row_end);
}
EXPORT int rac_use_instruction_set(const char* name) { return use_instruction_set(name); }
