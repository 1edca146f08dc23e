// conv2d_depthwise: each channel with a filter of its own, NHWC, a lane is a channel. As many pixels of a row as keep the
// multiply-add units busy share a load of each weight. Vectors of channels are the outermost loop: the rows that a filter sees
// again for the next row of the output are then still in L1. conv2d_grouped: the same with a few input channels for each output
// channel. The groups of a vector's output channels lie side by side in the source, and a shuffle brings to each lane the term of
// its group. The sum of an output runs over the taps and a tap's terms in order; long ones in partial sums of whole rows of taps.
// Bits are the same for every width, batch size and thread count.

constexpr int kDepthwisePixels = 8;
// 3x3: the sums of two rows or one, the weights of the filter or of one of its rows, and a pixel of the source fill 32 registers or
// 16.
constexpr int kDensePixels = kHasManyRegisters ? 8 : 10;

// Longest chain of additions into one accumulator, and the shortest worth ending: as the plan cuts those of the other kernels.
constexpr int kLongestTaps = 128, kShortestTaps = 64;

// The filter's rows that go into one partial sum.
static FASTSEQ_INLINE int32_t rows_of_partial_sum(const DepthwiseJob& job) {
  const int32_t terms = job.k_w * job.terms;  // of a row
  return job.k_h * terms <= kLongestTaps ? job.k_h : (kShortestTaps + terms - 1) / terms;
}

static FASTSEQ_INLINE void store_pixel(float* dst, Vec value, int lanes) {
  if (__builtin_expect(lanes == kLanes, 1)) {
    store(dst, value);
  } else {
    store_lanes(dst, value, lanes);
  }
}

template <int kPixels, bool kShuffles>
static FASTSEQ_INLINE void add_taps(const DepthwiseJob& job, const float* src, const float* weight, const int32_t* index,
                                    int32_t k_h, Vec (&acc)[kPixels]) {
  for (int32_t ky = 0; ky < k_h; ++ky, src += job.tap_row_stride) {
    const float* tap = src;
    if constexpr (kShuffles) {
      for (int32_t kx = 0; kx < job.k_w; ++kx, tap += job.tap_pitch)
        for (int32_t term = 0; term < job.terms; ++term, weight += kLanes) {
          const Vec w = load(weight);
          const VecI lanes = *reinterpret_cast<const VecI*>(index + term * kLanes);
#pragma GCC unroll 8
          for (int i = 0; i < kPixels; ++i) acc[i] += __builtin_shuffle(load(tap + i * job.src_pitch), lanes) * w;
        }
    } else {
      for (int32_t kx = 0; kx < job.k_w; ++kx, tap += job.tap_pitch, weight += kLanes) {
        const Vec w = load(weight);
#pragma GCC unroll 8
        for (int i = 0; i < kPixels; ++i) acc[i] += load(tap + i * job.src_pitch) * w;
      }
    }
  }
}

template <int kPixels, bool kShuffles>
static void depthwise_blocks(const DepthwiseJob& job, const float* src, const float* weight, const int32_t* index, Vec bias,
                             float* dst, int lanes, int32_t blocks) {
  const Vec lower = splat(job.lower);
  const int32_t together = rows_of_partial_sum(job);
  for (int32_t b = 0; b < blocks; ++b, src += kPixels * job.src_pitch, dst += kPixels * job.dst_pitch) {
    Vec acc[kPixels];
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) acc[i] = Vec{};
    add_taps<kPixels, kShuffles>(job, src, weight, index, together, acc);
    for (int32_t ky = together; __builtin_expect(ky < job.k_h, 0); ky += together) {
      Vec sum[kPixels];
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; ++i) sum[i] = Vec{};
      const int32_t rows = job.k_h - ky < together ? job.k_h - ky : together;
      add_taps<kPixels, kShuffles>(job, src + ky * job.tap_row_stride, weight + ky * job.k_w * job.terms * kLanes, index, rows,
                                   sum);
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; ++i) acc[i] += sum[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) {
      store_pixel(dst + i * job.dst_pitch, clamp_below(acc[i] + bias, lower), lanes);
    }
  }
}

// 3x3 taps next to one another, kRowsT rows of kPixels outputs: each pixel of the source is loaded once for all that it goes into.
template <int kRowsT, int kPixels>
static void depthwise_3x3_blocks(const DepthwiseJob& job, const float* src, const float* weight, Vec bias, float* dst, int lanes,
                                 int32_t blocks) {
  const Vec lower = splat(job.lower);
  Vec w[3][3];
  if constexpr (kRowsT > 1)
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) w[t / 3][t % 3] = load(weight + t * kLanes);
  for (int32_t b = 0; b < blocks; ++b, src += kPixels * job.src_pitch, dst += kPixels * job.dst_pitch) {
    Vec acc[kRowsT][kPixels];
#pragma GCC unroll 2
    for (int y = 0; y < kRowsT; ++y)
#pragma GCC unroll 10
      for (int x = 0; x < kPixels; ++x) acc[y][x] = Vec{};
    const float* row = src;
#pragma GCC unroll 4
    for (int r = 0; r < kRowsT + 2; ++r, row += job.src_row_stride) {
      if constexpr (kRowsT == 1)
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; ++kx) w[r][kx] = load(weight + (3 * r + kx) * kLanes);
      const float* pixel = row;
#pragma GCC unroll 12
      for (int c = 0; c < kPixels + 2; ++c, pixel += job.src_pitch) {
        const Vec v = load(pixel);
#pragma GCC unroll 2
        for (int y = 0; y < kRowsT; ++y)
#pragma GCC unroll 3
          for (int kx = 2; kx >= 0; --kx) {
            const int ky = r - y, x = c - kx;
            if (ky >= 0 && ky < 3 && x >= 0 && x < kPixels) acc[y][x] += v * w[ky][kx];
          }
      }
    }
