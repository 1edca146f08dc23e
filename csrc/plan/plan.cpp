// Builds plans: shape inference, tile choice, scratch layout. Cheap beside packing the weights.
#include "plan/plan.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>

#include "plan/plan_builder.h"

namespace fastseq {
namespace {

// The shortest chain of additions worth ending.
constexpr int64_t kShortestPartialSum = 64;

int64_t elements_of(const Map& map) { return map.channels * map.h * map.w; }

int64_t packed_bytes(const SpatialStep& step) {
  return (step.weights ? step.weights->bytes() : 0) + (step.winograd ? step.winograd.weights->bytes() : 0);
}

}  // namespace

int32_t to_offset(int64_t value) {
  if (value > std::numeric_limits<int32_t>::max()) throw Refusal("a row of the activations has more than 2^31 elements");
  return static_cast<int32_t>(value);
}

float lower_bound(const StepSpec& spec) { return spec.has_relu() ? 0.0f : -std::numeric_limits<float>::infinity(); }

Pass make_pass(const StepSpec& spec, int64_t channels, int lanes) {
  const ActivationSpec& from = spec.activation;
  Pass pass;
  if (from.kind == Activation::kNone || from.kind == Activation::kRelu) return pass;
  pass.kind = from.kind, pass.a = from.a, pass.b = from.b;
  if (from.kind != Activation::kPrelu) return pass;
  if (from.slope_count == 1) {
    pass.kind = Activation::kLeakyRelu, pass.a = from.slopes[0];
    return pass;
  }
  if (spec.is_per_feature) throw Refusal("prelu with slopes for the features of a flattened map");
  if (from.slope_count != channels) throw Refusal("prelu expects another number of channels");
  pass.slopes.resize(static_cast<size_t>(round_up(channels, lanes) + lanes));  // a group's first channel may be any
  std::copy(from.slopes, from.slopes + channels, pass.slopes.begin());
  return pass;
}

std::vector<cpu::Run> make_runs(const std::vector<int64_t>& taps, int64_t length) {
  const int64_t total = static_cast<int64_t>(taps.size()) * length;
  std::vector<cpu::Run> runs;
  int64_t summed = 0, done = 0;
  for (int64_t tap : taps)
    for (int64_t start = 0; start < length; start += kLongestSum) {
      const int64_t piece = std::min(kLongestSum, length - start);
      const int32_t offset = to_offset(tap + start);
      summed += piece, done += piece;
      const bool ends = total > kLongestSum && summed >= kShortestPartialSum && done < total;
      if (ends) summed = 0;
      const bool extends = !runs.empty() && !runs.back().ends_partial_sum && runs.back().offset + runs.back().length == offset;
      if (extends) {
        runs.back().length = to_offset(runs.back().length + piece);
        runs.back().ends_partial_sum = ends;
      } else {
        runs.push_back({offset, static_cast<int32_t>(piece), ends});
      }
    }
  return runs;
}

void PlanBuilder::build(const InputSpec& input, const std::vector<StepSpec>& steps) {
  plan_.kernels_ = &set_, plan_.bf16_ = options_.bf16;
  plan_.input_ = input;
  size_t first_linear = 0;
  while (first_linear < steps.size() && !takes_rows(steps[first_linear].op)) ++first_linear;
  if (first_linear > 0 && !input.is_spatial) throw Refusal("convolution and pooling need an input of shape (N, C, H, W)");
  // Kernels count pixels and channels of one row in 32 bits.
  to_offset(input.channels * input.w);
  to_offset(input.h);
  StepSizes sizes = infer_sizes(input, steps, first_linear);
  sizes_ = std::move(sizes.maps), conv_sizes_ = std::move(sizes.convs);
  plan_.src_image_ = input.is_spatial ? input.channels * input.h * input.w : input.features;
  look_up_timings(steps, first_linear);
  place_spatial(steps, first_linear);
  build_linear(steps, first_linear);
  lay_out_arena();
  for (const SpatialStep& step : plan_.spatial_) {
    plan_.flops_ += step.flops, count_weights(step.winograd ? step.winograd.weights : step.weights);
    if (!step.has_conv) plan_.moved_floats_ += static_cast<double>(elements_of(step.src) + elements_of(step.dst));
  }
  for (const LinearStep& step : plan_.linear_) {
    plan_.flops_ += step.flops, plan_.weight_bytes_ += step.weight_bytes();
    if (step.make_rows) plan_.moved_floats_ += 2.0 * static_cast<double>(step.n);
  }
}

StepSpec PlanBuilder::paired_spec(const StepSpec& spec) const {
  StepSpec paired = spec;
  if (scales_sums(spec)) {
    paired.weight = spec.unfolded;
  } else {
    paired.scale = nullptr;
  }
  return paired;
}

void PlanBuilder::count_weights(const PackedPtr& weights) {
  if (weights) plan_.weight_bytes_ += weights->bytes();
}

void PlanBuilder::lay_out_arena() {
  const bool groups_at_linear = plan_.features_ && !plan_.splits_at_linear_;
  plan_.group_images_ = groups_at_linear || plan_.first_wide_ < plan_.spatial_.size() ? kMostGroupImages : 1;
  plan_.features_offset_ = plan_.arena_floats_;
  if (!plan_.splits_at_linear_) plan_.arena_floats_ += plan_.group_images_ * plan_.features_;
  for (int64_t& offset : plan_.rows_offset_) {
    offset = plan_.arena_floats_;
    plan_.arena_floats_ += round_up(kRowBlock * plan_.rows_stride_, 16);
  }
  for (int64_t& offset : plan_.pairs_offset_) {
    offset = plan_.arena_floats_;
    plan_.arena_floats_ += round_up(kRowBlock * plan_.pairs_stride_, 16);
  }
  plan_.arena_floats_ += 16;
}

PlanPtr Plan::build(const InputSpec& input, const std::vector<StepSpec>& steps, const PlanOptions& options, PackCache& cache) {
  auto plan = std::make_shared<Plan>();
  const size_t own = own_steps(steps, 0);
  if (own == steps.size()) {
    PlanBuilder(*plan, options, cache).build(input, steps);
    return plan;
  }
  const std::vector<StepSpec> first(steps.begin(), steps.begin() + static_cast<std::ptrdiff_t>(own));
  const std::vector<StepSpec> behind(steps.begin() + static_cast<std::ptrdiff_t>(own), steps.end());
  PlanBuilder(*plan, options, cache).build(input, first);
  PlanOptions rest = options;
  rest.first_step += own;
  plan->next_ = build(unflatten(plan->output_, behind.front(), input.storage), behind, rest, cache);
  plan->own_in_place_ = plan->in_place_.size();
  plan->in_place_.insert(plan->in_place_.end(), plan->next_->in_place_.begin(), plan->next_->in_place_.end());
  plan->output_ = plan->next_->output_;
  return plan;
}

std::vector<StepInfo> Plan::describe() const {
  std::vector<StepInfo> infos;
  for (const SpatialStep& step : spatial_)
    infos.push_back({step.name, step.kernel, shape_text({step.dst.channels, step.dst.h, step.dst.w}), step.flops,
                     packed_bytes(step), step.note});
  for (const LinearStep& step : linear_)
    infos.push_back(
        {step.name, step.kernel, shape_text({step.n}), step.flops, step.weights ? step.weights->bytes() : 0, step.note});
  for (StepInfo& info : next_ ? next_->describe() : std::vector<StepInfo>()) infos.push_back(std::move(info));
  return infos;
}

}  // namespace fastseq
