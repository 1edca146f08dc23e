// What test_cuda_linear.py calls through ctypes: the rows of the chain tables, and launches of them.
#include <cstddef>
#include <string>
#include <vector>

#include "kernels/cuda/fused_mlp.cuh"
#include "kernels/cuda/launch.h"

using namespace fastseq::cuda;

namespace {

const std::vector<ChainKernel>& rows() {
  static const std::vector<ChainKernel> all = [] {
    std::vector<ChainKernel> found;
    for (const Table<ChainKernel>& table : {tiny_mlp_kernels(), fused_mlp_kernels(), skinny_linear_kernels()})
      found.insert(found.end(), table.begin(), table.end());
    return found;
  }();
  return all;
}

template <Math kMath>
Error launch_registers(const ChainArgs& args, int blocks, bool* is_resident) {
  using Tile = RegisterTile<kMath, 128, 1, 128>;
  const RegisterLayout layout = register_layout<Tile>(args);
  *is_resident = layout.is_resident();
  const Error error = prepare(fused_mlp_registers<Tile>, layout.bytes());
  return error ? error
               : launch(fused_mlp_registers<Tile>, Grid{static_cast<unsigned>(blocks)}, Tile::kThreads, layout.bytes(), nullptr,
                        args);
}

}  // namespace

extern "C" {

void fastseq_linear_seed(uint64_t seed) { fastseq::emulation::machine.seed = seed; }

// As test_cuda_linear.py declares them: the sizes of ChainArgs and of a layer, and where their last members are.
void fastseq_linear_layout(int64_t layout[4]) {
  const int64_t values[] = {sizeof(ChainArgs::Layer), offsetof(ChainArgs::Layer, finish), sizeof(ChainArgs),
                            offsetof(ChainArgs, layers)};
  for (int i = 0; i < 4; ++i) layout[i] = values[i];
}

// The rows as JSON.
const char* fastseq_linear_rows() {
  static std::string json;
  json = "[";
  for (const ChainKernel& row : rows()) {
    json += json.size() > 1 ? ", " : "";
    json += fastseq::emulation::text(
        "{\"name\": \"%s\", \"op\": %d, \"math\": %d, \"tile_rows\": %d, \"max_width\": %d, \"threads\": %d, \"min_arch\": %d}",
        row.name, static_cast<int>(row.op), static_cast<int>(row.math), row.tile_rows, row.max_width, row.threads, row.min_arch);
  }
  json += "]";
  return json.c_str();
}

int64_t fastseq_linear_shared_bytes(int row, const ChainArgs* args) { return rows()[row].shared_bytes(*args); }

Error fastseq_linear_launch(int row, const ChainArgs* args) {
  const ChainKernel& kernel = rows()[row];
  const int64_t bytes = kernel.shared_bytes(*args);
  if (bytes > fastseq::emulation::machine.shared_bytes_per_block) return "too much shared memory";
  const Error error = kernel.prepare(static_cast<int>(bytes));
  return error ? error : kernel.launch(*args, nullptr);
}

// fused_mlp in registers with tiles of 64 rows and so few blocks that each does several.
Error fastseq_linear_launch_registers(int math, const ChainArgs* args, int blocks, bool* is_resident) {
  switch (static_cast<Math>(math)) {
    case Math::kTf32:
      return launch_registers<Math::kTf32>(*args, blocks, is_resident);
    case Math::kF16:
      return launch_registers<Math::kF16>(*args, blocks, is_resident);
    default:
      return launch_registers<Math::kBF16>(*args, blocks, is_resident);
  }
}

}  // extern "C"
