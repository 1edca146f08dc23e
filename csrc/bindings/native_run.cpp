#include "bindings/native_run.h"

#include <ATen/core/grad_mode.h>

namespace fastseq {

NativeRun::NativeRun(std::vector<StepSource> steps, std::vector<std::shared_ptr<ModuleWatch>> watches, bool flattens_input,
                     bool flattens_output, const RunOptions& options)
    : steps_(std::move(steps)),
      watches_(std::move(watches)),
      shape_{steps_.front().spec.op != Op::kLinear, flattens_input, flattens_output},
      parameters_(steps_, watches_),
      cpu_(steps_, shape_, options.isa_cap, options.forced_kernel),
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

int NativeRun::traverse(visitproc visit, void* arg) const {
  for (const auto& watch : watches_)
    if (const int stop = watch->traverse(visit, arg)) return stop;
  return parameters_.traverse(visit, arg);
}

std::optional<NativeRun::Description> NativeRun::describe_last_plan() const {
  if (const PlanPtr plan = cpu_.last_plan()) return Description{plan->describe(), plan->scratch_bytes()};
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

  Parameters::Fingerprint fingerprint;  // on CUDA the device itself compares
  if (backend == Backend::kCpu) fingerprint = [this](const at::Tensor& tensor) { return cpu_.fingerprint(tensor); };
  reason = parameters_.check(*input, records_grad, fingerprint);
  if (parameters_.largest_change() != Change::kNone) {
    cpu_.forget_plans();
    cuda_.follow(parameters_);
  }
  if (reason) return {{}, reason};
  try {
    if (backend == Backend::kCpu) {
      cuda_.forget_last_plan();
      return {cpu_.call(*input, view, parameters_), nullptr};
    }
    cpu_.forget_last_plan();
    return {cuda_.call(*input, view, parameters_), nullptr};
  } catch (const Refusal& refusal) {
    return {{}, lasting(refusal.what())};
  }
}

}  // namespace fastseq
