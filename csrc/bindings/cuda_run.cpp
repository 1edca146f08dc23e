#include "bindings/cuda_run.h"

#include <ATen/Context.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <set>
#include <utility>

#include "bindings/cuda_library.h"
#include "plan/cuda_heuristics.h"

namespace fastseq {
namespace {

constexpr size_t kMostPlans = 64;  // they hold no weights

uint64_t random_magic() {
  static std::mutex mutex;
  static std::mt19937_64 generator{std::random_device{}()};
  const std::lock_guard<std::mutex> lock(mutex);
  return generator() | 1;
}

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

bool is_library_call(const CudaLaunch& launch) {
  return launch.kind == CudaLaunch::Kind::kCudnnConv || launch.kind == CudaLaunch::Kind::kCublasLinear;
}

bool uses_libraries(const CudaPlan& plan) { return std::any_of(plan.launches().begin(), plan.launches().end(), is_library_call); }

// Loads a plan's kernels and lets them have the device's shared memory, each once per device: no launch has to, which a captured
// call could not. device_properties() has loaded the one that packs weights. Throws Refusal for one that cannot be loaded.
void prepare_kernels(const CudaPlan& plan, c10::Device device) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> prepared;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto prepare_once = [&](const char* name, const void* kernel, const auto& prepare) {
    if (prepared.count({device.index(), kernel})) return;
    if (const cuda::Error error = prepare())
      throw Refusal("CUDA kernel " + std::string(name) + " cannot be loaded on " + device.str() + ": " + error);
    prepared.insert({device.index(), kernel});
  };
  const int shared_bytes = static_cast<int>(device_properties(device).shared_bytes_per_block);
  for (const CudaLaunch& launch : plan.launches()) {
    if (const auto* conv = launch.conv_kernel) prepare_once(conv->name, conv, [&] { return conv->prepare(); });
    if (const auto* chain = launch.chain_kernel) prepare_once(chain->name, chain, [&] { return chain->prepare(shared_bytes); });
    if (const auto* pool = launch.pool_kernel) prepare_once(pool->name, pool, [&] { return pool->prepare(); });
  }
}

std::vector<ChannelCounts> counts_of(const std::vector<StepSource>& steps, const Parameters& parameters) {
  std::vector<ChannelCounts> counts(steps.size());
  for (size_t i = 0; i < steps.size(); ++i) {
    if (steps[i].norm >= 0) {
      counts[i].norm = parameters.norm(i, 2).numel();
      for (size_t which = 0; which < 4; ++which) {
        const at::Tensor values = parameters.norm(i, which);
        if (values.defined() && (values.dim() != 1 || values.size(0) != counts[i].norm))
          throw Refusal("BatchNorm has another number of channels");
      }
    }
    if (steps[i].slopes >= 0) {
      const at::Tensor values = parameters.slopes(i);
      if (values.dim() > 1) throw Refusal("PReLU has a weight of more than one dimension");
      counts[i].slopes = values.numel();
    }
  }
  return counts;
}

// TF32 as eager would use it at this moment. torch's older getter for matrix products raises where the flag was set by its newer
// name, so it is not asked.
bool allows_tf32_linear() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) == at::Float32Precision::TF32;
}
bool allows_tf32_conv() {
  const auto& context = at::globalContext();
  return context.userEnabledCuDNN() ? context.allowTF32CuDNN(at::Float32Op::CONV)
                                    : allows_tf32_linear();  // a product without cuDNN
}
// NVIDIA's libraries never use TF32 in a process that starts with this.
bool is_tf32_overridden() {
  static const bool is_overridden = [] {
    const char* const value = std::getenv("NVIDIA_TF32_OVERRIDE");
    return value && std::strcmp(value, "0") == 0;
  }();
  return is_overridden;
}

}  // namespace

