// What conv_kernels.py calls through ctypes: the rows of the conv and pool tables, and launches of them.
#include <cstddef>
#include <string>

#include "kernels/cuda/launch.h"

using namespace fastseq::cuda;

namespace {

Table<ConvKernel> conv_kernels(int math) {
  switch (static_cast<Math>(math)) {
    case Math::kIeee:
      return conv_kernels_f32();
    case Math::kTf32:
      return conv_kernels_tf32();
    case Math::kF16:
      return conv_kernels_f16();
    case Math::kBF16:
      return conv_kernels_bf16();
  }
  return {nullptr, 0};
}

}  // namespace

extern "C" {

void fastseq_conv_seed(uint64_t seed) { fastseq::emulation::machine.seed = seed; }

// Sizes of the structs and where their last members are, in the order in which conv_kernels.py declares them.
void fastseq_conv_layout(int64_t layout[8]) {
  const int64_t values[] = {
      sizeof(PackJob),      offsetof(PackJob, samples),   sizeof(PackArgs),    offsetof(PackArgs, element_bytes),
      sizeof(ConvPoolArgs), offsetof(ConvPoolArgs, pack), sizeof(MaxPoolArgs), offsetof(MaxPoolArgs, finish)};
  for (int i = 0; i < 8; ++i) layout[i] = values[i];
}

// The rows as JSON: one list a kind of arithmetic, and the names of the pool kernels.
const char* fastseq_conv_rows() {
  static std::string json;
  json = "{\"conv\": [";
  for (int math = 0; math < 4; ++math) {
    json += math > 0 ? ", [" : "[";
    for (const ConvKernel& row : conv_kernels(math)) {
      json += json.back() == '[' ? "" : ", ";
      json += fastseq::emulation::text(
          "{\"name\": \"%s\", \"math\": %d, \"is_vector\": %d, \"tile_m\": %d, \"tile_n\": %d, \"threads\": %d, \"shared_bytes\": "
          "%d, "
          "\"min_arch\": %d}",
          row.name, static_cast<int>(row.math), row.is_vector, row.tile_m, row.tile_n, row.threads, row.shared_bytes, row.min_arch);
    }
    json += "]";
  }
  json += "], \"pool\": [";
  for (const PoolKernel& row : max_pool_kernels()) {
    json += json.back() == '[' ? "" : ", ";
    json += fastseq::emulation::text("{\"name\": \"%s\", \"math\": %d}", row.name, static_cast<int>(row.math));
  }
  json += "]}";
  return json.c_str();
}

Error fastseq_conv_launch(int math, int row, const ConvPoolArgs* args) {
  const ConvKernel& kernel = conv_kernels(math).rows[row];
  const Error error = kernel.prepare();
  return error ? error : kernel.launch(*args, nullptr);
}

Error fastseq_conv_pool_launch(int row, const MaxPoolArgs* args) { return max_pool_kernels().rows[row].launch(*args, nullptr); }

Error fastseq_conv_pack(const PackArgs* args) { return pack_weights(*args, nullptr); }

}  // extern "C"
