// The engine on the emulated grid: what the CUDA build has in its own files, and what tests set and read through ctypes.
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>

#include "emulated_grid.h"
#include "kernels/cuda/kernels.h"

namespace fastseq::cuda {

// Weak: a family whose files are not linked in is an empty table, so that a test can build the files it is about.
__attribute__((weak)) Table<ConvKernel> conv_kernels_f32();
__attribute__((weak)) Table<ConvKernel> conv_kernels_tf32();
__attribute__((weak)) Table<ConvKernel> conv_kernels_f16();
__attribute__((weak)) Table<ConvKernel> conv_kernels_bf16();
__attribute__((weak)) Table<ChainKernel> tiny_mlp_kernels();
__attribute__((weak)) Table<ChainKernel> fused_mlp_kernels();
__attribute__((weak)) Table<ChainKernel> skinny_linear_kernels();
__attribute__((weak)) Table<PoolKernel> max_pool_kernels();
__attribute__((weak)) Error prepare_pack_weights();
__attribute__((weak)) Error pack_weights(const PackArgs& args, void* stream);

namespace {

DeviceProperties device{9, 0, 132, emulation::kMostSharedBytes, int64_t{60} << 20};  // an H200

bool has_code = true;

Error properties(int index, DeviceProperties* result) {
  if (index != 0) return "the emulated grid is device 0";
  *result = device;
  result->unusable = has_code ? prepare_pack_weights() : "no kernel image is available for execution on the device";
  return nullptr;
}

// Launches have returned their errors; but a test may want one that shows later, behind so many launches.
int launches_to_error = -1;
Error last_error(void*) { return launches_to_error >= 0 && launches_to_error-- == 0 ? "an illegal memory access" : nullptr; }

bool is_captured = false;
bool is_capturing(void*) { return is_captured; }

template <typename T>
Table<T> table(Table<T> (*family)()) {
  return family ? family() : Table<T>{nullptr, 0};
}

std::vector<ChainKernel> chains() {
  std::vector<ChainKernel> rows;
  for (auto family : {tiny_mlp_kernels, fused_mlp_kernels, skinny_linear_kernels}) {
    for (const ChainKernel& row : table(family)) rows.push_back(row);
  }
  return rows;
}

}  // namespace

const Engine* engine() {
  static const std::vector<ChainKernel> chain = chains();
  static const Engine emulated{
      true,
      "emulated",
      {table(conv_kernels_f32), table(conv_kernels_tf32), table(conv_kernels_f16), table(conv_kernels_bf16)},
      {chain.data(), static_cast<int>(chain.size())},
      table(max_pool_kernels),
      prepare_pack_weights,
      pack_weights,
      properties,
      last_error,
      is_capturing};
  return &emulated;
}

}  // namespace fastseq::cuda

using fastseq::emulation::Launch;
using fastseq::emulation::machine;

namespace {

// As the linker has it; kernels without external linkage have none.
std::string name_of(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_saddr != kernel) return "kernel";
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
  const std::string name = demangled ? demangled : info.dli_sname;
  std::free(demangled);
  return name;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// The order of blocks, warps and lanes in launches from now on; 0: as they are numbered.
void fastseq_emulation_seed(uint64_t seed) { machine.seed = seed; }

void fastseq_emulation_device(int major, int minor, int multiprocessors, int shared_bytes_per_block, int64_t l2_bytes) {
  fastseq::cuda::device = {major, minor, multiprocessors, shared_bytes_per_block, l2_bytes};
  machine.shared_bytes_per_block = shared_bytes_per_block;
}

// Whether calls from now on are captured into a graph, as far as the engine can tell.
void fastseq_emulation_capture(int is_captured) { fastseq::cuda::is_captured = is_captured != 0; }

// The error of the kernel that is waited for after `launches` others.
void fastseq_emulation_error(int launches) { fastseq::cuda::launches_to_error = launches; }

// Whether the build has machine code for the device. Asked once, when the first call comes.
void fastseq_emulation_code(int has_code) { fastseq::cuda::has_code = has_code != 0; }

// Forgets the launches so far.
void fastseq_emulation_reset() { machine.log.clear(); }

// The launches since then as JSON. Valid until the next call.
const char* fastseq_emulation_launches() {
  static std::string json;
  json = "[";
  for (const Launch& launch : machine.log) {
    json += json.size() > 1 ? ", " : "";
    json += "{\"kernel\": \"" + name_of(launch.kernel) + "\", ";
    json += fastseq::emulation::text(
        "\"grid\": [%u, %u, %u], \"threads\": %d, \"shared_bytes\": %d, \"switches\": %lld, \"prepared\": %s}", launch.grid.x,
        launch.grid.y, launch.grid.z, launch.threads, launch.shared_bytes, static_cast<long long>(launch.switches),
        launch.is_prepared ? "true" : "false");
  }
  json += "]";
  return json.c_str();
}

}  // extern "C"
#pragma GCC visibility pop
