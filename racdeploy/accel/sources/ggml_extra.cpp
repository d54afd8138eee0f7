// The way into ggml that costs nothing: an extra buffer type of its CPU backend, as CPU_REPACK is one. MUL_MAT of
// packed weights runs inside ggml's own threads, without a split of the graph. It is private to ggml: see ggml_abi.h.
#include <new>

#include "ggml_plugin.h"

namespace racdeploy {
namespace {

class MatrixProduct final : public ggml::cpu::tensor_traits {
    bool work_size(int threads, const ggml_tensor* op, size_t& size) override {
        size = Product(op).bytes(threads);
        return true;
    }

    bool compute_forward(ggml_compute_params* params, ggml_tensor* op) override {
        const Product product(op);
        const int thread = params->ith, threads = params->nth;
        if (product.is_zero(thread)) return true;

        product.prepare(params->wdata, thread, threads);
        if (product.is_one_token()) {
            product.multiply(params->wdata, thread, product.share(thread, threads));
            return true;
        }

        if (thread == 0) ggml_threadpool_chunk_set(params->threadpool, threads);
        ggml_barrier(params->threadpool);
        for (Rows rows = product.chunk(thread, threads); product.has(rows);
             rows = product.chunk(ggml_threadpool_chunk_add(params->threadpool, 1), threads))
            product.multiply(params->wdata, thread, rows);
        return true;
    }
};

class SparseBufferType final : public ggml::cpu::extra_buffer_type {
    bool supports_op(ggml_backend_dev_t, const ggml_tensor* op) override { return takes(op); }

    ggml::cpu::tensor_traits* get_tensor_traits(const ggml_tensor* op) override {
        static MatrixProduct product;
        return op->op == GGML_OP_MUL_MAT && is_ours(op->src[0]) && op->src[0]->extra ? &product : nullptr;
    }
};

bool has(ggml_backend_buffer_type_t* list, ggml_backend_buffer_type_t type) {
    for (; list && *list; list++)
        if (*list == type) return true;
    return false;
}

ggml_backend_buffer_type_t register_type() {
    static SparseBufferType behaviour;
    static ggml_backend_buffer_type type{buffer_type_functions(), ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
                                         &behaviour};
    try {
        auto& types = ggml_backend_cpu_get_extra_buffer_types();
        types.insert(types.begin(), &type);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
    // The backend hands out a copy that it made when it was first asked: a model that was loaded before came first.
    return has(extra_buffer_types(), &type) ? &type : nullptr;
}

}  // namespace

ggml_backend_buffer_type_t sparse_buffer_type() {
    static const ggml_backend_buffer_type_t type = register_type();
    return type;
}

ggml_backend_t new_backend() { return ggml_backend_cpu_init(); }
void set_threads(ggml_backend_t backend, int threads) { ggml_backend_cpu_set_n_threads(backend, threads); }

}  // namespace racdeploy

EXPORT bool rac_ggml_is_device() { return false; }