CudaPlanPtr make_cuda_plan(const std::vector<StepSource>& steps, const std::vector<at::Tensor>& weights,
                           const std::vector<at::Tensor>& biases, const std::vector<ChannelCounts>& counts,
                           const Signature& signature, const RunShape& shape, CudaPlanRequest& request) {
  if (shape.has_one_dimension) throw Refusal("convolutions and pools of one dimension on CUDA");
  for (const StepSource& step : steps) {
    const StepSpec& spec = step.spec;
    if (!spec.unflattened.empty()) throw Refusal("Unflatten on CUDA, which has no kernel for it");
    if (spec.pad_top || spec.pad_bottom || spec.pad_left || spec.pad_right)
      throw Refusal(spec.name + " on CUDA, which has no kernel for it");
  }
  const SizedSteps sized = size_steps(steps, weights, biases, signature, shape);
  std::vector<WeightLayout> layouts;
  for (size_t i = 0; i < steps.size(); ++i) {
    const at::Tensor& weight = weights[i];
    WeightLayout layout;
    layout.norm_channels = counts[i].norm, layout.slopes = counts[i].slopes;
    layout.norm_eps = static_cast<float>(steps[i].norm_eps);
    if (weight.defined()) {
      std::copy(weight.strides().begin(), weight.strides().end(), layout.strides);
      layout.is_aligned = weight.is_meta() || is_aligned(weight.const_data_ptr());
    }
    layouts.push_back(layout);
  }
  CudaOptions& options = request.options;
  const int arch = options.device.arch();
  const auto math = [&](bool allows_tf32) {
    if (request.dtype == at::kHalf) return cuda::Math::kF16;
    if (request.dtype == at::kBFloat16) return cuda::Math::kBF16;
    return allows_tf32 && arch >= 80 ? cuda::Math::kTf32 : cuda::Math::kIeee;
  };
  if (request.dtype == at::kBFloat16 && arch < 80) throw Refusal("bfloat16 on a CUDA device older than sm_80");
  options.conv_math = math(request.allows_tf32_conv);
  options.linear_math = math(request.allows_tf32_linear);
  options.output_is_nhwc = sized.output_is_nhwc && !shape.flattens_output;
  return CudaPlan::build(signature.input_spec(), sized.specs, layouts, options);
}

// A weight in another order. Its contents are the device's business; here it is known only which streams have seen which weight.
struct CudaRun::Copy {
  PackSpec spec;
  at::Tensor data, stamps;
  uint64_t magic = random_magic();
  uint64_t generation = 1;                       // counts the changes that versions and addresses tell of
  std::vector<std::pair<void*, uint64_t>> seen;  // the generation each stream has packed
  void* home = nullptr;                          // the stream it was allocated on
  bool is_captured = false;                      // a graph refers to it

  // Whether `stream` has to copy whatever a sample says; it will have.
  bool must_copy(void* stream) {
    for (auto& [known, packed] : seen)
      if (known == stream) return std::exchange(packed, generation) != generation;
    seen.emplace_back(stream, generation);
    return generation != 1;  // a new copy has no stamps: every stream finds that out by itself
  }
};

bool CudaRun::Key::operator==(const Key& o) const {
  return signature == o.signature && batch == o.batch && device == o.device && dtype == o.dtype &&
         allows_tf32_conv == o.allows_tf32_conv && allows_tf32_linear == o.allows_tf32_linear && allows_cudnn == o.allows_cudnn &&
         is_aligned == o.is_aligned;
}

CudaRun::CudaRun(const std::vector<StepSource>& steps, RunShape shape, std::string forced_kernel, bool checks)
    : steps_(steps), shape_(shape), forced_kernel_(std::move(forced_kernel)), checks_(checks) {}

void CudaRun::retire_copies() {
  for (CopyPtr& copy : copies_)
    if (copy->is_captured) retired_.push_back(std::move(copy));
  copies_.clear();
}

void CudaRun::forget() {
  plans_.clear();
  retire_copies();
  last_plan_.reset();
}

void CudaRun::follow(const Parameters& parameters) {
  if (parameters.largest_change() == Change::kLayout) return forget();
  for (const CopyPtr& copy : copies_)
    if (parameters.change(static_cast<size_t>(copy->spec.step)) != Change::kNone) ++copy->generation;
}

int64_t CudaRun::packed_bytes() const {
  int64_t bytes = 0;
  for (const auto* list : {&copies_, &retired_})
    for (const CopyPtr& copy : *list) bytes += static_cast<int64_t>(copy->data.nbytes());
  return bytes;
}

