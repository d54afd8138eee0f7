// The operator racdeploy.SparseMatMul for stock onnxruntime: Y[..., O] = X[..., I] times a sparse matrix.
//
//   inputs      X float32; heads uint8, values uint8, offsets int64 as in sparse_matrix.h, all three constant
//   attributes  I, O; quant, ggml's number of the format
//
// The version of its domain is that of the matrix's form: onnxruntime refuses a graph of an earlier one.
// The matrix is read where onnxruntime holds its initializers: of a file with external data that is the mapped file.
// It is checked when the kernel is made, so that a damaged file is an error of the session. Nothing throws.
#include <algorithm>
#include <climits>
#include <cstdint>
#include <new>
#include <thread>

#include "onnxruntime_abi.h"
#include "sparse_matrix.h"

namespace {

using namespace racdeploy;

constexpr int64_t most_tokens = 1024;      // of one pass: they share a workspace
constexpr int64_t most_columns = 1 << 24;  // beyond any model; keeps every product below 2^63
constexpr int64_t most_rows = 1 << 28;
constexpr int64_t parts_of_a_core = 8;         // few: at each one's beginning a thread waits for memory
constexpr int64_t least_part_weights = 32768;  // below that, handing a part to a thread costs more than it saves
constexpr size_t most_dimensions = 16;

struct Kernel {
    const OrtApi* api;
    SparseMatrix matrix;
};

#define RETURN_IF_FAILED(expression) \
    if (OrtStatus* failed = (expression)) return failed
#define CALL_OR_RETURN(...) RETURN_IF_FAILED(ort::call(api, __VA_ARGS__))

OrtStatus* refuse(const OrtApi* api, const char* message) {
    return ort::call(api, ort::create_status, ort::invalid_argument, message);
}

struct Shape {
    int64_t dimensions[most_dimensions];
    size_t count;
    int64_t elements;
};

OrtStatus* read_shape(const OrtApi* api, const OrtValue* value, Shape* shape) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    CALL_OR_RETURN(ort::get_tensor_type_and_shape, value, &info);

    size_t elements = 0;
    OrtStatus* failed = ort::call(api, ort::get_tensor_shape_element_count, info, &elements);
    if (!failed) failed = ort::call(api, ort::get_dimensions_count, info, &shape->count);
    if (!failed && shape->count > most_dimensions) failed = refuse(api, "SparseMatMul: X has too many dimensions");
    if (!failed) failed = ort::call(api, ort::get_dimensions, info, shape->dimensions, shape->count);
    ort::call(api, ort::release_tensor_type_and_shape_info, info);
    shape->elements = static_cast<int64_t>(elements);
    return failed;
}

template <typename Element>
OrtStatus* read_constant(const OrtApi* api, const OrtKernelInfo* info, size_t index, const Element** data,
                         int64_t* count) {
    int constant = 0;
    const OrtValue* value = nullptr;
    CALL_OR_RETURN(ort::get_constant_input, info, index, &constant, &value);
    if (!constant || !value) return refuse(api, "SparseMatMul: heads, values and offsets must be constant");

    Shape shape;
    RETURN_IF_FAILED(read_shape(api, value, &shape));
    void* raw = nullptr;
    CALL_OR_RETURN(ort::get_tensor_mutable_data, const_cast<OrtValue*>(value), &raw);

    if (reinterpret_cast<uintptr_t>(raw) % alignof(Element))
        return refuse(api, "SparseMatMul: offsets are not aligned");
    *data = static_cast<const Element*>(raw);
    *count = shape.elements;
    return nullptr;
}

OrtStatus* read_matrix(const OrtApi* api, const OrtKernelInfo* info, SparseMatrix* matrix) {
    int64_t quant = 0;
    CALL_OR_RETURN(ort::get_attribute_int64, info, "I", &matrix->columns);
    CALL_OR_RETURN(ort::get_attribute_int64, info, "O", &matrix->rows);
    CALL_OR_RETURN(ort::get_attribute_int64, info, "quant", &quant);

    matrix->quant = static_cast<Quant>(quant);
    matrix->pattern = Pattern::unstructured;
    if (!is_quantized(matrix->quant) && matrix->quant != Quant::f16)
        return refuse(api, "SparseMatMul: quant is none of Q8_0, Q4_0 and F16");

    const int64_t rows = matrix->rows, columns = matrix->columns;
    if (rows < 1 || rows > most_rows || columns < 32 || columns > most_columns || columns % 32)
        return refuse(api, "SparseMatMul: I must be a multiple of 32, and I and O in bounds");

    int64_t head_count = 0, value_count = 0, offset_count = 0;
    RETURN_IF_FAILED(read_constant(api, info, 1, &matrix->heads, &head_count));
    RETURN_IF_FAILED(read_constant(api, info, 2, &matrix->values, &value_count));
    RETURN_IF_FAILED(read_constant(api, info, 3, &matrix->offsets, &offset_count));
    if (head_count != rows * heads_bytes(matrix->quant, columns) || offset_count != rows + 1 ||
        value_count < slack_bytes || !valid(*matrix, value_count - slack_bytes))
        return refuse(api, "SparseMatMul: heads, values and offsets do not fit each other");
    return nullptr;
}

