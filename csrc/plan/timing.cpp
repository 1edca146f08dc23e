#include "plan/timing.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <new>
#include <string>

namespace fastseq {
namespace {

using Clock = std::chrono::steady_clock;

// Candidates take turns with one short block of calls each, of so many seconds at least, in so many rounds; medians count. In a
// network the weights of a layer come back from wherever the other layers have driven them, and so they do where the weights of
// other candidates come between.
constexpr int kRounds = 15, kLongestRounds = 5;
constexpr double kBlockSeconds = 10e-6, kLongSeconds = 10e-3;
// After the first round the candidates that take this much longer than the fastest are dropped.
constexpr double kHopeless = 1.5;
// Another kernel than the engine's own choice must save this share of the layer's time, and all of them this share of the run's:
// less may be noise.
constexpr double kWorthwhile = 0.03, kWorthwhileAll = 0.01;
// Values that repeat after this many, a prime, so that rows and images differ.
constexpr size_t kValues = 997;

// What may be run, and how long one call of it took in each round.
struct Candidate {
  std::string wanted;  // the kernel asked for, empty for the engine's own choice
  PackCache packed;
  PlanPtr plan;
  int64_t calls = 1;
  std::vector<double> seconds;

  double median() const {
    std::vector<double> sorted = seconds;
    std::nth_element(sorted.begin(), sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2), sorted.end());
    return sorted[sorted.size() / 2];
  }
};
using Candidates = std::vector<std::unique_ptr<Candidate>>;

// weights: as Plan::run takes them, the same for all candidates.
void time_candidates(const Candidates& candidates, const InputSpec& input, int64_t batch, int threads,
                     const float* const* weights) {
  const OutputSpec& output = candidates.front()->plan->output();
  const int64_t in = input.is_spatial ? input.channels * input.h * input.w : input.features;
  const int64_t out = output.is_spatial ? output.channels * output.h * output.w : output.features;
  AlignedBuffer src(batch * in), dst(batch * out);
  for (int64_t i = 0; i < src.size(); ++i)
    src.data()[i] = static_cast<float>(static_cast<size_t>(i) % kValues * 619 % kValues) / kValues - 0.5f;

  const auto seconds_of = [&](const Candidate& c) {
    const Clock::time_point start = Clock::now();
    for (int64_t i = 0; i < c.calls; ++i) c.plan->run(src.data(), dst.data(), batch, threads, weights);
    return std::chrono::duration<double>(Clock::now() - start).count() / static_cast<double>(c.calls);
  };
  double least = 0;
  for (const auto& c : candidates) {
    seconds_of(*c);  // touches its memory
    const double seconds = seconds_of(*c);
    c->calls = std::max<int64_t>(1, static_cast<int64_t>(kBlockSeconds / std::max(seconds, 1e-9)));
    c->seconds.push_back(seconds);
    least = c == candidates.front() ? seconds : std::min(least, seconds);
  }
  const int rounds = least > kLongSeconds ? kLongestRounds : kRounds;
  for (int round = 0; round < rounds; ++round)
    for (const auto& c : candidates)
      if (c == candidates.front() || c->seconds.front() < kHopeless * least) c->seconds.push_back(seconds_of(*c));
}

// One layer by itself.
class LayerTiming {
 public:
  LayerTiming(const InputSpec& input, const StepSpec& step, const PlanOptions& options)
      : input_(input), steps_{step}, options_(options) {}

  // The kernel to ask for, or nothing.
  std::string fastest(int64_t batch, int threads) {
    add("");
    if (!candidates_.front()->plan->in_place().empty()) return "";  // a question of memory
    for (const cpu::KernelRow& row : cpu::kernel_rows())
      if (row.isa == (row.is_bf16 && options_.bf16 ? options_.bf16->isa : options_.kernels->isa) && can_be_asked_for(row))
        add(row.name);
    if (candidates_.size() == 1) return "";
    time_candidates(candidates_, input_, batch, threads, nullptr);
    const Candidate* best = candidates_.front().get();
    for (const auto& candidate : candidates_)
      if (candidate->median() < best->median()) best = candidate.get();
    return best->median() < (1 - kWorthwhile) * candidates_.front()->median() ? best->wanted : "";
  }

 private:
  bool can_be_asked_for(const cpu::KernelRow& row) const {
    if (row.is_bf16 && !options_.bf16) return false;
    if (steps_[0].op == Op::kLinear) return row.op == "linear";
    return row.op.rfind("conv2d", 0) == 0;
  }

