// winograd: stride-1 convolution by minimal filtering (Winograd, "Arithmetic Complexity of Computations", 1980; Lavin and Gray,
// "Fast Algorithms for Convolutional Neural Networks", 2016) on 6x6 patches of the input: F(4x4, 3x3) and F(2x2, 5x5).
//   patch V = B^T d B,  M[point] = sum_c V[point][c] * U[point][c] at 36 points,  result = A^T M A
// The points are 0, +-1/sqrt(2), +-sqrt(2) and infinity. Their powers stay near 1, so float32 keeps the accuracy of a direct sum,
// which the usual points 0, +-1, +-2 lose; one input transform serves both kernel sizes. The weights U = G g G^T are made once
// (plan/pack.cpp). Everything is per tile: the bits of a result depend on the tile it lies in and on nothing else.

constexpr float kRoot2 = 1.41421356237309505f, kHalfRoot2 = 0.70710678118654752f;

// One column or row of B^T d: what points 0, 1/sqrt2, -1/sqrt2 / sqrt2, -sqrt2 and infinity see of six values.
template <typename V>
static FASTSEQ_INLINE V at_zero(V d0, V d2, V d4) {
  return (d0 + d4) - 2.5f * d2;
}
template <typename V>
static FASTSEQ_INLINE V at_infinity(V d1, V d3, V d5) {
  return (d1 + d5) - 2.5f * d3;
}
template <typename V>
static FASTSEQ_INLINE void at_half_roots(V d1, V d2, V d3, V d4, V& plus, V& minus) {
  const V even = d4 - 2.0f * d2, odd = kHalfRoot2 * d3 - kRoot2 * d1;
  plus = even + odd, minus = even - odd;
}
template <typename V>
static FASTSEQ_INLINE void at_roots(V d1, V d2, V d3, V d4, V& plus, V& minus) {
  const V even = d4 - 0.5f * d2, odd = kRoot2 * d3 - kHalfRoot2 * d1;
  plus = even + odd, minus = even - odd;
}
template <typename V>
static FASTSEQ_INLINE void at_points(const V (&d)[6], V (&t)[6]) {
  t[0] = at_zero(d[0], d[2], d[4]);
  at_half_roots(d[1], d[2], d[3], d[4], t[1], t[2]);
  at_roots(d[1], d[2], d[3], d[4], t[3], t[4]);
  t[5] = at_infinity(d[1], d[3], d[5]);
}

// One column or row of A^T m: kOut results from the values at six points.
template <int kOut, typename V>
static FASTSEQ_INLINE void from_points(const V (&m)[6], V (&y)[kOut]) {
  const V sum1 = m[1] + m[2], difference1 = m[1] - m[2], sum2 = m[3] + m[4], difference2 = m[3] - m[4];
  y[0] = (m[0] + sum1) + sum2;
  if constexpr (kOut == 2) {
    y[1] = kHalfRoot2 * difference1 + (kRoot2 * difference2 + m[5]);
  } else {
    y[1] = kHalfRoot2 * difference1 + kRoot2 * difference2;
    y[2] = 0.5f * sum1 + 2.0f * sum2;
    y[3] = 0.5f * kHalfRoot2 * difference1 + (2.0f * kRoot2 * difference2 + m[5]);
  }
}

// Rows [kPass * 6 / kPasses, ...) of B^T d B for one vector of channels; few rows at a time stay in registers.
template <typename V, typename Load, typename Store>
static FASTSEQ_INLINE void transform_half(bool second, const Load& load_at, const Store& store_at) {
  V rows[3][6];
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) {
    const V d1 = load_at(1, j), d2 = load_at(2, j), d3 = load_at(3, j), d4 = load_at(4, j);
    if (!second) {
      rows[0][j] = at_zero(load_at(0, j), d2, d4);
      at_half_roots(d1, d2, d3, d4, rows[1][j], rows[2][j]);
    } else {
      at_roots(d1, d2, d3, d4, rows[0][j], rows[1][j]);
      rows[2][j] = at_infinity(d1, d3, load_at(5, j));
    }
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    V t[6];
    at_points(rows[i], t);
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) store_at((second ? 3 : 0) + i, j, t[j]);
  }
}

template <typename V, typename Load, typename Store>
static FASTSEQ_INLINE void transform_patch(const Load& load_at, const Store& store_at) {
  transform_half<V>(false, load_at, store_at);
  transform_half<V>(true, load_at, store_at);
}

