#include "bindings/native_run.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <set>

namespace fastseq {
namespace {

constexpr size_t kMostPlans = 8;
// Weights up to this size are read whole to see whether they changed; of larger ones a sample of cache lines.
constexpr int64_t kExactFloats = 16 * 1024;
constexpr int64_t kSampleLines = 64, kLineFloats = 16;

// Reasons must outlive the call that gives them: they are counted by pointer and shown later. There are few different ones.
Reason lasting(const std::string& text) {
  static auto* const texts = new std::set<std::string>;
  return texts->insert(text).first->c_str();
}

bool is_channels_last(const at::Tensor& tensor) {
  return tensor.dim() == 4 && tensor.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
}

// Whether eager's result is in channels_last order: a convolution takes the order of its input or weight, and ReLU out of place
// gives the contiguous one where both orders are the same in memory.
class FormatTracker {
 public:
  FormatTracker(int64_t channels, int64_t h, int64_t w, bool is_nhwc) : channels_(channels), h_(h), w_(w), is_nhwc_(is_nhwc) {}

  void step(const StepSpec& spec, bool weight_is_nhwc) {
    if (spec.op == Op::kLinear) return;
    if (spec.op == Op::kConv2d) {
      is_nhwc_ = is_nhwc_ || weight_is_nhwc;
      channels_ = spec.out;
      h_ = conv_size(h_, spec.conv.k_h, spec.conv.stride_h, spec.conv.pad_top, spec.conv.pad_bottom);
      w_ = conv_size(w_, spec.conv.k_w, spec.conv.stride_w, spec.conv.pad_left, spec.conv.pad_right);
    }
    if (!spec.pools_before_relu) relu(spec);
    if (spec.has_pool || spec.op == Op::kMaxPool2d) {
      h_ = pool_size(h_, spec.pool.k_h, spec.pool.stride_h, spec.pool.pad_top, spec.pool.ceil_mode);
      w_ = pool_size(w_, spec.pool.k_w, spec.pool.stride_w, spec.pool.pad_left, spec.pool.ceil_mode);
    }
    if (spec.pools_before_relu) relu(spec);
    // The strides of a single element are those of both orders, and eager takes that for contiguous.
    if (channels_ * h_ * w_ == 1) is_nhwc_ = false;
  }
  bool is_nhwc() const { return is_nhwc_; }

 private:
  void relu(const StepSpec& spec) {
    if (spec.has_relu && !spec.relu_is_in_place && (channels_ == 1 || h_ * w_ == 1)) is_nhwc_ = false;
  }

