// Builds CUDA plans: shape inference, choice of kernels, arena. Cheap: a few microseconds, since weights are packed on the device.
#include "plan/cuda_plan.h"

#include <algorithm>
#include <initializer_list>
#include <limits>

#include "plan/cuda_heuristics.h"

namespace fastseq {
namespace {

using cuda::Math;
using cuda::PoolMode;

int to_int(int64_t value) {
  if (value > std::numeric_limits<int>::max()) throw Refusal("a CUDA kernel's size or offset exceeds 2^31 elements");
  return static_cast<int>(value);
}

// An activation: spatial, or rows of features as 1x1 images.
struct Map {
  Operand at;
  int64_t c = 0, h = 1, w = 1;
  int64_t pitch = 0;  // channels there are room for: more than c are zeros
  int64_t image_stride = 0, c_stride = 0, h_stride = 0, w_stride = 0;

  int64_t elements() const { return image_stride; }
  bool is_nhwc() const { return c_stride == 1; }
  bool is_dense_nhwc() const { return is_nhwc() && pitch == c && w_stride == c && h_stride == w * c; }
};

Map nhwc(int64_t c, int64_t h, int64_t w, int64_t pitch) {
  Map map;
  map.c = c, map.h = h, map.w = w, map.pitch = pitch;
  map.c_stride = 1, map.w_stride = pitch, map.h_stride = w * pitch, map.image_stride = h * w * pitch;
  return map;
}

Map nchw(int64_t c, int64_t h, int64_t w) {
  Map map;
  map.c = c, map.h = h, map.w = w, map.pitch = c;
  map.w_stride = 1, map.h_stride = w, map.c_stride = h * w, map.image_stride = c * h * w;
  return map;
}

}  // namespace

bool PackSpec::operator==(const PackSpec& o) const {
  return step == o.step && valid == o.valid && std::equal(sizes, sizes + 4, o.sizes) && std::equal(strides, strides + 4, o.strides);
}

class CudaPlanBuilder {
 public:
  CudaPlanBuilder(CudaPlan& plan, const std::vector<StepSpec>& steps, const std::vector<WeightLayout>& weights,
                  const CudaOptions& options)
      : plan_(plan), steps_(steps), weights_(weights), options_(options), engine_(*options.engine), device_(options.device) {}

  void build(const InputSpec& input) {
    element_bytes_ = plan_.element_bytes_ = cuda::element_bytes(options_.conv_math);
    size_t first_linear = 0;
    while (first_linear < steps_.size() && !takes_rows(steps_[first_linear].op)) ++first_linear;
    if (first_linear > 0 && !input.is_spatial) throw Refusal("convolution and pooling need an input of shape (N, C, H, W)");
    if (first_linear == 0 && input.is_spatial) throw Refusal("linear takes rows of features");
    plan_.infos_.resize(steps_.size());
    for (size_t i = 0; i < steps_.size(); ++i) plan_.infos_[i].name = steps_[i].name;
    for (const StepSpec& step : steps_) {
      const bool is_known = step.op == Op::kConv2d || step.op == Op::kLinear || step.op == Op::kMaxPool2d ||
                            step.op == Op::kScale2d || step.op == Op::kScale;
      if (!is_known) throw Refusal(step.name + " on CUDA, which has no kernel for it");
      if (step.pool.dilation_h != 1 || step.pool.dilation_w != 1)
        throw Refusal("a pool with dilation on CUDA, which has no kernel for it");
    }

    Map current = input.is_spatial ? (input.is_nhwc ? nhwc(input.channels, input.h, input.w, input.channels)
                                                    : nchw(input.channels, input.h, input.w))
                                   : nchw(input.features, 1, 1);
    current = build_spatial(current, first_linear);
    if (first_linear < steps_.size()) build_linear(current, first_linear);
    place_arena();
    place_packs();
  }

 private:
  // Spatial steps --------------------------------------------------------------------------------------------------------------

