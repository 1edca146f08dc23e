#include "bindings/cuda_library.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_addmm_activation.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/cudnn_convolution.h>
#include <ATen/ops/cudnn_convolution_relu.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/relu.h>
#include <c10/core/Allocator.h>

#include <dlfcn.h>

#include <array>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>

// In libtorch_cuda, of the stable C interface; weak, so that one binary loads beside a torch without CUDA.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fastseq {
namespace {

constexpr int kMostDevices = 64;

using StreamGetter = int32_t (*)(int32_t device_index, void** stream);

std::optional<at::Tensor> optional_tensor(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

bool has_nan(const at::Tensor& tensor) { return at::isnan(tensor).any().item<bool>(); }
bool is_all_nan(const at::Tensor& tensor) { return at::isnan(tensor).all().item<bool>(); }

// On shapes of the kind that are handed over, for which the libraries choose their engines; small ones on the emulated grid.
LibraryTraits try_libraries(c10::Device device, at::ScalarType dtype) {
  const at::NoGradGuard no_grad;
  LibraryTraits traits;
  const auto options = at::TensorOptions().device(device).dtype(dtype);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const auto filled = [&](at::IntArrayRef sizes, double value) { return at::full(sizes, value, options); };
  const bool is_real = device.is_cuda();
  try {
    const int64_t rows = is_real ? 128 : 8, n = is_real ? 512 : 8, k = is_real ? 1024 : 8;
    const at::Tensor weight = filled({n, k}, 1.0), bias = filled({n}, 0.0);
    at::Tensor product = filled({rows, n}, nan);
    library_linear(product, filled({rows, k}, 1.0), weight, bias, /*has_relu=*/true, /*trusts_relu=*/true);
    const bool makes_nan = has_nan(product);
    library_linear(product, filled({rows, k}, nan), weight, bias, /*has_relu=*/true, /*trusts_relu=*/true);
    traits.trusts_cublas_relu = !makes_nan && is_all_nan(product);
  } catch (const c10::Error&) {
    traits.trusts_cublas_relu = false;
  }
  const auto format = at::MemoryFormat::ChannelsLast;
  const int64_t c_in = is_real ? 128 : 8, c_out = is_real ? 64 : 8, size = is_real ? 64 : 8;
  cuda::ConvPoolArgs args;
  args.pad_top = args.pad_left = 1;
  const auto convolve = [&](double value, bool applies_epilogue) {
    const at::Tensor src = filled({1, c_in, size, size}, value).contiguous(format);
    const at::Tensor weight = filled({c_out, c_in, 3, 3}, 1.0).contiguous(format), bias = filled({c_out}, 0.0);
    filled({1, c_out, size, size}, nan);  // freed at once: what the allocator then gives out for the result is full of NaN
    return library_conv(src, weight, bias, args, applies_epilogue);
  };
  try {
    traits.has_cudnn = !has_nan(convolve(1.0, false));
  } catch (const c10::Error&) {
    return traits;
  }
  try {
    traits.trusts_cudnn_relu = !has_nan(convolve(1.0, true)) && is_all_nan(convolve(nan, true));
  } catch (const c10::Error&) {
    traits.trusts_cudnn_relu = false;
  }
  return traits;
}

}  // namespace

void* current_stream(c10::Device device) {
  if (!device.is_cuda()) return nullptr;
  // A linker that leaves out libraries nobody calls into drops libtorch.so, through which the symbol would be found.
  static const StreamGetter get = [] {
    if (aoti_torch_get_current_cuda_stream) return &aoti_torch_get_current_cuda_stream;
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<StreamGetter>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  TORCH_CHECK(get, "fastseq: this torch tells no CUDA streams; rebuild fastseq with FASTSEQ_CUDA=0 to run CUDA models eager");
  void* stream = nullptr;
  TORCH_CHECK(get(device.index(), &stream) == 0, "fastseq: torch gave no stream for ", device);
  return stream;
}

at::Tensor allocate(at::IntArrayRef sizes, at::ScalarType dtype, c10::Device device, at::MemoryFormat format) {
  // Past the dispatcher, which takes longer than a small kernel.
  const auto key = device.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  if (c10::Allocator* const allocator = c10::GetAllocator(device.type()))
    return at::detail::empty_generic(sizes, allocator, c10::DispatchKeySet(key), dtype, format);
  return at::empty(sizes, at::TensorOptions().device(device).dtype(dtype), format);
}

at::Tensor view_of(void* data, at::IntArrayRef sizes, at::IntArrayRef strides, const at::Tensor& like) {
  return at::from_blob(data, sizes, strides, /*storage_offset=*/0, [](void*) {}, like.options(), like.device());
}

const cuda::DeviceProperties& device_properties(c10::Device device) {
  static std::array<cuda::DeviceProperties, kMostDevices> all;
  static std::array<std::once_flag, kMostDevices> made;
  const size_t index = device.has_index() && device.index() < kMostDevices ? static_cast<size_t>(device.index()) : 0;
  std::call_once(made[index], [&] {
    const cuda::Error error = cuda::engine()->properties(static_cast<int>(index), &all[index]);
    TORCH_CHECK(!error, "fastseq: no properties of ", device, ": ", error);
  });
  return all[index];
}

std::optional<LibraryTraits> library_traits(c10::Device device, const Arithmetic& arithmetic, void* stream) {
  static std::mutex mutex;
  static std::map<std::tuple<c10::DeviceIndex, at::ScalarType, bool, bool>, LibraryTraits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(device.index(), arithmetic.dtype, arithmetic.allows_tf32_conv, arithmetic.allows_tf32_linear);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  if (cuda::engine()->is_capturing(stream)) return std::nullopt;
  return known[key] = try_libraries(device, arithmetic.dtype);
}

at::Tensor library_conv(const at::Tensor& src, const at::Tensor& weight, const at::Tensor& bias, const cuda::ConvPoolArgs& args,
                        bool applies_epilogue) {
  const std::array<int64_t, 2> stride{args.stride_h, args.stride_w}, padding{args.pad_top, args.pad_left}, ones{1, 1}, zeros{0, 0};
  if (!src.is_cuda()) {
    const at::Tensor sums = at::convolution(src, weight, applies_epilogue ? optional_tensor(bias) : std::nullopt, stride, padding,
                                            ones, /*transposed=*/false, zeros, /*groups=*/1);
    return applies_epilogue ? at::relu(sums) : sums;
  }
  if (applies_epilogue) return at::cudnn_convolution_relu(src, weight, optional_tensor(bias), stride, padding, ones, /*groups=*/1);
  auto& context = at::globalContext();
  return at::cudnn_convolution(src, weight, padding, stride, ones, /*groups=*/1, context.benchmarkCuDNN(),
                               context.deterministicCuDNN() || context.deterministicAlgorithms(),
                               context.allowTF32CuDNN(at::Float32Op::CONV));
}

void library_linear(at::Tensor& dst, const at::Tensor& src, const at::Tensor& weight, const at::Tensor& bias, bool has_relu,
                    bool trusts_relu) {
  const at::Tensor columns = weight.t();
  if (!bias.defined()) {
    at::mm_out(dst, src, columns);
  } else if (has_relu && trusts_relu) {
    at::_addmm_activation_out(dst, bias, src, columns, /*beta=*/1, /*alpha=*/1, /*use_gelu=*/false);
    return;
  } else {
    at::addmm_out(dst, bias, src, columns);
  }
  if (has_relu) at::relu_(dst);
}

}  // namespace fastseq
