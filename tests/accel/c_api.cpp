// The kernels as C functions, for the tests.
#include "sparse_matrix.h"

using namespace racdeploy;

EXPORT int64_t rac_row_bytes(int quant, int64_t columns) { return row_bytes(Quant(quant), columns); }
EXPORT int64_t rac_heads_bytes(int quant, int64_t rows, int64_t columns) {
    return rows * heads_bytes(Quant(quant), columns);
}
EXPORT int rac_wanted_pattern(int quant, int64_t rows, int64_t columns, const void* blocks) {
    return kernels().prefers_two_of_four(Quant(quant), rows, columns, blocks);
}
EXPORT void rac_count(int quant, int pattern, int64_t columns, const void* blocks, int64_t* counts, int64_t row_begin,
                      int64_t row_end) {
    kernels().count({Quant(quant), Pattern(pattern), columns, blocks}, counts, {row_begin, row_end});
}
EXPORT void rac_pack(int quant, int pattern, int64_t columns, const void* blocks, const int64_t* offsets,
                     uint8_t* heads, uint8_t* values, int64_t row_begin, int64_t row_end) {
    kernels().pack({Quant(quant), Pattern(pattern), columns, blocks}, offsets, heads, values, {row_begin, row_end});
}
EXPORT void rac_unpack(const SparseMatrix* matrix, void* blocks, int64_t row_begin, int64_t row_end) {
    kernels().unpack(*matrix, blocks, {row_begin, row_end});
}
EXPORT int rac_valid(const SparseMatrix* matrix, int64_t values_bytes) { return valid(*matrix, values_bytes); }
EXPORT int64_t rac_workspace_bytes(int quant, int64_t columns, int64_t tokens) {
    return workspace_bytes(Quant(quant), columns, tokens);
}
EXPORT void rac_prepare(int quant, int64_t columns, int64_t tokens, int64_t token, const float* activation,
                        void* workspace) {
    kernels().prepare(Quant(quant), columns, tokens, token, activation, workspace);
}
EXPORT void rac_multiply(const SparseMatrix* matrix, int64_t tokens, const void* workspace, float* output,
                         int64_t output_stride, int64_t row_begin, int64_t row_end) {
    kernels().multiply(*matrix, tokens, workspace, {output, output_stride}, {row_begin, row_end});
}
EXPORT int rac_use_instruction_set(const char* name) { return use_instruction_set(name); }
