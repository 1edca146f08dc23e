// Builds one plan: plan.cpp says in which order, plan_choice.cpp which kernels, plan_spatial.cpp and plan_linear.cpp the steps.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan/maps.h"
#include "plan/plan.h"
#include "plan/rows.h"

namespace fastseq {

// Elements behind a map: vector reads may run past its last pixel.
constexpr int64_t kSlack = 48;
// Longest chain of additions into one accumulator.
constexpr int64_t kLongestSum = 128;
// Weights beyond this share of L3 come from memory.
constexpr int64_t kFarthestWeightBytes = int64_t{12} << 20;

int32_t to_offset(int64_t value);  // throws Refusal beyond 2^31
float lower_bound(const StepSpec& spec);
// channels: of the step's output.
Pass make_pass(const StepSpec& spec, int64_t channels, int lanes);
// The reduction as contiguous stretches: `taps` stretches of `length` at the given offsets. Partial sums end at the same places
// however the source is laid out, so layouts give the same bits.
std::vector<cpu::Run> make_runs(const std::vector<int64_t>& taps, int64_t length);

class PlanBuilder {
 public:
  PlanBuilder(Plan& plan, const PlanOptions& options, PackCache& cache)
      : plan_(plan), options_(options), set_(*options.kernels), cache_(cache) {}
  void build(const InputSpec& input, const std::vector<StepSpec>& steps);

 private:
  struct Timed {
    bool is_known = false;
    std::string kernel;  // empty for the engine's own choice
  };
  struct Choice {
    int vectors;  // of the widest panel, which names the kernel
    std::vector<int> panels;
    std::string kernel;
  };

  // Of a step in the run.
  size_t number(size_t index) const { return options_.first_step + index; }
  // Of a step in bfloat16: a BatchNorm's scale in the weights of a bfloat16 model would round them where eager rounds nothing, so
  // that it multiplies the sums.
  bool scales_sums(const StepSpec& spec) const { return spec.scale && is_narrow(); }
  StepSpec paired_spec(const StepSpec& spec) const;
  const cpu::TileTable& tiles(bool is_bf16) const { return is_bf16 ? options_.bf16->tiles : set_.tiles; }
  static const char* depthwise_op(const StepSpec& spec) { return spec.is_depthwise() ? "conv2d_depthwise" : "conv2d_grouped"; }
  bool is_narrow() const { return plan_.input_.storage != Storage::kF32; }

  void count_weights(const PackedPtr& weights);
  void lay_out_arena();

  // Which kernel a step runs on

  void look_up_timings(const std::vector<StepSpec>& steps, size_t first_linear);
  // Where the choice of a step's kernel comes from, for the report.
  std::string note(size_t index) const;
  // What of a convolution is computed, and whether its pool happens in the tile's registers.
  ConvShape conv_shape(const StepSpec& spec, size_t index) const;
  bool uses_winograd(const StepSpec& spec, size_t index) const;
  // Of a convolution that is neither Winograd's nor of a plane.
  bool uses_bf16(const StepSpec& spec, size_t index) const;
  // One input channel, and so few output channels that lanes of pixels are better filled. Only the first step's pixels are dense.
  bool uses_plane(const StepSpec& spec, size_t index) const;
  // Groups so small that their panels of the register tiles would have few lanes.
  bool uses_depthwise(const StepSpec& spec, size_t index) const;
  bool linear_uses_bf16(const StepSpec& spec, size_t index) const;
  // The first kernel of this operation that FASTSEQ_KERNEL may mean, or timing has chosen for this step.
  const cpu::KernelRow* wanted_row(const std::string& op, size_t index) const;
  // The first kernel with `part` in its name, of any operation where `op` is empty.
  const cpu::KernelRow* find_row(const std::string& op, const std::string& part) const;
  bool is_ours(const cpu::KernelRow& row) const;
  // The instruction set's preferred tile, or the wanted one if it is of this operation.
  Choice choose(const std::string& op, bool is_bf16, size_t index, const int* max_rows, int preferred, int64_t out,
                std::vector<int> (*split)(int, int, const int*) = split_vectors) const;

  // Convolution, pooling and what else is done to maps

  // An arena map for `size`, with room for the zero border that the step which reads it wants.
  Map arena_map(MapSize size, const StepSpec* reader, bool packs_pixels) const;
  // The same map in pairs of bfloat16 numbers, which are its elements.
  Map paired_map(MapSize size, const StepSpec& reader) const;
  // For the map that step `reader` reads, or the last one: place_maps() says where it lies.
  void claim(Map& map, size_t reader);
  // Side by side; but where that is more than a cache holds, from both ends of the arena in turns, so that a map lies where the one
  // before the last has been.
  void place_maps();
  // The first step whose weights come from far away and serve so few tiles of an image that this takes longer than the products.
  size_t first_wide_step(const std::vector<StepSpec>& steps) const;
  void place_spatial(const std::vector<StepSpec>& steps, size_t count);
  // A place for a block of planes of that width on their way from or to the caller's type.
  void stage(int64_t width);
  // rounding: of what the step leaves in `dst`.
  SpatialStep make_spatial(const StepSpec& spec, size_t index, const Map& src, const Map& dst, Storage rounding);
  void make_plane(SpatialStep& step, const StepSpec& spec, size_t index);
  void make_depthwise(SpatialStep& step, const StepSpec& spec, size_t index);
  void make_winograd(SpatialStep& step, const StepSpec& spec, size_t index, const ConvShape& shape);
  void prepare_map(SpatialStep& step, const StepSpec& spec, const MapSize& src, const MapSize& dst) const;
  // The rows of the convolution that wait for their pool. With weights that exceed the cache, all rows are made first.
  void place_ring(SpatialStep& step, const StepSpec& spec);
  // Offsets of the pixels of one tile of Winograd's, in the order of make_tables.
  void make_winograd_tables(SpatialStep& step, const Map& out, int64_t scale) const;
  // Offsets of the pixels of one block of output rows: row by row, or window by window for a pool in registers.
  void make_tables(SpatialStep& step) const;

  // Linear and what else is done to rows

  void build_linear(const std::vector<StepSpec>& steps, size_t first);
  // Where the rows of step `index` go, and whether they are rounded there rather than on their way to pairs or to the caller.
  void place_rows(LinearStep& step, const std::vector<StepSpec>& steps, size_t index);
  // A map's features are in another order than eager's.
  void order_features(LinearStep& step) const;
  // A step of rows that is no Linear.
  LinearStep make_rows(const RowOp& op, const StepSpec& spec, size_t index, int64_t width, int64_t src_stride) const;
  void read_in_place(LinearStep& step, const StepSpec& spec, size_t index);

  Plan& plan_;
  const PlanOptions& options_;
  const cpu::KernelSet& set_;
  PackCache& cache_;
  std::vector<Timed> timed_;     // of all steps
  std::vector<int64_t> claims_;  // floats of the maps in the arena, by the step that reads them
  std::vector<bool> uses_winograd_, uses_plane_, uses_depthwise_, uses_bf16_;
  std::vector<MapSize> sizes_, conv_sizes_;  // see StepSizes
};

}  // namespace fastseq