// V[point][tile][c] for all channels of some tiles: a cache line of channels at a time, tiles inside.
static void winograd_input(const WinogradInputJob& job) {
  constexpr int32_t kLine = kLanes < 16 ? 16 : kLanes;
  for (int32_t line = 0; line < job.channels; line += kLine)
    for (int32_t t = 0; t < job.tiles; ++t)
      for (int32_t c = line; c < line + kLine && c < job.channels; c += kLanes) {
        const float* const src = job.src[t] + c;
        float* const dst = job.dst + t * job.dst_tile_stride + c;
        transform_patch<Vec>([&](int i, int j) { return load(src + i * job.src_row_stride + j * job.src_pitch); },
                             [&](int i, int j, Vec v) { store(dst + (i * 6 + j) * job.dst_point_stride, v); });
      }
}

// dst[row][lane] = sum_k src[row][k] * weight[k][lane] for kRowsT rows, `blocks` times. A chain of additions as long as the
// channels are many would cost more accuracy than the transforms do, so the sum has three levels: chains of terms, groups of
// chains, groups.
template <int kRowsT, int kVec>
static void product_loop(const ProductJob& job, int64_t blocks) {
  const float* src = job.src;
  float* dst = job.dst;
  const int64_t stride = job.src_stride;
  for (int64_t b = 0; b < blocks; ++b, src += kRowsT * stride, dst += kRowsT * kVec * kLanes) {
    const float* weight = job.weight;
    const float* at = src;
    const float* const end = src + job.depth;
    // Of the group at work: in dst where there is one group only.
    alignas(64) float waiting[kRowsT * kVec * kLanes];
    float* const group = job.depth <= job.group ? dst : waiting;
    do {
      const float* const group_start = at;
      const float* const group_end = end - at > job.group ? at + job.group : end;
      do {
        Vec acc[kRowsT][kVec];
#pragma GCC unroll 16
        for (int i = 0; i < kRowsT; ++i)
#pragma GCC unroll 16
          for (int j = 0; j < kVec; ++j) acc[i][j] = Vec{};
        const bool is_first = at == group_start;
        const float* const link = group_end - at > job.chain ? at + job.chain : group_end;
        do {
          Vec w[kVec];
#pragma GCC unroll 16
          for (int j = 0; j < kVec; ++j) w[j] = *reinterpret_cast<const Vec*>(weight + j * kLanes);
#pragma GCC unroll 16
          for (int i = 0; i < kRowsT; ++i) {
            const Vec x = splat(at[i * stride]);
#pragma GCC unroll 16
            for (int j = 0; j < kVec; ++j) acc[i][j] += x * w[j];
          }
          weight += kVec * kLanes;
        } while (++at < link);
        if (is_first) {
#pragma GCC unroll 16
          for (int i = 0; i < kRowsT; ++i)
#pragma GCC unroll 16
            for (int j = 0; j < kVec; ++j) store(group + (i * kVec + j) * kLanes, acc[i][j]);
        } else {
#pragma GCC unroll 16
          for (int i = 0; i < kRowsT; ++i)
#pragma GCC unroll 16
            for (int j = 0; j < kVec; ++j) {
              float* const to = group + (i * kVec + j) * kLanes;
              store(to, load(to) + acc[i][j]);
            }
        }
      } while (at < group_end);
      if (group == dst) continue;
      const bool is_first_group = group_start == src;
      for (int i = 0; i < kRowsT * kVec * kLanes; i += kLanes)
        store(dst + i, is_first_group ? load(group + i) : load(dst + i) + load(group + i));
    } while (at < end);
  }
}

