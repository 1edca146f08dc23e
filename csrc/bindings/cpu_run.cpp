#include "bindings/cpu_run.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "bindings/output_memory.h"
#include "plan/fold.h"
#include "plan/timing.h"

namespace fastseq {
namespace {

constexpr size_t kMostPlans = 8;
// Weights up to this size are read whole to see whether they changed; of larger ones a sample of cache lines.
constexpr size_t kExactBytes = 64 * 1024;
// Less work than this keeps the interpreter's lock where no other Python thread could want it: to let go of it and take it again is
// a tenth of a microsecond. Where there are others it is let go of always, since a thread that has to ask for it waits for 5 ms.
constexpr double kShortMicroseconds = 20;

bool is_only_python_thread() {
  PyThreadState* const head = PyInterpreterState_ThreadHead(PyThreadState_GetInterpreter(PyThreadState_Get()));
  return !PyThreadState_Next(head);
}

// In the order of its dimensions; the tensor itself where it is so already.
at::Tensor as_floats(const at::Tensor& tensor) {
  const at::NoGradGuard no_grad;  // a graph would hold the parameter
  return tensor.contiguous().to(at::kFloat);
}

}  // namespace

CpuRun::CpuRun(const std::vector<StepSource>& steps, RunShape shape, const std::string& isa_cap, std::string forced_kernel,
               bool allows_winograd, bool computes_bf16, KernelTimings timings, bool times_kernels)
    : steps_(steps),
      shape_(shape),
      kernels_(cpu::select_isa(isa_cap)),
      bf16_(cpu::select_bf16(isa_cap)),
      forced_kernel_(std::move(forced_kernel)),
      allows_winograd_(allows_winograd),
      computes_bf16_(computes_bf16),
      timings_(std::move(timings)),
      times_kernels_(times_kernels) {
  if (!kernels_) throw std::invalid_argument("no kernels for ISA '" + isa_cap + "' on this machine");
}

// A call that reads parameters in place, for as long as it needs them to stay.
class CpuRun::Reading {
 public:
  explicit Reading(CpuRun& run) : run_(run) {
    if (run_.readers_process_ != getpid()) run_.readers_ = 0, run_.readers_process_ = getpid();
    ++run_.readers_;
  }
  ~Reading() { --run_.readers_; }
  Reading(const Reading&) = delete;
  Reading& operator=(const Reading&) = delete;

 private:
  CpuRun& run_;
};

bool CpuRun::is_reading() const { return readers_ > 0 && readers_process_ == getpid(); }

void CpuRun::forget_plans() {
  plans_.clear();
  packed_.clear();
  copies_.clear();
}

void CpuRun::forget() {
  forget_plans();
  last_plan_.reset();
}

int64_t CpuRun::packed_bytes() const {
  int64_t bytes = 0;
  for (const auto& [key, packed] : packed_) bytes += packed->bytes();
  for (const at::Tensor& copy : copies_)
    if (copy.defined()) bytes += static_cast<int64_t>(copy.nbytes());
  return bytes;
}

int64_t CpuRun::idle_scratch_bytes() const {
  int64_t bytes = 0;
  for (const Entry& entry : plans_) bytes += entry.plan->idle_scratch_bytes();
  return bytes;
}

void CpuRun::reserve_scratch(size_t calls) const {
  for (const Entry& entry : plans_) entry.plan->reserve_scratch(calls);
}

uint64_t CpuRun::fingerprint(const at::Tensor& tensor) const {
  const float* data = static_cast<const float*>(tensor.const_data_ptr());
  const size_t bytes = tensor.nbytes();  // dense in some order of its dimensions, so exactly this stretch of memory
  const auto count = static_cast<int64_t>(bytes / sizeof(float));  // of pairs, where the type has 16 bits
  const uint64_t hash = bytes <= kExactBytes ? kernels_->fingerprint(data, count) : kernels_->fingerprint_sample(data, count);
  if (bytes % sizeof(float) == 0) return hash;
  uint16_t last;
  std::memcpy(&last, data + count, sizeof last);
  return hash + last;
}

const CpuRun::Entry* CpuRun::find(const Signature& signature) {
  for (size_t i = 0; i < plans_.size(); ++i) {
    if (!(plans_[i].signature == signature)) continue;
    if (i > 0)
      std::rotate(plans_.begin(), plans_.begin() + static_cast<std::ptrdiff_t>(i),
                  plans_.begin() + static_cast<std::ptrdiff_t>(i) + 1);
    return &plans_.front();
  }
  return nullptr;
}

// The steps with their weights, and contiguous copies that live as long as this.
struct CpuRun::Layers {
  Layers(const CpuRun& run, const Signature& signature, const Parameters& parameters)
      : weights(parameters.weights()), biases(parameters.biases()) {
    sized = size_steps(run.steps_, weights, biases, signature, run.shape_);
    for (size_t i = 0; i < run.steps_.size(); ++i) {
      if (run.steps_[i].slopes >= 0) add_slopes(i, parameters);
      if (!weights[i].defined() && run.steps_[i].norm >= 0) {
        // A BatchNorm by itself: folded into ones.
        const int64_t channels = parameters.norm(i, 2).numel();
        weights[i] = at::detail::empty_cpu({channels}, at::kFloat, /*pin_memory=*/false, std::nullopt);
        std::fill_n(static_cast<float*>(weights[i].mutable_data_ptr()), channels, 1.0f);
        sized.specs[i].out = channels;
      }
      if (weights[i].defined()) weights[i] = as_floats(weights[i]);
      if (run.steps_[i].norm >= 0) fold(i, parameters, run.steps_[i].norm_eps);
      if (weights[i].defined()) sized.specs[i].weight = static_cast<const float*>(weights[i].const_data_ptr());
      if (!biases[i].defined()) continue;
      biases[i] = as_floats(biases[i]);
      sized.specs[i].bias = static_cast<const float*>(biases[i].const_data_ptr());
    }
  }