  void add(const std::string& wanted) {
    auto candidate = std::make_unique<Candidate>();
    candidate->wanted = wanted;
    PlanOptions options = options_;
    options.forced_kernel = wanted;
    try {
      candidate->plan = Plan::build(input_, steps_, options, candidate->packed);
    } catch (const std::bad_alloc&) {
      if (wanted.empty()) throw;
      return;  // the others need less
    }
    // What the layer cannot run on it runs on something else, which is there already or will be.
    const std::string kernel = candidate->plan->describe()[0].kernel;
    if (!wanted.empty() && kernel != wanted) {
      for (const cpu::KernelRow& row : cpu::kernel_rows())
        if (row.name == kernel) return;
    }
    for (const auto& other : candidates_)
      if (other->plan->describe()[0].kernel == kernel) return;
    candidates_.push_back(std::move(candidate));
  }

  const InputSpec input_;
  const std::vector<StepSpec> steps_;
  const PlanOptions options_;
  Candidates candidates_;  // the engine's own choice first
};

// Whether the run as a whole is faster with these kernels: alone in the cache a layer may prefer another one than in company.
bool is_faster(const KernelTimings& timings, const InputSpec& input, const std::vector<StepSpec>& steps, const PlanOptions& options,
               int64_t batch, int threads) {
  KernelTimings all = timings;
  if (options.timings) all.insert(options.timings->begin(), options.timings->end());
  Candidates candidates;
  for (const KernelTimings* used : {options.timings, static_cast<const KernelTimings*>(&all)}) {
    PlanOptions with = options;
    with.timings = used;
    candidates.push_back(std::make_unique<Candidate>());
    candidates.back()->plan = Plan::build(input, steps, with, candidates.back()->packed);
  }
  std::vector<const float*> weights;
  for (size_t step : candidates.front()->plan->in_place()) weights.push_back(steps[step].weight);
  time_candidates(candidates, input, batch, threads, weights.data());
  return candidates[1]->median() < (1 - kWorthwhileAll) * candidates[0]->median();
}

// What a step reads: a map, in which order, or nothing for rows.
struct Source {
  bool is_spatial = false, is_nhwc = false;
  MapSize map;
};

std::vector<Source> sources_of(InputSpec input, const std::vector<StepSpec>& steps) {
  std::vector<Source> sources;
  while (sources.size() < steps.size()) {
    const size_t begin = sources.size(), end = begin + own_steps(steps, begin);
    const std::vector<StepSpec> own(steps.begin() + static_cast<std::ptrdiff_t>(begin),
                                    steps.begin() + static_cast<std::ptrdiff_t>(end));
    size_t first_linear = 0;
    while (first_linear < own.size() && !takes_rows(own[first_linear].op)) ++first_linear;
    const StepSizes sizes = infer_sizes(input, own, first_linear);
    for (size_t i = 0; i < own.size(); ++i)
      sources.push_back(i < first_linear ? Source{true, i > 0 || input.is_nhwc, sizes.maps[i]} : Source{});
    if (end == steps.size()) break;
    const std::vector<int64_t>& next = steps[end].unflattened;
    input = {true, next[0], next[1], next[2], false, 0, input.storage};
  }
  return sources;
}

}  // namespace

KernelTimings time_kernels(const InputSpec& given, const std::vector<StepSpec>& steps, const PlanOptions& options, int64_t batch,
                           int threads) {
  KernelTimings timings;
  if (!options.forced_kernel.empty() || batch < 1) return timings;
  InputSpec input = given;
  input.storage = Storage::kF32;  // what lies between the steps in any case
  const std::vector<Source> sources = sources_of(input, steps);
  for (size_t i = 0; i < steps.size(); ++i) {
    StepSpec step = steps[i];
    if (step.op != Op::kConv2d && step.op != Op::kLinear) continue;
    step.unflattened.clear();
    const auto [is_spatial, is_nhwc, src] = sources[i];
    const std::string key = layer_key(isa_of(options), step, src);
    if (timings.count(key) || (options.timings && options.timings->count(key))) continue;
    InputSpec alone;
    if (is_spatial) {
      alone = {true, src.channels, src.h, src.w, is_nhwc, 0, input.storage};
    } else {
      alone.features = step.in;
    }
    PlanOptions layer_options = options;
    layer_options.timings = nullptr;
    layer_options.output_is_nhwc = i + 1 < steps.size() || options.output_is_nhwc;
    timings[key] = LayerTiming(alone, step, layer_options).fastest(batch, threads);
  }
  const bool has_others = std::any_of(timings.begin(), timings.end(), [](const auto& timed) { return !timed.second.empty(); });
  if (has_others && !is_faster(timings, input, steps, options, batch, threads))
    for (auto& [key, kernel] : timings) kernel.clear();
  return timings;
}

}  // namespace fastseq
