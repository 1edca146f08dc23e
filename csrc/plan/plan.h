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
  const cpu::Bf16Tiles* bf16 = nullptr;  // where set, steps may compute in bfloat16
  std::string forced_kernel;             // part of a kernel's name, "" for none
  bool output_is_nhwc = false;           // a spatial result in channels_last order
  bool allows_winograd = true;
  const KernelTimings* timings = nullptr;
  size_t first_step = 0;  // of the run, where the steps are its later ones
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
  bool has_border = false;
  bool is_shared = false;  // other maps lie there as well, so that the border is written with the rows
  int64_t size = 0;        // elements in the arena, border included
};

// What follows in a pass of its own over what a step has just stored, while that is in the cache: an activation, but for ReLU,
// which is a clamp in the step's kernel, and rounding to what a layer's result can hold.
struct Pass {
  Activation kind = Activation::kNone;
  float a = 0, b = 0;
  std::vector<float> slopes;  // one per output channel, zero up to whole vectors; empty but for PReLU with several
  Storage rounding = Storage::kF32;

  explicit operator bool() const { return kind != Activation::kNone || rounding != Storage::kF32; }
};

// What a channel or feature is multiplied by and what is added to it, as whole vectors.
struct Scale {
  std::vector<float> scale, shift;
  cpu::ScaleRows kernel = nullptr;
};
Scale make_scale(const StepSpec& spec, int64_t channels, const cpu::KernelSet& set);

// Beside the numbers of a Scale.
struct GroupNorm {
  int64_t groups = 1;
  double eps = 0;
  cpu::ChannelMoments moments = nullptr;
  cpu::CenteredRows kernel = nullptr;
};

struct SpatialStep;

// Makes rows [first, last) of the step's dst of those of `from`: its src, or the ring behind its convolution. src, dst: pixel (0,
// 0) of the maps, or the ring's begin. measured: what the following found.
using MapRows = void (*)(const SpatialStep& step, const Map& from, const float* src, float* dst, int64_t first, int64_t last,
                         const float* measured);
// What a step has to know of all of the map that it reads, before it makes rows: `measured_floats` numbers.
using MeasureMap = void (*)(const SpatialStep& step, const Map& from, const float* src, float* measured);

// A spatial step: convolution, convolution with pooling, or another one of maps.h.
struct SpatialStep {
  std::string name, kernel, note;
  Map src, dst;
  Map paired;            // dst for a next step in bfloat16, which is a copy; no pitch where there is none
  bool is_bf16 = false;  // src, weights and offsets count pairs
  bool has_conv = false, has_pool = false;
  bool pools_in_registers = false;  // 2x2/2 windows inside the tile
  float lower = 0;                  // of the step's last operation
  Pass on_results, on_pooled;       // of the convolution, and of a pool outside the registers
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
  bool is_depthwise = false;      // a filter for each channel, or a few; `weights` are for that
  int64_t groups = 1, terms = 1;  // terms: input channels of a group
  int64_t plane_stride = 0;       // of the rows [out][x] in the thread's scratch before they become pixels
  // pooling outside the registers, and all that is no convolution
  MapRows rows = nullptr;
  MeasureMap measure = nullptr;  // into the thread's scratch; null for most
  int64_t measured_floats = 0;
  Window pool;
  cpu::PoolRow pool_row = nullptr;
  std::vector<cpu::PoolSpan> row_spans, column_spans;  // of the windows of each row and column of dst
  Scale scale;
  bool has_scale_per_feature = false;  // [row][column][channel], whole vectors a pixel
  GroupNorm norm;
  std::vector<int32_t> row_sources, column_sources;  // of each of dst's, where it is taken from; -1 for a padding's value
  float pad_value = 0;
  std::vector<cpu::Blend> row_blends, column_blends;  // of each of dst's rows and columns
  cpu::BlendRow blend_row = nullptr;
  int64_t factor = 1;                    // of a shuffle
  std::vector<int32_t> channel_sources;  // of the pixels that it makes of one, [row][column][channel]
  int64_t group_rows = 1;                // pooled rows made at a time
  double flops = 0;
};

struct LinearStep;

// Makes `rows` rows of the step's dst of those of its src.
using MakeRows = void (*)(const LinearStep& step, const float* src, float* dst, int64_t rows);

// A step of rows of features: Linear, or another one of rows.h.
struct LinearStep {
  std::string name, kernel, note;
  int64_t n = 0, k = 0;
  bool is_bf16 = false;                    // src and weights are of pairs
  int64_t depth = 0;                       // rows of a panel: k, or as many pairs as it takes
  int64_t src_stride = 0, dst_stride = 0;  // elements from a row to the next
  float lower = 0;
  Pass on_results;
  PackedPtr weights;  // of a weight that is read in place the bias and where the panels are
  std::vector<cpu::Run> runs;
  double flops = 0;
  int in_place = -1;                     // which of the weights that a call brings
  int64_t spatial = 1, pixel_pitch = 0;  // the map whose pixels the source's features are, for all but packed weights
  // All that is no Linear.
  MakeRows make_rows = nullptr;
  bool can_overread = false;  // the source's rows have room for whole vectors
  // Where the source is a map, `spatial` pixels: from one image's to the next. Its features are put into eager's order first, in
  // dst.
  int64_t map_stride = 0;
  cpu::Transpose transpose = nullptr;
  Scale scale;
  double eps = 0;
  cpu::LayerNormRows layer_norm = nullptr;
  cpu::SoftmaxRows softmax = nullptr;
  int64_t weight_bytes() const { return make_rows ? 0 : n * depth * static_cast<int64_t>(sizeof(float)); }
};