CudaRun::CopyPtr CudaRun::copy_for(const PackSpec& pack, const Key& key) {
  for (const CopyPtr& copy : copies_)
    if (copy->spec == pack && copy->data.device() == key.device && copy->data.scalar_type() == key.dtype) return copy;
  auto copy = std::make_shared<Copy>();
  copy->spec = pack;
  copy->data = allocate({pack.elements()}, key.dtype, key.device);
  copy->stamps = allocate({(pack.elements() + cuda::kPackSlice - 1) / cuda::kPackSlice}, at::kLong, key.device);
  copy->home = current_stream(key.device);
  copies_.push_back(copy);
  return copy;
}

std::shared_ptr<const CudaRun::Entry> CudaRun::plan_for(const Key& key, const Parameters& parameters, void* stream) {
  for (size_t i = 0; i < plans_.size(); ++i) {
    if (!(plans_[i]->key == key)) continue;
    if (i > 0)
      std::rotate(plans_.begin(), plans_.begin() + static_cast<std::ptrdiff_t>(i),
                  plans_.begin() + static_cast<std::ptrdiff_t>(i) + 1);
    return plans_.front();
  }
  CudaPlanRequest request;
  request.dtype = key.dtype;
  request.allows_tf32_conv = key.allows_tf32_conv, request.allows_tf32_linear = key.allows_tf32_linear;
  CudaOptions& options = request.options;
  options.engine = cuda::engine();
  options.device = device_properties(key.device);
  options.batch = key.batch;
  options.input_is_aligned = key.is_aligned;
  options.allows_cudnn = key.allows_cudnn;
  options.trusts_cudnn_relu = true;
  options.forced_kernel = forced_kernel_;
  const auto make = [&] {
    return make_cuda_plan(steps_, parameters.weights(), parameters.biases(), counts_of(steps_, parameters), key.signature, shape_,
                          request);
  };

  auto entry = std::make_shared<Entry>();
  entry->key = key;
  entry->plan = make();
  bool is_final = true;
  if (uses_libraries(*entry->plan)) {
    // Loading them takes longer than all else here, so they are tried only for plans that want them.
    const Arithmetic arithmetic{key.dtype, key.allows_tf32_conv, key.allows_tf32_linear};
    const std::optional<LibraryTraits> traits = library_traits(key.device, arithmetic, stream);
    is_final = traits.has_value();
    entry->trusts_cublas_relu = traits && traits->trusts_cublas_relu;
    if (!traits || !traits->has_cudnn || !traits->trusts_cudnn_relu) {
      options.allows_cudnn = key.allows_cudnn && traits && traits->has_cudnn;
      options.allows_cublas = traits.has_value();  // their handles cannot be made while a call is captured
      options.trusts_cudnn_relu = false;
      entry->plan = make();
    }
  }
  entry->output_is_nhwc = options.output_is_nhwc;
  for (const PackSpec& pack : entry->plan->packs()) entry->copies.push_back(copy_for(pack, key));
  prepare_kernels(*entry->plan, key.device);
  ++plans_made_;
  if (!is_final) return entry;
  plans_.push_front(entry);
  if (plans_.size() > kMostPlans) plans_.pop_back();
  return entry;
}

// One call: where its operands are, and its launches in order. Needs no GIL.
class CudaRun::Call {
 public:
  Call(const Entry& entry, const at::Tensor& src, at::Tensor dst, const Parameters& parameters, void* stream, bool checks)
      : entry_(entry),
        plan_(*entry.plan),
        engine_(*cuda::engine()),
        src_(src),
        dst_(std::move(dst)),
        stream_(stream),
        checks_(checks) {
    // Everything that needs the GIL: the weights' addresses, or tensors of them for the libraries.
    for (const CudaLaunch& launch : plan_.launches()) {
      const size_t count = launch.kind == CudaLaunch::Kind::kChain ? static_cast<size_t>(launch.chain.count) : 1;
      Operands operands;
      for (size_t i = 0; i < count; ++i) {
        const size_t step = static_cast<size_t>(launch.step) + i;
        operands.weights[i] = parameters.weight_data(step);
        // Without the GIL another thread may replace a parameter: its memory must not be handed out again before the launch.
        kept_.push_back(parameters.weight(step));
        kept_.push_back(parameters.bias(step));
        operands.biases[i] = launch.takes_bias ? parameters.bias_data(step) : nullptr;
        operands.finishes[i] = with_tensors(finish_of(launch, i), step, parameters);
        const int packed = launch.kind == CudaLaunch::Kind::kChain ? launch.chain_packs[i] : launch.packed;
        if (packed >= 0) operands.weights[i] = entry_.copies[static_cast<size_t>(packed)]->data.const_data_ptr();
      }
      if (is_library_call(launch)) {
        operands.weight = parameters.weight(static_cast<size_t>(launch.step));
        operands.bias = parameters.bias(static_cast<size_t>(launch.step));
      }
      operands_.push_back(std::move(operands));
    }
    const bool is_capturing = engine_.is_capturing(stream);
    for (size_t i = 0; i < entry_.copies.size(); ++i) {
      Copy& copy = *entry_.copies[i];
      jobs_.push_back(job_for(plan_.packs()[i], copy, parameters, is_capturing));
    }
    is_capturing_ = is_capturing;
  }

