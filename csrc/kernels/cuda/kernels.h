// The CUDA kernels as the planner and the executor see them: plain structs and tables of launchers, no CUDA header.
// Pointers are device pointers. Strides are in elements. Every launcher is asynchronous on `stream`, a cudaStream_t of the current
// device, allocates nothing, and returns null or the text of an error. prepare() comes first, once per device: it loads the kernel,
// which a launch into a graph that is being captured could not.
#pragma once

#include <cstdint>

#include "kernels/activation.h"

#ifdef __CUDACC__
#define FS_HOST_DEVICE __host__ __device__
#else
#define FS_HOST_DEVICE
#endif

namespace fastseq::cuda {

using Error = const char*;

// What is multiplied, always accumulated in fp32: kIeee and kTf32 take float elements, the others their own.
enum class Math { kIeee, kTf32, kF16, kBF16 };
constexpr int element_bytes(Math math) { return math == Math::kIeee || math == Math::kTf32 ? 4 : 2; }
const char* name_of(Math math);  // f32, tf32, f16, bf16: as kernels are named

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

struct DeviceProperties {
  int major = 0, minor = 0;
  int multiprocessors = 0;
  int64_t shared_bytes_per_block = 0;  // the opt-in limit
  int64_t l2_bytes = 0;
  Error unusable = nullptr;  // why this build's kernels do not run there, such as no machine code for it
  int arch() const { return 10 * major + minor; }
};

// Copies of weights in another order -----------------------------------------------------------------------------------------

// Keeps dst, dense with sizes[4], equal to src[i][j][k][l] by strides[4], and zero where l >= valid. Each slice of dst is compared
// with src, whole or in a sample, and copied again where it differs: so a copy follows its weight even through a replayed graph,
// without a synchronisation. A slice counts as written once its stamp is `magic`, which is set after its elements: calls on several
// streams may share a copy.
struct PackJob {
  const void* src = nullptr;
  void* dst = nullptr;
  uint64_t* stamps = nullptr;  // one a slice
  uint64_t magic = 0;
  int sizes[4] = {1, 1, 1, 1};
  int valid = 1;
  int64_t strides[4] = {0, 0, 0, 0};
  int is_forced = 0;  // copy whatever a sample says: the weight is known to have changed
  int samples = 0;    // elements of a slice that are compared; 0: all
};
constexpr int kMostPackJobs = 12;
constexpr int kPackSlice = 2048;  // elements of dst
struct PackArgs {
  PackJob jobs[kMostPackJobs];
  int count = 0;
  int element_bytes = 4;
};
FS_HOST_DEVICE inline int64_t pack_elements(const PackJob& job) {
  return static_cast<int64_t>(job.sizes[0]) * job.sizes[1] * job.sizes[2] * job.sizes[3];
}
FS_HOST_DEVICE inline int pack_slices(const PackJob& job) {
  return static_cast<int>((pack_elements(job) + kPackSlice - 1) / kPackSlice);
}
FS_HOST_DEVICE inline int pack_slices(const PackArgs& args) {
  int slices = 0;
  for (int i = 0; i < args.count; ++i) slices += pack_slices(args.jobs[i]);
  return slices;
}

// A layer's epilogue -------------------------------------------------------------------------------------------------------------

// What follows the sums and bias of a layer where that is more than ReLU: a BatchNorm in eval mode, then an activation, channel by
// channel. The tensors are the modules' own, of the kernel's elements, read where they lie: nothing is copied that could be out of
// date, in a replayed graph neither.
struct Finish {
  int is_used = 0;              // has_relu does not count then
  int has_norm = 0;             // mean and variance are not null
  const void* gain = nullptr;   // or null for ones
  const void* shift = nullptr;  // or null for zeros
  const void* mean = nullptr;
  const void* variance = nullptr;
  float eps = 0;
  Activation kind = Activation::kNone;
  float a = 0, b = 0;            // see Activation
  const void* slopes = nullptr;  // PReLU's
  int slope_step = 0;            // 1: one a channel, 0: one for all
  int is_after_pool = 0;         // the activation; the BatchNorm never is
};

// Convolution + bias + ReLU + max-pool -----------------------------------------------------------------------------------------

enum class PoolMode {
  kNone,
  kRegisters,  // 2x2 windows, stride 2, no padding: the four sums of a window are in one thread
  kShared,     // any window: a tile of sums goes through shared memory
};

// dst[i][n][y][x] = pool(relu(bias[n] + sum_k src * weight[n][k])), or `finish` instead of ReLU. A Linear layer is one with images
// of 1x1.
// k runs over (c, y, x) for gather kernels, which read a layer's own contiguous weight; over (y, x, c) with c up to c_pitch for
// vector kernels, whose src has 16-byte aligned pixels of c_pitch channels (src_c_stride is 1), as its weight has.
struct ConvPoolArgs {
  const void* src = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;  // or null
  void* dst = nullptr;
  int batch = 0;
  int c_in = 0, h_in = 0, w_in = 0, c_pitch = 0;
  int64_t src_image_stride = 0, src_c_stride = 0, src_h_stride = 0, src_w_stride = 0;
  int k_h = 1, k_w = 1, stride_h = 1, stride_w = 1, pad_top = 0, pad_left = 0;
  int conv_h = 0, conv_w = 0;  // sums there are, before pooling
  int c_out = 0;
  int has_relu = 0;
  PoolMode pool_mode = PoolMode::kNone;
  int pool_h = 1, pool_w = 1, pool_stride_h = 1, pool_stride_w = 1, pool_top = 0, pool_left = 0;
  int tile_h = 0, tile_w = 0;  // kShared: pooled outputs of a block
  int h_out = 0, w_out = 0;    // after pooling
  int64_t dst_image_stride = 0, dst_c_stride = 0, dst_h_stride = 0, dst_w_stride = 0;
  int dst_channels = 0;  // c_out, or more: the rest are set to zero
  Finish finish;
  PackArgs pack;  // done by additional blocks, for later launches
};

struct ConvKernel {
  const char* name;  // such as conv2d_tf32__mma_128x64_vector
  Math math;
  bool is_vector;
  int tile_m, tile_n, threads, shared_bytes;
  int min_arch;
  Error (*prepare)();
  Error (*launch)(const ConvPoolArgs& args, void* stream);
};

// Chains of Linear layers ------------------------------------------------------------------------------------------------------

constexpr int kMostLayers = 8;

// Row by row: x = relu?(x * weight^T + bias) for each layer, or `finish` instead of ReLU. weight (n, k) contiguous, the layer's
// own; src rows of layers[0].k elements and dst rows of the last layer's n, contiguous in a row.
struct ChainArgs {
  struct Layer {
    const void* weight = nullptr;
    const void* bias = nullptr;  // or null
    int n = 0, k = 0;
    int has_relu = 0;
    Finish finish;  // ChainOp::kFusedMlp takes none
  };
  const void* src = nullptr;
  void* dst = nullptr;
  int64_t rows = 0, src_row_stride = 0, dst_row_stride = 0;
  int count = 0;
  Layer layers[kMostLayers];
};

enum class ChainOp { kTinyMlp, kFusedMlp, kSkinnyLinear };

struct ChainKernel {
  const char* name;  // such as tiny_mlp_f32__ffma_4
  ChainOp op;
  Math math;
  int tile_rows;  // rows of a block
  int max_width;  // 0: any that shared_bytes allows
  int threads;
  int min_arch;
  int64_t (*shared_bytes)(const ChainArgs& args);  // of a block; more than the device has: not for this kernel
  Error (*prepare)(int shared_bytes);
  Error (*launch)(const ChainArgs& args, void* stream);
};

// Max-pool of NHWC maps ----------------------------------------------------------------------------------------------------------

// torch.max_pool2d: NaN wins, otherwise the first of equals. Any strides; fastest where channels are contiguous and a multiple of
// 16 bytes. bias, ReLU and `finish` for layers that leave them to us: before pooling, but for what is_after_pool.
struct MaxPoolArgs {
  const void* src = nullptr;
  const void* bias = nullptr;  // or null
  void* dst = nullptr;
  int batch = 0, channels = 0, h_in = 0, w_in = 0, h_out = 0, w_out = 0;
  int64_t src_image_stride = 0, src_c_stride = 0, src_h_stride = 0, src_w_stride = 0;
  int64_t dst_image_stride = 0, dst_c_stride = 0, dst_h_stride = 0, dst_w_stride = 0;
  int pool_h = 1, pool_w = 1, pool_stride_h = 1, pool_stride_w = 1, pool_top = 0, pool_left = 0;
  int has_relu = 0;
  int finished_channels = 0;  // of `channels`, where finish.is_used: the others are zeros
  Finish finish;
};

struct PoolKernel {
  const char* name;
  Math math;  // of the elements
  Error (*prepare)();
  Error (*launch)(const MaxPoolArgs& args, void* stream);
};

// ------------------------------------------------------------------------------------------------------------------------------

template <typename T>
struct Table {
  const T* rows;
  int count;
  const T* begin() const { return rows; }
  const T* end() const { return rows + count; }
};

// Everything compiled in.
struct Engine {
  bool is_emulated;           // on the CPU, for tests: device pointers are host pointers
  const char* architectures;  // machine code for these, such as "75 80 90 90+PTX"
  Table<ConvKernel> conv[4];  // by Math, best first
  Table<ChainKernel> chain;
  Table<PoolKernel> pool;
  Error (*prepare_pack)();
  Error (*pack)(const PackArgs& args, void* stream);
  Error (*properties)(int device, DeviceProperties* properties);  // of the current device, whose number is `device`
  Error (*last_error)(void* stream);   // waits for the stream: the error of what ran on it, for FASTSEQ_CHECK
  bool (*is_capturing)(void* stream);  // into a graph
};

// Null in a build without CUDA.
const Engine* engine();

// The tables of the families.
Table<ConvKernel> conv_kernels_f32();
Table<ConvKernel> conv_kernels_tf32();
Table<ConvKernel> conv_kernels_f16();
Table<ConvKernel> conv_kernels_bf16();
Table<ChainKernel> tiny_mlp_kernels();
Table<ChainKernel> fused_mlp_kernels();
Table<ChainKernel> skinny_linear_kernels();
Table<PoolKernel> max_pool_kernels();
Error prepare_pack_weights();
Error pack_weights(const PackArgs& args, void* stream);

}  // namespace fastseq::cuda
