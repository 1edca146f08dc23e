// The one list of instruction sets and kernels. Choice, _C.kernels(), tests and benchmarks all walk it.
#include "kernels/cpu/kernels.h"

namespace fastseq::cpu {
namespace {

#if defined(__x86_64__)
bool cpu_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool cpu_has_avx512() {
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}
#endif

std::string tile_name(const char* op, const KernelSet& set, int rows, int vectors) {
  return std::string(op) + "_f32__" + set.isa + "_" + std::to_string(rows) + "x" + std::to_string(vectors * set.lanes);
}

}  // namespace

const std::vector<Isa>& isas() {
  static const std::vector<Isa> list = {
#if defined(__x86_64__)
      {&kernels_avx512(), cpu_has_avx512(), false},
      {&kernels_avx2(), cpu_has_avx2(), false},
#endif
      {&kernels_portable(), true, false},
      {&kernels_emulated512(), true, true},
  };
  return list;
}

const KernelSet* select_isa(const std::string& cap) {
  bool is_below_cap = cap.empty();
  for (const Isa& isa : isas()) {
    is_below_cap = is_below_cap || cap == isa.kernels->isa;
    if (!is_below_cap || !isa.is_supported) continue;
    if (!isa.is_test_only || cap == isa.kernels->isa) return isa.kernels;
  }
  return nullptr;
}

std::vector<KernelRow> kernel_rows() {
  std::vector<KernelRow> rows;
  for (const Isa& isa : isas()) {
    const KernelSet& set = *isa.kernels;
    auto add = [&](const char* op, int height, int vectors) {
      rows.push_back({tile_name(op, set, height, vectors), op, set.isa, height, vectors, isa.is_supported, isa.is_test_only});
    };
    for (int v = 1; v <= kMaxVectors; ++v)
      if (set.max_rows[v]) add("conv2d", set.max_rows[v], v);
    for (int v = 1; v <= kMaxVectors; ++v)
      if (set.pool_rows[v]) add("conv2d_maxpool2d", set.pool_rows[v], v);
    for (int v = 1; v <= kMaxVectors; ++v)
      if (set.product_rows[v]) add("conv2d_winograd", set.product_rows[v], v);
    for (int v = 1; v <= kMaxVectors; ++v)
      if (set.max_rows[v]) add("linear", set.max_rows[v], v);
    add("linear_in_place", set.in_place_rows, 1);
    add("conv2d_plane", 1, 2);
    add("maxpool2d", 1, 1);
  }
  return rows;
}

}  // namespace fastseq::cpu
