// conv2d_plane: convolution of one input channel, a lane is a pixel. Where there are few output channels, lanes of channels would
// stay empty: this takes a weight in the broadcast operand and 2 vectors of neighbouring pixels of each row. The sum of an output
// runs over the taps in order, as in gemm_tile, and has the same bits.

template <int kOut, bool kPool>
static FASTSEQ_INLINE void plane_block(const PlaneJob& job, int32_t first, Vec lower) {
  constexpr int kRowsT = kPool ? 2 : 1;
  typedef VecI Index;
  Index even, odd;  // of two vectors side by side
  for (int i = 0; i < kLanes; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
  for (int32_t x = 0; x < job.width; x += 2 * kLanes) {
    Vec acc[kOut][kRowsT][2];
#pragma GCC unroll 8
    for (int o = 0; o < kOut; ++o)
#pragma GCC unroll 2
      for (int r = 0; r < kRowsT; ++r) acc[o][r][0] = acc[o][r][1] = Vec{};
    const float* weight = job.weight + first;
    for (int32_t ky = 0; ky < job.k_h; ++ky) {
      const float* src = job.src + ky * job.src_row_stride + x;
      for (int32_t kx = 0; kx < job.k_w; ++kx, ++src, weight += job.outs) {
        Vec d[kRowsT][2];
#pragma GCC unroll 2
        for (int r = 0; r < kRowsT; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) d[r][v] = load(src + r * job.src_row_stride + v * kLanes);
#pragma GCC unroll 8
        for (int o = 0; o < kOut; ++o) {
          const Vec w = splat(weight[o]);
#pragma GCC unroll 2
          for (int r = 0; r < kRowsT; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) acc[o][r][v] += d[r][v] * w;
        }
      }
    }
#pragma GCC unroll 8
    for (int o = 0; o < kOut; ++o) {
      const Vec bias = splat(job.bias[first + o]);
      float* const dst = job.dst + (first + o) * job.dst_stride;
      if constexpr (kPool) {
        const Vec left = pool_max(acc[o][0][0], acc[o][1][0]), right = pool_max(acc[o][0][1], acc[o][1][1]);
        const Vec max = pool_max(__builtin_shuffle(left, right, even), __builtin_shuffle(left, right, odd));
        store(dst + x / 2, clamp_below(max + bias, lower));
      } else {
        store(dst + x, clamp_below(acc[o][0][0] + bias, lower));
        store(dst + x + kLanes, clamp_below(acc[o][0][1] + bias, lower));
      }
    }
  }
}

// All output channels of one row (or of one row of windows), kPlaneOuts at a time.
template <bool kPool>
static void plane_row(const PlaneJob& job) {
  constexpr int kMost = kPool ? kPlaneOuts : 2 * kPlaneOuts > 8 ? 8 : 2 * kPlaneOuts;
  const Vec lower = splat(job.lower);
  int32_t o = 0;
  for (; o + kMost <= job.outs; o += kMost) plane_block<kMost, kPool>(job, o, lower);
  for (; o + 2 <= job.outs; o += 2) plane_block<2, kPool>(job, o, lower);
  if (o < job.outs) plane_block<1, kPool>(job, o, lower);
}