#pragma GCC unroll 2
    for (int y = 0; y < kRowsT; ++y) {
      float* to = dst + y * job.dst_row_stride;
#pragma GCC unroll 10
      for (int x = 0; x < kPixels; ++x, to += job.dst_pitch) store_pixel(to, clamp_below(acc[y][x] + bias, lower), lanes);
    }
  }
}

// How the outputs of one vector of channels are made: 3x3 taps in two rows or one, or one row of any filter.
enum class DepthwiseKind { kTwoRows3x3, kOneRow3x3, kAny, kShuffled };

template <DepthwiseKind kKind, int kPixels>
static FASTSEQ_INLINE void depthwise_blocks_of(int32_t pixels, const DepthwiseJob& job, const float* src, const float* weight,
                                               const int32_t* index, Vec bias, float* dst, int lanes, int32_t blocks) {
  if (pixels == kPixels) {
    if constexpr (kKind == DepthwiseKind::kTwoRows3x3) {
      depthwise_3x3_blocks<2, kPixels>(job, src, weight, bias, dst, lanes, blocks);
    } else if constexpr (kKind == DepthwiseKind::kOneRow3x3) {
      depthwise_3x3_blocks<1, kPixels>(job, src, weight, bias, dst, lanes, blocks);
    } else {
      depthwise_blocks<kPixels, kKind == DepthwiseKind::kShuffled>(job, src, weight, index, bias, dst, lanes, blocks);
    }
  } else if constexpr (kPixels > 1) {
    depthwise_blocks_of<kKind, kPixels - 1>(pixels, job, src, weight, index, bias, dst, lanes, blocks);
  }
}

// Row y of the vector of channels that starts with c. Blocks as equal as can be: a last one of a single pixel would wait for its
// own sums.
template <DepthwiseKind kKind, int kPixels>
static FASTSEQ_INLINE void depthwise_row(const DepthwiseJob& job, int32_t c, int32_t y) {
  const int32_t blocks = (job.width + kPixels - 1) / kPixels, size = job.width / blocks, larger = job.width % blocks;
  const int lanes = job.channels - c < kLanes ? job.channels - c : kLanes;
  const float* const weight = job.weight + c * (job.k_h * job.k_w * job.terms);
  const int32_t* const index = job.index ? job.index + c * job.terms : nullptr;
  const Vec bias = load(job.bias + c);
  const float* src = job.src + y * job.src_row_stride + (job.index ? job.first_channel[c / kLanes] : c);
  float* dst = job.dst + y * job.dst_row_stride + c;
  if (larger) depthwise_blocks_of<kKind, kPixels>(size + 1, job, src, weight, index, bias, dst, lanes, larger);
  src += larger * (size + 1) * job.src_pitch, dst += larger * (size + 1) * job.dst_pitch;
  depthwise_blocks_of<kKind, kPixels>(size, job, src, weight, index, bias, dst, lanes, blocks - larger);
}

static void depthwise_rows(const DepthwiseJob& job) {
  assert(job.rows >= 1 && job.width >= 1 && job.channels >= 1 && "there is an output");
  assert((job.index || job.terms == 1) && "several terms come by shuffles");
  const bool is_dense_3x3 =
      !job.index && job.k_h == 3 && job.k_w == 3 && job.src_pitch == job.tap_pitch && job.src_row_stride == job.tap_row_stride;
  for (int32_t c = 0; c < job.channels; c += kLanes) {
    int32_t y = 0;
    if (job.index) {
      for (; y < job.rows; ++y) depthwise_row<DepthwiseKind::kShuffled, kDepthwisePixels>(job, c, y);
    } else if (!is_dense_3x3) {
      for (; y < job.rows; ++y) depthwise_row<DepthwiseKind::kAny, kDepthwisePixels>(job, c, y);
    } else {
      if constexpr (kHasManyRegisters)
        for (; y + 2 <= job.rows; y += 2) depthwise_row<DepthwiseKind::kTwoRows3x3, kDensePixels>(job, c, y);
      for (; y < job.rows; ++y) depthwise_row<DepthwiseKind::kOneRow3x3, kDensePixels>(job, c, y);
    }
  }
}
