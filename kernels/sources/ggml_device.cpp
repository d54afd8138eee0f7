// The way into ggml: a device of type ACCEL, which ggml_backend_load takes from a library of its own. llama.cpp
// asks its buffer type before any other, and cuts its graph before and after each product that the device takes.
//
// A product runs as an operation of our own (GGML_OP_CUSTOM) on a CPU backend: on the threads that ggml has already,
// which would else wait busily for ours. Activations and outputs are in the CPU's memory, so that nothing is copied.
#include <atomic>
#include <cstring>
#include <new>

#include "ggml-cpp.h"
#include "ggml_plugin.h"

namespace racdeploy {
namespace {

constexpr const char* device_name = "SPARSE";

struct Task {
    Product product;
    void* memory;  // for activations, of all threads
    std::atomic<int64_t> chunks;
};

void prepare(ggml_tensor*, int thread, int threads, void* context) {
    const Task& task = *static_cast<Task*>(context);
    if (!task.product.is_zero(thread)) task.product.prepare(task.memory, thread, threads);
}

void multiply(ggml_tensor*, int thread, int threads, void* context) {
    Task& task = *static_cast<Task*>(context);
    const Product& product = task.product;
    if (product.is_zero(thread)) return;

    if (product.is_one_token()) {
        product.prepare(task.memory, thread, threads);
        product.multiply(task.memory, thread, product.share(thread, threads));
        return;
    }
    for (Rows rows = product.chunk(task.chunks++, threads); product.has(rows);
         rows = product.chunk(task.chunks++, threads))
        product.multiply(task.memory, thread, rows);
}

// Runs products on a CPU backend of its own.
class Runner {
public:
    Runner() : cpu_(ggml_backend_cpu_init()), graph_(static_cast<uint8_t*>(std::malloc(graph_bytes()))) {}

    bool works() const { return cpu_ && graph_; }

    void use_threads(int threads) {
        threads_ = threads;
        ggml_backend_cpu_set_n_threads(cpu_.get(), threads);
    }

    ggml_status run(ggml_cgraph* graph) {
        for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
            const ggml_tensor* node = ggml_graph_node(graph, i);
            if (node->op != GGML_OP_MUL_MAT) continue;  // a view of an output: nothing to compute
            const ggml_status status = run_product(Product(node));
            if (status != GGML_STATUS_SUCCESS) return status;
        }
        return GGML_STATUS_SUCCESS;
    }

private:
    static constexpr size_t operations = 2;
    static size_t graph_bytes() {
        return operations * ggml_tensor_overhead() + ggml_graph_overhead_custom(operations, false);
    }

    // In a graph of its own: a model's products rarely follow each other, and a trial measures what each one takes.
    ggml_status run_product(const Product& product) {
        if (!reserve(product.bytes(threads_))) return GGML_STATUS_ALLOC_FAILED;
        const ggml_context_ptr context(ggml_init({graph_bytes(), graph_.get(), true}));
        if (!context) return GGML_STATUS_ALLOC_FAILED;

        Task task{product, activations_.get(), {0}};
        ggml_cgraph* graph = ggml_new_graph_custom(context.get(), operations, false);
        const auto add = [&](ggml_custom_op_t function) {
            ggml_tensor* operation = ggml_custom_4d(context.get(), GGML_TYPE_F32, 1, 1, 1, 1, nullptr, 0, function,
                                                    GGML_N_TASKS_MAX, &task);
            ggml_build_forward_expand(graph, operation);
        };
        if (!product.is_one_token()) add(prepare);  // threads meet after each operation
        add(multiply);
        return ggml_backend_graph_compute(cpu_.get(), graph);
    }

    bool reserve(size_t bytes) {
        if (bytes <= activation_bytes_) return true;
        activations_.reset();  // first: both at once would be twice as much
        activations_.reset(static_cast<uint8_t*>(std::malloc(bytes)));
        activation_bytes_ = activations_ ? bytes : 0;
        return activations_ != nullptr;
    }