  Map build_spatial(Map current, size_t count) {
    for (size_t i = 0; i < count; ++i) {
      const StepSpec& step = steps_[i];
      Map conv = current;
      if (step.op == Op::kConv2d) {
        const Window& w = step.conv;
        if (step.in != current.c) throw Refusal("conv2d weight expects another number of channels");
        if (step.out < 1) throw Refusal("conv2d has no output channels");
        if (step.conv.k_h > 11 || step.conv.k_w > 11) throw Refusal("CUDA kernels take convolutions up to 11x11");
        conv.c = step.out;
        if (step.groups != 1 || w.is_dilated()) throw Refusal("CUDA kernels take convolutions without groups and dilation");
        const Extent size = conv_size(w, {current.h, current.w});
        conv.h = size.h, conv.w = size.w;
      }
      int64_t h = conv.h, w = conv.w;
      if (has_pool(step)) {
        h = pool_size(h, step.pool.k_h, step.pool.stride_h, step.pool.pad_top, step.pool.ceil_mode);
        w = pool_size(w, step.pool.k_w, step.pool.stride_w, step.pool.pad_left, step.pool.ceil_mode);
      }
      const bool is_last = i + 1 == count, has_linear = count < steps_.size();
      Map dst;
      if (!is_last) {
        dst = nhwc(conv.c, h, w, steps_[i + 1].op == Op::kConv2d ? pitch_of(conv.c, step) : conv.c);
        dst.at.place = Operand::Place::kArena;
      } else if (has_linear) {
        dst = nchw(conv.c, h, w);  // as Flatten reads it
        dst.at.place = Operand::Place::kArena;
      } else {
        dst = options_.output_is_nhwc ? nhwc(conv.c, h, w, conv.c) : nchw(conv.c, h, w);
        dst.at.place = Operand::Place::kDst;
        plan_.output_ = {true, conv.c, h, w, 0};
      }
      check_map(current), check_map(dst);
      StepInfo& info = plan_.infos_[i];
      info.output = shape_text({dst.c, dst.h, dst.w});
      if (step.op == Op::kConv2d) {
        info.flops = 2.0 * static_cast<double>(conv.h * conv.w * step.out * step.in * step.conv.k_h * step.conv.k_w);
        current = add_conv(static_cast<int>(i), current, conv.h, conv.w, dst);
      } else {
        dst = placed(dst, current);
        add_pool(static_cast<int>(i), current, dst, step.pool, /*applies_bias=*/false, step.has_relu(), finish_of(i, dst.c));
        current = dst;
      }
    }
    return current;
  }

  static bool has_pool(const StepSpec& step) { return step.has_pool || step.op == Op::kMaxPool2d; }

  // The epilogue of a step with so many channels; not used where bias and ReLU are all of it.
  cuda::Finish finish_of(size_t index, int64_t channels) const {
    const StepSpec& step = steps_[index];
    const WeightLayout& layout = weights_[index];
    const ActivationSpec& activation = step.activation;
    const auto fits = [&](int64_t count) { return count == channels || count == kAnyChannels; };
    cuda::Finish finish;
    finish.has_norm = layout.norm_channels != 0;
    if (finish.has_norm && !fits(layout.norm_channels)) throw Refusal("BatchNorm has another number of channels");
    if (layout.slopes > 1 && !fits(layout.slopes)) throw Refusal("prelu expects another number of channels");
    finish.is_used = finish.has_norm || (activation.kind != Activation::kNone && !step.has_relu());
    if (!finish.is_used) return {};
    finish.eps = layout.norm_eps;
    finish.kind = activation.kind, finish.a = activation.a, finish.b = activation.b;
    finish.slope_step = layout.slopes > 1;
    // Slopes are on the device: nobody here knows whether they commute.
    const bool may_follow = activation.kind != Activation::kPrelu && commutes_with_max_pool(activation);
    finish.is_after_pool = step.op == Op::kMaxPool2d || (step.has_pool && (step.pools_before_activation || may_follow));
    return finish;
  }

  // Room for whole 16-byte pieces of channels. Only a convolution writes the zeros behind the last.
  int64_t pitch_of(int64_t c, const StepSpec& writer) const {
    return writer.op == Op::kConv2d ? round_up(c, 16 / element_bytes_) : c;
  }

  void check_map(const Map& map) const {
    to_int(map.image_stride);
    if (map.elements() < 1) throw Refusal("an activation is empty");
  }

  // In a slot of the arena that none of `busy` occupies. Offsets are slot numbers until place_arena().
  Map arena(Map map, std::initializer_list<const Map*> busy) {
    const auto is_busy = [&](int64_t slot) {
      return std::any_of(busy.begin(), busy.end(),
                         [&](const Map* other) { return other->at.place == Operand::Place::kArena && other->at.offset == slot; });
    };
    int64_t slot = 0;
    while (is_busy(slot)) ++slot;
    map.at = {Operand::Place::kArena, slot};
    slot_elements_[slot] = std::max(slot_elements_[slot], round_up(map.elements() * options_.batch, 64));
    return map;
  }

  Map placed(const Map& map, const Map& src) { return map.at.place == Operand::Place::kArena ? arena(map, {&src}) : map; }

  bool can_use_vectors(const Map& src) const {
    const int64_t piece = 16 / element_bytes_;
    if (!src.is_nhwc() || src.pitch % piece || src.w_stride % piece || src.h_stride % piece || src.image_stride % piece)
      return false;
    return src.at.place != Operand::Place::kSrc || options_.input_is_aligned;
  }

