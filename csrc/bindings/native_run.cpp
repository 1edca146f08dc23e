#include "bindings/native_run.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <new>
#include <thread>

namespace fastseq {
namespace {

constexpr Reason kWait = "no plan for this input without the weights that are being loaded";
constexpr Reason kSlower = "eager was faster for such an input in the trial of optimize(example_input=...)";
constexpr Reason kNoMemory = "not enough memory for a fused run";
// A call that has to wait for a load looks this often, and goes on with the weights as they are after this long.
constexpr std::chrono::microseconds kLoadPoll(200);
constexpr std::chrono::seconds kLongestLoad(10);

}  // namespace

NativeRun::NativeRun(std::vector<StepSource> steps, std::vector<std::shared_ptr<ModuleWatch>> watches, RunShape shape,
                     const RunOptions& options)
    : steps_(std::move(steps)),
      watches_(std::move(watches)),
      shape_(shape),
      parameters_(steps_, watches_),
      cpu_(steps_, shape_, options.isa_cap, options.forced_kernel, options.allows_winograd, options.computes_bf16, options.timings,
           options.times_kernels),
      cuda_(steps_, shape_, options.forced_kernel, options.checks) {}

WatchResult NativeRun::check() const {
  for (const auto& watch : watches_) {
    const WatchResult result = watch->check();
    if (result != WatchResult::kSame) return result;
  }
  return WatchResult::kSame;
}

void NativeRun::refresh() {
  cpu_.forget();
  cuda_.forget();
  parameters_.forget();
}

void NativeRun::leave_to_eager(const at::Tensor& example) {
  InputView view;
  if (!read_input(example, shape_, view)) slower_.push_back(view);
}

void NativeRun::hold(py::object load) {
  if (load_.is(load)) return;       // which has begun to change the weights
  if (held() != Held::kNo) return;  // an earlier load says when the weights are whole again
  std::vector<py::object> replaced;
  if (cpu_.has_plans()) {
    // What is packed may be older than this moment.
    const at::Tensor probe = at::detail::empty_cpu({1}, cpu_.dtype(), /*pin_memory=*/false, std::nullopt);
    const auto fingerprint = [this](const at::Tensor& tensor) { return cpu_.fingerprint(tensor); };
    const Reason refused = parameters_.check(probe, false, fingerprint, replaced);
    if (parameters_.largest_change() != Change::kNone) {
      cuda_.follow(parameters_);
      try {
        refused ? cpu_.forget_plans() : cpu_.pack_again(parameters_);
      } catch (const std::exception&) {  // what these weights do not fit, or no memory: load_state_dict must go on
        cpu_.forget_plans();
      }
    }
  }
  load_ = std::move(load);
  // Calls that begin from now on wait for the load if they read its weights in place. Those that have begun are waited for.
  const auto start = std::chrono::steady_clock::now();
  while (cpu_.is_reading() && std::chrono::steady_clock::now() - start < kLongestLoad) {
    const py::gil_scoped_release release;
    std::this_thread::sleep_for(kLoadPoll);
  }
}

NativeRun::Held NativeRun::held() {
  while (load_) {
    const py::object load = load_;  // while it is asked, the next load may begin in its thread
    const py::object answer = load();
    if (answer.is_none()) return Held::kByThis;
    if (answer.cast<bool>()) return Held::kByOther;
    if (load_.is(load)) load_ = py::object();
  }
  return Held::kNo;
}

Outcome NativeRun::call_held(const at::Tensor& input, const InputView& view, bool records_grad) {
  if (records_grad) return {{}, "weights are being loaded while gradients are recorded"};
  try {
    if (std::optional<at::Tensor> result = cpu_.call_as_planned(input, view)) return {*result, nullptr};
  } catch (const Refusal&) {  // for eager, which is to see whole weights: when they are loaded
  } catch (const std::bad_alloc&) {
    return {{}, kNoMemory};
  } catch (const c10::Error&) {
    return {{}, kNoMemory};
  }
  return {{}, kWait};
}

int NativeRun::traverse(visitproc visit, void* arg) const {
  Py_VISIT(load_.ptr());
  for (const auto& watch : watches_)
    if (const int stop = watch->traverse(visit, arg)) return stop;
  return parameters_.traverse(visit, arg);
}

std::optional<NativeRun::Description> NativeRun::describe_last_plan() const {
  if (const PlanPtr plan = cpu_.last_plan()) {
    Description description{plan->describe(), plan->scratch_bytes()};
    // Maps of one row, 20x1x9, are what the user has as 20x9.
    if (shape_.has_one_dimension)
      for (StepInfo& step : description.steps)
        if (const size_t row = step.output.find("x1x"); row != std::string::npos) step.output.erase(row, 2);
    return description;
  }
  if (const CudaPlanPtr plan = cuda_.last_plan()) return Description{plan->describe(), plan->arena_bytes()};
  return std::nullopt;
}

Outcome NativeRun::call(PyObject* object) {
  const at::Tensor* const input = exact_tensor(object);
  if (!input) return {{}, "the input is not a plain torch.Tensor"};
  const Backend backend = backend_of(*input);
  Reason reason = nullptr;
  if ((reason = active_mode(input->device().type())) || (reason = refuse_input(*input, backend))) return {{}, reason};
  const bool records_grad = at::GradMode::is_enabled();
  if (records_grad && input->requires_grad())
    return {{}, "gradients are being recorded (the input requires grad); use torch.no_grad() or inference_mode()"};
  InputView view;
  if ((reason = read_input(*input, shape_, view))) return {{}, reason};
  if (backend == Backend::kCpu && std::find(slower_.begin(), slower_.end(), view) != slower_.end()) return {{}, kSlower};

  if (load_ && backend == Backend::kCpu) {
    const auto start = std::chrono::steady_clock::now();
    bool has_waited = false;
    for (Held by; (by = held()) != Held::kNo && std::chrono::steady_clock::now() - start < kLongestLoad;) {
      if (by == Held::kByThis) return {{}, "weights are being loaded by this thread"};
      const Outcome outcome = call_held(*input, view, records_grad);
      if (outcome.reason != kWait) return outcome;
      const py::gil_scoped_release release;
      std::this_thread::sleep_for(kLoadPoll);
      has_waited = true;
    }
    if (has_waited && check() != WatchResult::kSame) return {{}, "the layers changed while their weights were being loaded"};
  }

  Parameters::Fingerprint fingerprint;  // on CUDA the device itself compares
  if (backend == Backend::kCpu) fingerprint = [this](const at::Tensor& tensor) { return cpu_.fingerprint(tensor); };
  std::vector<py::object> replaced;
  reason = parameters_.check(*input, records_grad, fingerprint, replaced);
  if (parameters_.largest_change() != Change::kNone) {
    cpu_.forget_plans();
    cuda_.follow(parameters_);
  }
  if (reason) return {{}, reason};
  try {
    if (backend == Backend::kCpu) {
      cuda_.forget_last_plan();
      // Nothing was written yet. Eager may need less, or says in its own words that there is too little.
      try {
        if (cpu_.wants_timing(view.signature)) {
          cpu_.time_kernels(view, parameters_);
          return call(object);
        }
        return {cpu_.call(*input, view, parameters_), nullptr};
      } catch (const std::bad_alloc&) {
        return {{}, kNoMemory};
      } catch (const c10::Error&) {  // torch's allocator; the CPU engine asks nothing else of torch
        return {{}, kNoMemory};
      }
    }
    cpu_.forget_last_plan();
    return {cuda_.call(*input, view, parameters_), nullptr};
  } catch (const Refusal& refusal) {
    return {{}, lasting(refusal.what())};
  }
}

}  // namespace fastseq