  at::Tensor run() {
    if (plan_.arena_elements() > 0) arena_ = allocate({plan_.arena_elements()}, src_.scalar_type(), src_.device());
    pack_before();
    for (size_t i = 0; i < plan_.launches().size(); ++i) {
      const CudaLaunch& launch = plan_.launches()[i];
      switch (launch.kind) {
        case CudaLaunch::Kind::kConv:
          launch_conv(launch, operands_[i], static_cast<int>(i) == plan_.packing_launch());
          break;
        case CudaLaunch::Kind::kChain:
          launch_chain(launch, operands_[i]);
          break;
        case CudaLaunch::Kind::kPool:
          launch_pool(launch, operands_[i]);
          break;
        case CudaLaunch::Kind::kCudnnConv:
        case CudaLaunch::Kind::kCublasLinear:
          call_library(launch, operands_[i]);
          break;
      }
      if (is_library_call(launch)) check(nullptr, launch.kernel);
    }
    return plan_.launches().back().dst.place == Operand::Place::kHeld ? held_ : dst_;
  }

 private:
  struct Operands {
    const void* weights[cuda::kMostLayers] = {};
    const void* biases[cuda::kMostLayers] = {};
    cuda::Finish finishes[cuda::kMostLayers];
    at::Tensor weight, bias;  // for library calls
  };

  static const cuda::Finish& finish_of(const CudaLaunch& launch, size_t layer) {
    if (launch.kind == CudaLaunch::Kind::kChain) return launch.chain.layers[layer].finish;
    return launch.kind == CudaLaunch::Kind::kPool ? launch.pool.finish : launch.conv.finish;
  }

  // The plan's epilogue with the tensors that it reads.
  cuda::Finish with_tensors(cuda::Finish finish, size_t step, const Parameters& parameters) {
    const auto data = [&](const at::Tensor& tensor) -> const void* {
      if (!tensor.defined()) return nullptr;
      kept_.push_back(tensor);
      return tensor.const_data_ptr();
    };
    if (finish.has_norm) {
      finish.gain = data(parameters.norm(step, 0)), finish.shift = data(parameters.norm(step, 1));
      finish.mean = data(parameters.norm(step, 2)), finish.variance = data(parameters.norm(step, 3));
    }
    if (finish.kind == Activation::kPrelu) finish.slopes = data(parameters.slopes(step));
    return finish;
  }

  cuda::PackJob job_for(const PackSpec& pack, Copy& copy, const Parameters& parameters, bool is_capturing) {
    cuda::PackJob job;
    job.src = parameters.weight_data(static_cast<size_t>(pack.step));
    job.dst = copy.data.mutable_data_ptr();
    job.stamps = static_cast<uint64_t*>(copy.stamps.mutable_data_ptr());
    job.magic = copy.magic;
    std::copy(pack.sizes, pack.sizes + 4, job.sizes);
    std::copy(pack.strides, pack.strides + 4, job.strides);
    job.valid = pack.valid;
    // A captured call may run after any change: it compares everything, each time.
    job.is_forced = !is_capturing && copy.must_copy(stream_);
    const int64_t bytes = pack.elements() * static_cast<int64_t>(src_.element_size());
    job.samples = is_capturing || bytes <= kExactPackBytes ? 0 : kPackSamples;
    copy.is_captured |= is_capturing;
    if (copy.home != stream_ && src_.is_cuda()) {
      // Freed while another stream may still read it: the allocator must know.
      const c10::impl::VirtualGuardImpl guard(src_.device().type());
      const c10::Stream stream = guard.getStream(src_.device());
      guard.recordDataPtrOnStream(copy.data.storage().data_ptr(), stream);
      guard.recordDataPtrOnStream(copy.stamps.storage().data_ptr(), stream);
    }
    return job;
  }

