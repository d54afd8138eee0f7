// Packed weights in ggml's hands: their buffer and products (ggml_plugin.cpp), and the device that runs them
// (ggml_device.cpp).
#pragma once
#include "ggml_abi.h"
#include "sparse_matrix.h"

namespace racdeploy {

// The device gives the buffer type of packed weights.
ggml_backend_buffer_type_t sparse_buffer_type();
// A backend that multiplies weights of this type; nullptr where there is no memory.
ggml_backend_t new_backend();
void set_threads(ggml_backend_t, int threads);  // of such a backend, or of the CPU's

// And gets what that does.

ggml_backend_buffer_type_i buffer_type_functions();
bool is_ours(const ggml_tensor* weight);  // is it in a buffer of packed weights?
bool takes(const ggml_tensor* op);        // is it a product of a packed weight, or of one that will be?

// One product that is taken, shared among threads. Activations are prepared in memory of bytes(threads): one token by
// each thread for itself, several by all threads together, which then have to wait for each other.
class Product {
public:
    explicit Product(const ggml_tensor* op);

    bool is_one_token() const { return tokens_ == 1; }
    size_t bytes(int threads) const;

    // Is the weight all zeros, since nothing was ever written into it? Then so is the output, once thread 0 was here.
    bool is_zero(int thread) const;
    void prepare(void* memory, int thread, int threads) const;
    void multiply(void* memory, int thread, Rows rows) const;

    // Rows of one thread, and a part of them for whoever comes: which thread is slower is not known before. Either may
    // lie behind the last row.
    Rows share(int thread, int threads) const;
    Rows chunk(int64_t number, int threads) const;
    bool has(Rows rows) const { return rows.begin < rows_; }

private:
    uint8_t* activations(void* memory, int thread) const;

    const ggml_tensor* op_;
    int64_t tokens_, rows_;
    size_t bytes_ = 0;
};

}  // namespace racdeploy