  // The weight as (n, y, x, c up to the source's pitch) for vector loads and cuDNN, as (n, c, y, x) otherwise: itself where it lies
  // so.
  int packed_conv_weight(int index, bool is_nhwc, int64_t pitch, bool needs_alignment) {
    const StepSpec& step = steps_[static_cast<size_t>(index)];
    const WeightLayout& layout = weights_[static_cast<size_t>(index)];
    const int64_t k_h = step.conv.k_h, k_w = step.conv.k_w;
    const int64_t* const s = layout.strides;  // n, c, y, x
    PackSpec pack;
    pack.step = index;
    const int64_t sizes[4] = {step.out, is_nhwc ? k_h : step.in, is_nhwc ? k_w : k_h, is_nhwc ? pitch : k_w};
    const int64_t strides[4] = {s[0], is_nhwc ? s[2] : s[1], is_nhwc ? s[3] : s[2], is_nhwc ? s[1] : s[3]};
    for (int i = 0; i < 4; ++i) pack.sizes[i] = to_int(sizes[i]), pack.strides[i] = strides[i];
    pack.valid = to_int(is_nhwc ? step.in : k_w);
    return packed(pack, needs_alignment && !layout.is_aligned);
  }

  // -1 where the weight lies as wanted already.
  int packed(const PackSpec& pack, bool must_move) {
    bool is_in_place = pack.valid == pack.sizes[3] && !must_move;
    int64_t stride = 1;
    for (int i = 3; i >= 0; --i) {
      if (pack.sizes[i] != 1 && pack.strides[i] != stride) is_in_place = false;
      stride *= pack.sizes[i];
    }
    if (is_in_place) return -1;
    to_int(pack.elements());
    plan_.infos_[static_cast<size_t>(pack.step)].packed_bytes = pack.elements() * element_bytes_;
    plan_.packs_.push_back(pack);
    return static_cast<int>(plan_.packs_.size()) - 1;
  }

  void set_source(cuda::ConvPoolArgs& args, const Map& src) const {
    args.batch = to_int(options_.batch);
    args.c_in = to_int(src.c), args.h_in = to_int(src.h), args.w_in = to_int(src.w), args.c_pitch = to_int(src.pitch);
    args.src_image_stride = src.image_stride, args.src_c_stride = src.c_stride;
    args.src_h_stride = src.h_stride, args.src_w_stride = src.w_stride;
  }

  void set_window(cuda::ConvPoolArgs& args, const Window& conv) const {
    args.k_h = to_int(conv.k_h), args.k_w = to_int(conv.k_w);
    args.stride_h = to_int(conv.stride_h), args.stride_w = to_int(conv.stride_w);
    args.pad_top = to_int(conv.pad_top), args.pad_left = to_int(conv.pad_left);
  }

  void set_target(cuda::ConvPoolArgs& args, const Map& dst) const {
    args.h_out = to_int(dst.h), args.w_out = to_int(dst.w);
    args.dst_image_stride = dst.image_stride, args.dst_c_stride = dst.c_stride;
    args.dst_h_stride = dst.h_stride, args.dst_w_stride = dst.w_stride;
    args.dst_channels = to_int(dst.pitch);
  }

  // Returns where the result is: `dst`, with its place.
  Map add_conv(int index, const Map& src, int64_t conv_h, int64_t conv_w, Map dst) {
    const StepSpec& step = steps_[static_cast<size_t>(index)];
    const Window& window = step.conv;
    const int64_t terms = step.in * window.k_h * window.k_w, pixels = options_.batch * conv_h * conv_w;
    const bool is_symmetric = window.pad_top == window.pad_bottom && window.pad_left == window.pad_right;
    if (options_.allows_cudnn && options_.forced_kernel.empty() && is_symmetric && src.pitch == src.c &&
        (src.is_dense_nhwc() || src.at.place == Operand::Place::kSrc) && is_for_cudnn(terms, pixels, step.in, step.out)) {
      return add_cudnn_conv(index, src, conv_h, conv_w, dst, terms);
    }
    dst = placed(dst, src);

    CudaLaunch launch;
    launch.kind = CudaLaunch::Kind::kConv;
    launch.step = index;
    launch.src = src.at, launch.dst = dst.at;
    set_source(launch.conv, src);
    set_window(launch.conv, window);
    launch.conv.c_out = to_int(step.out);
    launch.conv.finish = finish_of(static_cast<size_t>(index), step.out);
    launch.conv.has_relu = step.has_relu() && !launch.conv.finish.is_used;
    launch.conv.conv_h = to_int(conv_h), launch.conv.conv_w = to_int(conv_w);

    const bool is_vector = can_use_vectors(src);
    Map target = dst;
    std::string note;
    cuda::Finish after_pool;  // what is left to a launch that pools
    if (!step.has_pool) {
      launch.conv.pool_mode = PoolMode::kNone;
    } else if (is_pooled_in_registers(step.pool, conv_h, conv_w, dst)) {
      launch.conv.pool_mode = PoolMode::kRegisters;
    } else {
      launch.conv.pool_mode = PoolMode::kShared;
      set_pool(launch.conv, step.pool);
    }
    set_target(launch.conv, target);
    const cuda::ConvKernel* kernel = choose_conv(launch.conv, options_.conv_math, is_vector);
    if (!kernel) {
      // Windows too large, or too much halo: the sums go through memory.
      target = arena(nhwc(step.out, conv_h, conv_w, round_up(step.out, 16 / element_bytes_)), {&src, &dst});
      check_map(target);
      launch.dst = target.at;
      launch.conv.pool_mode = PoolMode::kNone;
      if (launch.conv.finish.is_after_pool) {
        after_pool = launch.conv.finish;
        after_pool.has_norm = 0;
        launch.conv.finish.kind = Activation::kNone;
      }
      set_target(launch.conv, target);
      kernel = choose_conv(launch.conv, options_.conv_math, is_vector);
      if (!kernel) throw Refusal("no CUDA convolution kernel runs on this device");
      note = "; pooled in a launch of its own, a block's halo would be too large";
    }
    launch.conv_kernel = kernel;
    launch.kernel = kernel->name;
    launch.packed = packed_conv_weight(index, kernel->is_vector, src.pitch, kernel->is_vector);
    check_blocks(launch.conv, *kernel);
    StepInfo& info = plan_.infos_[static_cast<size_t>(index)];
    info.kernel = launch.kernel, info.note = blocks_note(launch.conv, *kernel) + note;
    plan_.launches_.push_back(launch);
    if (target.at.place != dst.at.place || target.at.offset != dst.at.offset)
      add_pool(index, target, dst, step.pool, /*applies_bias=*/false, /*applies_relu=*/false, after_pool);
    return dst;
  }