// Results of one vector of output channels, from values at the points to pixels. y is before bias; poison becomes NaN where any
// of it is not finite, or so large that their sum is not.
template <int kOut, bool kPool>
static FASTSEQ_INLINE void finish_tile(const WinogradOutputJob& job, const Vec (&y)[kOut][kOut], int32_t tile, int32_t lane,
                                       Vec bias, Vec lower, Vec& poison) {
  constexpr int kSide = kPool ? kOut / 2 : kOut;
  Vec sum = y[0][0];
  Vec out[kSide][kSide];
#pragma GCC unroll 4
  for (int i = 0; i < kOut; ++i)
#pragma GCC unroll 4
    for (int j = i == 0; j < kOut; ++j) sum += y[i][j];
  poison += sum * 0.0f;
#pragma GCC unroll 4
  for (int i = 0; i < kSide; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kSide; ++j) {
      Vec v;
      if constexpr (kPool) {
        const Vec a = y[2 * i][2 * j], b = y[2 * i][2 * j + 1], c = y[2 * i + 1][2 * j], d = y[2 * i + 1][2 * j + 1];
        const Vec top = a > b ? a : b, bottom = c > d ? c : d;
        v = top > bottom ? top : bottom;
      } else {
        v = y[i][j];
      }
      out[i][j] = clamp_below(v + bias, lower);
    }
  const WinogradTile& place = job.tile[tile];
  float* const dst = place.dst + job.first_lane + lane;
  const int32_t left = job.lanes - lane;
  if (__builtin_expect(left >= kLanes && !place.skip_rows && !place.skip_columns, 1)) {
#pragma GCC unroll 4
    for (int i = 0; i < kSide; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kSide; ++j) store(dst + i * job.dst_row_stride + j * job.dst_pitch, out[i][j]);
    return;
  }
  for (int i = place.skip_rows; i < kSide; ++i)
    for (int j = place.skip_columns; j < kSide; ++j) {
      float* const pixel = dst + i * job.dst_row_stride + j * job.dst_pitch;
      if (left >= kLanes) {
        store(pixel, out[i][j]);
      } else {
        store_lanes(pixel, out[i][j], left);
      }
    }
}

template <int kOut, bool kPool>
static void winograd_output(const WinogradOutputJob& job) {
  const Vec lower = splat(job.lower);
  for (int32_t t = 0; t < job.tiles; ++t) {
    Vec poison = load(job.poison + t * kLanes);
    for (int32_t lane = 0; lane < job.lanes; lane += kLanes) {
      const float* const m = job.src + t * job.src_tile_stride + lane;
      Vec columns[kOut][6];
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) {
        Vec at[6], y[kOut];
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) at[i] = load(m + (i * 6 + j) * job.src_point_stride);
        from_points<kOut>(at, y);
#pragma GCC unroll 4
        for (int i = 0; i < kOut; ++i) columns[i][j] = y[i];
      }
      Vec y[kOut][kOut];
#pragma GCC unroll 4
      for (int i = 0; i < kOut; ++i) from_points<kOut>(columns[i], y[i]);
      finish_tile<kOut, kPool>(job, y, t, lane, load(job.bias + lane), lower, poison);
    }
    store(job.poison + t * kLanes, poison);
  }
}

// One to four input channels: the sums at a column's six points stay in registers and go straight through A^T.
static void winograd_small_input(const WinogradInputJob& job) {
  for (int32_t t = 0; t < job.tiles; ++t) {
    const float* const src = job.src[t];
    float* const dst = job.dst + t * job.dst_tile_stride;
    transform_patch<Vec4>(
        [&](int i, int j) -> Vec4 { return *reinterpret_cast<const Vec4U*>(src + i * job.src_row_stride + j * job.src_pitch); },
        [&](int i, int j, Vec4 v) { *reinterpret_cast<Vec4U*>(dst + (i * 6 + j) * 4) = v; });
  }
}

// Vectors outside, tiles inside: the weights of one vector and the patches of the tiles stay in L1 together.
template <int kOut, bool kPool, int kChannels>
static void winograd_small_output(const WinogradOutputJob& job) {
  const Vec lower = splat(job.lower);
  for (int32_t lane = 0; lane < job.lanes; lane += kLanes) {
    const float* const weight = job.weight + lane * kWinogradPoints * kChannels;
    const Vec bias = load(job.bias + lane);
    for (int32_t t = 0; t < job.tiles; ++t) {
      const float* const v = job.src + t * job.src_tile_stride;
      Vec columns[kOut][6];
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) {
        Vec at[6], y[kOut];
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) {
          const int point = i * 6 + j;
#pragma GCC unroll 4
          for (int c = 0; c < kChannels; ++c) {
            const Vec term =
                splat(v[point * kMostSmallChannels + c]) * *reinterpret_cast<const Vec*>(weight + (point * kChannels + c) * kLanes);
            at[i] = c ? at[i] + term : term;
          }
        }
        from_points<kOut>(at, y);
#pragma GCC unroll 4
        for (int i = 0; i < kOut; ++i) columns[i][j] = y[i];
      }
      Vec y[kOut][kOut];
#pragma GCC unroll 4
      for (int i = 0; i < kOut; ++i) from_points<kOut>(columns[i], y[i]);
      Vec poison = load(job.poison + t * kLanes);
      finish_tile<kOut, kPool>(job, y, t, lane, bias, lower, poison);
      store(job.poison + t * kLanes, poison);
    }
  }
}
