// A plan: the fused steps of one native run for one input signature, with packed weights, chosen tiles and scratch offsets.
// The batch size stays free. A plan does not change after build(), so any number of threads may run it at once.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "plan/memory.h"
#include "plan/pack.h"
#include "plan/sizes.h"
#include "plan/spec.h"
#include "plan/winograd.h"

namespace fastseq {

// Kernels that timing has found the fastest, by layer_key; an empty name where that is what the engine chooses by itself.
using KernelTimings = std::map<std::string, std::string>;

struct PlanOptions {
  const cpu::KernelSet* kernels = nullptr;
  std::string forced_kernel;    // part of a kernel's name, "" for none
  bool output_is_nhwc = false;  // a spatial result in channels_last order
  bool allows_winograd = true;
  const KernelTimings* timings = nullptr;
};

// Where an activation map lives: NHWC with the next convolution's zero border around it, or the caller's own memory.
struct Map {
  enum class Place { kArena, kRing, kCallerSrc, kCallerDst, kFeatures };
  Place place = Place::kArena;
  int64_t channels = 0, h = 0, w = 0;
  int64_t pitch = 0;          // elements from a pixel to the next
  int64_t row_stride = 0;     // elements from a row to the next
  int64_t origin = 0;         // of pixel (0, 0), inside the border
  int64_t offset = 0;         // of the map in the arena
  int64_t rows_kept = 0;      // a ring of rows when smaller than h
  bool is_per_image = false;  // of each image in a group, rather than one after the other's
  int64_t size = 0;           // elements in the arena, border included
};

// An activation in a pass of its own over what a step has just stored, while that is in the cache. Not ReLU, which is a clamp in
// the step's kernel.
struct ActivationPass {
  Activation kind = Activation::kNone;
  float a = 0, b = 0;
  std::vector<float> slopes;  // one per output channel, zero up to whole vectors; empty but for PReLU with several

  explicit operator bool() const { return kind != Activation::kNone; }
};

// A spatial step: convolution, convolution with pooling, or pooling alone.
struct SpatialStep {
  std::string name, kernel, note;
  Map src, dst;
  bool has_conv = false, has_pool = false;
  bool pools_in_registers = false;  // 2x2/2 windows inside the tile
  float lower = 0;                  // of the step's last operation
  ActivationPass activation;
  bool activates_pooled = false;  // what comes out of a pool outside the registers, rather than the convolution's results
  // convolution
  Window conv;
  int64_t conv_h = 0, conv_w = 0;  // rows and columns that are computed: what a pool would drop is not
  Map ring;                        // the convolution's rows on their way to a pool outside the registers
  PackedPtr weights;
  std::vector<cpu::Run> runs;
  std::vector<int32_t> src_offset, dst_offset;  // of one block of rows
  int64_t block_rows = 1;
  bool panels_outermost = false;  // weights that do not fit the cache are read once per call, not once per block
  int64_t scratch_offset = 0;     // in the thread's scratch, behind the ring: of the buffers of one of the following
  Winograd winograd;              // where set, the tables above serve the tiles that it cannot do
  int64_t unit_rows = 1;          // rows of dst that are made together
  bool is_plane = false;          // one input channel, lanes are pixels; `weights` are for that
  int64_t plane_stride = 0;       // of the rows [out][x] in the thread's scratch before they become pixels
  // pooling outside the registers
  Window pool;
  int64_t group_rows = 1;  // pooled rows made at a time
  double flops = 0;
};

struct LinearStep {
  std::string name, kernel, note;
  int64_t n = 0, k = 0;
  int64_t src_stride = 0, dst_stride = 0;  // elements from a row to the next
  float lower = 0;
  ActivationPass activation;
  PackedPtr weights;  // of a weight that is read in place the bias and where the panels are
  std::vector<cpu::Run> runs;
  double flops = 0;
  int in_place = -1;                     // which of the weights that a call brings
  int64_t spatial = 1, pixel_pitch = 0;  // the map whose pixels the source's features are, for a weight in place
  int64_t weight_bytes() const { return n * k * static_cast<int64_t>(sizeof(float)); }
};

class Plan {
 public:
  // Throws Refusal where eager would raise or the sizes do not fit, std::bad_alloc when out of memory.
  static std::shared_ptr<const Plan> build(const InputSpec& input, const std::vector<StepSpec>& steps, const PlanOptions& options,
                                           PackCache& cache);

  // src, dst: `batch` images or rows, dense, in the layouts of the signature. At most `threads` threads take part.
  // weights: of the steps in_place(), in that order.
  void run(const float* src, float* dst, int64_t batch, int threads, const float* const* weights = nullptr) const;

  // The steps whose weights are read where they lie, at each call, instead of being packed.
  const std::vector<size_t>& in_place() const { return in_place_; }

  // A rough estimate of one thread's time: to decide how many a call is worth, not to predict it.
  double microseconds(int64_t batch) const;

  const OutputSpec& output() const { return output_; }
  std::vector<StepInfo> describe() const;
  // Per thread, or per image where rows are shared out.
  int64_t scratch_bytes() const {
    return (arena_floats_ + group_images_ * image_floats_ + thread_floats_) * static_cast<int64_t>(sizeof(float));
  }

 private:
  friend class PlanBuilder;
  friend class Executor;

  const cpu::KernelSet* kernels_ = nullptr;
  InputSpec input_;
  OutputSpec output_;
  int64_t src_image_ = 0, dst_image_ = 0;  // elements of an image or row in the caller's memory

  bool copies_input_ = false;
  Map entry_;  // where the input copy goes
  std::vector<SpatialStep> spatial_;
  bool transposes_output_ = false;
  Map exit_;  // NHWC source of the final transpose

  std::vector<LinearStep> linear_;
  std::vector<size_t> in_place_;  // of all steps
  int64_t features_ = 0;      // elements of an image's features between the spatial steps and Linear, 0 if there is no such place
  int64_t group_images_ = 1;  // images a thread takes through both
  bool splits_at_linear_ = false;  // all images through the spatial steps first: the Linear weights should be read once

  // Steps before this one are run image by image, those from it on step by step for a group of images, which then share the way
  // that heavy weights come from memory.
  size_t first_wide_ = 0;
  // Of maps that one image leaves to the next, and of those that each has for itself. Their zero borders are written once, so an
  // arena is never anything else; the maps of a group's images follow one another at its end.
  int64_t arena_floats_ = 0, image_floats_ = 0;
  int64_t thread_floats_ = 0;  // of a thread's ring of rows and Winograd's buffers, used by one step at a time
  int64_t features_offset_ = 0, rows_offset_[2] = {0, 0};
  int64_t rows_stride_ = 0;  // elements of a hidden Linear row

  double flops_ = 0;  // per image or row
  int64_t weight_bytes_ = 0;
  mutable BufferPool arenas_, scratch_;
};
using PlanPtr = std::shared_ptr<const Plan>;

// Images that a thread takes together through wide steps and Linear: a tile of rows, or two.
constexpr int64_t kMostGroupImages = 12;
// Rows of a Linear chain that go through all its layers together.
constexpr int64_t kRowBlock = 64;

}  // namespace fastseq
