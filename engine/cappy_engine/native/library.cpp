// What the library shows to others: RegisterCustomOps for ONNX Runtime, and plain functions for tests (ctypes).
#include <pthread.h>

#include <atomic>
#include <cstring>

#include "attention.h"
#include "gate.h"
#include "kernels.h"
#include "linear.h"
#include "operators.h"
#include "quantize.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace cappy {
namespace {

// All operators of the domain, in version 1 of it.
const Operator* const OPERATORS[] = {&QUANTIZE_ROTATED_ROWS, &QUANTIZE_NORMED_ROWS, &QUANTIZE_GATED_ROWS, &GE_GLU,
                                     &LINEAR, &LINEAR_ADD, &LINEAR_GELU, &LINEAR_NORM,
                                     &BF16_LINEAR, &BF16_LINEAR_ADD, &BF16_LINEAR_GELU, &BF16_LINEAR_NORM,
                                     &ATTENTION, &FIRST_ATTENTION, &DISENTANGLED_ATTENTION, &FIRST_DISENTANGLED_ATTENTION,
                                     &ROTARY_ATTENTION, &FIRST_ROTARY_ATTENTION, &LOCAL_ROTARY_ATTENTION};
constexpr size_t OPERATOR_COUNT = sizeof OPERATORS / sizeof *OPERATORS;

Api api;  // read once, when the runtime first registers the library

struct CustomOp : OrtCustomOp {
  const Operator* described;
};
const Operator& described(const OrtCustomOp* op) { return *static_cast<const CustomOp*>(op)->described; }

OrtStatus* status(const Error& found) { return found ? api.CreateStatus(ORT_FAIL, found.text) : nullptr; }

OrtStatus* create(const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** made) {
  Node node(api, info);
  Kernel* kernel = nullptr;
  Error found = described(op).create(node, &kernel);
  if (found) {
    delete kernel;
    return status(error("cappy.%s: %.200s", described(op).name, found.text));
  }
  kernel->threads = chosen_threads();
  *made = kernel;
  return nullptr;
}

CustomOp custom_op(const Operator& op) {
  CustomOp made = {};
  made.described = &op;
  made.version = ORT_API_VERSION;
  made.GetName = [](const OrtCustomOp* op) { return described(op).name; };
  made.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return "CPUExecutionProvider"; };
  made.GetInputType = [](const OrtCustomOp* op, size_t place) { return described(op).inputs[place]; };
  made.GetInputTypeCount = [](const OrtCustomOp* op) { return described(op).input_count; };
  made.GetOutputType = [](const OrtCustomOp* op, size_t place) { return described(op).outputs[place]; };
  made.GetOutputTypeCount = [](const OrtCustomOp* op) { return described(op).output_count; };
  made.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  made.GetInputCharacteristic = made.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return 0; };
  made.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  made.GetVariadicInputMinArity = made.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  made.GetVariadicInputHomogeneity = made.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  made.CreateKernelV2 = create;
  made.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return status(static_cast<Kernel*>(kernel)->compute(Call(api, context, static_cast<Kernel*>(kernel)->threads)));
  };
  made.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  made.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  return made;
}

std::atomic<int> registrations{0};

// The first status that is an error, as an Error; statuses are released.
Error translated(std::initializer_list<OrtStatus*> statuses, const char* what) {
  Error found;
  for (OrtStatus* each : statuses)
    if (each) {
      if (!found) found = error("ONNX Runtime refused %s", what);
      api.ReleaseStatus(each);
    }
  return found;
}

// Made once, and kept as long as the process: sessions hold on to it.
struct Domain {
  CustomOp ops[OPERATOR_COUNT] = {};
  OrtCustomOpDomain* domain = nullptr;
  Error failed;

  void make() {
    failed = translated({api.CreateCustomOpDomain("cappy", &domain)}, "the domain cappy");
    for (size_t i = 0; i < OPERATOR_COUNT && !failed; i++) {
      ops[i] = custom_op(*OPERATORS[i]);
      failed = translated({api.CustomOpDomain_Add(domain, &ops[i])}, OPERATORS[i]->name);
    }
  }
};

// The error for a runtime without all functions. The function that makes errors is the first in every version of the API.
// A runtime without version 1 gets null, which means success: the caller finds that `registrations` did not grow.
OrtStatus* too_old(const OrtApiBase* base) {
  const OrtApi* oldest = base ? base->GetApi(1) : nullptr;
  OrtStatus* (*create_status)(OrtErrorCode, const char*) = nullptr;
  if (!oldest || !take(oldest, 0, create_status)) return nullptr;
  return create_status(ORT_FAIL, error("they need version %u of its API, which ONNX Runtime %s has not", ORT_API_VERSION,
                                       base->GetVersionString()).text);
}

Error read_tensor(const Api& api, const OrtValue* value, Tensor* tensor) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (!value) return error("an input is missing");
  if (Error found = translated({api.GetTensorTypeAndShape(value, &info)}, "to tell a tensor's shape")) return found;
  Error found = translated({api.GetDimensionsCount(info, &tensor->rank)}, "to tell a tensor's rank");
  if (!found && tensor->rank > 4) found = error("a tensor has rank %zu, and 4 is the most", tensor->rank);
  if (!found) found = translated({api.GetDimensions(info, tensor->shape, tensor->rank)}, "to tell a tensor's shape");
  if (!found) found = translated({api.GetTensorMutableData(const_cast<OrtValue*>(value), &tensor->data)}, "a tensor's data");
  api.ReleaseTensorTypeAndShapeInfo(info);
  return found;
}

}  // namespace

