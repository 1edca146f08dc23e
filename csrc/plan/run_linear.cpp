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
  const std::vector<Panel>& panels = step.weights->panels;
  const int64_t first_lane = panels[first].first_lane;
  // Hidden rows have room for whole vectors, which weights in place leave alone; the result's rows may not.
  const int64_t room = step.in_place >= 0 ? step.n : step.dst_stride;
  const int64_t end_lane = std::min<int64_t>(room, panels[last - 1].first_lane + panels[last - 1].vectors * kernels_.lanes);
  const auto activate_rows = [&](float* row, int64_t count) {
    if (!step.activation || first_lane >= end_lane) return;
    cpu::ActivationJob job = {};
    job.data = row + first_lane, job.rows = count, job.row_stride = step.dst_stride, job.lanes = end_lane - first_lane;
    activate(step.activation, job, first_lane);
  };
  if (step.in_place >= 0) {
    run_in_place(kernels_, step, weights_[step.in_place], src, dst, rows, first, last, plan_.scratch_);
    activate_rows(dst, rows);
    return;
  }
  const PackedWeights& weights = *step.weights;
  int32_t src_offset[kRowBlock], dst_offset[kRowBlock];
  const int64_t blocks = block_count(rows, kRowBlock, 1);
  const int64_t most = (rows + blocks - 1) / blocks;
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
    if (count > kernels_.max_rows[widest] && step.k * widest * kernels_.lanes > kFarPanelFloats) {
      run_stretches(step, job, dst + row * step.dst_stride, count, first, last);
      activate_rows(dst + row * step.dst_stride, count);
      continue;
    }
    for (size_t p = first; p < last;) {
      const Panel& panel = weights.panels[p];
      job.weight = weights.weight->data() + panel.weight_offset;
      job.bias = weights.bias->data() + panel.first_lane;
      job.dst = dst + row * step.dst_stride + panel.first_lane;
      size_t side_by_side = 1;
      if (count <= 3 && panel.vectors == kernels_.preferred_vectors) {
        const size_t most_panels = static_cast<size_t>(kernels_.row_panels[count]);
        while (side_by_side < most_panels && p + side_by_side < last && weights.panels[p + side_by_side].vectors == panel.vectors)
          ++side_by_side;
        job.panel_stride = step.k * panel.vectors * kernels_.lanes;
      }
      const Panel& end = weights.panels[p + side_by_side - 1];
      job.lanes = static_cast<int32_t>(std::min<int64_t>(end.vectors * kernels_.lanes, step.dst_stride - end.first_lane));
      if (count <= 3 && panel.vectors == kernels_.preferred_vectors) {
        kernels_.row_tile[count][side_by_side](job, 1);
      } else {
        run_tiles(kernels_.tile[panel.vectors], kernels_.max_rows[panel.vectors], job, count, 1);
      }
      p += side_by_side;
    }
    activate_rows(dst + row * step.dst_stride, count);
  }
}

// A block of rows through one stretch of the reduction after the other, panels inside: a stretch of a panel stays in the cache
// until all tiles have met it, and of the rows it is the same for all panels. The sums are added in the same order as without.
void Executor::run_stretches(const LinearStep& step, cpu::TileJob job, float* dst, int64_t rows, size_t first, size_t last) const {
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
      job.dst = dst + panel.first_lane;
      job.lanes = static_cast<int32_t>(std::min<int64_t>(width, step.dst_stride - panel.first_lane));
      job.sums = sums + rows * (panel.first_lane - first_lane), job.sums_stride = width;
      run_tiles(kernels_.tile[panel.vectors], kernels_.max_rows[panel.vectors], job, rows, 1);
    }
    done += taken;
    begin = end;
  }
}

void Executor::run_chain(float* arena, const float* src, float* dst, int64_t rows) const {
  for (size_t i = 0; i < plan_.linear_.size(); ++i) {
    const LinearStep& step = plan_.linear_[i];
    float* const to = i + 1 == plan_.linear_.size() ? dst : arena + plan_.rows_offset_[i % 2];
    run_linear(step, src, to, rows, 0, step.weights->panels.size());
    src = to;
  }
}

int64_t Executor::panel_count(size_t step) const { return static_cast<int64_t>(plan_.linear_[step].weights->panels.size()); }

void Executor::run_panels(size_t step, const float* src, float* dst, float* const (&hidden)[2], int64_t rows, int64_t first,
                          int64_t last) const {
  const bool is_last = step + 1 == plan_.linear_.size();
  run_linear(plan_.linear_[step], step ? hidden[(step - 1) % 2] : src, is_last ? dst : hidden[step % 2], rows,
             static_cast<size_t>(first), static_cast<size_t>(last));
}

}  // namespace fastseq
