// The Linear steps of a plan: rows through panels of weights, packed or as they lie.
#include <algorithm>
#include <vector>

#include "plan/executor.h"
#include "plan/in_place.h"
#include "plan/tiles.h"

namespace fastseq {
namespace {

// A panel of weights that tiles of rows would each bring from beyond L2, and the floats of it that they take together instead.
constexpr int64_t kFarPanelFloats = int64_t{128} << 10, kStretchFloats = int64_t{64} << 10;

}  // namespace

void Executor::run_linear(const LinearStep& step, const float* src, float* dst, int64_t rows, size_t first, size_t last) const {
  if (step.make_rows) {
    if (step.map_stride)
      for (int64_t row = 0; row < rows; ++row)
        step.transpose({src + row * step.map_stride, step.pixel_pitch, dst + row * step.dst_stride, step.spatial,
                        step.n / step.spatial, step.spatial, true});
    step.make_rows(step, step.map_stride ? dst : src, dst, rows);
    if (!step.on_results) return;
    cpu::ActivationJob job = {};
    job.data = dst, job.rows = rows, job.row_stride = step.dst_stride, job.lanes = step.n;
    activate(step.on_results, job, 0);
    return;
  }
  const std::vector<Panel>& panels = step.weights->panels;
  const int64_t first_lane = panels[first].first_lane;
  // Hidden rows have room for whole vectors, which weights in place leave alone; the result's rows may not.
  const int64_t room = step.in_place >= 0 ? step.n : step.dst_stride;
  const int64_t end_lane = std::min<int64_t>(room, panels[last - 1].first_lane + panels[last - 1].vectors * kernels_.lanes);
  const auto activate_rows = [&](float* row, int64_t count) {
    if (!step.on_results || first_lane >= end_lane) return;
    cpu::ActivationJob job = {};
    job.data = row + first_lane, job.rows = count, job.row_stride = step.dst_stride, job.lanes = end_lane - first_lane;
    activate(step.on_results, job, first_lane);
  };
  if (step.in_place >= 0) {
    run_in_place(kernels_, step, weights_[step.in_place], src, dst, rows, first, last, plan_.scratch_);
    activate_rows(dst, rows);
    return;
  }
  const PackedWeights& weights = *step.weights;
  const cpu::TileTable& table = tiles(step.is_bf16);
  int32_t src_offset[kRowBlock], dst_offset[kRowBlock];
  const int64_t blocks = block_count(rows, kRowBlock, 1);
  const int64_t most = divide_up(rows, blocks);
  for (int64_t i = 0; i < most; ++i) {
    src_offset[i] = static_cast<int32_t>(i * step.src_stride);
    dst_offset[i] = static_cast<int32_t>(i * step.dst_stride);
  }
  cpu::TileJob job = {};
  job.src_offset = src_offset, job.dst_offset = dst_offset;
  job.runs = step.runs.data();
  job.run_count = static_cast<int32_t>(step.runs.size());
  job.lower = step.lower;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t row = rows * b / blocks, count = rows * (b + 1) / blocks - row;
    job.src = src + row * step.src_stride;
    const int widest = weights.panels.front().vectors;
    if (count > table.max_rows[widest] && step.depth * widest * kernels_.lanes > kFarPanelFloats) {
      run_stretches(step, job, dst + row * step.dst_stride, count, first, last);
      activate_rows(dst + row * step.dst_stride, count);
      continue;
    }
    for (size_t p = first; p < last;) {
      const Panel& panel = weights.panels[p];
      job.weight = weights.weight->data() + panel.weight_offset;
      job.bias = weights.bias->data() + panel.first_lane;
      job.scale = weights.scale ? weights.scale->data() + panel.first_lane : nullptr;
      job.dst = dst + row * step.dst_stride + panel.first_lane;
      size_t side_by_side = 1;
      if (count <= 3 && panel.vectors == table.preferred_vectors) {
        const size_t most_panels = static_cast<size_t>(table.row_panels[count]);
        while (side_by_side < most_panels && p + side_by_side < last && weights.panels[p + side_by_side].vectors == panel.vectors)
          ++side_by_side;
        job.panel_stride = step.depth * panel.vectors * kernels_.lanes;
      }
      const Panel& end = weights.panels[p + side_by_side - 1];
      job.lanes = static_cast<int32_t>(std::min<int64_t>(end.vectors * kernels_.lanes, step.dst_stride - end.first_lane));
      if (count <= 3 && panel.vectors == table.preferred_vectors) {
        table.row_tile[count][side_by_side](job, 1);
      } else {
        run_tiles(table.tile[panel.vectors], table.max_rows[panel.vectors], job, count, 1);
      }
      p += side_by_side;
    }
    activate_rows(dst + row * step.dst_stride, count);
  }
}