OrtStatus* create(const ort::CustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** out) {
    SparseMatrix matrix{};
    RETURN_IF_FAILED(read_matrix(api, info, &matrix));
    *out = new (std::nothrow) Kernel{api, matrix};
    return *out ? nullptr : refuse(api, "SparseMatMul: out of memory");
}

void destroy(void* kernel) { delete static_cast<Kernel*>(kernel); }

// Calls work(i) for every i below `count`, on onnxruntime's threads.
template <typename Work>
OrtStatus* share_out(const Kernel& kernel, OrtKernelContext* context, int64_t count, Work& work) {
    const auto run = [](void* data, size_t i) { (*static_cast<Work*>(data))(static_cast<int64_t>(i)); };
    return ort::call(kernel.api, ort::parallel_for, context, run, static_cast<size_t>(count), size_t{0}, &work);
}

int64_t rows_of_a_part(const SparseMatrix& matrix, int64_t tokens) {
    static const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
    const int64_t weights = matrix.rows * matrix.columns * tokens;
    const int64_t parts = std::clamp<int64_t>(weights / least_part_weights, 1, parts_of_a_core * cores);
    return round_up((matrix.rows + parts - 1) / parts, 8);
}

OrtStatus* run_pass(const Kernel& kernel, OrtKernelContext* context, const float* input_TI, float* output_TO,
                    int64_t tokens, void* workspace) {
    const SparseMatrix& matrix = kernel.matrix;
    auto prepare = [&](int64_t token) {
        const float* input_I = input_TI + token * matrix.columns;
        kernels().prepare(matrix.quant, matrix.columns, tokens, token, input_I, workspace);
    };
    if (tokens == 1)
        prepare(0);
    else
        RETURN_IF_FAILED(share_out(kernel, context, tokens, prepare));

    const int64_t rows = matrix.rows, part_rows = rows_of_a_part(matrix, tokens);
    auto multiply = [&](int64_t part) {
        const int64_t begin = part * part_rows, end = std::min(begin + part_rows, rows);
        kernels().multiply(matrix, tokens, workspace, {output_TO, rows}, {begin, end});
    };
    return share_out(kernel, context, (rows + part_rows - 1) / part_rows, multiply);
}

OrtStatus* compute(void* data, OrtKernelContext* context) {
    const Kernel& kernel = *static_cast<Kernel*>(data);
    const SparseMatrix& matrix = kernel.matrix;
    const OrtApi* api = kernel.api;
    const OrtValue* input = nullptr;
    Shape shape;
    CALL_OR_RETURN(ort::get_input, context, size_t{0}, &input);
    RETURN_IF_FAILED(read_shape(api, input, &shape));
    if (!shape.count || shape.dimensions[shape.count - 1] != matrix.columns)
        return refuse(api, "SparseMatMul: the last dimension of X is not I");
    shape.dimensions[shape.count - 1] = matrix.rows;

    OrtValue* output = nullptr;
    void *input_TI = nullptr, *output_TO = nullptr;
    CALL_OR_RETURN(ort::get_output, context, size_t{0}, shape.dimensions, shape.count, &output);
    CALL_OR_RETURN(ort::get_tensor_mutable_data, const_cast<OrtValue*>(input), &input_TI);
    CALL_OR_RETURN(ort::get_tensor_mutable_data, output, &output_TO);

    const int64_t all = shape.elements / matrix.columns;
    const int64_t together = all < most_tokens ? all : most_tokens;
    if (!all) return nullptr;
    const int64_t size_bytes = round_up(workspace_bytes(matrix.quant, matrix.columns, together), 64);

    const Memory<uint8_t> workspace(static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(size_bytes))));
    if (!workspace) return refuse(api, "SparseMatMul: out of memory");

    for (int64_t token = 0; token < all; token += together) {
        RETURN_IF_FAILED(run_pass(kernel, context, static_cast<const float*>(input_TI) + token * matrix.columns,
                                  static_cast<float*>(output_TO) + token * matrix.rows, std::min(all - token, together),
                                  workspace.get()));
    }
    return nullptr;
}

