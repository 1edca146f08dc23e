// Which kernel a step runs on.
#include <algorithm>
#include <cmath>

#include "plan/plan_builder.h"

namespace fastseq {
namespace {

// Vectors of as many floats can be shuffled in one instruction.
constexpr int kShuffledLanes = 8;
// Pairs of fewer channels would be half empty, or take as long to make as they save.
constexpr int64_t kLeastPairedChannels = 8;

// An infinite bias makes NaN of a sum that is infinite the other way, which pooling the sums before the bias would hide.
bool has_infinity(const float* values, int64_t count) {
  return values && std::any_of(values, values + count, [](float v) { return std::isinf(v); });
}

}  // namespace

void PlanBuilder::look_up_timings(const std::vector<StepSpec>& steps, size_t first_linear) {
  timed_.resize(steps.size());
  if (!options_.timings || !options_.forced_kernel.empty()) return;
  for (size_t i = 0; i < steps.size(); ++i) {
    if (steps[i].op != Op::kConv2d && steps[i].op != Op::kLinear) continue;
    const auto found = options_.timings->find(layer_key(isa_of(options_), steps[i], i < first_linear ? sizes_[i] : MapSize{}));
    if (found != options_.timings->end() && (found->second.empty() || find_row("", found->second)))
      timed_[i] = {true, found->second};
  }
}

std::string PlanBuilder::note(size_t index) const {
  const Timed& timed = timed_[index];
  return !timed.is_known ? "" : timed.kernel.empty() ? "timed: its own choice is the fastest" : "timed: faster than its own choice";
}

ConvShape PlanBuilder::conv_shape(const StepSpec& spec, size_t index) const {
  const MapSize full = conv_sizes_[index], dst = sizes_[index + 1];
  ConvShape shape{spec.in, spec.out, spec.groups, full.h, full.w, spec.conv, false};
  if (spec.has_pool) {
    const Window& w = spec.pool;
    shape.h = std::min(full.h, (dst.h - 1) * w.stride_h - w.pad_top + w.reach_h());
    shape.w = std::min(full.w, (dst.w - 1) * w.stride_w - w.pad_left + w.reach_w());
    shape.pools_in_registers = w.k_h == 2 && w.k_w == 2 && w.stride_h == 2 && w.stride_w == 2 && !w.pad_top && !w.pad_left &&
                               !w.is_dilated() && 2 * dst.h <= full.h && 2 * dst.w <= full.w &&
                               !has_infinity(spec.bias, spec.out) && pools_first(spec);
  }
  return shape;
}

bool PlanBuilder::uses_winograd(const StepSpec& spec, size_t index) const {
  if (spec.op != Op::kConv2d || !options_.allows_winograd || uses_depthwise(spec, index)) return false;
  const ConvShape shape = conv_shape(spec, index);
  const bool asks_for_direct = wanted_row(shape.pools_in_registers ? "conv2d_maxpool2d" : "conv2d", index) != nullptr;
  const bool asks_for_winograd = wanted_row("conv2d_winograd", index) != nullptr;
  if (asks_for_direct != asks_for_winograd) return asks_for_winograd && can_use_winograd(shape, spec);
  return is_winograd_faster(shape, set_, uses_bf16(spec, index) ? options_.bf16->speed : 1.0) && can_use_winograd(shape, spec);
}

bool PlanBuilder::uses_bf16(const StepSpec& spec, size_t index) const {
  if (spec.op != Op::kConv2d || spec.groups > 1 || !options_.bf16) return false;
  const bool pools_in_registers = conv_shape(spec, index).pools_in_registers;
  const cpu::KernelRow* const wanted = wanted_row(pools_in_registers ? "conv2d_maxpool2d" : "conv2d", index);
  return wanted ? wanted->is_bf16 : spec.in >= kLeastPairedChannels;
}

bool PlanBuilder::uses_plane(const StepSpec& spec, size_t index) const {
  if (index > 0 || spec.op != Op::kConv2d || spec.in != 1 || spec.groups > 1) return false;
  if (spec.conv.stride_h != 1 || spec.conv.stride_w != 1 || spec.conv.is_dilated()) return false;
  const int64_t taps = spec.conv.k_h * spec.conv.k_w;
  if (taps > kLongestSum) return false;
  const ConvShape shape = conv_shape(spec, index);
  const bool asks_for_tile = wanted_row(shape.pools_in_registers ? "conv2d_maxpool2d" : "conv2d", index) != nullptr;
  const bool asks_for_plane = wanted_row("conv2d_plane", index) != nullptr;
  if (asks_for_tile != asks_for_plane) return asks_for_plane;
  const int64_t plane = round_up(shape.w, 2 * set_.lanes) / set_.lanes * shape.c_out * taps;
  const int64_t tile = shape.w * divide_up(shape.c_out, set_.lanes) * taps;
  // Rows to pixels, as if an element were a third of a multiply-add: 1-20 5x5 on 28x28, where both are near, takes 1.12 times as
  // long by tiles.
  return plane + shape.w * shape.c_out / 3 < tile;
}

bool PlanBuilder::uses_depthwise(const StepSpec& spec, size_t index) const {
  if (spec.op != Op::kConv2d || spec.groups == 1 || (!spec.is_depthwise() && !can_shuffle_groups(spec, set_.lanes))) return false;
  const bool asks_for_tile = wanted_row(conv_shape(spec, index).pools_in_registers ? "conv2d_maxpool2d" : "conv2d", index);
  const bool asks_for_this = wanted_row(depthwise_op(spec), index) != nullptr;
  if (asks_for_tile != asks_for_this) return asks_for_this;
  return spec.is_depthwise() || (set_.lanes >= kShuffledLanes && 2 * spec.out <= set_.lanes * spec.groups);
}

bool PlanBuilder::linear_uses_bf16(const StepSpec& spec, size_t index) const {
  if (spec.op != Op::kLinear || !options_.bf16 || wanted_row("linear_in_place", index)) return false;
  const cpu::KernelRow* const wanted = wanted_row("linear", index);
  return !wanted || wanted->is_bf16;
}

const cpu::KernelRow* PlanBuilder::wanted_row(const std::string& op, size_t index) const {
  const std::string& wanted = options_.forced_kernel.empty() ? timed_[index].kernel : options_.forced_kernel;
  return wanted.empty() ? nullptr : find_row(op, wanted);
}

const cpu::KernelRow* PlanBuilder::find_row(const std::string& op, const std::string& part) const {
  static const std::vector<cpu::KernelRow> rows = cpu::kernel_rows();
  for (const cpu::KernelRow& row : rows)
    if ((op.empty() || row.op == op) && is_ours(row) && row.name.find(part) != std::string::npos) return &row;
  return nullptr;
}

bool PlanBuilder::is_ours(const cpu::KernelRow& row) const {
  return row.is_bf16 ? options_.bf16 && row.isa == options_.bf16->isa : row.isa == set_.isa;
}

PlanBuilder::Choice PlanBuilder::choose(const std::string& op, bool is_bf16, size_t index, const int* max_rows, int preferred,
                                        int64_t out, std::vector<int> (*split)(int, int, const int*)) const {
  Choice choice{preferred, {}, ""};
  if (const cpu::KernelRow* const wanted = wanted_row(op, index)) choice.vectors = wanted->vectors;
  const int vectors = static_cast<int>(divide_up(out, set_.lanes));
  choice.panels = split(vectors, choice.vectors, max_rows);
  choice.vectors = *std::max_element(choice.panels.begin(), choice.panels.end());
  choice.kernel = op + (is_bf16 ? std::string("_bf16__") + options_.bf16->isa : std::string("_f32__") + set_.isa) + "_" +
                  std::to_string(max_rows[choice.vectors]) + "x" + std::to_string(choice.vectors * set_.lanes);
  return choice;
}

}  // namespace fastseq