  int64_t channels_, h_, w_;
  bool is_nhwc_;
};

}  // namespace

NativeRun::NativeRun(std::vector<StepSource> steps, std::vector<std::shared_ptr<ModuleWatch>> watches, bool flattens_input,
                     bool flattens_output, const std::string& isa_cap, const std::string& forced_kernel)
    : steps_(std::move(steps)),
      watches_(std::move(watches)),
      flattens_input_(flattens_input),
      flattens_output_(flattens_output),
      kernels_(cpu::select_isa(isa_cap)),
      forced_kernel_(forced_kernel) {
  if (!kernels_) throw std::invalid_argument("no kernels for ISA '" + isa_cap + "' on this machine");
  for (const StepSource& step : steps_)
    if (step.layer >= 0) parameters_.resize(parameters_.size() + 2);
}

WatchResult NativeRun::check() const {
  for (const auto& watch : watches_) {
    const WatchResult result = watch->check();
    if (result != WatchResult::kSame) return result;
  }
  return WatchResult::kSame;
}

void NativeRun::refresh() {
  plans_.clear();
  packed_.clear();
  last_plan_.reset();
  for (ParameterState& state : parameters_) state = ParameterState();
}

int NativeRun::traverse(visitproc visit, void* arg) const {
  for (const auto& watch : watches_)
    if (const int stop = watch->traverse(visit, arg)) return stop;
  for (const ParameterState& state : parameters_) Py_VISIT(state.object.ptr());
  return 0;
}

int64_t NativeRun::packed_bytes() const {
  int64_t bytes = 0;
  for (const auto& [key, packed] : packed_) bytes += packed->bytes();
  return bytes;
}

uint64_t NativeRun::fingerprint(const at::Tensor& tensor) const {
  const float* data = static_cast<const float*>(tensor.const_data_ptr());
  const int64_t count = tensor.numel();  // dense in some order of its dimensions, so exactly this stretch of memory
  if (count <= kExactFloats) return kernels_->fingerprint(data, count, 0);
  uint64_t hash = 0;
  for (int64_t i = 0; i < kSampleLines; ++i) {
    const int64_t at = (count - kLineFloats) * i / (kSampleLines - 1);
    hash = kernels_->fingerprint(data + at, kLineFloats, hash);
  }
  return hash;
}

bool NativeRun::is_fresh(const ParameterState& state, PyObject* object) const {
  if (!object || object != state.object.ptr()) return false;
  if (object == Py_None) return true;
  const at::Tensor* tensor = exact_tensor(object);
  return tensor && tensor->unsafeGetTensorImpl() == state.tensor && !refuse_tensor(*tensor, true) &&
         tensor->const_data_ptr() == state.data && version_of(*tensor) == state.version && tensor->sizes().equals(state.sizes) &&
         tensor->strides().equals(state.strides) && fingerprint(*tensor) == state.fingerprint;
}

Reason NativeRun::adopt(ParameterState& state, PyObject* object, bool is_required) {
  state = ParameterState();
  if (!object) return "a layer has lost a parameter";
  if (object == Py_None) {
    if (is_required) return "a layer has no weight";
    state.object = py::none();
    return nullptr;
  }
  const at::Tensor* tensor = exact_tensor(object);
  if (!tensor) return "a parameter is not a plain torch.Tensor or Parameter";
  if (Reason reason = refuse_tensor(*tensor, true)) return reason;
  if (!tensor->is_non_overlapping_and_dense() || tensor->numel() == 0) return "a parameter is empty, or not dense in memory";
  state.tensor = tensor->unsafeGetTensorImpl();
  state.data = tensor->const_data_ptr();
  state.version = version_of(*tensor);
  state.sizes = tensor->sizes().vec();
  state.strides = tensor->strides().vec();
  state.fingerprint = fingerprint(*tensor);
  state.object = py::reinterpret_borrow<py::object>(object);
  return nullptr;
}

Reason NativeRun::check_parameters(bool records_grad) {
  size_t slot = 0;
  for (const StepSource& step : steps_) {
    if (step.layer < 0) continue;
    for (size_t which = 0; which < 2; ++which, ++slot) {
      ParameterState& state = parameters_[slot];
      PyObject* const object = watches_[static_cast<size_t>(step.layer)]->parameter(which);
      if (!is_fresh(state, object)) {
        plans_.clear();
        packed_.clear();
        if (Reason reason = adopt(state, object, which == 0)) return reason;
      }
      if (records_grad && state.tensor && exact_tensor(object)->requires_grad())
        return "gradients are being recorded (a parameter requires grad); use torch.no_grad() or inference_mode()";
    }
  }
  return nullptr;
}

const NativeRun::Entry& NativeRun::plan_for(const Signature& signature) {
  for (size_t i = 0; i < plans_.size(); ++i) {
    if (!(plans_[i].signature == signature)) continue;
    if (i > 0)
      std::rotate(plans_.begin(), plans_.begin() + static_cast<std::ptrdiff_t>(i),
                  plans_.begin() + static_cast<std::ptrdiff_t>(i) + 1);
    return plans_.front();
  }
  std::vector<StepSpec> specs;
  std::vector<at::Tensor> kept;  // contiguous copies live until the weights are packed
  FormatTracker format(signature.channels, signature.h, signature.w, signature.is_nhwc);
  size_t slot = 0;
  for (const StepSource& step : steps_) {
    StepSpec spec = step.spec;
    bool weight_is_nhwc = false;
    if (step.layer >= 0) {
      const at::Tensor weight = *exact_tensor(parameters_[slot].object.ptr());
      PyObject* const bias_object = parameters_[slot + 1].object.ptr();
      const at::Tensor bias = bias_object == Py_None ? at::Tensor() : *exact_tensor(bias_object);
      slot += 2;
      const int64_t rank = spec.op == Op::kConv2d ? 4 : 2;
      if (weight.dim() != rank) throw Refusal(spec.name + " weight has " + std::to_string(weight.dim()) + " dimensions");
      spec.out = weight.size(0), spec.in = weight.size(1);
      if (bias.defined() && (bias.dim() != 1 || bias.size(0) != spec.out))
        throw Refusal(spec.name + " bias does not fit its weight");
      if (spec.op == Op::kConv2d) {
        spec.conv.k_h = weight.size(2), spec.conv.k_w = weight.size(3);
        if (step.pads_same) {
          if (spec.conv.stride_h != 1 || spec.conv.stride_w != 1)
            throw Refusal("padding='same' with a stride, which eager rejects");
          // An even kernel pads one more behind than before, as F.conv2d does.
          spec.conv.pad_top = (spec.conv.k_h - 1) / 2, spec.conv.pad_bottom = spec.conv.k_h - 1 - spec.conv.pad_top;
          spec.conv.pad_left = (spec.conv.k_w - 1) / 2, spec.conv.pad_right = spec.conv.k_w - 1 - spec.conv.pad_left;
        }
        weight_is_nhwc = is_channels_last(weight);
      }
      kept.push_back(weight.contiguous());
      spec.weight = static_cast<const float*>(kept.back().const_data_ptr());
      if (bias.defined()) {
        kept.push_back(bias.contiguous());
        spec.bias = static_cast<const float*>(kept.back().const_data_ptr());
      }
    }
    if (signature.is_spatial) format.step(spec, weight_is_nhwc);
    specs.push_back(std::move(spec));
  }
  InputSpec input;
  input.is_spatial = signature.is_spatial;
  input.channels = signature.channels, input.h = signature.h, input.w = signature.w;
  input.is_nhwc = signature.is_nhwc;
  input.features = signature.features;
  PlanOptions options;
  options.kernels = kernels_;
  options.forced_kernel = forced_kernel_;
  options.output_is_nhwc = format.is_nhwc() && !flattens_output_;
  Entry entry{signature, Plan::build(input, specs, options, packed_), options.output_is_nhwc};
  plans_.insert(plans_.begin(), std::move(entry));
  ++plans_made_;
  if (plans_.size() > kMostPlans) plans_.pop_back();
  return plans_.front();
}

Outcome NativeRun::call(PyObject* object) {
  Outcome outcome;
  const at::Tensor* const input = exact_tensor(object);
  if (!input) return {{}, "the input is not a plain torch.Tensor"};
  if ((outcome.reason = active_mode()) || (outcome.reason = refuse_tensor(*input, false))) return outcome;
  const bool records_grad = at::GradMode::is_enabled();
  if (records_grad && input->requires_grad())
    return {{}, "gradients are being recorded (the input requires grad); use torch.no_grad() or inference_mode()"};

  Signature signature;
  const bool is_first_spatial = steps_.front().spec.op != Op::kLinear;
  const int64_t rank = input->dim();
  if (input->numel() == 0) return {{}, "the input is empty"};
  bool is_unbatched = false;
  int64_t batch = 1;
  if (is_first_spatial) {
    if (rank != 3 && rank != 4) return {{}, "the input of a convolution or pool has neither 3 nor 4 dimensions"};
    is_unbatched = rank == 3;
    signature.is_spatial = true;
    signature.is_nhwc = is_channels_last(*input);
    batch = is_unbatched ? 1 : input->size(0);
    signature.channels = input->size(rank - 3), signature.h = input->size(rank - 2), signature.w = input->size(rank - 1);
  } else if (flattens_input_) {
    if (rank < 2) return {{}, "Flatten needs an input of at least 2 dimensions"};
    batch = input->size(0);
    signature.features = input->numel() / batch;
  } else {
    if (rank < 1) return {{}, "linear needs an input of at least 1 dimension"};
    if (rank > 2 && !input->is_contiguous()) return {{}, "a non-contiguous input of more than 2 dimensions to linear"};
    signature.features = input->size(rank - 1);
    batch = input->numel() / signature.features;
  }

  if ((outcome.reason = check_parameters(records_grad))) return outcome;
  const Entry* entry;
  try {
    entry = &plan_for(signature);
  } catch (const Refusal& refusal) {
    return {{}, lasting(refusal.what())};
  }
  const PlanPtr plan = entry->plan;
  const OutputSpec& output = plan->output();
  // Eager drops the batch dimension of a channels_last result and keeps its strides; rare enough to leave to eager.
  if (is_unbatched && (entry->output_is_nhwc || flattens_output_ || !output.is_spatial))
    return {{}, "an unbatched input with channels_last weights or Flatten"};

  const at::MemoryFormat format = signature.is_nhwc ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const at::Tensor src = input->is_contiguous(format) ? *input : input->contiguous(format);

  c10::SmallVector<int64_t, 5> sizes;
  if (output.is_spatial && !flattens_output_) {
    if (!is_unbatched) sizes.push_back(batch);
    sizes.append({output.channels, output.h, output.w});
  } else if (output.is_spatial) {
    sizes.append({batch, output.channels * output.h * output.w});
  } else {
    if (is_first_spatial || flattens_input_) {
      sizes.push_back(batch);
    } else {
      sizes.append(input->sizes().begin(), input->sizes().end() - 1);
    }
    sizes.push_back(output.features);
  }
  std::optional<at::MemoryFormat> out_format;
  if (entry->output_is_nhwc && output.is_spatial) out_format = at::MemoryFormat::ChannelsLast;
  at::Tensor dst = at::detail::empty_cpu(sizes, at::kFloat, /*pin_memory=*/false, out_format);

  last_plan_ = plan;
  {
    py::gil_scoped_release release;
    RECORD_FUNCTION("fastseq::run", std::vector<c10::IValue>({src}));
    plan->run(static_cast<const float*>(src.const_data_ptr()), static_cast<float*>(dst.mutable_data_ptr()), batch,
              at::get_num_threads());
  }
  outcome.value = std::move(dst);
  return outcome;
}

}  // namespace fastseq