  static bool is_pooled_in_registers(const Window& w, int64_t conv_h, int64_t conv_w, const Map& dst) {
    return w.k_h == 2 && w.k_w == 2 && w.stride_h == 2 && w.stride_w == 2 && !w.pad_top && !w.pad_left && 2 * dst.h <= conv_h &&
           2 * dst.w <= conv_w;
  }

  void set_pool(cuda::ConvPoolArgs& args, const Window& w) const {
    args.pool_h = to_int(w.k_h), args.pool_w = to_int(w.k_w);
    args.pool_stride_h = to_int(w.stride_h), args.pool_stride_w = to_int(w.stride_w);
    args.pool_top = to_int(w.pad_top), args.pool_left = to_int(w.pad_left);
  }

  // The tile of pooled outputs whose sums fit `rows` and that wastes least; false if not even one output fits.
  static bool choose_tile(cuda::ConvPoolArgs& args, int rows) {
    int64_t best = 0;
    for (int h = 1; (h - 1) * args.pool_stride_h + args.pool_h <= rows && h <= args.h_out; ++h) {
      const int sums_h = (h - 1) * args.pool_stride_h + args.pool_h;
      const int room = rows / sums_h - args.pool_w;
      if (room < 0) break;
      const int w = std::min(room / args.pool_stride_w + 1, args.w_out);
      // Outputs that exist, of the tiles that cover them.
      const int64_t tiles = divide_up(args.h_out, h) * divide_up(args.w_out, w);
      const int64_t score = int64_t{1} * args.h_out * args.w_out * 1024 / tiles;
      if (score > best) best = score, args.tile_h = h, args.tile_w = w;
    }
    return best > 0;
  }

  // Sums that the tiles compute over the sums that there are.
  double recomputation(const cuda::ConvPoolArgs& args, int rows) const {
    const double tiles = static_cast<double>(divide_up(args.h_out, args.tile_h) * divide_up(args.w_out, args.tile_w));
    return tiles * rows / (static_cast<double>(args.conv_h) * args.conv_w);
  }

  int64_t blocks_of(const cuda::ConvPoolArgs& args, const cuda::ConvKernel& kernel) const {
    const int64_t columns = divide_up(args.dst_channels, kernel.tile_n);
    if (args.pool_mode == PoolMode::kShared)
      return options_.batch * divide_up(args.h_out, args.tile_h) * divide_up(args.w_out, args.tile_w) * columns;
    const int64_t rows = args.pool_mode == PoolMode::kRegisters ? kernel.tile_m / 4 : kernel.tile_m;
    return divide_up(options_.batch * args.h_out * args.w_out, rows) * columns;
  }

  std::string blocks_note(const cuda::ConvPoolArgs& args, const cuda::ConvKernel& kernel) const {
    return std::to_string(blocks_of(args, kernel)) + " blocks on " + std::to_string(device_.multiprocessors) + " multiprocessors";
  }

  void check_blocks(const cuda::ConvPoolArgs& args, const cuda::ConvKernel& kernel) const {
    to_int(blocks_of(args, kernel) + (1 << 20));
  }

