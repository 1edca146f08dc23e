#include "plan/in_place.h"

#include <algorithm>

namespace fastseq {
namespace {

// A stretch of the reduction for which the packed rows stay in half of a common L2, with the widest block of rows.
constexpr int64_t kStretch = 2048;
// Weight rows whose sums wait for the next stretch: with a block's rows they stay in L2 too.
constexpr int64_t kWaitingRows = 1024;
// Rows of the source that are packed together.
constexpr int64_t kPackedRows = 64;

struct Task {
  const cpu::KernelSet& kernels;
  const LinearStep& step;
  const float* weight;  // the first of `n` rows, as are bias and dst
  const float* bias;
  const float* src;
  int64_t src_stride;
  float* dst;
  int64_t n;
};

// Few rows: each of them once through the weight, as many at a time as a tile takes.
void run_few(const Task& task, int64_t rows) {
  cpu::InPlaceJob job = {};
  job.weight = task.weight, job.weight_stride = task.step.k, job.weight_rows = task.n;
  job.src_stride = task.src_stride;
  job.runs = task.step.runs.data(), job.run_count = static_cast<int32_t>(task.step.runs.size());
  job.bias = task.bias, job.lower = task.step.lower;
  job.dst_stride = task.step.dst_stride;
  const int64_t tiles = divide_up(rows, task.kernels.in_place_rows);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = rows * t / tiles;
    job.src = task.src + row * task.src_stride, job.dst = task.dst + row * task.step.dst_stride;
    task.kernels.in_place[rows * (t + 1) / tiles - row](job);
  }
}

// Up to kPackedRows rows, packed, through stretches of the reduction: a tile of weight rows meets all of them while it is in cache.
void run_packed(const Task& task, int64_t rows, BufferPool& pool) {
  const cpu::KernelSet& kernels = task.kernels;
  const LinearStep& step = task.step;
  const int64_t all_vectors = divide_up(rows, kernels.lanes);
  const int64_t vectors = std::min<int64_t>(all_vectors, kernels.tiles.preferred_vectors);
  const int64_t panels = divide_up(all_vectors, vectors), width = vectors * kernels.lanes;
  const int64_t tile = kernels.tiles.max_rows[vectors];
  const int64_t waiting = std::min(kWaitingRows / tile * tile, task.n);  // whole tiles, but for the last
  Lease lease(pool);
  float* const packed = lease.add(panels * step.k * width);
  float* const sums = lease.add(panels * (waiting + tile) * width);
  for (int64_t p = 0; p < panels; ++p)
    kernels.transpose({task.src + p * width * task.src_stride, task.src_stride, packed + p * step.k * width, width, step.k,
                       std::min(width, rows - p * width)});

  cpu::InPlaceTileJob job = {};
  job.weight_stride = step.k;
  job.panels = static_cast<int32_t>(panels);
  job.panel_stride = step.k * width, job.sums_stride = (waiting + tile) * width;
  job.sums = sums;
  job.lower = step.lower;
  for (int64_t n = 0; n < task.n; n += waiting) {
    job.weight = task.weight + n * step.k, job.weight_rows = std::min(waiting, task.n - n);
    job.bias = task.bias + n;
    for (size_t run = 0; run < step.runs.size();) {
      size_t end = run + 1;
      while (end < step.runs.size() && step.runs[end].offset - step.runs[run].offset < kStretch) ++end;
      job.runs = &step.runs[run], job.run_count = static_cast<int32_t>(end - run);
      job.panel = packed + step.runs[run].offset * width;
      job.has_sums = run > 0, job.is_last = end == step.runs.size();
      kernels.in_place_tile[vectors](job);
      run = end;
    }
    for (int64_t p = 0; p < panels; ++p)
      kernels.transpose({sums + p * job.sums_stride, width, task.dst + p * width * step.dst_stride + n, step.dst_stride,
                         std::min(width, rows - p * width), job.weight_rows, true});
  }
}

}  // namespace

void run_in_place(const cpu::KernelSet& kernels, const LinearStep& step, const float* weight, const float* src, float* dst,
                  int64_t rows, size_t first, size_t last, BufferPool& pool) {
  const PackedWeights& panels = *step.weights;
  const int64_t begin = panels.panels[first].first_lane;
  const int64_t end = last < panels.panels.size() ? panels.panels[last].first_lane : step.n;
  if (begin >= end) return;
  Task task = {kernels, step, weight + begin * step.k, panels.bias->data() + begin, src, step.src_stride, dst + begin, end - begin};

  Lease lease(pool);
  if (step.spatial > 1) {
    // The weight's columns are channel by channel, the features lie pixel by pixel.
    float* const planes = lease.add(rows * step.k);
    for (int64_t row = 0; row < rows; ++row)
      kernels.transpose({src + row * step.src_stride, step.pixel_pitch, planes + row * step.k, step.spatial, step.k / step.spatial,
                         step.spatial, true});
    task.src = planes, task.src_stride = step.k;
  }
  for (int64_t row = 0; row < rows;) {
    const int64_t left = std::min(rows - row, kPackedRows);
    // The rest of a vector of rows takes less time by itself than as a vector that is mostly empty.
    const int64_t rest = left % kernels.lanes;
    const int64_t few = rest <= kernels.in_place_rows ? rest : 0;
    Task part = task;
    part.src += row * task.src_stride, part.dst += row * step.dst_stride;
    if (left > few) run_packed(part, left - few, pool);
    if (few) {
      part.src += (left - few) * task.src_stride, part.dst += (left - few) * step.dst_stride;
      run_few(part, few);
    }
    row += left;
  }
}

}  // namespace fastseq
