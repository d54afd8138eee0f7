// What a plug-in of ggml's CPU backend needs and ggml's public headers do not give, declared again.
//
// ggml promises none of it, so the plug-in is built and used with releases only whose declarations were compared with
// these: see ggml_releases.toml, and tests/support/ggml_releases.py, which reads this file.
// Source: ggml/src/ggml-backend-impl.h, ggml-cpu/traits.h and ggml-cpu/ggml-cpu-impl.h of 0.25.3.
#pragma once
#include <vector>

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

extern "C" {

struct ggml_backend_buffer_type_i {
    const char* (*get_name)(ggml_backend_buffer_type_t);
    ggml_backend_buffer_t (*alloc_buffer)(ggml_backend_buffer_type_t, size_t size);
    size_t (*get_alignment)(ggml_backend_buffer_type_t);
    size_t (*get_max_size)(ggml_backend_buffer_type_t);
    size_t (*get_alloc_size)(ggml_backend_buffer_type_t, const ggml_tensor*);
    bool (*is_host)(ggml_backend_buffer_type_t);
};

struct ggml_backend_buffer_type {
    ggml_backend_buffer_type_i iface;
    ggml_backend_dev_t device;
    void* context;
};

struct ggml_backend_buffer_i {
    void (*free_buffer)(ggml_backend_buffer_t);
    void* (*get_base)(ggml_backend_buffer_t);
    ggml_status (*init_tensor)(ggml_backend_buffer_t, ggml_tensor*);
    void (*memset_tensor)(ggml_backend_buffer_t, ggml_tensor*, uint8_t value, size_t offset, size_t size);
    void (*set_tensor)(ggml_backend_buffer_t, ggml_tensor*, const void* data, size_t offset, size_t size);
    void (*get_tensor)(ggml_backend_buffer_t, const ggml_tensor*, void* data, size_t offset, size_t size);
    void (*set_tensor_2d)(ggml_backend_buffer_t, ggml_tensor*, const void*, size_t, size_t, size_t, size_t, size_t);
    void (*get_tensor_2d)(ggml_backend_buffer_t, const ggml_tensor*, void*, size_t, size_t, size_t, size_t, size_t);
    bool (*cpy_tensor)(ggml_backend_buffer_t, const ggml_tensor* source, ggml_tensor* target);
    void (*clear)(ggml_backend_buffer_t, uint8_t value);
    void (*reset)(ggml_backend_buffer_t);
};

struct ggml_backend_buffer {
    ggml_backend_buffer_i iface;
    ggml_backend_buffer_type_t buft;
    void* context;
    size_t size;
    ggml_backend_buffer_usage usage;
};

ggml_backend_buffer_t ggml_backend_buffer_init(ggml_backend_buffer_type_t, ggml_backend_buffer_i, void* context,
                                               size_t size);

struct ggml_compute_params {
    int ith, nth;  // this thread, of so many
    size_t wsize;
    void* wdata;  // of all threads
    ggml_threadpool* threadpool;
    bool use_ref;
};

void ggml_barrier(ggml_threadpool*);
void ggml_threadpool_chunk_set(ggml_threadpool*, int value);
int ggml_threadpool_chunk_add(ggml_threadpool*, int value);  // returns the value before

}  // extern "C"

namespace ggml::cpu {

class tensor_traits {
public:
    virtual ~tensor_traits();
    virtual bool work_size(int threads, const ggml_tensor* op, size_t& size) = 0;
    virtual bool compute_forward(ggml_compute_params*, ggml_tensor* op) = 0;
};

class extra_buffer_type {
public:
    virtual ~extra_buffer_type();
    virtual bool supports_op(ggml_backend_dev_t, const ggml_tensor* op) = 0;
    virtual tensor_traits* get_tensor_traits(const ggml_tensor* op) = 0;
};

}  // namespace ggml::cpu

std::vector<ggml_backend_buffer_type_t>& ggml_backend_cpu_get_extra_buffer_types();