  // The first tile that gives the device enough blocks, the last if none does. Null if windows do not fit. Sets the pool's tile.
  const cuda::ConvKernel* choose_conv(cuda::ConvPoolArgs& args, Math math, bool is_vector) const {
    const cuda::ConvKernel* chosen = nullptr;
    cuda::ConvPoolArgs chosen_args;
    const bool is_shared = args.pool_mode == PoolMode::kShared;
    for (const cuda::ConvKernel& kernel : engine_.conv[static_cast<int>(math)]) {
      if (kernel.is_vector != is_vector || kernel.min_arch > device_.arch() || kernel.shared_bytes > device_.shared_bytes_per_block)
        continue;
      const bool is_forced = is_forced_kernel(kernel.name);
      if (!options_.forced_kernel.empty() && has_forced_conv(math, is_vector) && !is_forced) continue;
      if (!is_forced && kernel.tile_n == 64 && prefers_narrow_tile(args.dst_channels)) continue;
      cuda::ConvPoolArgs trial = args;
      if (is_shared) {
        if (!choose_tile(trial, kernel.tile_m)) continue;
        if (!is_forced && recomputation(trial, kernel.tile_m) > kMostRecomputation &&
            options_.batch * args.conv_h * args.conv_w > 4096)
          continue;
      }
      chosen = &kernel, chosen_args = trial;
      if (is_enough_blocks(blocks_of(trial, kernel), device_.multiprocessors)) break;
    }
    if (chosen) args = chosen_args;
    return chosen;
  }

  bool is_forced_kernel(const std::string& name) const {
    return !options_.forced_kernel.empty() && name.find(options_.forced_kernel) != std::string::npos;
  }
  bool has_forced_conv(Math math, bool is_vector) const {
    for (const cuda::ConvKernel& kernel : engine_.conv[static_cast<int>(math)])
      if (kernel.is_vector == is_vector && is_forced_kernel(kernel.name)) return true;
    return false;
  }

  // cuDNN makes the convolution into a tensor of its own, ReLU included where its ReLU keeps NaN. A pool, bias and ReLU otherwise,
  // or another order of the result are a launch of ours.
  Map add_cudnn_conv(int index, const Map& src, int64_t conv_h, int64_t conv_w, Map dst, int64_t terms) {
    const StepSpec& step = steps_[static_cast<size_t>(index)];
    CudaLaunch launch;
    const cuda::Finish finish = finish_of(static_cast<size_t>(index), step.out);
    launch.kind = CudaLaunch::Kind::kCudnnConv;
    launch.step = index;
    launch.has_relu = step.has_relu() && options_.trusts_cudnn_relu && !finish.is_used;
    launch.kernel = launch.has_relu ? "cudnn_convolution_relu" : "cudnn_convolution";
    launch.takes_bias = launch.has_relu;
    launch.src = src.at;
    launch.dst.place = Operand::Place::kHeld;
    launch.is_nhwc = src.is_nhwc();
    set_source(launch.conv, src);
    set_window(launch.conv, step.conv);
    launch.conv.c_out = to_int(step.out);
    launch.conv.conv_h = to_int(conv_h), launch.conv.conv_w = to_int(conv_w);
    launch.packed = packed_conv_weight(index, launch.is_nhwc, src.c, true);
    Map held = launch.is_nhwc ? nhwc(step.out, conv_h, conv_w, step.out) : nchw(step.out, conv_h, conv_w);
    held.at = launch.dst;
    check_map(held);
    StepInfo& info = plan_.infos_[static_cast<size_t>(index)];
    info.kernel = launch.kernel;
    info.note = "handed to cuDNN: " + std::to_string(terms) + " products a sum";
    plan_.launches_.push_back(launch);
    const bool is_same_order = dst.c_stride == held.c_stride && dst.pitch == held.pitch && dst.w_stride == held.w_stride;
    if (launch.has_relu && !step.has_pool && is_same_order) return held;
    dst = placed(dst, src);
    add_pool(index, held, dst, step.has_pool ? step.pool : Window{}, !launch.takes_bias, step.has_relu() && !launch.has_relu,
             finish);
    return dst;
  }