    ggml_backend_ptr cpu_;
    Memory<uint8_t> graph_, activations_;
    size_t activation_bytes_ = 0;
    int threads_ = GGML_DEFAULT_N_THREADS;
};

Runner& runner_of(ggml_backend_t backend) { return *static_cast<Runner*>(backend->context); }

const char* backend_name(ggml_backend_t) { return device_name; }
ggml_status compute(ggml_backend_t backend, ggml_cgraph* graph) { return runner_of(backend).run(graph); }
void use_threads(ggml_backend_t backend, int threads) { runner_of(backend).use_threads(threads); }
void free_backend(ggml_backend_t backend) {
    delete &runner_of(backend);
    delete backend;
}

// ggml asks a device for one buffer type, and puts there a model's weights as well as what its backend computes. Ours
// packs what it gets, so there are two devices: the one that is registered has the packed weights' type, and the one
// that backends say they are of has the CPU's.
ggml_backend_device* device_of_weights();
ggml_backend_device* device_of_backends();

ggml_backend_t make_backend(ggml_backend_dev_t, const char*) {
    static uint8_t guid[16] = {'r', 'a', 'c', 'd', 'e', 'p', 'l', 'o', 'y', ' ', 's', 'p', 'a', 'r', 's', 'e'};
    auto* runner = new (std::nothrow) Runner;
    auto* backend = new (std::nothrow) ggml_backend{&guid, {}, device_of_backends(), runner};
    if (!backend || !runner || !runner->works()) {
        delete runner;
        delete backend;
        return nullptr;
    }

    backend->iface.get_name = backend_name;
    backend->iface.free = free_backend;
    backend->iface.graph_compute = compute;
    return backend;
}

const char* name_of(ggml_backend_dev_t) { return device_name; }
const char* description_of(ggml_backend_dev_t) { return "products of sparse weights on the CPU"; }
enum ggml_backend_dev_type type_of(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; }
ggml_backend_buffer_type_t weights_type(ggml_backend_dev_t) { return sparse_buffer_type(); }
ggml_backend_buffer_type_t outputs_type(ggml_backend_dev_t) { return ggml_backend_cpu_buffer_type(); }

void memory_of(ggml_backend_dev_t, size_t* free, size_t* total) { *free = *total = 0; }  // the CPU's, which it says

void properties_of(ggml_backend_dev_t device, ggml_backend_dev_props* properties) {
    *properties = {};
    properties->name = name_of(device);
    properties->description = description_of(device);
    properties->type = type_of(device);
}

bool supports_op(ggml_backend_dev_t, const ggml_tensor* op) {
    return op->op == GGML_OP_NONE ? is_ours(op) : takes(op);  // ggml asks for the weight itself, too
}

bool supports_type(ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
    return type == sparse_buffer_type() || ggml_backend_buft_is_host(type);
}

const char* registry_name(ggml_backend_reg_t) { return device_name; }
size_t count_devices(ggml_backend_reg_t) { return 1; }
ggml_backend_dev_t get_device(ggml_backend_reg_t, size_t) { return device_of_weights(); }
void* find_function(ggml_backend_reg_t, const char* name) {
    return std::strcmp(name, "ggml_backend_set_n_threads") ? nullptr : reinterpret_cast<void*>(use_threads);
}

ggml_backend_reg registry{GGML_BACKEND_API_VERSION, {registry_name, count_devices, get_device, find_function}, nullptr};

ggml_backend_device make_device(ggml_backend_buffer_type_t (*buffer_type)(ggml_backend_dev_t)) {
    ggml_backend_device device{{}, &registry, nullptr};
    device.iface.get_name = name_of;
    device.iface.get_description = description_of;
    device.iface.get_memory = memory_of;
    device.iface.get_type = type_of;
    device.iface.get_props = properties_of;
    device.iface.init_backend = make_backend;
    device.iface.get_buffer_type = buffer_type;
    device.iface.supports_op = supports_op;
    device.iface.supports_buft = supports_type;
    return device;
}

ggml_backend_device* device_of_weights() {
    static ggml_backend_device device = make_device(weights_type);
    return &device;
}

ggml_backend_device* device_of_backends() {
    static ggml_backend_device device = make_device(outputs_type);
    return &device;
}

}  // namespace

ggml_backend_buffer_type_t sparse_buffer_type() {
    static ggml_backend_buffer_type type{buffer_type_functions(), device_of_weights(), nullptr};
    return &type;
}

ggml_backend_t new_backend() { return make_backend(device_of_weights(), nullptr); }

void set_threads(ggml_backend_t backend, int threads) {
    if (ggml_backend_is_cpu(backend)) {
        ggml_backend_cpu_set_n_threads(backend, threads);
    } else {
        use_threads(backend, threads);
    }
}

}  // namespace racdeploy

EXPORT ggml_backend_reg_t ggml_backend_init() { return &racdeploy::registry; }
