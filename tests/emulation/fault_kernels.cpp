// Kernels for test_emulated_grid.py: small ones that are right, and what becomes of them when a line is wrong.
#include <map>
#include <stdexcept>
#include <string>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.h"

namespace fastseq::cuda {

// What each kernel gets; `variant` 0 is right, or says which primitive is meant.
struct TestArgs {
  const void* a = nullptr;
  const void* b = nullptr;
  void* c = nullptr;
  int n = 0;
  int variant = 0;
};

template <typename T>
FS_DEVICE const T* a_of(const TestArgs& args) {
  return static_cast<const T*>(args.a);
}
template <typename T>
FS_DEVICE T* c_of(const TestArgs& args) {
  return static_cast<T*>(args.c);
}
FS_DEVICE int thread_of_grid() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// c: for each thread the others of its block that have run before, at its start.
FS_KERNEL(1024, 1) order(FS_ARGS TestArgs args) {
  int* count = c_of<int>(args);
  count[1 + thread_of_grid()] = (*count)++;
}

// c[i] = a of the block's last thread but i.
FS_KERNEL(1024, 1) reverse(FS_ARGS TestArgs args) {
  int* const shared = reinterpret_cast<int*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  shared[thread] = a_of<int>(args)[thread_of_grid()];
  switch (args.variant) {
    case 0:
      block_barrier();
      break;
    case 1:  // no barrier
      break;
    case 2:  // not for all
      if (thread != 5) block_barrier();
      break;
    case 3:  // not the same for all
      if (thread < 32) {
        block_barrier();
      } else {
        block_barrier();
      }
      break;
    case 4:  // some have left
      if (thread >= 40) return;
      block_barrier();
      break;
    case 5:  // not for one, who waits for its warp
      if (thread != 33) block_barrier();
      warp_barrier();
      break;
    case 6:
      throw std::runtime_error("thrown by a kernel");
    case 7:  // after the end
      shared[threads + thread] = 1;
      block_barrier();
      break;
    case 8:  // before the start
      shared[thread == 3 ? -1 : thread] = 1;
      block_barrier();
      break;
  }
  c_of<int>(args)[thread_of_grid()] = shared[threads - 1 - thread];
}

// n times: each takes what its neighbour has, plus one. variant 1: the next step may overwrite what is still to be read.
FS_KERNEL(1024, 1) exchange(FS_ARGS TestArgs args) {
  int* const shared = reinterpret_cast<int*>(shared_memory());
  const unsigned thread = threadIdx.x;
  int value = a_of<int>(args)[thread_of_grid()];
  for (int step = 0; step < args.n; ++step) {
    shared[thread] = value;
    warp_barrier();
    value = shared[thread ^ 1] + 1;
    if (args.variant == 0) warp_barrier();
  }
  c_of<int>(args)[thread_of_grid()] = value;
}

// Four words of c a thread: shfl_xor of a float, shfl_xor of an int, shfl, ballot. n: the mask and the lane.
FS_KERNEL(1024, 1) talk(FS_ARGS TestArgs args) {
  const int thread = thread_of_grid();
  const uint32_t value = a_of<uint32_t>(args)[thread];
  uint32_t* const c = c_of<uint32_t>(args) + 4 * thread;
  const float sent = emulated::float_of(value);
  if (args.variant == 1 && threadIdx.x % 32 == 7) {
    ballot(true);  // not what the others do
  }
  if (args.variant == 2 && threadIdx.x == 9) return;
  c[0] = emulated::bits_of(shfl_xor(sent, args.n));
  c[1] = static_cast<uint32_t>(shfl_xor(static_cast<int>(value), args.n));
  c[2] = shfl(value, (thread + args.n) % 32);
  c[3] = ballot(value & 1);
}

// a: 4 matrices of 8 rows of 16 bytes, c: four words a thread. n: 2 or 4 matrices are loaded.
FS_KERNEL(32, 1) load_matrices(FS_ARGS TestArgs args) {
  unsigned char* const shared = shared_memory();
  const int lane = static_cast<int>(threadIdx.x);
  reinterpret_cast<uint4*>(shared)[lane] = a_of<uint4>(args)[lane];
  warp_barrier();
  const unsigned char* row = shared + 16 * lane;
  if (args.variant == 1 && lane == 6) row += 8;    // misaligned
  if (args.variant == 2 && lane == 6) row += 512;  // not there
  if (args.variant == 3 && lane == 20) row = nullptr;
  uint32_t r[4] = {}, two[2] = {};
  if (args.n == 4) {
    ldmatrix_x4(r, row);
  } else {
    ldmatrix_x2(two, row);
    r[0] = two[0], r[1] = two[1];
  }
  for (int j = 0; j < 4; ++j) c_of<uint32_t>(args)[4 * lane + j] = r[j];
}

// a: four registers a lane, b: two, c: four sums, added to. variant 1: the two registers of b are swapped.
template <Math math>
FS_KERNEL(32, 1)
multiply(FS_ARGS TestArgs args) {
  const unsigned lane = threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  for (int j = 0; j < 4; ++j) a[j] = a_of<uint32_t>(args)[4 * lane + j];
  for (int j = 0; j < 2; ++j) b[j ^ (args.variant == 1)] = static_cast<const uint32_t*>(args.b)[2 * lane + j];
  for (int j = 0; j < 4; ++j) d[j] = c_of<float>(args)[4 * lane + j];
  for (int i = 0; i < args.n; ++i) {
    if constexpr (math == Math::kF16) {
      mma_f16(d, a, b);
    } else if constexpr (math == Math::kBF16) {
      mma_bf16(d, a, b);
    } else {
      mma_tf32(d, a, b);
    }
  }
  for (int j = 0; j < 4; ++j) c_of<float>(args)[4 * lane + j] = d[j];
}

// c[i] = sum over n rows of what the next thread has at a[row][i], through three stages of cp.async; n may be less.
enum Pipeline { kRight, kNoWait, kShortWait, kNoBarrier, kNoCommit, kMisaligned, kOutside, kFromStack, kEarlyRefill };
template <int kBytes>
FS_KERNEL(128, 1)
pipeline(FS_ARGS TestArgs args) {
  constexpr int kStages = 3, kWords = kBytes / 4;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  unsigned char* const shared = shared_memory();
  alignas(16) const uint32_t on_stack[4] = {};
  const auto fetch = [&](int row) {
    unsigned char* to = shared + (row % kStages * threads + thread) * kBytes;
    const void* from = a_of<unsigned char>(args) + (static_cast<int64_t>(row) * threads + thread) * kBytes;
    if (args.variant == kMisaligned) to += 2;
    if (args.variant == kOutside) to += kStages * threads * kBytes;
    if (args.variant == kFromStack) from = on_stack;
    if constexpr (kBytes == 16) {
      cp_async_16(to, from, row < args.n);
    } else if constexpr (kBytes == 8) {
      cp_async_8(to, from, row < args.n);
    } else {
      cp_async_4(to, from, row < args.n);
    }
    if (args.variant != kNoCommit) cp_async_commit();
  };
  for (int row = 0; row < kStages - 1; ++row) fetch(row);
  uint32_t sums[kWords] = {};
  for (int row = 0; row < args.n; ++row) {
    if (args.variant == kShortWait) {
      cp_async_wait<kStages - 1>();
    } else if (args.variant != kNoWait) {
      cp_async_wait<kStages - 2>();
    }
    if (args.variant == kEarlyRefill) fetch(row + kStages - 1);  // where others may still read
    if (args.variant != kNoBarrier) block_barrier();
    if (args.variant != kEarlyRefill) fetch(row + kStages - 1);
    const auto* stage = reinterpret_cast<const uint32_t*>(shared + row % kStages * threads * kBytes);
    for (int i = 0; i < kWords; ++i) sums[i] += stage[(thread + 1) % threads * kWords + i];
  }
  for (int i = 0; i < kWords; ++i) c_of<uint32_t>(args)[thread * kWords + i] = sums[i];
}

// c[i] = a[i] + 1 for i < n. variant 1: one too few, 2: one too many.
FS_KERNEL(1024, 1) increment(FS_ARGS TestArgs args) {
  const int count = args.n + (args.variant == 2) - (args.variant == 1), i = thread_of_grid();
  if (i < count) c_of<int>(args)[i] = a_of<int>(args)[i] + 1;
}

// Four words at once from the n-th word on.
FS_KERNEL(1024, 1) load_vector(FS_ARGS TestArgs args) {
  c_of<uint4>(args)[thread_of_grid()] = *reinterpret_cast<const uint4*>(a_of<uint32_t>(args) + args.n + 4 * thread_of_grid());
}

// n numbers, by `variant`.
FS_KERNEL(1024, 1) convert(FS_ARGS TestArgs args) {
  const int i = thread_of_grid();
  if (i >= args.n) return;
  const float value = args.variant < 2 ? 0.0f : a_of<float>(args)[i];
  switch (args.variant) {
    case 0:
      c_of<float>(args)[i] = unpack_low<Half>(pack2<Half>(to_float(a_of<Half>(args)[i]), 1.0f));
      break;
    case 1:
      c_of<float>(args)[i] = unpack_high<BFloat16>(pack2<BFloat16>(1.0f, to_float(a_of<BFloat16>(args)[i])));
      break;
    case 2:
      c_of<Half>(args)[i] = from_float<Half>(value);
      break;
    case 3:
      c_of<BFloat16>(args)[i] = from_float<BFloat16>(value);
      break;
    case 4:
      c_of<uint32_t>(args)[i] = to_tf32(value);
      break;
    case 5:
      c_of<float>(args)[i] = max_nan(value, static_cast<const float*>(args.b)[i]);
      break;
    case 6:
      c_of<float>(args)[i] = relu(value);
      break;
    case 7:
      c_of<float>(args)[i] = fused_multiply_add(value, static_cast<const float*>(args.b)[i], 1.0f);
      break;
  }
}

// n times the same collective: what a switch costs.
FS_KERNEL(256, 1) spin(FS_ARGS TestArgs args) {
  float value = 1.0f;
  float d[4] = {};
  const uint32_t a[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00}, b[2] = {0x3c003c00, 0x3c003c00};
  for (int i = 0; i < args.n; ++i) {
    if (args.variant == 0) value = shfl_xor(value, 1);
    if (args.variant == 1) block_barrier();
    if (args.variant == 2) mma_f16(d, a, b);
  }
  c_of<float>(args)[thread_of_grid()] = value + d[0];
}

}  // namespace fastseq::cuda

using namespace fastseq::cuda;

namespace {

using Kernel = void (*)(TestArgs);
const std::map<std::string, Kernel> kernels = {
    {"order", order},
    {"reverse", reverse},
    {"exchange", exchange},
    {"talk", talk},
    {"load_matrices", load_matrices},
    {"multiply_f16", multiply<Math::kF16>},
    {"multiply_bf16", multiply<Math::kBF16>},
    {"multiply_tf32", multiply<Math::kTf32>},
    {"pipeline_16", pipeline<16>},
    {"pipeline_8", pipeline<8>},
    {"pipeline_4", pipeline<4>},
    {"increment", increment},
    {"load_vector", load_vector},
    {"convert", convert},
    {"spin", spin},
};

}  // namespace

extern "C" {

Error fastseq_test_prepare(const char* kernel, int shared_bytes) { return prepare(kernels.at(kernel), shared_bytes); }

Error fastseq_test_launch(const char* kernel, int blocks, int threads, int shared_bytes, const void* a, const void* b, void* c,
                          int n, int variant) {
  return launch(kernels.at(kernel), Grid{static_cast<unsigned>(blocks), 1, 1}, threads, shared_bytes, nullptr,
                TestArgs{a, b, c, n, variant});
}

}  // extern "C"
