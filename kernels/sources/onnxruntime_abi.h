// The part of onnxruntime's C interface that the operator uses, declared again: the wheel comes without its header.
//
// OrtApi is a table of functions to which a release only appends, so a function keeps its place; OrtCustomOp is a table
// of ours that begins with the version it was written for, and onnxruntime reads no member that came later.
// tests/onnxruntime_header.cpp compares every place and signature with the header itself.
// Source: onnxruntime_c_api.h of onnxruntime 1.21.
#pragma once
#include <cstddef>
#include <cstdint>

struct OrtApi;
struct OrtCustomOpDomain;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtOpAttr;
struct OrtSessionOptions;
struct OrtShapeInferContext;
struct OrtStatus;
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;

namespace racdeploy::ort {

constexpr uint32_t api_version = 17;  // the first one with KernelContext_ParallelFor and inference of shapes

constexpr int invalid_argument = 2;  // OrtErrorCode

constexpr int attribute_int = 1;  // OrtOpAttrType

constexpr int float32 = 1, uint8 = 2, int64 = 7;  // ONNXTensorElementDataType

template <typename Signature>
struct Place {
    size_t index;  // of the function in OrtApi
};

constexpr Place<OrtStatus*(int code, const char* message)> create_status{0};
constexpr Place<OrtStatus*(const char* name, OrtCustomOpDomain** out)> create_custom_op_domain{26};
constexpr Place<OrtStatus*(OrtCustomOpDomain*, const void* custom_op)> custom_op_domain_add{27};
constexpr Place<OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)> add_custom_op_domain{28};
constexpr Place<OrtStatus*(OrtValue*, void** out)> get_tensor_mutable_data{51};
constexpr Place<OrtStatus*(OrtTensorTypeAndShapeInfo*, const int64_t*, size_t)> set_dimensions{59};
constexpr Place<OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t* out)> get_dimensions_count{61};
constexpr Place<OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)> get_dimensions{62};
constexpr Place<OrtStatus*(const OrtTensorTypeAndShapeInfo*, const char** names, size_t)> get_symbolic_dimensions{63};
constexpr Place<OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t* out)> get_tensor_shape_element_count{64};
constexpr Place<OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo** out)> get_tensor_type_and_shape{65};
constexpr Place<OrtStatus*(const OrtKernelInfo*, const char* name, int64_t* out)> get_attribute_int64{86};
constexpr Place<OrtStatus*(const OrtKernelContext*, size_t index, const OrtValue** out)> get_input{90};
constexpr Place<OrtStatus*(OrtKernelContext*, size_t index, const int64_t*, size_t, OrtValue** out)> get_output{91};
constexpr Place<void(OrtStatus*)> release_status{93};
constexpr Place<void(OrtTensorTypeAndShapeInfo*)> release_tensor_type_and_shape_info{99};
constexpr Place<OrtStatus*(const OrtKernelInfo*, size_t index, int* is_constant, const OrtValue** out)>
    get_constant_input{249};
constexpr Place<OrtStatus*(const OrtShapeInferContext*, size_t index, OrtTensorTypeAndShapeInfo** out)>
    get_input_type_shape{268};
constexpr Place<OrtStatus*(const OrtShapeInferContext*, const char* name, const OrtOpAttr** out)>
    get_inferred_attribute{269};
constexpr Place<OrtStatus*(const OrtShapeInferContext*, size_t index, const OrtTensorTypeAndShapeInfo*)>
    set_output_type_shape{270};
constexpr Place<OrtStatus*(const OrtOpAttr*, int type, void* data, size_t size_bytes, size_t* out)> read_op_attribute{
    272};
constexpr Place<OrtStatus*(const OrtKernelContext*, void (*)(void*, size_t), size_t total, size_t batches, void* data)>
    parallel_for{274};

template <typename Result, typename... Declared, typename... Given>
Result call(const OrtApi* api, Place<Result(Declared...)> place, Given... arguments) {
    auto functions = reinterpret_cast<void (*const*)()>(api);
    return reinterpret_cast<Result (*)(Declared...)>(functions[place.index])(arguments...);
}

struct ApiBase {
    const OrtApi* (*get_api)(uint32_t version);
    const char* (*get_version_string)();
};

struct CustomOp {
    uint32_t version;
    void* (*create_kernel)(const CustomOp*, const OrtApi*, const OrtKernelInfo*);
    const char* (*get_name)(const CustomOp*);
    const char* (*get_execution_provider_type)(const CustomOp*);
    int (*get_input_type)(const CustomOp*, size_t index);
    size_t (*get_input_type_count)(const CustomOp*);
    int (*get_output_type)(const CustomOp*, size_t index);
    size_t (*get_output_type_count)(const CustomOp*);
    void (*kernel_compute)(void* kernel, OrtKernelContext*);
    void (*kernel_destroy)(void* kernel);
    int (*get_input_characteristic)(const CustomOp*, size_t index);
    int (*get_output_characteristic)(const CustomOp*, size_t index);
    int (*get_input_memory_type)(const CustomOp*, size_t index);
    int (*get_variadic_input_min_arity)(const CustomOp*);
    int (*get_variadic_input_homogeneity)(const CustomOp*);
    int (*get_variadic_output_min_arity)(const CustomOp*);
    int (*get_variadic_output_homogeneity)(const CustomOp*);
    OrtStatus* (*create_kernel_v2)(const CustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
    OrtStatus* (*kernel_compute_v2)(void* kernel, OrtKernelContext*);
    OrtStatus* (*infer_output_shape)(const CustomOp*, OrtShapeInferContext*);
    int (*get_start_version)(const CustomOp*);
    int (*get_end_version)(const CustomOp*);
};

}  // namespace racdeploy::ort