  // Replaces weight and bias of a step by copies with its BatchNorm in them, beside which the former weight stays.
  void fold(size_t i, const Parameters& parameters, double eps) {
    NormSpec norm;
    norm.eps = eps;
    at::Tensor norms[4];
    const float** const to[] = {&norm.weight, &norm.bias, &norm.mean, &norm.variance};
    for (size_t which = 0; which < 4; ++which) {
      if (!parameters.norm(i, which).defined()) continue;
      const at::Tensor& values = norms[which] = as_floats(parameters.norm(i, which));
      if (values.dim() != 1 || values.size(0) != sized.specs[i].out) throw Refusal("BatchNorm has another number of channels");
      *to[which] = static_cast<const float*>(values.const_data_ptr());
    }
    const at::Tensor weight = weights[i], bias = biases[i].defined() ? as_floats(biases[i]) : biases[i];
    const int64_t channels = sized.specs[i].out;
    weights[i] = at::detail::empty_cpu(weight.sizes(), at::kFloat, /*pin_memory=*/false, std::nullopt);
    biases[i] = at::detail::empty_cpu({channels}, at::kFloat, /*pin_memory=*/false, std::nullopt);
    const at::Tensor scale = at::detail::empty_cpu({channels}, at::kFloat, /*pin_memory=*/false, std::nullopt);
    fold_batch_norm(norm, channels, weight.numel() / channels, static_cast<const float*>(weight.const_data_ptr()),
                    bias.defined() ? static_cast<const float*>(bias.const_data_ptr()) : nullptr,
                    static_cast<float*>(weights[i].mutable_data_ptr()), static_cast<float*>(biases[i].mutable_data_ptr()),
                    static_cast<float*>(scale.mutable_data_ptr()));
    sized.specs[i].unfolded = static_cast<const float*>(weight.const_data_ptr());
    sized.specs[i].scale = static_cast<const float*>(scale.const_data_ptr());
    kept.push_back(weight), kept.push_back(scale);
  }

  void add_slopes(size_t i, const Parameters& parameters) {
    slopes.push_back(as_floats(parameters.slopes(i)));
    const at::Tensor& values = slopes.back();
    if (values.dim() > 1) throw Refusal("PReLU has a weight of more than one dimension");
    ActivationSpec& activation = sized.specs[i].activation;
    activation.slopes = static_cast<const float*>(values.const_data_ptr());
    activation.slope_count = values.numel();
  }