class Plan;
using PlanPtr = std::shared_ptr<const Plan>;

class Plan {
 public:
  // Throws Refusal where eager would raise or the sizes do not fit, std::bad_alloc when out of memory.
  static PlanPtr build(const InputSpec& input, const std::vector<StepSpec>& steps, const PlanOptions& options, PackCache& cache);

  // src, dst: `batch` images or rows, dense, in the layouts and of the type of the signature. At most `threads` threads take part.
  // weights: of the steps in_place(), in that order.
  void run(const void* src, void* dst, int64_t batch, int threads, const float* const* weights = nullptr) const;

  // The steps whose weights are read where they lie, at each call, instead of being packed.
  const std::vector<size_t>& in_place() const { return in_place_; }

  // A rough estimate of one thread's time: to decide how many a call is worth, not to predict it.
  double microseconds(int64_t batch) const;

  const OutputSpec& output() const { return output_; }
  std::vector<StepInfo> describe() const;
  // Per thread, or per image where rows are shared out.
  int64_t scratch_bytes() const {
    const int64_t floats = arena_floats_ + group_images_ * image_floats_ + thread_floats_;
    return floats * static_cast<int64_t>(sizeof(float)) + (next_ ? next_->scratch_bytes() : 0);
  }
  // Of all threads' scratch, what is kept for the next calls.
  int64_t idle_scratch_bytes() const {
    return arenas_.idle_bytes() + scratch_.idle_bytes() + between_.idle_bytes() + (next_ ? next_->idle_scratch_bytes() : 0);
  }
  // Makes the scratch of `calls` calls at once, where one call after another has been made.
  void reserve_scratch(size_t calls) const {
    for (BufferPool* pool : {&arenas_, &scratch_, &between_}) pool->reserve(calls);
    if (next_) next_->reserve_scratch(calls);
  }

 private:
  friend class PlanBuilder;
  friend class Executor;

  double own_microseconds(int64_t batch) const;

  const cpu::KernelSet* kernels_ = nullptr;
  // Where rows become maps again: what takes this plan's rows for its images. in_place() and output() are of both.
  PlanPtr next_;
  size_t own_in_place_ = 0;
  InputSpec input_;
  OutputSpec output_;
  int64_t src_image_ = 0, dst_image_ = 0;  // elements of an image or row in the caller's memory

  const cpu::Bf16Tiles* bf16_ = nullptr;
  bool copies_input_ = false;
  Map entry_;         // where the input copy goes
  Map entry_paired_;  // and a copy of that, as SpatialStep::paired
  std::vector<SpatialStep> spatial_;
  bool copies_output_ = false;
  bool output_is_nhwc_ = false;
  Map exit_;  // NHWC source of the output copy

  std::vector<LinearStep> linear_;
  std::vector<size_t> in_place_;  // of all steps
  // Floats for a block of the input on its way from the caller's 16-bit type, or of the output to it; in the thread's scratch.
  int64_t staged_floats_ = 0;
  int64_t features_ = 0;      // elements of an image's features between the spatial steps and Linear, 0 if there is no such place
  int64_t group_images_ = 1;  // images a thread takes through both
  bool splits_at_linear_ = false;  // all images through the spatial steps first: the Linear weights should be read once

  // Steps before this one are run image by image, those from it on step by step for a group of images, which then share the way
  // that heavy weights come from memory.
  size_t first_wide_ = 0;
  // Of maps that one image leaves to the next, and of those that each has for itself. But for shared ones their zero borders are
  // written once, so an arena is never anything else; the maps of a group's images follow one another at its end.
  int64_t arena_floats_ = 0, image_floats_ = 0;
  int64_t thread_floats_ = 0;  // of a thread's ring of rows and Winograd's buffers, used by one step at a time
  int64_t features_offset_ = 0, rows_offset_[2] = {0, 0}, pairs_offset_[2] = {0, 0};
  int64_t rows_stride_ = 0, pairs_stride_ = 0;  // elements of a hidden Linear row, and pairs of it
  int64_t wide_stride_ = 0;                     // of rows that become floats
  int64_t linear_origin_ = 0;                   // of what Linear reads, in the features

  double flops_ = 0;         // per image or row
  double moved_floats_ = 0;  // read and written by steps that are no convolution
  int64_t weight_bytes_ = 0;
  mutable BufferPool arenas_, scratch_, between_;
};

// The instruction set that a plan's layers are timed on.
inline std::string isa_of(const PlanOptions& options) {
  return std::string(options.kernels->isa) + (options.bf16 ? std::string("+") + options.bf16->isa : "");
}

// Images that a thread takes together through wide steps and Linear: a tile of rows, or two.
constexpr int64_t kMostGroupImages = 12;
// Pixels that are converted together, at least, where the image has as many.
constexpr int64_t kStagedPixels = 64;
// Rows of a Linear chain that go through all its layers together.
constexpr int64_t kRowBlock = 64;

}  // namespace fastseq
