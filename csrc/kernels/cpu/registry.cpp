// The one list of instruction sets and kernels. Choice, _C.kernels(), tests and benchmarks all walk it.
#include <algorithm>

#include "kernels/cpu/kernels.h"
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastseq::cpu {
namespace {

#if defined(__x86_64__)
bool cpu_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool cpu_has_avx512() {
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}

bool cpu_has_avx512_bf16() { return cpu_has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Linux keeps the tiles' 8 KiB of each thread for processes that ask (Documentation/arch/x86/xstate.rst).
bool cpu_has_amx_bf16() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return cpu_has_avx512() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::string tile_name(const char* op, const char* isa, bool is_bf16, int rows, int lanes) {
  return std::string(op) + (is_bf16 ? "_bf16__" : "_f32__") + isa + "_" + std::to_string(rows) + "x" + std::to_string(lanes);
}

const Isa* find_isa(const std::string& cap) {
  bool is_below_cap = cap.empty();
  for (const Isa& isa : isas()) {
    const bool is_named = cap == isa.kernels->isa ||
                          std::any_of(isa.bf16.begin(), isa.bf16.end(), [&](const Isa::Bf16& b) { return cap == b.tiles->isa; });
    is_below_cap = is_below_cap || is_named;
    if (!is_below_cap || !isa.is_supported) continue;
    if (!isa.is_test_only || is_named) return &isa;
  }
  return nullptr;
}

}  // namespace

const std::vector<Isa>& isas() {
  static const std::vector<Isa> list = {
#if defined(__x86_64__)
      {&kernels_avx512(),
       cpu_has_avx512(),
       false,
       {{&bf16_tiles_amx(), cpu_has_amx_bf16()}, {&bf16_tiles_avx512(), cpu_has_avx512_bf16()}}},
      {&kernels_avx2(), cpu_has_avx2(), false},
#endif
      {&kernels_portable(), true, false},
      {&kernels_emulated512(), true, true, {{&bf16_tiles_emulated_amx(), true}, {&bf16_tiles_emulated512(), true}}},
  };
  return list;
}

const KernelSet* select_isa(const std::string& cap) {
  const Isa* const isa = find_isa(cap);
  return isa ? isa->kernels : nullptr;
}

const Bf16Tiles* select_bf16(const std::string& cap) {
  const Isa* const isa = find_isa(cap);
  if (!isa) return nullptr;
  const auto is_named = [&](const Isa::Bf16& bf16) { return cap == bf16.tiles->isa; };
  auto best = std::find_if(isa->bf16.begin(), isa->bf16.end(), is_named);
  if (best == isa->bf16.end() && cap != isa->kernels->isa) best = isa->bf16.begin();  // the cap is of another, above
  best = std::find_if(best, isa->bf16.end(), [](const Isa::Bf16& bf16) { return bf16.is_supported; });
  return best == isa->bf16.end() ? nullptr : best->tiles;
}

std::vector<KernelRow> kernel_rows() {
  std::vector<KernelRow> rows;
  for (const Isa& isa : isas()) {
    const KernelSet& set = *isa.kernels;
    auto add = [&](const char* op, int height, int vectors, const Isa::Bf16* bf16 = nullptr) {
      const char* const name = bf16 ? bf16->tiles->isa : set.isa;
      rows.push_back({tile_name(op, name, bf16, height, vectors * set.lanes), op, name, height, vectors, bf16 != nullptr,
                      bf16 ? bf16->is_supported : isa.is_supported, isa.is_test_only});
    };
    for (const Isa::Bf16& bf16 : isa.bf16) {
      const TileTable& tiles = bf16.tiles->tiles;
      for (int v = 1; v <= kMaxVectors; ++v)
        if (tiles.max_rows[v]) add("conv2d", tiles.max_rows[v], v, &bf16);
      for (int v = 1; v <= kMaxVectors; ++v)
        if (tiles.pool_rows[v]) add("conv2d_maxpool2d", tiles.pool_rows[v], v, &bf16);
      for (int v = 1; v <= kMaxVectors; ++v)
        if (tiles.max_rows[v]) add("linear", tiles.max_rows[v], v, &bf16);
    }
    for (int v = 1; v <= kMaxVectors; ++v)
      if (set.tiles.max_rows[v]) add("conv2d", set.tiles.max_rows[v], v);
    for (int v = 1; v <= kMaxVectors; ++v)
      if (set.tiles.pool_rows[v]) add("conv2d_maxpool2d", set.tiles.pool_rows[v], v);
    for (int v = 1; v <= kMaxVectors; ++v)
      if (set.product_rows[v]) add("conv2d_winograd", set.product_rows[v], v);
    for (int v = 1; v <= kMaxVectors; ++v)
      if (set.tiles.max_rows[v]) add("linear", set.tiles.max_rows[v], v);
    add("linear_in_place", set.in_place_rows, 1);
    add("conv2d_plane", 1, 2);
    add("conv2d_depthwise", set.depthwise_pixels, 1);
    add("conv2d_grouped", set.depthwise_pixels, 1);
    add("maxpool2d", 1, 1);
    add("avgpool2d", 1, 1);
    for (const char* op : {"scale", "upsamplebilinear2d", "groupnorm", "layernorm", "softmax", "logsoftmax"}) add(op, 1, 1);
  }
  return rows;
}

}  // namespace fastseq::cpu