  void* address(const Operand& operand) const {
    char* base = nullptr;
    switch (operand.place) {
      case Operand::Place::kSrc:
        return const_cast<void*>(src_.const_data_ptr());
      case Operand::Place::kDst:
        return dst_.mutable_data_ptr();
      case Operand::Place::kArena:
        base = static_cast<char*>(arena_.mutable_data_ptr());
        return base + operand.offset * static_cast<int64_t>(src_.element_size());
      case Operand::Place::kHeld:
        return held_.mutable_data_ptr();
    }
    return nullptr;
  }

  void check(cuda::Error error, const std::string& kernel) const {
    if (!error && checks_ && !is_capturing_) error = engine_.last_error(stream_);
    TORCH_CHECK(
        !error, "fastseq: CUDA kernel ", kernel, " failed on ", src_.device(), ", input ", src_.sizes(), ": ", error,
        checks_ ? "" : ". Errors of kernels that ran before are told here too; FASTSEQ_CHECK=1 waits for each and names it");
  }

  cuda::PackArgs pack_args(size_t first, size_t last) const {
    cuda::PackArgs args;
    args.element_bytes = static_cast<int>(src_.element_size());
    for (size_t i = first; i < last; ++i) args.jobs[args.count++] = jobs_[i];
    return args;
  }

  void pack_before() const {
    const size_t count = static_cast<size_t>(plan_.packs_before());
    for (size_t i = 0; i < count; i += cuda::kMostPackJobs)
      check(engine_.pack(pack_args(i, std::min(count, i + cuda::kMostPackJobs)), stream_), "pack_weights");
  }

  void launch_conv(const CudaLaunch& launch, const Operands& operands, bool packs_aside) const {
    cuda::ConvPoolArgs args = launch.conv;
    args.src = address(launch.src), args.dst = address(launch.dst);
    args.weight = operands.weights[0], args.bias = operands.biases[0];
    args.finish = operands.finishes[0];
    if (packs_aside) args.pack = pack_args(static_cast<size_t>(plan_.packs_before()), jobs_.size());
    check(launch.conv_kernel->launch(args, stream_), launch.kernel);
  }

  void launch_chain(const CudaLaunch& launch, const Operands& operands) const {
    cuda::ChainArgs args = launch.chain;
    args.src = address(launch.src), args.dst = address(launch.dst);
    for (int i = 0; i < args.count; ++i) {
      cuda::ChainArgs::Layer& layer = args.layers[i];
      layer.weight = operands.weights[i], layer.bias = operands.biases[i], layer.finish = operands.finishes[i];
    }
    check(launch.chain_kernel->launch(args, stream_), launch.kernel);
  }

  void launch_pool(const CudaLaunch& launch, const Operands& operands) const {
    cuda::MaxPoolArgs args = launch.pool;
    args.src = address(launch.src), args.dst = address(launch.dst);
    args.bias = operands.biases[0], args.finish = operands.finishes[0];
    check(launch.pool_kernel->launch(args, stream_), launch.kernel);
  }

  // Where the library declines, a shape it has no engine for or memory it does not get, eager takes over and has the last word.
  void call_library(const CudaLaunch& launch, const Operands& operands) {
    try {
      if (launch.kind == CudaLaunch::Kind::kCublasLinear) return launch_cublas(launch, operands);
      held_ = library_conv(source_images(launch), weight_images(launch, operands), operands.bias, launch.conv, launch.has_relu)
                  .contiguous(launch.is_nhwc ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);  // as it is already
    } catch (const c10::Error&) {
      throw Refusal("torch's " + launch.kernel + " raised an error for these shapes");
    }
  }