// The optimizer of a session wants to know shapes. Those that it knows in part are left open.
OrtStatus* infer_known_shape(const OrtApi* api, OrtShapeInferContext* context, OrtTensorTypeAndShapeInfo* info) {
    int64_t dimensions[most_dimensions], rows = 0;
    const char* names[most_dimensions] = {};
    size_t count = 0, read_bytes = 0;
    CALL_OR_RETURN(ort::get_dimensions_count, info, &count);
    if (!count || count > most_dimensions) return nullptr;
    CALL_OR_RETURN(ort::get_dimensions, info, dimensions, count);
    CALL_OR_RETURN(ort::get_symbolic_dimensions, info, names, count);
    for (size_t i = 0; i + 1 < count; ++i)
        if (dimensions[i] < 0 && (!names[i] || !*names[i])) return nullptr;
    if (names[count - 1] && *names[count - 1]) return nullptr;

    const OrtOpAttr* attribute = nullptr;
    CALL_OR_RETURN(ort::get_inferred_attribute, context, "O", &attribute);
    CALL_OR_RETURN(ort::read_op_attribute, attribute, ort::attribute_int, &rows, sizeof(rows), &read_bytes);
    dimensions[count - 1] = rows;
    CALL_OR_RETURN(ort::set_dimensions, info, dimensions, count);
    return ort::call(api, ort::set_output_type_shape, context, size_t{0}, info);
}

struct SparseMatMul : ort::CustomOp {
    explicit SparseMatMul(const OrtApi* api) : CustomOp{}, api(api) {
        version = ort::api_version;
        get_name = [](const CustomOp*) { return "SparseMatMul"; };
        get_execution_provider_type = [](const CustomOp*) { return "CPUExecutionProvider"; };
        get_input_type_count = [](const CustomOp*) { return size_t{4}; };
        get_input_type = [](const CustomOp*, size_t index) {
            return index == 0 ? ort::float32 : index == 3 ? ort::int64 : ort::uint8;
        };
        get_output_type_count = [](const CustomOp*) { return size_t{1}; };
        get_output_type = [](const CustomOp*, size_t) { return ort::float32; };

        get_input_characteristic = get_output_characteristic = [](const CustomOp*, size_t) { return 0; };  // required
        get_input_memory_type = [](const CustomOp*, size_t) { return 0; };                                 // of the CPU
        get_variadic_input_min_arity = get_variadic_output_min_arity = [](const CustomOp*) { return 1; };
        get_variadic_input_homogeneity = get_variadic_output_homogeneity = [](const CustomOp*) { return 0; };
        get_start_version = [](const CustomOp*) { return layout; };
        get_end_version = [](const CustomOp*) { return INT_MAX; };

        create_kernel_v2 = create;
        kernel_compute_v2 = compute;
        kernel_destroy = destroy;
        infer_output_shape = [](const CustomOp* op, OrtShapeInferContext* context) -> OrtStatus* {
            const OrtApi* api = static_cast<const SparseMatMul*>(op)->api;
            OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's own
            OrtStatus* failed = ort::call(api, ort::get_input_type_shape, context, size_t{0}, &info);
            if (!failed) return infer_known_shape(api, context, info);
            ort::call(api, ort::release_status, failed);  // a shape that is not known is no error
            return nullptr;
        };
    }
    const OrtApi* api;
};

}  // namespace

EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const ort::ApiBase* base) {
    const OrtApi* api = base->get_api(ort::api_version);
    if (!api) return nullptr;  // older than 1.17: the session then says that it lacks the operator

    static const SparseMatMul op(api);
    OrtCustomOpDomain* domain = nullptr;  // for good: sessions refer to it, and nothing tells when the last one ends
    CALL_OR_RETURN(ort::create_custom_op_domain, "racdeploy", &domain);
    CALL_OR_RETURN(ort::custom_op_domain_add, domain, &op);
    return ort::call(api, ort::add_custom_op_domain, options, domain);
}