  std::vector<at::Tensor> weights, biases, slopes, kept;  // another thread may replace the parameters meanwhile
  SizedSteps sized;
};

PlanOptions CpuRun::plan_options(const Signature& signature, bool output_is_nhwc) const {
  PlanOptions options;
  options.kernels = kernels_;
  if ((computes_bf16_ && signature.dtype == at::kFloat) || signature.dtype == at::kBFloat16) options.bf16 = bf16_;
  options.forced_kernel = forced_kernel_;
  options.allows_winograd = allows_winograd_;
  options.timings = &timings_;
  options.output_is_nhwc = output_is_nhwc && !shape_.flattens_output;
  return options;
}

const CpuRun::Entry& CpuRun::plan_for(const Signature& signature, const Parameters& parameters) {
  if (const Entry* const entry = find(signature)) return *entry;
  const Layers layers(*this, signature, parameters);
  const PlanOptions options = plan_options(signature, layers.sized.output_is_nhwc);
  Entry entry{signature, Plan::build(signature.input_spec(), layers.sized.specs, options, packed_), options.output_is_nhwc};
  copies_.resize(steps_.size());
  for (size_t step : entry.plan->in_place())
    if (!copies_[step].defined() && !layers.weights[step].is_alias_of(parameters.weight(step)))
      copies_[step] = layers.weights[step];
  plans_.insert(plans_.begin(), std::move(entry));
  ++plans_made_;
  if (plans_.size() > kMostPlans) plans_.pop_back();
  return plans_.front();
}

void CpuRun::pack_again(const Parameters& parameters) {
  std::vector<Signature> signatures;
  for (const Entry& entry : plans_) signatures.push_back(entry.signature);
  forget_plans();
  for (auto signature = signatures.rbegin(); signature != signatures.rend(); ++signature) plan_for(*signature, parameters);
}

bool CpuRun::wants_timing(const Signature& signature) const {
  return times_kernels_ && std::find(timed_.begin(), timed_.end(), signature) == timed_.end();
}

void CpuRun::time_kernels(const InputView& view, const Parameters& parameters) {
  const Layers layers(*this, view.signature, parameters);
  const PlanOptions given = plan_options(view.signature, layers.sized.output_is_nhwc);
  const KernelTimings known = timings_;  // another thread's call may add to the other
  timed_.push_back(view.signature);
  KernelTimings timed;
  {
    const int threads = at::get_num_threads();
    const py::gil_scoped_release release;
    PlanOptions options = given;
    options.timings = &known;
    timed = fastseq::time_kernels(view.signature.input_spec(), layers.sized.specs, options, view.batch, threads);
  }
  timings_.merge(timed);
}

at::Tensor CpuRun::call(const at::Tensor& input, const InputView& view, const Parameters& parameters) {
  return run(plan_for(view.signature, parameters), input, view, &parameters);
}

std::optional<at::Tensor> CpuRun::call_as_planned(const at::Tensor& input, const InputView& view) {
  const Entry* const entry = find(view.signature);
  if (!entry || !entry->plan->in_place().empty()) return std::nullopt;
  return run(*entry, input, view, nullptr);
}

at::Tensor CpuRun::run(const Entry& entry, const at::Tensor& input, const InputView& view, const Parameters* parameters) {
  const OutputSpec& output = entry.plan->output();
  check_unbatched(view, shape_, output, entry.output_is_nhwc);

  const at::MemoryFormat format = view.signature.format();
  at::Tensor dense;
  if (!input.is_contiguous(format)) dense = input.contiguous(format);
  const at::Tensor& src = dense.defined() ? dense : input;
  std::optional<at::MemoryFormat> out_format;
  if (entry.output_is_nhwc && output.is_spatial) out_format = at::MemoryFormat::ChannelsLast;
  at::Tensor dst = empty_output(output_sizes(input, view, shape_, output), view.signature.dtype, out_format);

  // Storages and not tensors: those must not have more references, see ParameterState.
  std::vector<c10::Storage> storages;
  std::vector<const float*> weights;
  for (size_t step : entry.plan->in_place()) {
    const at::Tensor weight = copies_[step].defined() ? copies_[step] : parameters->weight(step);
    storages.push_back(weight.storage());
    weights.push_back(static_cast<const float*>(weight.const_data_ptr()));
  }
  std::optional<Reading> reading;
  if (!weights.empty()) reading.emplace(*this);

  if (last_plan_ != entry.plan) last_plan_ = entry.plan;
  const auto compute = [&](const Plan& plan, const at::Tensor& from, int threads) {
    RECORD_FUNCTION("fastseq::run", std::vector<c10::IValue>({from}));
    plan.run(from.const_data_ptr(), dst.mutable_data_ptr(), view.batch, threads, weights.data());
  };
  if (entry.plan->microseconds(view.batch) < kShortMicroseconds && is_only_python_thread()) {
    compute(*entry.plan, src, 1);
  } else {
    // Other threads may drop the plan meanwhile, and swap the input's tensor for another.
    const PlanPtr plan = entry.plan;
    const at::Tensor from = src;
    const py::gil_scoped_release release;
    compute(*plan, from, at::get_num_threads());
  }
  return dst;
}

}  // namespace fastseq