  // Max-pooling, or with a 1x1 window a copy in another order, or in place. Bias, ReLU and `finish` are what a library has left to
  // do, or what is a step of its own.
  void add_pool(int index, const Map& src, const Map& dst, const Window& window, bool applies_bias, bool applies_relu,
                const cuda::Finish& finish) {
    CudaLaunch launch;
    launch.kind = CudaLaunch::Kind::kPool;
    launch.step = index;
    launch.src = src.at, launch.dst = dst.at;
    launch.takes_bias = applies_bias;
    for (const cuda::PoolKernel& kernel : engine_.pool)
      if (kernel.math == element_math()) launch.pool_kernel = &kernel;
    if (!launch.pool_kernel) throw Refusal("no CUDA pooling kernel for this dtype");
    launch.kernel = launch.pool_kernel->name;
    cuda::MaxPoolArgs& args = launch.pool;
    args.batch = to_int(options_.batch);
    args.channels = to_int(std::min(src.pitch, dst.pitch));
    args.h_in = to_int(src.h), args.w_in = to_int(src.w), args.h_out = to_int(dst.h), args.w_out = to_int(dst.w);
    args.src_image_stride = src.image_stride, args.src_c_stride = src.c_stride;
    args.src_h_stride = src.h_stride, args.src_w_stride = src.w_stride;
    args.dst_image_stride = dst.image_stride, args.dst_c_stride = dst.c_stride;
    args.dst_h_stride = dst.h_stride, args.dst_w_stride = dst.w_stride;
    args.pool_h = to_int(window.k_h), args.pool_w = to_int(window.k_w);
    args.pool_stride_h = to_int(window.stride_h), args.pool_stride_w = to_int(window.stride_w);
    args.pool_top = to_int(window.pad_top), args.pool_left = to_int(window.pad_left);
    args.has_relu = applies_relu && !finish.is_used;
    args.finish = finish;
    args.finished_channels = to_int(dst.c);
    StepInfo& info = plan_.infos_[static_cast<size_t>(index)];
    info.kernel += (info.kernel.empty() ? "" : " + ") + launch.kernel;
    plan_.launches_.push_back(launch);
  }

  Math element_math() const { return options_.conv_math == Math::kTf32 ? Math::kIeee : options_.conv_math; }

  // Linear steps ---------------------------------------------------------------------------------------------------------------

  void build_linear(Map current, size_t first) {
    current = flat(current);
    size_t i = first;
    while (i < steps_.size()) {
      const bool is_linear = steps_[i].op == Op::kLinear;
      for (size_t j = i; j < steps_.size() && steps_[j].op == Op::kLinear; ++j)
        check_linear(j, j == i ? current.c : steps_[j - 1].out);
      const size_t end = is_linear ? chain_end(i) : i + 1;
      const bool is_last = end == steps_.size();
      Map dst = nchw(is_linear ? steps_[end - 1].out : current.c, 1, 1);
      if (is_last) {
        dst.at.place = Operand::Place::kDst;
        plan_.output_ = {false, 0, 0, 0, dst.c};
      } else {
        dst = arena(dst, {&current});
      }
      check_map(current), check_map(dst);
      for (size_t j = i; j < end; ++j) {
        plan_.infos_[j].output = shape_text({is_linear ? steps_[j].out : dst.c});
        if (!is_linear) continue;
        plan_.infos_[j].flops = 2.0 * static_cast<double>(steps_[j].out) * static_cast<double>(steps_[j].in);
      }
      if (!is_linear) {
        add_pool(static_cast<int>(i), current, dst, Window{}, /*applies_bias=*/false, steps_[i].has_relu(), finish_of(i, dst.c));
      } else if (chain_) {
        add_chain(i, end, current, dst);
      } else {
        add_linear(static_cast<int>(i), current, dst);
      }
      current = dst;
      i = end;
    }
  }

  void check_linear(size_t i, int64_t width) const {
    if (steps_[i].in != width) throw Refusal("linear weight expects another number of features");
    if (steps_[i].in < 1 || steps_[i].out < 1) throw Refusal("linear has no features");
  }

  static Map flat(const Map& map) {
    Map rows = nchw(map.c * map.h * map.w, 1, 1);
    rows.at = map.at;
    return rows;
  }

  // The longest chain from `first` that one launch takes: sets chain_ to its kernel. Null and first + 1 for a layer by itself.
  size_t chain_end(size_t first) {
    chain_ = nullptr;
    size_t last = first;
    while (last < steps_.size() && steps_[last].op == Op::kLinear) ++last;
    for (size_t end = std::min(last, first + cuda::kMostLayers); end > first; --end) {
      chain_ = choose_chain(first, end);
      if (chain_) return end;
    }
    return first + 1;
  }

  cuda::ChainArgs chain_args(size_t first, size_t end) const {
    cuda::ChainArgs args;
    args.rows = options_.batch;
    args.count = static_cast<int>(end - first);
    args.src_row_stride = steps_[first].in, args.dst_row_stride = steps_[end - 1].out;
    for (size_t i = first; i < end; ++i) {
      const cuda::Finish finish = finish_of(i, steps_[i].out);
      const bool has_relu = steps_[i].has_relu() && !finish.is_used;
      args.layers[i - first] = {nullptr, nullptr, to_int(steps_[i].out), to_int(steps_[i].in), has_relu, finish};
    }
    return args;
  }

