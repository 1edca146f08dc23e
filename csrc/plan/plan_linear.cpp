// The steps that take rows of features.
#include <algorithm>
#include <string>
#include <utility>

#include "plan/plan_builder.h"

namespace fastseq {
namespace {

// Linear weights from this size on are not packed: a copy takes as much memory again, and time to make. One row reads packed
// weights at 31 GB/s and these at 21 (one core of a Zen 4), so that smaller ones are worth their copy; from eight rows on both are
// equal.
constexpr int64_t kInPlaceBytes = int64_t{256} << 20;
// Linear weights beyond this are worth a pass of their own over the batch.
constexpr int64_t kSplitWeightBytes = int64_t{1} << 20;

}  // namespace

void PlanBuilder::build_linear(const std::vector<StepSpec>& steps, size_t first) {
  if (first == steps.size()) return;
  int64_t width = plan_.input_.is_spatial ? sizes_.back().channels * sizes_.back().h * sizes_.back().w : plan_.input_.features;
  const bool follows_spatial = first > 0;
  if (first == 0 && plan_.input_.is_spatial) throw Refusal("linear takes rows of features");
  int64_t src_stride = follows_spatial ? plan_.features_ : is_narrow() ? round_up(width, set_.lanes) : width;
  if (!follows_spatial && is_narrow()) plan_.rows_stride_ = plan_.wide_stride_ = src_stride;
  int64_t linear_bytes = 0;
  for (size_t i = first; i < steps.size(); ++i) {
    const StepSpec& spec = steps[i];
    if (const RowOp* const op = row_op(spec.op)) {
      LinearStep step = make_rows(*op, spec, i, width, src_stride);
      step.can_overread = i > first || is_narrow();
      place_rows(step, steps, i);
      if (follows_spatial && i == first) order_features(step);
      op->prepare(spec, set_, step);
      src_stride = step.dst_stride;
      plan_.linear_.push_back(std::move(step));
      continue;
    }
    if (spec.in != width) throw Refusal("linear weight expects another number of features");
    if (spec.in < 1 || spec.out < 1) throw Refusal("linear has no features");
    LinearStep step;
    step.name = spec.name, step.note = note(i);
    step.n = spec.out, step.k = spec.in;
    step.lower = lower_bound(spec);
    step.on_results = make_pass(spec, spec.out, set_.lanes);
    step.flops = 2.0 * spec.out * spec.in;
    const bool reads_map = follows_spatial && i == first;
    const int64_t spatial = reads_map ? sizes_.back().h * sizes_.back().w : 1;
    step.is_bf16 = linear_uses_bf16(spec, i);
    const int64_t pitch = !reads_map ? 0 : step.is_bf16 ? plan_.spatial_.back().paired.pitch : plan_.spatial_.back().dst.pitch;
    const int64_t length = step.is_bf16 ? (spec.in / spatial + 1) / 2 : spec.in / spatial;
    step.depth = spatial * length;
    if (step.is_bf16 && !reads_map) {
      src_stride = round_up(width, set_.lanes) / 2;
      plan_.pairs_stride_ = std::max(plan_.pairs_stride_, src_stride);
    }
    const cpu::KernelRow* const packs = wanted_row("linear", i);
    const cpu::KernelRow* const in_place = wanted_row("linear_in_place", i);
    // Of 16-bit weights a copy is made anyhow.
    if (in_place || (!packs && !is_narrow() && !step.is_bf16 && step.weight_bytes() >= kInPlaceBytes)) {
      read_in_place(step, spec, i);
      step.spatial = spatial, step.pixel_pitch = pitch;
    } else {
      const cpu::TileTable& table = tiles(step.is_bf16);
      // Weights from memory: a higher tile reads them once for more rows, and a narrower panel streams as fast.
      const bool is_far = step.weight_bytes() > kFarthestWeightBytes && table.preferred_vectors > 2;
      const Choice choice = choose("linear", step.is_bf16, i, table.max_rows, is_far ? 2 : table.preferred_vectors, spec.out);
      step.kernel = choice.kernel;
      PackedPtr& packed = cache_[{number(i), choice.vectors, step.is_bf16 ? -spatial : spatial}];
      if (!packed) {
        const StepSpec source = step.is_bf16 ? paired_spec(spec) : spec;
        packed = pack_linear(source, choice.panels, spatial, set_);
        if (step.is_bf16) packed = pack_pairs(*packed, source, spatial, spec.in / spatial, set_);
      }
      step.weights = packed;
      std::vector<int64_t> taps;
      for (int64_t s = 0; s < spatial; ++s) taps.push_back(s * pitch);
      step.runs = make_runs(taps, length);
    }
    linear_bytes += step.weight_bytes();

    step.src_stride = src_stride;
    place_rows(step, steps, i);
    src_stride = step.dst_stride;
    width = spec.out;
    plan_.linear_.push_back(std::move(step));
  }
  plan_.output_ = {false, 0, 0, 0, width};
  plan_.dst_image_ = width;
  plan_.splits_at_linear_ = follows_spatial && linear_bytes > kSplitWeightBytes;
}

void PlanBuilder::place_rows(LinearStep& step, const std::vector<StepSpec>& steps, size_t index) {
  const bool is_last = index + 1 == steps.size(), is_in_arena = !is_last || is_narrow();
  if (!is_last && !linear_uses_bf16(steps[index + 1], index + 1)) step.on_results.rounding = plan_.input_.storage;
  step.dst_stride = is_in_arena ? round_up(step.n, set_.lanes) : step.n;
  to_offset(kRowBlock * std::max(step.src_stride, step.dst_stride));
  if (is_in_arena) plan_.rows_stride_ = std::max(plan_.rows_stride_, step.dst_stride);
}

void PlanBuilder::order_features(LinearStep& step) const {
  const Map& map = plan_.spatial_.back().dst;
  step.map_stride = step.src_stride, step.src_stride = step.dst_stride;
  step.spatial = map.h * map.w, step.pixel_pitch = map.pitch, step.transpose = set_.transpose;
  step.can_overread = step.dst_stride % set_.lanes == 0;
}

LinearStep PlanBuilder::make_rows(const RowOp& op, const StepSpec& spec, size_t index, int64_t width, int64_t src_stride) const {
  LinearStep step;
  step.name = spec.name, step.note = note(index);
  step.kernel = std::string(op.kernel) + "__" + set_.isa + "_1x" + std::to_string(set_.lanes);
  step.n = step.k = width;
  step.lower = lower_bound(spec);
  step.on_results = make_pass(spec, width, set_.lanes);
  step.src_stride = src_stride;
  step.make_rows = op.rows;
  return step;
}

void PlanBuilder::read_in_place(LinearStep& step, const StepSpec& spec, size_t index) {
  step.kernel =
      std::string("linear_in_place_f32__") + set_.isa + "_" + std::to_string(set_.in_place_rows) + "x" + std::to_string(set_.lanes);
  PackedPtr& shared = cache_[{number(index), 0, 0}];
  if (!shared) shared = pack_bias(spec, set_);
  step.weights = shared;
  step.runs = make_runs({0}, spec.in);
  step.in_place = static_cast<int>(plan_.in_place_.size());
  plan_.in_place_.push_back(number(index));
}

}  // namespace fastseq
