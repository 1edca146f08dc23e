#include "plan/rows.h"

#include <algorithm>
#include <iterator>

namespace fastseq {
namespace {

// What all jobs have.
template <typename Job>
Job job_of(const LinearStep& step, const float* src, float* dst, int64_t rows) {
  Job job = {};
  job.src = src, job.dst = dst, job.src_stride = step.src_stride, job.dst_stride = step.dst_stride;
  job.rows = rows, job.lanes = step.n, job.can_overread = step.can_overread;
  return job;
}

cpu::ScaleJob scale_job(const LinearStep& step, const float* src, float* dst, int64_t rows) {
  cpu::ScaleJob job = job_of<cpu::ScaleJob>(step, src, dst, rows);
  job.scale = step.scale.scale.data(), job.shift = step.scale.shift.data(), job.lower = step.lower;
  return job;
}

void prepare_scale(const StepSpec& spec, const cpu::KernelSet& set, LinearStep& step) {
  step.scale = make_scale(spec, step.n, set);
}

void scale_rows(const LinearStep& step, const float* src, float* dst, int64_t rows) {
  step.scale.kernel(scale_job(step, src, dst, rows));
}

void prepare_layer_norm(const StepSpec& spec, const cpu::KernelSet& set, LinearStep& step) {
  if (spec.in != step.n) throw Refusal("layernorm expects another number of features");
  prepare_scale(spec, set, step);
  step.eps = spec.eps, step.layer_norm = set.layer_norm_rows;
}

void layer_norm_rows(const LinearStep& step, const float* src, float* dst, int64_t rows) {
  step.layer_norm(scale_job(step, src, dst, rows), step.eps);
}

void prepare_softmax(const StepSpec& spec, const cpu::KernelSet& set, LinearStep& step) {
  step.softmax = set.softmax_rows[spec.op == Op::kLogSoftmax];
}

void softmax_rows(const LinearStep& step, const float* src, float* dst, int64_t rows) {
  step.softmax(job_of<cpu::SoftmaxJob>(step, src, dst, rows));
}

constexpr RowOp kRowOps[] = {
    {Op::kScale, "scale_f32", prepare_scale, scale_rows},
    {Op::kLayerNorm, "layernorm_f32", prepare_layer_norm, layer_norm_rows},
    {Op::kSoftmax, "softmax_f32", prepare_softmax, softmax_rows},
    {Op::kLogSoftmax, "logsoftmax_f32", prepare_softmax, softmax_rows},
};

}  // namespace

const RowOp* row_op(Op op) {
  const auto found = std::find_if(std::begin(kRowOps), std::end(kRowOps), [op](const RowOp& entry) { return entry.op == op; });
  return found == std::end(kRowOps) ? nullptr : found;
}

Scale make_scale(const StepSpec& spec, int64_t channels, const cpu::KernelSet& set) {
  if ((spec.weight || spec.bias) && spec.out != channels) throw Refusal(spec.name + " expects another number of channels");
  Scale scale;
  scale.kernel = set.scale_rows;
  const size_t lanes = static_cast<size_t>(round_up(channels, set.lanes));
  scale.scale.assign(lanes, spec.weight ? 0.0f : 1.0f), scale.shift.assign(lanes, spec.bias ? 0.0f : -0.0f);
  if (spec.weight) std::copy(spec.weight, spec.weight + channels, scale.scale.begin());
  if (spec.bias) std::copy(spec.bias, spec.bias + channels, scale.shift.begin());
  return scale;
}

}  // namespace fastseq