// A block of rows through one stretch of the reduction after the other, panels inside: a stretch of a panel stays in the cache
// until all tiles have met it, and of the rows it is the same for all panels. The sums are added in the same order as without.
void Executor::run_stretches(const LinearStep& step, cpu::TileJob job, float* dst, int64_t rows, size_t first, size_t last) const {
  const cpu::TileTable& table = tiles(step.is_bf16);
  const std::vector<Panel>& panels = step.weights->panels;
  const int64_t first_lane = panels[first].first_lane;
  const int64_t lanes = panels[last - 1].first_lane + panels[last - 1].vectors * kernels_.lanes - first_lane;
  const int64_t length = std::max<int64_t>(1, kStretchFloats / (panels.front().vectors * kernels_.lanes));
  Lease lease(plan_.scratch_);
  float* const sums = lease.add(rows * lanes);
  std::vector<cpu::Run> runs;
  int64_t done = 0;
  for (size_t begin = 0; begin < step.runs.size();) {
    // Between partial sums, so that none is cut.
    int64_t taken = 0;
    runs.clear();
    size_t end = begin;
    do {
      runs.push_back(step.runs[end]);
      taken += step.runs[end].length;
    } while (++end < step.runs.size() && (taken < length || !step.runs[end - 1].ends_partial_sum));
    runs.back().ends_partial_sum = false;
    job.runs = runs.data(), job.run_count = static_cast<int32_t>(runs.size());
    job.has_sums = begin > 0, job.is_last = end == step.runs.size();
    for (size_t p = first; p < last; ++p) {
      const Panel& panel = panels[p];
      const int width = panel.vectors * kernels_.lanes;
      job.weight = step.weights->weight->data() + panel.weight_offset + done * width;
      job.bias = step.weights->bias->data() + panel.first_lane;
      job.scale = step.weights->scale ? step.weights->scale->data() + panel.first_lane : nullptr;
      job.dst = dst + panel.first_lane;
      job.lanes = static_cast<int32_t>(std::min<int64_t>(width, step.dst_stride - panel.first_lane));
      job.sums = sums + rows * (panel.first_lane - first_lane), job.sums_stride = width;
      run_tiles(table.tile[panel.vectors], table.max_rows[panel.vectors], job, rows, 1);
    }
    done += taken;
    begin = end;
  }
}

// src: rows that the first step reads, or the caller's.
void Executor::run_chain(float* arena, const void* src, void* dst, int64_t rows) const {
  const float* from = static_cast<const float*>(src);
  // The second step's places, which comes later.
  if (plan_.spatial_.empty()) from = take_rows(src, arena + plan_.rows_offset_[1], arena + plan_.pairs_offset_[1], rows);
  for (size_t i = 0; i < plan_.linear_.size(); ++i) {
    const LinearStep& step = plan_.linear_[i];
    const bool is_last = i + 1 == plan_.linear_.size();
    float* const to = is_last && !is_narrow() ? static_cast<float*>(dst) : arena + plan_.rows_offset_[i % 2];
    run_linear(step, from, to, rows, 0, static_cast<size_t>(panel_count(i)));
    from = to;
    if (is_last || !plan_.linear_[i + 1].is_bf16) continue;
    float* const pairs = arena + plan_.pairs_offset_[i % 2];
    pair_rows(to, step.dst_stride, i + 1, pairs, rows, 0, step.n);
    from = pairs;
  }
  if (is_narrow()) narrow_rows(from, dst, rows, 0, plan_.dst_image_);
}