bool Tensor::is(const int64_t* wanted, size_t wanted_rank) const {
  return rank == wanted_rank && memcmp(shape, wanted, rank * sizeof *shape) == 0;
}

size_t Tensor::rows() const {
  size_t found = 1;
  for (size_t i = 0; i + 1 < rank; i++) found *= static_cast<size_t>(shape[i]);
  return found;
}

Error Node::whole(const char* attribute, int64_t* value) const {
  if (!translated({api_.KernelInfoGetAttribute_int64(info_, attribute, value)}, attribute)) return {};
  return error("the attribute %s is missing, or is not a whole number", attribute);
}

Error Node::number(const char* attribute, float* value) const {
  if (!translated({api_.KernelInfoGetAttribute_float(info_, attribute, value)}, attribute)) return {};
  return error("the attribute %s is missing, or is not a number", attribute);
}

Error Node::constant(size_t input, Tensor* tensor) const {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  if (Error found = translated({api_.KernelInfoGetConstantInput_tensor(info_, input, &is_constant, &value)}, "a constant")) return found;
  return is_constant ? read_tensor(api_, value, tensor) : error("input %zu must be a constant of the model", input);
}

Error Call::input(size_t place, Tensor* tensor) const {
  const OrtValue* value = nullptr;
  if (Error found = translated({api_.KernelContext_GetInput(context_, place, &value)}, "an input")) return found;
  return read_tensor(api_, value, tensor);
}

Error Call::output(size_t place, const int64_t* shape, size_t rank, Tensor* tensor) const {
  OrtValue* value = nullptr;
  if (Error found = translated({api_.KernelContext_GetOutput(context_, place, shape, rank, &value)}, "an output"))
    return found;
  return read_tensor(api_, value, tensor);
}

Parallel Call::parallel() const {
  return {[](const void* call, void (*task)(void*, size_t), size_t count, void* data) {
            const Call& self = *static_cast<const Call*>(call);
            // As many batches as tasks: a thread takes the next when it is free. It fails for no context only.
            translated({self.api_.KernelContext_ParallelFor(self.context_, task, count, count, data)}, "to run tasks");
          },
          this, threads_};
}

}  // namespace cappy

using namespace cappy;

// ONNX Runtime calls this for each session that takes the library.
EXPORTED OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  static std::atomic<const OrtApiBase*> given;
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  static bool is_loaded;
  static Domain made;
  given = base;
  pthread_once(&once, [] {
    is_loaded = load_api(given, &api);
    if (is_loaded) made.make();
  });
  if (!is_loaded) return too_old(base);
  if (made.failed) return status(made.failed);
  if (OrtStatus* failed = api.AddCustomOpDomain(options, made.domain)) return failed;
  registrations++;
  return nullptr;
}

// How many sessions' options have taken the library.
EXPORTED int cappy_registrations() { return registrations; }

// Sizes of the structs that callers pass, for callers that write them anew (library.py): they compare them first.
EXPORTED const int64_t* cappy_struct_sizes() {
  static const int64_t sizes[] = {sizeof(Rounding), sizeof(Preparation), sizeof(LinearWeights), sizeof(AttentionInput)};
  return sizes;
}

// The instruction sets that this processor can use, the best first: "avx512 avx2 scalar".
EXPORTED const char* cappy_instruction_sets() { return usable_instruction_sets(); }

// The set of sessions that this thread opens from now on, and how many threads they have; 0: one for each processor.
EXPORTED const char* cappy_chosen() { return chosen_instruction_set()->name; }
EXPORTED int64_t cappy_chosen_threads() { return static_cast<int64_t>(chosen_threads()); }
EXPORTED int cappy_choose(const char* set, int64_t threads) {
  const bool is_usable = choose_instruction_set(set);
  if (is_usable) choose_threads(threads > 0 ? static_cast<size_t>(threads) : 0);
  return is_usable;
}

// The operators with a given instruction set, on the calling thread; false where the set is not usable here.
EXPORTED int cappy_quantize_rows(const char* set, const float* x, int64_t rows, int64_t columns,
                                 const Preparation* preparation, const Rounding* rounding, uint8_t* q, float* scales) {
  const InstructionSet* found = find_instruction_set(set);
  return found && quantize_rows(found->linear->rows, x, rows, columns, *preparation, *rounding, q, scales, one_thread(chosen_threads()));
}

EXPORTED int cappy_gate_rows(const char* set, const float* x, int64_t rows, int64_t count, float* y) {
  const InstructionSet* found = find_instruction_set(set);
  if (found) gate_rows(found->linear->rows, x, rows, count, y, one_thread(chosen_threads()));
  return found != nullptr;
}

EXPORTED int cappy_linear(const char* set, const LinearWeights* weights, const void* x, const float* scales, int64_t rows,
                          const float* residual, float* y) {
  const InstructionSet* found = find_instruction_set(set);
  if (!found) return false;
  Linear linear(*found, *weights);
  return linear.is_ready() && linear.run(x, scales, rows, residual, y, one_thread(chosen_threads()));
}

// Also false where the lengths are not those of the tokens, or distances or angles lack rows (then nothing is written), and
// where memory is short.
EXPORTED int cappy_attention(const char* set, const AttentionInput* input) {
  const InstructionSet* found = find_instruction_set(set);
  return found && !attend_pairs(*input, found->attention, one_thread(chosen_threads()));
}
