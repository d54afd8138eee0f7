// Compares sources/onnxruntime_abi.h with onnxruntime's own header; it is right if it compiles.
#include <onnxruntime_c_api.h>

#include <type_traits>

#include "onnxruntime_abi.h"

namespace ort = racdeploy::ort;

template <typename Member, typename Signature>
constexpr bool same_place(size_t offset, ort::Place<Signature> place) {
    return offset == place.index * sizeof(void (*)()) && std::is_convertible_v<Member, Signature*>;
}

#define PLACE(name, member) \
    static_assert(same_place<decltype(OrtApi::member)>(offsetof(OrtApi, member), ort::name), #member)

PLACE(create_custom_op_domain, CreateCustomOpDomain);
PLACE(add_custom_op_domain, AddCustomOpDomain);
PLACE(get_tensor_mutable_data, GetTensorMutableData);
PLACE(set_dimensions, SetDimensions);
PLACE(get_dimensions_count, GetDimensionsCount);
PLACE(get_dimensions, GetDimensions);
PLACE(get_symbolic_dimensions, GetSymbolicDimensions);
PLACE(get_tensor_shape_element_count, GetTensorShapeElementCount);
PLACE(get_tensor_type_and_shape, GetTensorTypeAndShape);
PLACE(get_attribute_int64, KernelInfoGetAttribute_int64);
PLACE(get_input, KernelContext_GetInput);
PLACE(get_output, KernelContext_GetOutput);
PLACE(release_status, ReleaseStatus);
PLACE(release_tensor_type_and_shape_info, ReleaseTensorTypeAndShapeInfo);
PLACE(get_constant_input, KernelInfoGetConstantInput_tensor);
PLACE(get_input_type_shape, ShapeInferContext_GetInputTypeShape);
PLACE(get_inferred_attribute, ShapeInferContext_GetAttribute);
PLACE(set_output_type_shape, ShapeInferContext_SetOutputTypeShape);
PLACE(parallel_for, KernelContext_ParallelFor);

// Their signatures name types of the header that ours does not declare.
static_assert(offsetof(OrtApi, CreateStatus) == ort::create_status.index * sizeof(void (*)()));
static_assert(offsetof(OrtApi, CustomOpDomain_Add) == ort::custom_op_domain_add.index * sizeof(void (*)()));
static_assert(offsetof(OrtApi, ReadOpAttr) == ort::read_op_attribute.index * sizeof(void (*)()));

static_assert(ort::invalid_argument == ORT_INVALID_ARGUMENT);
static_assert(ort::attribute_int == ORT_OP_ATTR_INT);
static_assert(ort::float32 == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
static_assert(ort::uint8 == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
static_assert(ort::int64 == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
static_assert(INPUT_OUTPUT_REQUIRED == 0 && OrtMemTypeDefault == 0);

static_assert(offsetof(OrtApiBase, GetApi) == offsetof(ort::ApiBase, get_api));
static_assert(offsetof(OrtApiBase, GetVersionString) == offsetof(ort::ApiBase, get_version_string));

#define MEMBER(name, member) static_assert(offsetof(OrtCustomOp, member) == offsetof(ort::CustomOp, name), #member)

MEMBER(version, version);
MEMBER(create_kernel, CreateKernel);
MEMBER(get_name, GetName);
MEMBER(get_execution_provider_type, GetExecutionProviderType);
MEMBER(get_input_type, GetInputType);
MEMBER(get_input_type_count, GetInputTypeCount);
MEMBER(get_output_type, GetOutputType);
MEMBER(get_output_type_count, GetOutputTypeCount);
MEMBER(kernel_compute, KernelCompute);
MEMBER(kernel_destroy, KernelDestroy);
MEMBER(get_input_characteristic, GetInputCharacteristic);
MEMBER(get_output_characteristic, GetOutputCharacteristic);
MEMBER(get_input_memory_type, GetInputMemoryType);
MEMBER(get_variadic_input_min_arity, GetVariadicInputMinArity);
MEMBER(get_variadic_input_homogeneity, GetVariadicInputHomogeneity);
MEMBER(get_variadic_output_min_arity, GetVariadicOutputMinArity);
MEMBER(get_variadic_output_homogeneity, GetVariadicOutputHomogeneity);
MEMBER(create_kernel_v2, CreateKernelV2);
MEMBER(kernel_compute_v2, KernelComputeV2);
MEMBER(infer_output_shape, InferOutputShapeFn);
MEMBER(get_start_version, GetStartVersion);
MEMBER(get_end_version, GetEndVersion);