const float* Executor::take_rows(const void* src, float* wide, float* paired, int64_t rows) const {
  const float* from = static_cast<const float*>(src);
  int64_t stride = plan_.src_image_;
  if (is_narrow()) {
    kernels_.widen[static_cast<int>(plan_.input_.storage)]({src, wide, rows, stride, stride, plan_.wide_stride_});
    from = wide, stride = plan_.wide_stride_;
  }
  if (!plan_.linear_.front().is_bf16) return from;
  pair_rows(from, stride, 0, paired, rows, 0, plan_.src_image_);
  return paired;
}

// Some lanes of rows as pairs, for a step that reads them.
void Executor::pair_rows(const float* src, int64_t src_stride, size_t step, float* dst, int64_t rows, int64_t first_lane,
                         int64_t end_lane) const {
  const LinearStep& reader = plan_.linear_[step];
  const int64_t end = std::min(end_lane, reader.k), dst_stride = 2 * reader.src_stride;
  if (first_lane >= end) return;
  auto* const to = reinterpret_cast<uint16_t*>(dst);
  kernels_.narrow[static_cast<int>(Storage::kBf16)](
      {src + first_lane, to + first_lane, rows, end - first_lane, src_stride, dst_stride});
  if (end % 2)  // the partner of the last
    for (int64_t row = 0; row < rows; ++row) to[row * dst_stride + end] = 0;
}

// Some lanes of the last step's rows.
void Executor::narrow_rows(const float* src, void* dst, int64_t rows, int64_t first_lane, int64_t end_lane) const {
  const int64_t end = std::min(end_lane, plan_.dst_image_);
  if (first_lane >= end) return;
  kernels_.narrow[static_cast<int>(plan_.input_.storage)]({src + first_lane, static_cast<uint16_t*>(dst) + first_lane, rows,
                                                           end - first_lane, plan_.linear_.back().dst_stride, plan_.dst_image_});
}

int64_t Executor::panel_count(size_t step) const {
  const LinearStep& linear = plan_.linear_[step];
  return linear.make_rows ? 1 : static_cast<int64_t>(linear.weights->panels.size());
}

HiddenRows Executor::hidden_rows(Lease& memory, int64_t rows) const {
  HiddenRows hidden;
  if (plan_.rows_stride_)
    for (float*& floats : hidden.floats) floats = memory.add(rows * plan_.rows_stride_);
  if (plan_.pairs_stride_)
    for (float*& pairs : hidden.pairs) pairs = memory.add(rows * plan_.pairs_stride_);
  return hidden;
}

void Executor::run_panels(size_t step, const float* src, void* dst, const HiddenRows& hidden, int64_t rows, int64_t first,
                          int64_t last) const {
  const LinearStep& linear = plan_.linear_[step];
  const bool is_last = step + 1 == plan_.linear_.size();
  // Not one expression: gcc 12's bounds sanitizer takes the wrong element of an array that a condition chooses.
  float* const* const before = linear.is_bf16 ? hidden.pairs : hidden.floats;
  const float* const from = step == 0 ? src : before[(step - 1) % 2];
  float* const to = is_last && !is_narrow() ? static_cast<float*>(dst) : hidden.floats[step % 2];
  run_linear(linear, from, to, rows, static_cast<size_t>(first), static_cast<size_t>(last));
  int64_t first_lane = 0, end_lane = linear.n;
  if (!linear.make_rows) {
    const Panel& end = linear.weights->panels[static_cast<size_t>(last) - 1];
    first_lane = linear.weights->panels[static_cast<size_t>(first)].first_lane;
    end_lane = end.first_lane + end.vectors * kernels_.lanes;
  }
  if (is_last && is_narrow()) narrow_rows(to, dst, rows, first_lane, end_lane);
  if (!is_last && plan_.linear_[step + 1].is_bf16)
    pair_rows(to, linear.dst_stride, step + 1, hidden.pairs[step % 2], rows, first_lane, end_lane);
}

}  // namespace fastseq
