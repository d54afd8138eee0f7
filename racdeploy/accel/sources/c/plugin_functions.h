// The C functions of ggml_plugin.cpp and ggml_trial.cpp, which describe them; Python calls the same.
#pragma once
#include <cstdint>

#include "file_maps.h"

extern "C" {

const char* rac_instruction_set();
int rac_ggml_layout();
bool rac_ggml_enable(const char* const* names, int64_t count, int threads);
bool rac_ggml_keep(int descriptor, int64_t bytes, const char* const* names, const racdeploy::Place* places,
                   int64_t count);
bool rac_ggml_maps_huge(int descriptor, int64_t bytes);
int64_t rac_ggml_pack(int quant, int64_t rows, int64_t columns, const void* blocks, void* memory, int64_t memory_bytes,
                      int* pattern);
int64_t rac_ggml_packed();
int64_t rac_ggml_stored_bytes(int quant, int64_t rows, int64_t columns, const void* blocks, int* pattern);
double rac_ggml_difference(int quant, int64_t rows, int64_t columns, int64_t tokens, double zeros, bool two_of_four,
                           int threads, uint64_t seed);
void rac_ggml_time(int quant, int64_t rows, int64_t columns, int64_t tokens, double zeros, bool two_of_four, int count,
                   const int* threads, int thread_counts, double* stock_ms, double* sparse_ms);

}  // extern "C"