  at::Tensor source_images(const CudaLaunch& launch) const {
    const cuda::ConvPoolArgs& a = launch.conv;
    if (launch.src.place == Operand::Place::kHeld) return held_;
    return view_of(address(launch.src), {a.batch, a.c_in, a.h_in, a.w_in},
                   {a.src_image_stride, a.src_c_stride, a.src_h_stride, a.src_w_stride}, src_);
  }

  at::Tensor weight_images(const CudaLaunch& launch, const Operands& operands) const {
    if (launch.packed < 0) return operands.weight;
    const cuda::ConvPoolArgs& a = launch.conv;
    const int64_t n = a.c_out, c = a.c_in, h = a.k_h, w = a.k_w;
    void* const data = const_cast<void*>(operands.weights[0]);
    if (launch.is_nhwc) return view_of(data, {n, c, h, w}, {c * h * w, 1, w * c, c}, src_);
    return view_of(data, {n, c, h, w}, {c * h * w, h * w, w, 1}, src_);
  }

  void launch_cublas(const CudaLaunch& launch, const Operands& operands) const {
    const int64_t rows = launch.conv.batch, k = launch.conv.c_in, n = launch.conv.c_out;
    const at::Tensor src = view_of(address(launch.src), {rows, k}, {k, 1}, src_);
    at::Tensor dst = view_of(address(launch.dst), {rows, n}, {n, 1}, src_);
    const at::Tensor weight =
        launch.packed < 0 ? operands.weight : view_of(const_cast<void*>(operands.weights[0]), {n, k}, {k, 1}, src_);
    library_linear(dst, src, weight, operands.bias, launch.has_relu, entry_.trusts_cublas_relu);
  }

  const Entry& entry_;
  const CudaPlan& plan_;
  const cuda::Engine& engine_;
  const at::Tensor& src_;
  at::Tensor dst_, arena_, held_;
  void* const stream_;
  const bool checks_;
  bool is_capturing_ = false;
  c10::SmallVector<Operands, 4> operands_;
  c10::SmallVector<at::Tensor, 8> kept_;
  c10::SmallVector<cuda::PackJob, 4> jobs_;
};

at::Tensor CudaRun::call(const at::Tensor& input, const InputView& view, const Parameters& parameters) {
  const c10::Device device = input.device();
  const c10::DeviceGuard guard(device);

  const cuda::DeviceProperties& properties = device_properties(device);
  if (properties.unusable)
    throw Refusal("the CUDA kernels of this build, for " + std::string(cuda::engine()->architectures) + ", do not run on " +
                  device.str() + ", sm_" + std::to_string(properties.arch()) + ": " + properties.unusable);
  const at::MemoryFormat format = view.signature.format();
  at::Tensor src = input.is_contiguous(format) ? input : input.contiguous(format);
  Key key;
  key.signature = view.signature;
  key.batch = view.batch;
  key.device = device;
  key.dtype = input.scalar_type();
  if (key.dtype == at::kFloat && !is_tf32_overridden()) {
    key.allows_tf32_conv = view.signature.is_spatial && allows_tf32_conv();
    key.allows_tf32_linear = allows_tf32_linear();
  }
  key.allows_cudnn = view.signature.is_spatial && at::globalContext().userEnabledCuDNN();
  key.is_aligned = is_aligned(src.const_data_ptr());

  void* const stream = current_stream(device);
  const std::shared_ptr<const Entry> entry = plan_for(key, parameters, stream);
  const OutputSpec& output = entry->plan->output();
  check_unbatched(view, shape_, output, entry->output_is_nhwc);

  const Sizes sizes = output_sizes(input, view, shape_, output);
  const bool is_nhwc = entry->output_is_nhwc && output.is_spatial;
  at::Tensor dst;
  if (entry->plan->launches().back().dst.place != Operand::Place::kHeld)
    dst = allocate(sizes, key.dtype, device, is_nhwc ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  last_plan_ = entry->plan;
  Call call(*entry, src, std::move(dst), parameters, stream, checks_);
  at::Tensor result;
  {
    py::gil_scoped_release release;
    RECORD_FUNCTION("fastseq::run", std::vector<c10::IValue>({src}));
    result = call.run();
  }
  return result.sizes().equals(sizes) ? result : result.view(sizes);
}

}  // namespace fastseq
