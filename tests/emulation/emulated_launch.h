// launch.h for the emulated grid: a launch runs the kernel to its end on the calling thread.
#pragma once

#include "emulated_grid.h"
#include "kernels/cuda/kernels.h"

namespace fastseq::cuda {

template <typename Args>
Error launch(void (*kernel)(Args), Grid grid, int threads, int shared_bytes, void* /*stream*/, const Args& args) {
  static_assert(sizeof(Args) <= 4096, "CUDA passes 4 KiB of arguments");
  emulation::Launch what{};
  what.kernel = reinterpret_cast<const void*>(kernel);
  what.call = [](const void* pointer, const void* arguments) {
    reinterpret_cast<void (*)(Args)>(const_cast<void*>(pointer))(*static_cast<const Args*>(arguments));
  };
  what.args = &args;
  what.grid = {grid.x, grid.y, grid.z};
  what.threads = threads;
  what.shared_bytes = shared_bytes;
  return emulation::machine.launch(what);
}

template <typename Args>
Error prepare(void (*kernel)(Args), int shared_bytes) {
  return emulation::machine.prepare(reinterpret_cast<const void*>(kernel), shared_bytes);
}

}  // namespace fastseq::cuda