  const cuda::ChainKernel* choose_chain(size_t first, size_t end) const {
    const cuda::ChainArgs args = chain_args(first, end);
    int64_t bytes = 0, widest = 0;
    for (size_t i = first; i < end; ++i) {
      bytes += steps_[i].in * steps_[i].out * element_bytes_;
      widest = std::max({widest, steps_[i].in, steps_[i].out});
    }
    const int64_t rows = options_.batch;
    const bool is_single = end - first == 1;
    if (const cuda::ChainKernel* forced = find_chain(args, widest, rows, /*op=*/-1, /*is_forced=*/true)) return forced;
    if (is_single && rows <= kMostSkinnyRows && bytes > kSkinnyWeightBytes)
      if (const auto* kernel = find_chain(args, widest, rows, static_cast<int>(cuda::ChainOp::kSkinnyLinear))) return kernel;
    // fp32 layers use the multiply-add units whatever the flags say where latency counts: no less exact than TF32.
    if (bytes <= kTinyWeightBytes && rows <= most_tiny_rows(device_.multiprocessors))
      if (const auto* kernel = find_chain(args, widest, tiny_rows_of_a_block(rows, device_.multiprocessors),
                                          static_cast<int>(cuda::ChainOp::kTinyMlp)))
        return kernel;
    if (widest <= kWidestFused && rows >= kFewestFusedRows)
      if (const auto* kernel = find_chain(args, widest, rows, static_cast<int>(cuda::ChainOp::kFusedMlp))) return kernel;
    return nullptr;
  }

  // Of a family's kernels that take the chain: the smallest whose block holds `rows`, else the largest. fused_mlp: the first.
  const cuda::ChainKernel* find_chain(const cuda::ChainArgs& args, int64_t widest, int64_t rows, int op,
                                      bool is_forced = false) const {
    const cuda::ChainKernel* chosen = nullptr;
    const bool has_finish =
        std::any_of(args.layers, args.layers + args.count, [](const auto& layer) { return layer.finish.is_used; });
    for (const cuda::ChainKernel& kernel : engine_.chain) {
      if (is_forced ? !is_forced_kernel(kernel.name) : static_cast<int>(kernel.op) != op) continue;
      const bool is_fused = kernel.op == cuda::ChainOp::kFusedMlp;
      const Math math = is_fused ? options_.linear_math : element_math();
      if (kernel.math != math || kernel.min_arch > device_.arch()) continue;
      if (kernel.max_width > 0 && widest > kernel.max_width) continue;
      if (is_fused && has_finish) continue;
      if (kernel.op == cuda::ChainOp::kSkinnyLinear && (args.count != 1 || args.rows > kernel.tile_rows)) continue;
      if (kernel.shared_bytes(args) > device_.shared_bytes_per_block) continue;
      if (is_fused || is_forced) return &kernel;
      const bool is_better =
          !chosen || (chosen->tile_rows < rows ? kernel.tile_rows > chosen->tile_rows
                                               : kernel.tile_rows >= rows && kernel.tile_rows < chosen->tile_rows);
      if (is_better) chosen = &kernel;
    }
    return chosen;
  }

  void add_chain(size_t first, size_t end, const Map& src, const Map& dst) {
    CudaLaunch launch;
    launch.kind = CudaLaunch::Kind::kChain;
    launch.step = static_cast<int>(first);
    launch.kernel = chain_->name;
    launch.chain_kernel = chain_;
    launch.chain = chain_args(first, end);
    launch.src = src.at, launch.dst = dst.at;
    for (size_t i = first; i < end; ++i) {
      plan_.infos_[i].kernel = chain_->name;
      plan_.infos_[i].note = chain_->op == cuda::ChainOp::kSkinnyLinear ? "few rows: a stream of weights"
                             : end - first > 1                          ? std::to_string(end - first) + " layers in one launch"
                                                                        : "";
      launch.chain_packs.push_back(packed_linear_weight(static_cast<int>(i), /*needs_alignment=*/false));
    }
    plan_.launches_.push_back(launch);
  }

  int packed_linear_weight(int index, bool needs_alignment) {
    const StepSpec& step = steps_[static_cast<size_t>(index)];
    const WeightLayout& layout = weights_[static_cast<size_t>(index)];
    PackSpec pack;
    pack.step = index;
    pack.sizes[0] = to_int(step.out), pack.sizes[3] = to_int(step.in);
    pack.strides[0] = layout.strides[0], pack.strides[3] = layout.strides[1];
    pack.valid = pack.sizes[3];
    return packed(pack, needs_alignment && !layout.is_aligned);
  }

