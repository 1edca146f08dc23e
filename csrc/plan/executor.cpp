#include "plan/executor.h"

#include <algorithm>
#include <vector>

#include "plan/threads.h"
#include "plan/tiles.h"

namespace fastseq {
namespace {

// Rough rates to decide how many threads a call is worth, not to predict its time.
constexpr double kFlopsPerMicrosecond = 80e3, kBytesPerMicrosecond = 20e3;
// Of work for each thread, and no second thread for less than twice that: one of OpenMP's waits already, another has to be started.
constexpr double kMicrosecondsPerThread = 10, kMicrosecondsPerNewThread = 100;
// From this many rows per thread a Linear chain is split by rows: weights are then read often enough to hide their way from memory.
constexpr int64_t kRowsPerThread = 24;

// Weights of a step whose rows are not divided further than into one part a thread: each part reads them all.
constexpr int64_t kHeavyWeightBytes = int64_t{768} << 10;
// Floats of an input that one thread copies in less time than it takes to meet.
constexpr int64_t kSmallCopy = 1024;
// Tiles that Winograd's products want at a time.
constexpr int64_t kProductTiles = 14;

// Rows that stay together where threads share `rows` of them, a multiple of `unit`: up to `most` parts a thread, of at least
// `least` rows, so that there is something to take over from a thread that comes late, but not at the price of idle threads at the
// end.
int64_t shared_rows(int64_t rows, int64_t unit, int64_t least, int threads, int most) {
  int64_t best = 0, best_time = 0;
  for (int parts = most; parts >= 1; parts /= 2) {
    const int64_t count = static_cast<int64_t>(threads) * parts, size = round_up(divide_up(rows, count), unit);
    if (size < least && parts > 1) continue;
    const int64_t time = divide_up(divide_up(rows, size), threads) * size;
    if (!best || time < best_time) best = size, best_time = time;
  }
  return best;
}

const PackedWeights* weights_of(const SpatialStep& step) {
  return step.winograd ? step.winograd.weights.get() : step.weights.get();
}

Share share_of(int64_t lanes, int64_t part, int64_t parts) { return {lanes * part / parts, lanes * (part + 1) / parts}; }

}  // namespace

void Plan::run(const void* src, void* dst, int64_t batch, int threads, const float* const* weights) const {
  if (batch <= 0) return;
  if (!next_) {
    Executor(*this, weights).run(src, dst, batch, threads);
    return;
  }
  Lease between(between_);
  void* const rows = between.add(batch * dst_image_);  // room for floats, whatever the type
  Executor(*this, weights).run(src, rows, batch, threads);
  next_->run(rows, dst, batch, threads, weights ? weights + own_in_place_ : nullptr);
}

double Plan::own_microseconds(int64_t batch) const {
  const double moved = moved_floats_ * sizeof(float) / kBytesPerMicrosecond;
  return std::max(static_cast<double>(batch) * (flops_ / kFlopsPerMicrosecond + moved),
                  static_cast<double>(weight_bytes_) / kBytesPerMicrosecond);
}

double Plan::microseconds(int64_t batch) const { return own_microseconds(batch) + (next_ ? next_->microseconds(batch) : 0); }

int Executor::useful_threads(int64_t batch, int threads) const {
  if (threads <= 1) return 1;
  const double micros = plan_.own_microseconds(batch);
  const double per_thread = starts_threads() ? kMicrosecondsPerNewThread : kMicrosecondsPerThread;
  if (micros < 2 * per_thread || (threads = usable_threads(threads)) == 1) return 1;
  return static_cast<int>(std::min<double>(threads, micros / per_thread));
}

void Executor::run(const void* src, void* dst, int64_t batch, int threads) const {
  const int useful = useful_threads(batch, threads);
  // Whole images (or blocks of rows) per thread need no barrier; with few of them the rows inside are shared out instead.
  bool by_image = useful == 1;
  if (plan_.spatial_.empty()) {
    by_image = by_image || batch >= kRowsPerThread * useful;
  } else {
    by_image = by_image || batch >= 4 * useful || batch % useful == 0;
  }
  if (by_image) {
    run_by_image(src, dst, batch, useful);
  } else {
    run_by_row(src, dst, batch, useful);
  }
}

void Executor::run_by_image(const void* src, void* dst, int64_t batch, int threads) const {
  const bool has_spatial = !plan_.spatial_.empty(), has_linear = !plan_.linear_.empty();
  const bool splits = plan_.splits_at_linear_;
  Lease arenas(plan_.arenas_), scratch(plan_.scratch_);
  Workspace alone;  // a short call should not allocate
  std::vector<Workspace> several(static_cast<size_t>(threads > 1 ? threads : 0));
  Workspace* const at = threads > 1 ? several.data() : &alone;
  for (int thread = 0; thread < threads; ++thread) {
    at[thread].arena = arenas.add(plan_.arena_floats_ + std::min(batch, plan_.group_images_) * plan_.image_floats_);
    if (plan_.thread_floats_) at[thread].scratch = scratch.add(plan_.thread_floats_);
  }
  float* const all_features = splits ? scratch.add(batch * plan_.features_) : nullptr;

  // Whole images or blocks of rows first. Linear steps with large weights follow for all of them: panel by panel where the rows are
  // few, block by block otherwise.
  const int64_t groups = block_count(batch, has_spatial ? plan_.group_images_ : kRowBlock, threads);
  const bool chain_by_panel = splits && threads > 1 && batch < kRowsPerThread * threads;
  const int64_t row_blocks = block_count(batch, kRowBlock, threads);
  const HiddenRows hidden = chain_by_panel ? hidden_rows(scratch, batch) : HiddenRows();

  const auto run_group = [&](int64_t first, int64_t last, Workspace own) {
    if (!has_spatial) {
      run_chain(own.arena, image_of(src, first), result_of(dst, first), last - first);
      return;
    }
    float* const group = splits ? all_features + first * plan_.features_ : own.arena + plan_.features_offset_;
    Workspace images[kMostGroupImages];
    for (int64_t i = first; i < last; ++i) {
      own.src = image_of(src, i), own.dst = result_of(dst, i);
      own.features = group + (i - first) * plan_.features_;
      own.own = own.arena + plan_.arena_floats_ + (i - first) * plan_.image_floats_;
      images[i - first] = own;
    }
    run_images(images, last - first);
    if (has_linear && !splits) run_chain(own.arena, group + plan_.linear_origin_, result_of(dst, first), last - first);
  };
  const auto units = [&](int phase) {
    if (phase == 0) return groups;
    return chain_by_panel ? panel_count(static_cast<size_t>(phase - 1)) : row_blocks;
  };
  const auto run = [&](int phase, int64_t first, int64_t last, int thread) {
    if (phase > 0 && chain_by_panel) {
      run_panels(static_cast<size_t>(phase - 1), all_features + plan_.linear_origin_, dst, hidden, batch, first, last);
      return;
    }
    for (int64_t u = first; u < last; ++u) {
      if (phase == 0) {
        run_group(batch * u / groups, batch * (u + 1) / groups, at[thread]);
      } else {
        const int64_t row = batch * u / row_blocks, end = batch * (u + 1) / row_blocks;
        run_chain(at[thread].arena, all_features + row * plan_.features_ + plan_.linear_origin_, result_of(dst, row), end - row);
      }
    }
  };
  const int chain_phases = !splits ? 0 : chain_by_panel ? static_cast<int>(plan_.linear_.size()) : 1;
  run_phases(threads, 1 + chain_phases, units, run);
}

// Whether threads should rather share out the output channels of a step than its rows: none then reads all of the weights, and
// products are as high as the images allow. Winograd's transforms of the input are made by each of them.
bool Executor::shares_panels(const SpatialStep& step, int64_t batch, int threads) const {
  const PackedWeights* const weights = weights_of(step);
  if (!weights || weights->bytes() <= kHeavyWeightBytes || step.ring.size || step.is_plane || step.groups > 1 ||
      step.winograd.has_few_channels)
    return false;
  const int64_t vectors = weights->bias->size() / kernels_.lanes;
  int64_t most = 0;
  for (int part = 0; part < threads; ++part) {
    const Share share = share_of(weights->bias->size(), part, threads);
    int64_t own = 0;
    for (const Panel& panel : weights->panels) own += share.has(panel) ? panel.vectors : 0;
    most = std::max(most, own);
  }
  const auto time = [&](int64_t rows, int64_t out_vectors) {
    const int64_t across = step.winograd ? step.winograd.band_tiles() : step.conv_w;
    const ConvPart part{rows * across, step.src.channels, step.conv.k_h * step.conv.k_w, out_vectors, kernels_.lanes};
    return step.winograd ? winograd_time(part, /*has_few_channels=*/false) : direct_time(part);
  };
  const int64_t rows = batch * (step.winograd ? step.winograd.bands : step.conv_h);
  return time(rows, most) < time(divide_up(rows, threads), vectors);
}

void Executor::run_by_row(const void* src, void* dst, int64_t batch, int threads) const {
  Lease arenas(plan_.arenas_), scratch(plan_.scratch_);
  const bool has_spatial = !plan_.spatial_.empty();
  float* const all_features = plan_.features_ ? scratch.add(batch * plan_.features_) : nullptr;
  std::vector<Workspace> at(static_cast<size_t>(has_spatial ? batch : 0));
  for (size_t i = 0; i < at.size(); ++i) {
    const int64_t image = static_cast<int64_t>(i);
    at[i].arena = arenas.add(plan_.arena_floats_ + plan_.image_floats_);
    at[i].own = at[i].arena + plan_.arena_floats_;
    at[i].src = image_of(src, image), at[i].dst = result_of(dst, image);
    if (all_features) at[i].features = all_features + image * plan_.features_;
  }
  std::vector<float*> own_scratch(static_cast<size_t>(plan_.thread_floats_ ? threads : 0));
  for (float*& s : own_scratch) s = scratch.add(plan_.thread_floats_);
  const HiddenRows hidden = plan_.linear_.empty() ? HiddenRows() : hidden_rows(scratch, batch);
  const float* rows_src = all_features ? all_features + plan_.linear_origin_ : nullptr;
  if (!has_spatial) {
    float* const wide = is_narrow() ? scratch.add(batch * plan_.wide_stride_) : nullptr;
    float* const paired = plan_.linear_.front().is_bf16 ? scratch.add(batch * plan_.pairs_stride_) : nullptr;
    rows_src = take_rows(src, wide, paired, batch);
  }

  // The rows of all images, one after the other, are what threads share; those of a step that makes several together stay so.
  const int copies = plan_.copies_input_ ? 1 : 0, steps = static_cast<int>(plan_.spatial_.size());
  const auto rows_of = [&](int phase) { return phase < copies ? plan_.entry_.h : plan_.spatial_[phase - copies].dst.h; };
  std::vector<int64_t> unit(static_cast<size_t>(copies + steps));
  std::vector<bool> by_panel(unit.size());
  for (int phase = 0; phase < copies + steps; ++phase) {
    // What a part costs anew, the way of its weights, what it measures, or the rows that its pool shares with the next part's,
    // should be little.
    const SpatialStep* const step = phase < copies ? nullptr : &plan_.spatial_[phase - copies];
    const bool copies_output = phase + 1 == copies + steps && plan_.copies_output_;  // whole pixels
    if (step && !copies_output && shares_panels(*step, batch, threads)) {
      by_panel[phase] = true;
      continue;
    }
    const PackedWeights* const weights = step ? weights_of(*step) : nullptr;
    const bool is_costly = (weights && weights->bytes() > kHeavyWeightBytes) || (step && step->measure);
    const int parts = is_costly ? 1 : step && step->ring.size ? 2 : 4;
    const int64_t rows = rows_of(phase);
    if (!step && rows * plan_.entry_.row_stride < kSmallCopy) {
      unit[phase] = rows;  // others would come too late
      continue;
    }
    const int64_t together = step ? step->unit_rows : 1;
    int64_t least = together;
    if (step && step->winograd) least *= divide_up(kProductTiles, step->winograd.band_tiles());
    unit[phase] = shared_rows(rows, together, least, threads, parts);
  }
  const auto per_image = [&](int phase) { return divide_up(rows_of(phase), unit[phase]); };
  const auto units = [&](int phase) {
    if (phase >= copies + steps) return panel_count(static_cast<size_t>(phase - copies - steps));
    return by_panel[static_cast<size_t>(phase)] ? threads : batch * per_image(phase);
  };
  const auto run = [&](int phase, int64_t first, int64_t last, int thread) {
    if (phase >= copies + steps) {
      run_panels(static_cast<size_t>(phase - copies - steps), rows_src, dst, hidden, batch, first, last);
      return;
    }
    float* const scratch_of_thread = own_scratch.empty() ? nullptr : own_scratch[static_cast<size_t>(thread)];
    if (by_panel[static_cast<size_t>(phase)]) {
      const SpatialStep& step = plan_.spatial_[static_cast<size_t>(phase - copies)];
      for (int64_t part = first; part < last; ++part)
        run_share(step, at.data(), batch, share_of(weights_of(step)->bias->size(), part, threads), scratch_of_thread);
      return;
    }
    const int64_t units_per_image = per_image(phase), rows = rows_of(phase);
    while (first < last) {
      const int64_t image = first / units_per_image, unit_first = first % units_per_image;
      const int64_t unit_last = std::min(units_per_image, unit_first + last - first);
      const int64_t row = unit_first * unit[phase], end = std::min(rows, unit_last * unit[phase]);
      Workspace own = at[static_cast<size_t>(image)];
      own.scratch = scratch_of_thread;
      if (phase < copies) {
        take_input(own, row, end);
      } else {
        const SpatialStep& step = plan_.spatial_[static_cast<size_t>(phase - copies)];
        run_step(step, own, row, end);
        if (phase + 1 == copies + steps && plan_.copies_output_) copy_output(own, row, end);
      }
      first += unit_last - unit_first;
    }
  };
  run_phases(threads, copies + steps + static_cast<int>(plan_.linear_.size()), units, run);
}

void Executor::run_images(const Workspace* images, int64_t count) const {
  const size_t steps = plan_.spatial_.size();
  for (int64_t i = 0; i < count; ++i) {
    if (plan_.copies_input_) take_input(images[i], 0, plan_.entry_.h);
    for (size_t s = 0; s < plan_.first_wide_; ++s) run_step(plan_.spatial_[s], images[i], 0, plan_.spatial_[s].dst.h);
    if (plan_.first_wide_ == steps && plan_.copies_output_) copy_output(images[i], 0, plan_.exit_.h);
  }
  if (plan_.first_wide_ == steps) return;
  for (size_t s = plan_.first_wide_; s < steps; ++s) {
    const SpatialStep& step = plan_.spatial_[s];
    if (step.winograd && !step.ring.pitch) {
      run_share(step, images, count, {}, images[0].scratch);
    } else {
      for (int64_t i = 0; i < count; ++i) run_step(step, images[i], 0, step.dst.h);
    }
  }
  if (plan_.copies_output_)
    for (int64_t i = 0; i < count; ++i) copy_output(images[i], 0, plan_.exit_.h);
}

}  // namespace fastseq
