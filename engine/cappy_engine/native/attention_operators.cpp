// The operators Attention, DisentangledAttention and those with rotary positions, and the ones for one query of each pair.
#include <cmath>
#include <new>

#include "attention.h"
#include "kernels.h"
#include "operators.h"

namespace cappy {
namespace {

enum Kind { WHOLE, DISENTANGLED, ROTARY, LOCAL_ROTARY };

struct AttentionOptions {
  AttentionKernel kernel;
  int64_t heads;
  int64_t window;  // negative: none
  float scale;     // 0: 1 / sqrt(head size)
  bool is_first;
  bool is_disentangled;
  bool is_rotary;
};

Error read_distances(const Call& call, size_t place, int64_t heads, int64_t head_size, AttentionDistances* distances) {
  Tensor keys, queries, rows;
  if (Error found = call.input(place, &keys)) return found;
  if (Error found = call.input(place + 1, &queries)) return found;
  if (Error found = call.input(place + 2, &rows)) return found;
  if (keys.rank != 3 || !keys.is({heads, keys.shape[1], head_size}) || !queries.is(keys.shape, keys.rank))
    return error("the keys and queries of distances are not %lld heads of %lld values for each distance",
                 static_cast<long long>(heads), static_cast<long long>(head_size));
  if (keys.shape[1] == 0) return error("distances have no keys and queries");
  if (rows.rank != 1 || rows.shape[0] % 2 == 0)
    return error("the rows of distances are not an odd count: of both sides, and of distance 0");
  *distances = {keys.as<float>(), queries.as<float>(), rows.as<int64_t>(), rows.shape[0] / 2, keys.shape[1]};
  return {};
}

Error read_angles(const Call& call, size_t place, int64_t head_size, AttentionAngles* angles) {
  Tensor cosines, sines;
  if (Error found = call.input(place, &cosines)) return found;
  if (Error found = call.input(place + 1, &sines)) return found;
  if (cosines.rank != 2 || 2 * cosines.columns() != head_size || !sines.is(cosines.shape, cosines.rank))
    return error("the cosines and sines are not those of heads of %lld values", static_cast<long long>(head_size));
  if (cosines.shape[0] == 0) return error("there are angles for 0 tokens");
  *angles = {cosines.as<float>(), sines.as<float>(), cosines.shape[0], cosines.columns()};
  return {};
}

class AttentionOperator : public Kernel {
 public:
  explicit AttentionOperator(const AttentionOptions& options) : options_(options) {}

  Error compute(const Call& call) override {
    const bool is_first = options_.is_first;
    const int64_t heads = options_.heads;
    Tensor queries, packed, lengths, out;
    const size_t place = is_first ? 1 : 0;
    if (Error found = call.input(place, &packed)) return found;
    if (Error found = call.input(place + 1, &lengths)) return found;
    if (packed.rank != 2 || lengths.rank != 1)
      return error("attention takes rows and their lengths, not tensors of rank %zu and %zu", packed.rank, lengths.rank);
    const int64_t parts = is_first ? 2 : 3, width = packed.shape[1], hidden = width / parts, tokens = packed.shape[0];
    if (width == 0 || width % (parts * heads) != 0)
      return error("rows of %lld values are not %lld parts of %lld heads", static_cast<long long>(width),
                   static_cast<long long>(parts), static_cast<long long>(heads));
    if (is_first) {
      if (Error found = call.input(0, &queries)) return found;
      if (!queries.is({lengths.shape[0], hidden})) return error("the queries are not one of %lld values for each pair",
                                                                static_cast<long long>(hidden));
    }
    AttentionDistances distances = {};
    if (options_.is_disentangled)
      if (Error found = read_distances(call, place + 2, heads, hidden / heads, &distances)) return found;
    AttentionAngles angles = {};
    if (options_.is_rotary)
      if (Error found = read_angles(call, place + 2, hidden / heads, &angles)) return found;
    if (Error found = call.output(0, {is_first ? lengths.shape[0] : tokens, hidden}, &out)) return found;
    const float scale = options_.scale != 0 ? options_.scale : 1 / sqrtf(static_cast<float>(hidden / heads));
    const float* rows = packed.as<float>();
    AttentionRows given = {rows, width, rows + hidden, width, out.as<float>(), heads, hidden / heads, options_.window,
                           scale, distances, angles};
    if (is_first) {
      given.queries = queries.as<float>();
      given.query_stride = hidden;
      given.keys = rows;
    }
    return attend_pairs({given, tokens, lengths.as<int64_t>(), lengths.shape[0], is_first}, options_.kernel, call.parallel());
  }

 private:
  AttentionOptions options_;
};

template <Kind kind, bool is_first>
Error create(const Node& node, Kernel** kernel) {
  const bool is_rotary = kind == ROTARY || kind == LOCAL_ROTARY;
  AttentionOptions options = {chosen_instruction_set()->attention, 0, -1, 0, is_first, kind == DISENTANGLED, is_rotary};
  if (Error found = node.whole("heads", &options.heads)) return found;
  if (options.heads < 1 || options.heads > 65536)
    return error("heads must be 1 to 65536, not %lld", static_cast<long long>(options.heads));
  if (kind == LOCAL_ROTARY) {
    if (Error found = node.whole("window", &options.window)) return found;
    if (options.window < 0) return error("window must be 0 or more, not %lld", static_cast<long long>(options.window));
  }
  if (kind == DISENTANGLED) {
    if (Error found = node.number("scale", &options.scale)) return found;
    if (!(options.scale > 0)) return error("scale must be more than 0, not %g", static_cast<double>(options.scale));
  }
  *kernel = new (std::nothrow) AttentionOperator(options);
  return *kernel ? Error{} : error("no memory");
}

}  // namespace

const Operator ATTENTION = {"Attention", 2, {ORT_FLOAT, ORT_INT64}, 1, {ORT_FLOAT}, create<WHOLE, false>};
const Operator FIRST_ATTENTION = {"FirstAttention", 3, {ORT_FLOAT, ORT_FLOAT, ORT_INT64}, 1, {ORT_FLOAT}, create<WHOLE, true>};
const Operator DISENTANGLED_ATTENTION = {
    "DisentangledAttention", 5, {ORT_FLOAT, ORT_INT64, ORT_FLOAT, ORT_FLOAT, ORT_INT64}, 1, {ORT_FLOAT},
    create<DISENTANGLED, false>};
const Operator FIRST_DISENTANGLED_ATTENTION = {
    "FirstDisentangledAttention", 6, {ORT_FLOAT, ORT_FLOAT, ORT_INT64, ORT_FLOAT, ORT_FLOAT, ORT_INT64}, 1, {ORT_FLOAT},
    create<DISENTANGLED, true>};

const Operator ROTARY_ATTENTION = {
    "RotaryAttention", 4, {ORT_FLOAT, ORT_INT64, ORT_FLOAT, ORT_FLOAT}, 1, {ORT_FLOAT}, create<ROTARY, false>};
const Operator FIRST_ROTARY_ATTENTION = {
    "FirstRotaryAttention", 5, {ORT_FLOAT, ORT_FLOAT, ORT_INT64, ORT_FLOAT, ORT_FLOAT}, 1, {ORT_FLOAT}, create<ROTARY, true>};
const Operator LOCAL_ROTARY_ATTENTION = {
    "LocalRotaryAttention", 4, {ORT_FLOAT, ORT_INT64, ORT_FLOAT, ORT_FLOAT}, 1, {ORT_FLOAT}, create<LOCAL_ROTARY, false>};

}  // namespace cappy