  // One layer by itself: cuBLAS, or the convolution kernels on images of 1x1.
  void add_linear(int index, const Map& src, const Map& dst) {
    const StepSpec& step = steps_[static_cast<size_t>(index)];
    StepInfo& info = plan_.infos_[static_cast<size_t>(index)];
    CudaLaunch launch;
    const cuda::Finish finish = finish_of(static_cast<size_t>(index), step.out);
    launch.step = index;
    launch.src = src.at, launch.dst = dst.at;
    launch.has_relu = step.has_relu() && !finish.is_used;
    set_source(launch.conv, src);
    set_target(launch.conv, dst);
    launch.conv.c_out = to_int(step.out);
    launch.conv.conv_h = launch.conv.conv_w = 1;
    launch.conv.has_relu = launch.has_relu, launch.conv.finish = finish;
    if (options_.allows_cublas && options_.forced_kernel.empty() && is_for_cublas(options_.batch, step.out, step.in)) {
      launch.kind = CudaLaunch::Kind::kCublasLinear;
      launch.kernel = "_addmm_activation";
      launch.packed = packed_linear_weight(index, false);
      info.note = "handed to cuBLAS: " + shape_text({options_.batch, step.out, step.in});
    } else {
      launch.kind = CudaLaunch::Kind::kConv;
      launch.conv_kernel = choose_conv(launch.conv, options_.linear_math, can_use_vectors_for_rows(src));
      if (!launch.conv_kernel) throw Refusal("no CUDA kernel for this Linear runs on this device");
      launch.kernel = launch.conv_kernel->name;
      info.note = blocks_note(launch.conv, *launch.conv_kernel);
      launch.packed = packed_linear_weight(index, launch.conv_kernel->is_vector);
      check_blocks(launch.conv, *launch.conv_kernel);
    }
    info.kernel = launch.kernel;
    plan_.launches_.push_back(launch);
    if (launch.kind == CudaLaunch::Kind::kCublasLinear && finish.is_used)
      add_pool(index, dst, dst, Window{}, /*applies_bias=*/false, /*applies_relu=*/false, finish);
  }

  bool can_use_vectors_for_rows(const Map& src) const {
    const bool is_aligned = src.at.place != Operand::Place::kSrc || options_.input_is_aligned;
    return is_aligned && src.c % (16 / element_bytes_) == 0;
  }

  // Memory ---------------------------------------------------------------------------------------------------------------------

  void place_arena() {
    int64_t offsets[kSlots];
    for (int slot = 0; slot < kSlots; ++slot) {
      offsets[slot] = plan_.arena_elements_;
      plan_.arena_elements_ += slot_elements_[slot];
    }
    for (CudaLaunch& launch : plan_.launches_)
      for (Operand* operand : {&launch.src, &launch.dst})
        if (operand->place == Operand::Place::kArena) operand->offset = offsets[operand->offset];
  }

  // The first convolution keeps the packed weights of later launches up to date with additional blocks; what it or a launch before
  // it needs, and what does not fit, is packed ahead.
  void place_packs() {
    for (size_t i = 0; i < plan_.launches_.size() && plan_.packing_launch_ < 0; ++i)
      if (plan_.launches_[i].kind == CudaLaunch::Kind::kConv) plan_.packing_launch_ = static_cast<int>(i);
    std::vector<int> before, aside, position(plan_.packs_.size());
    for (size_t p = 0; p < plan_.packs_.size(); ++p) {
      bool is_needed_early = plan_.packing_launch_ < 0;
      for (int i = 0; i <= plan_.packing_launch_; ++i)
        is_needed_early |= uses(plan_.launches_[static_cast<size_t>(i)], static_cast<int>(p));
      (is_needed_early || aside.size() == cuda::kMostPackJobs ? before : aside).push_back(static_cast<int>(p));
    }
    plan_.packs_before_ = static_cast<int>(before.size());
    if (aside.empty()) plan_.packing_launch_ = -1;
    before.insert(before.end(), aside.begin(), aside.end());
    std::vector<PackSpec> ordered;
    for (size_t i = 0; i < before.size(); ++i) {
      ordered.push_back(plan_.packs_[static_cast<size_t>(before[i])]);
      position[static_cast<size_t>(before[i])] = static_cast<int>(i);
    }
    plan_.packs_ = std::move(ordered);
    for (CudaLaunch& launch : plan_.launches_) {
      if (launch.packed >= 0) launch.packed = position[static_cast<size_t>(launch.packed)];
      for (int& pack : launch.chain_packs)
        if (pack >= 0) pack = position[static_cast<size_t>(pack)];
    }
  }

  static bool uses(const CudaLaunch& launch, int pack) {
    return launch.packed == pack ||
           std::find(launch.chain_packs.begin(), launch.chain_packs.end(), pack) != launch.chain_packs.end();
  }

  CudaPlan& plan_;
  const std::vector<StepSpec>& steps_;
  const std::vector<WeightLayout>& weights_;
  const CudaOptions& options_;
  const cuda::Engine& engine_;
  const cuda::DeviceProperties device_;
  int64_t element_bytes_ = 4;
  static constexpr int kSlots = 3;  // a source, a result, and the sums between a convolution and its pool
  int64_t slot_elements_[kSlots] = {};
  const cuda::ChainKernel* chain_ = nullptr;
};

std::shared_ptr<const CudaPlan> CudaPlan::build(const InputSpec& input, const std::vector<StepSpec>& steps,
                                                const std::vector<WeightLayout>& weights, const CudaOptions& options) {
  auto plan = std::make_shared<CudaPlan>();
  CudaPlanBuilder(*plan, steps, weights, options).build(input);
  return plan;
}

}  // namespace fastseq
