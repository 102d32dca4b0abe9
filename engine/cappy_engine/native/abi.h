// The few parts of ONNX Runtime's C ABI that custom operators need.
//
// Its header is in no package. The ABI is stable: functions are only appended to OrtApi, fields only to OrtCustomOp.
// All that is used here is in version 20 (ONNX Runtime 1.20), which `load_api` asks the runtime for.
#pragma once
#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtValue;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;
struct OrtApi;  // an array of pointers to functions

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

enum OrtElementType : int { ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT8 = 3, ORT_INT64 = 7, ORT_BFLOAT16 = 16 };
enum OrtErrorCode : int { ORT_FAIL = 1 };

struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  OrtElementType (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  OrtElementType (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);   // 0 required, 1 optional, 2 variadic
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);  // 0 the provider's own
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};
static_assert(sizeof(void*) == 8, "the places of the entries are those of 64-bit systems");
static_assert(sizeof(OrtCustomOp) == 208, "the runtime reads this struct by its layout");
static_assert(offsetof(OrtCustomOp, KernelComputeV2) == 144, "the runtime reads this struct by its layout");

namespace cappy {

constexpr uint32_t ORT_API_VERSION = 20;

// Functions of OrtApi, each at its place. A status that is not null is an error, and its receiver's to release.
struct Api {
  OrtStatus* (*CreateStatus)(OrtErrorCode, const char*);
  void (*ReleaseStatus)(OrtStatus*);
  OrtStatus* (*CreateCustomOpDomain)(const char*, OrtCustomOpDomain**);
  OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain*, const OrtCustomOp*);
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions*, OrtCustomOpDomain*);
  OrtStatus* (*GetTensorMutableData)(OrtValue*, void**);
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo*, size_t*);
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t);
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo**);
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*);
  OrtStatus* (*KernelInfoGetAttribute_float)(const OrtKernelInfo*, const char*, float*);
  OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo*, const char*, int64_t*);
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext*, size_t, const OrtValue**);
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**);
  OrtStatus* (*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo*, size_t, int*, const OrtValue**);
  OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*);
};

template <class Function>
bool take(const OrtApi* table, size_t place, Function*& function) {
  function = reinterpret_cast<Function* const*>(table)[place];
  return function != nullptr;
}

// Reads the functions of this runtime; false if it has none of this version.
inline bool load_api(const OrtApiBase* base, Api* api) {
  const OrtApi* table = base ? base->GetApi(ORT_API_VERSION) : nullptr;
  return table && take(table, 0, api->CreateStatus) && take(table, 93, api->ReleaseStatus) &&
         take(table, 26, api->CreateCustomOpDomain) && take(table, 27, api->CustomOpDomain_Add) &&
         take(table, 28, api->AddCustomOpDomain) && take(table, 51, api->GetTensorMutableData) &&
         take(table, 61, api->GetDimensionsCount) && take(table, 62, api->GetDimensions) &&
         take(table, 65, api->GetTensorTypeAndShape) && take(table, 99, api->ReleaseTensorTypeAndShapeInfo) &&
         take(table, 85, api->KernelInfoGetAttribute_float) && take(table, 86, api->KernelInfoGetAttribute_int64) &&
         take(table, 90, api->KernelContext_GetInput) && take(table, 91, api->KernelContext_GetOutput) &&
         take(table, 249, api->KernelInfoGetConstantInput_tensor) && take(table, 274, api->KernelContext_ParallelFor);
}

}  // namespace cappy
