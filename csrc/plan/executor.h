// Runs a plan: who computes which rows of which image, and where. Knows threads; the kernels it calls do not.
#pragma once

#include <cstdint>
#include <limits>

#include "plan/plan.h"

namespace fastseq {

// Where one image (or group of images) is at work.
struct Workspace {
  float* arena = nullptr;
  float* own = nullptr;       // maps that are the image's alone
  const void* src = nullptr;  // the image in the caller's memory
  void* dst = nullptr;        // its result in the caller's memory, if the spatial steps end there
  float* features = nullptr;  // its row of features otherwise
  float* scratch = nullptr;   // the thread's own
};

// The panels whose first vector is among [begin, end) of a step's output channels.
struct Share {
  int64_t begin = 0, end = std::numeric_limits<int64_t>::max();  // lanes
  bool has(const Panel& panel) const { return begin <= panel.first_lane && panel.first_lane < end; }
};

// Of all rows, between the steps of a Linear chain that goes panel by panel.
struct HiddenRows {
  float* floats[2] = {nullptr, nullptr};
  float* pairs[2] = {nullptr, nullptr};
};

class Executor {
 public:
  Executor(const Plan& plan, const float* const* weights) : plan_(plan), kernels_(*plan.kernels_), weights_(weights) {}

  void run(const void* src, void* dst, int64_t batch, int threads) const;

 private:
  int useful_threads(int64_t batch, int threads) const;
  void run_by_image(const void* src, void* dst, int64_t batch, int threads) const;
  void run_by_row(const void* src, void* dst, int64_t batch, int threads) const;

  bool shares_panels(const SpatialStep& step, int64_t batch, int threads) const;

  // Spatial steps: rows [first, last) of the step's output for one image.
  void take_input(const Workspace& at, int64_t first, int64_t last) const;
  void copy_input(const Workspace& at, int64_t first, int64_t last) const;
  void run_step(const SpatialStep& step, const Workspace& at, int64_t first, int64_t last) const;
  void make_rows(const SpatialStep& step, const Workspace& at, int64_t first, int64_t last) const;
  // The zeros around rows [first, last) of a map, where other maps have been in their place.
  void renew_border(const Map& map, const Workspace& at, int64_t first, int64_t last) const;
  void copy_output(const Workspace& at, int64_t first, int64_t last) const;
  void widen_input(const Workspace& at, int64_t first, int64_t last) const;
  void narrow_output(const Workspace& at, int64_t first, int64_t last) const;
  // Rows of the map as a copy in pairs, of channels [first_lane, end_lane).
  void pair_map(const Map& from, const Map& to, const Workspace& at, int64_t first, int64_t last, int64_t first_lane,
                int64_t end_lane) const;
  void run_share(const SpatialStep& step, const Workspace* images, int64_t count, Share share, float* own_scratch) const;
  void conv_rows(const SpatialStep& step, const Workspace& at, const Map& dst, float lower, int64_t first, int64_t last,
                 Share share) const;
  void conv_panel(const SpatialStep& step, const Workspace& at, const Map& dst, float lower, const Panel& panel, int64_t row,
                  int64_t rows) const;
  cpu::TileJob conv_job(const SpatialStep& step, const Workspace& at, float lower, const Panel& panel, int64_t y, int64_t x) const;
  void run_conv(const SpatialStep& step, const Panel& panel, const cpu::TileJob& job, int64_t count) const;
  void run_winograd(const SpatialStep& step, const Workspace* images, int64_t image_count, const Map& dst, float lower,
                    int64_t first, int64_t last, Share share, float* own_scratch) const;
  void run_tile_directly(const SpatialStep& step, const Workspace& at, float lower, int64_t row, int64_t column,
                         const cpu::WinogradTile& tile, int64_t first_lane, int64_t end_lane) const;
  void depthwise_rows(const SpatialStep& step, const Workspace& at, const Map& dst, float lower, int64_t first, int64_t last) const;
  void plane_rows(const SpatialStep& step, const Workspace& at, const Map& dst, float lower, int64_t first, int64_t last) const;
  void map_rows(const SpatialStep& step, const Workspace& at, const Map& from, int64_t first, int64_t last) const;
  // A pass over what a step has just stored, each element once: rows of a job, whole rows of a map, rows of planes.
  void activate(const Pass& pass, cpu::ActivationJob job, int64_t first_channel) const;
  void activate_rows(const Pass& pass, const Workspace& at, const Map& dst, int64_t row, int64_t rows, int64_t first_lane,
                     int64_t end_lane) const;
  void activate_planes(const SpatialStep& step, float* planes) const;
  // Whole images, each with its workspace: the first steps one image after the other, the wide ones together.
  void run_images(const Workspace* images, int64_t count) const;

  // Linear steps: `rows` rows through panels [first, last) of one step, or through the whole chain.
  void run_linear(const LinearStep& step, const float* src, float* dst, int64_t rows, size_t first, size_t last) const;
  void run_stretches(const LinearStep& step, cpu::TileJob job, float* dst, int64_t rows, size_t first, size_t last) const;
  void run_chain(float* arena, const void* src, void* dst, int64_t rows) const;
  int64_t panel_count(size_t step) const;
  HiddenRows hidden_rows(Lease& memory, int64_t rows) const;
  void run_panels(size_t step, const float* src, void* dst, const HiddenRows& hidden, int64_t rows, int64_t first,
                  int64_t last) const;
  // The caller's rows as the first step takes them. wide, paired: memory for them.
  const float* take_rows(const void* src, float* wide, float* paired, int64_t rows) const;
  void pair_rows(const float* src, int64_t src_stride, size_t step, float* dst, int64_t rows, int64_t first_lane,
                 int64_t end_lane) const;
  void narrow_rows(const float* src, void* dst, int64_t rows, int64_t first_lane, int64_t end_lane) const;

  // Images or rows of the caller's memory.
  const void* image_of(const void* src, int64_t image) const {
    return static_cast<const char*>(src) + image * plan_.src_image_ * bytes_of(plan_.input_.storage);
  }
  void* result_of(void* dst, int64_t image) const {
    return static_cast<char*>(dst) + image * plan_.dst_image_ * bytes_of(plan_.input_.storage);
  }
  bool is_narrow() const { return plan_.input_.storage != Storage::kF32; }
  const cpu::TileTable& tiles(bool is_bf16) const { return is_bf16 ? plan_.bf16_->tiles : kernels_.tiles; }

  int64_t lanes_of(const Map& map) const;
  const float* source(const Map& map, const Workspace& at) const;
  float* target(const Map& map, const Workspace& at) const;

  const Plan& plan_;
  const cpu::KernelSet& kernels_;
  const float* const* const weights_;  // that are read in place
};

}  // namespace fastseq
