// linear on weights read where they lie, row by row as PyTorch holds them, instead of from packed panels.
// Few rows of the source: kLanes weight rows are transposed in registers, a square block at a time, which takes less time than
// their way from memory; a lane is an output as in a packed panel. Many rows: the source is packed instead, [k][row], a lane is one
// of its rows and the weight stands in the broadcast operand. Both add up in the order of gemm_tile, k ascending in the same
// partial sums, so their bits are those of packed weights.

constexpr int kWeightPitch = kLongestRun + kLineFloats;
constexpr int kAheadFloats = 128;  // from what is read to what is asked for

// A run of kRowsT weight rows through a copy in the first cache: rows that are a multiple of 4 KiB apart would fight for the same
// sets, and row after row is how memory likes to be read. Rows that are not there are the last one again. `ahead` is where the
// next such rows are, which come into the second cache meanwhile.
template <int kRowsT>
static FASTSEQ_INLINE void copy_run(float* copy, const float* weight, int64_t stride, int64_t rows, int64_t length,
                                    const float* ahead) {
  assert(length <= kLongestRun && rows > 0);
  for (int i = 0; i < kRowsT; ++i) {
    const int64_t row = (i < rows ? i : rows - 1) * stride;
    const float* const from = weight + row;
    float* const to = copy + i * kWeightPitch;
    int64_t k = 0;
    for (; k + kLineFloats <= length; k += kLineFloats) {
      __builtin_prefetch(ahead + row + k, 0, 2);
#pragma GCC unroll 4
      for (int j = 0; j < kLineFloats; j += kLanes) store(to + k + j, load(from + k + j));
    }
    for (; k < length; ++k) to[k] = from[k];
  }
}

// A square block: lane j of vector i becomes lane i of vector j.
template <int kCount>
static FASTSEQ_INLINE void transpose_block(Vec (&r)[kCount]) {
  static_assert(kCount == kLanes);
  constexpr int kQuads = kCount / 4;
  VecI low, high, first, second;  // within four lanes: a0 b0 a1 b1, a2 b2 a3 b3, a0 a1 b0 b1, a2 a3 b2 b3
  VecI even, odd;                 // by fours: those of a, then those of b
  for (int l = 0; l < kLanes; ++l) {
    const int quad = l & ~3, at = l & 3, from = l / 4 * 2;
    low[l] = quad + at / 2 + (at & 1) * kLanes, high[l] = low[l] + 2;
    first[l] = quad + (at & 1) + at / 2 * kLanes, second[l] = first[l] + 2;
    even[l] = (from < kQuads ? from : kQuads + from - kQuads) * 4 + at, odd[l] = even[l] + 4;
  }
  Vec u[kQuads][4];  // of the rows 4q to 4q + 3: column c of each four
#pragma GCC unroll 4
  for (int q = 0; q < kQuads; ++q) {
    const Vec low01 = __builtin_shuffle(r[4 * q], r[4 * q + 1], low), low23 = __builtin_shuffle(r[4 * q + 2], r[4 * q + 3], low);
    const Vec high01 = __builtin_shuffle(r[4 * q], r[4 * q + 1], high),
              high23 = __builtin_shuffle(r[4 * q + 2], r[4 * q + 3], high);
    u[q][0] = __builtin_shuffle(low01, low23, first), u[q][1] = __builtin_shuffle(low01, low23, second);
    u[q][2] = __builtin_shuffle(high01, high23, first), u[q][3] = __builtin_shuffle(high01, high23, second);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    if constexpr (kQuads == 1) {
      r[c] = u[0][c];
    } else if constexpr (kQuads == 2) {
      r[c] = __builtin_shuffle(u[0][c], u[1][c], even), r[4 + c] = __builtin_shuffle(u[0][c], u[1][c], odd);
    } else {
      static_assert(kQuads == 4);
      const Vec even01 = __builtin_shuffle(u[0][c], u[1][c], even), odd01 = __builtin_shuffle(u[0][c], u[1][c], odd);
      const Vec even23 = __builtin_shuffle(u[2][c], u[3][c], even), odd23 = __builtin_shuffle(u[2][c], u[3][c], odd);
      r[c] = __builtin_shuffle(even01, even23, even), r[8 + c] = __builtin_shuffle(even01, even23, odd);
      r[4 + c] = __builtin_shuffle(odd01, odd23, even), r[12 + c] = __builtin_shuffle(odd01, odd23, odd);
    }
  }
}

// kRowsT rows of the source x kLanes weight rows. Where weight rows are missing the last one is there again.
template <int kRowsT, bool kIsFull>
static FASTSEQ_INLINE void in_place_group(const InPlaceJob& job, int64_t n) {
  const float* const weight = job.weight + n * job.weight_stride;
  const int64_t left = job.weight_rows - n;
  int64_t offset[kLanes];
  if constexpr (!kIsFull)
    for (int i = 0; i < kLanes; ++i) offset[i] = (i < left ? i : left - 1) * job.weight_stride;
  const auto row = [&](int i) { return weight + (kIsFull ? i * job.weight_stride : offset[i]); };

  Vec acc[kRowsT], total[kRowsT];
#pragma GCC unroll 16
  for (int r = 0; r < kRowsT; ++r) acc[r] = Vec{};
  bool has_total = false;
  for (int32_t run = 0; run < job.run_count; ++run) {
    int64_t k = job.runs[run].offset;
    const int64_t end = k + job.runs[run].length;
    for (; k + kLanes <= end; k += kLanes) {
      Vec w[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        __builtin_prefetch(row(i) + k + kAheadFloats, 0, 2);
        w[i] = load(row(i) + k);
      }
      transpose_block(w);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
#pragma GCC unroll 16
        for (int r = 0; r < kRowsT; ++r) acc[r] += splat(job.src[r * job.src_stride + k + i]) * w[i];
    }
    for (; k < end; ++k) {
      Vec w;
      for (int i = 0; i < kLanes; ++i) w[i] = row(i)[k];
#pragma GCC unroll 16
      for (int r = 0; r < kRowsT; ++r) acc[r] += splat(job.src[r * job.src_stride + k]) * w;
    }
    if (job.runs[run].ends_partial_sum) {
#pragma GCC unroll 16
      for (int r = 0; r < kRowsT; ++r) {
        total[r] = has_total ? total[r] + acc[r] : acc[r];
        acc[r] = Vec{};
      }
      has_total = true;
    }
  }
  const Vec bias = load(job.bias + n), lower = splat(job.lower);
#pragma GCC unroll 16
  for (int r = 0; r < kRowsT; ++r) {
    if (has_total) acc[r] = total[r] + acc[r];
    acc[r] = clamp_below(acc[r] + bias, lower);
    float* const dst = job.dst + r * job.dst_stride + n;
    if (kIsFull) {
      store(dst, acc[r]);
    } else {
      store_lanes(dst, acc[r], static_cast<int>(left));
    }
  }
}

template <int kRowsT>
static void in_place_loop(const InPlaceJob& job) {
  assert(job.run_count > 0 && job.weight_rows > 0);
  int64_t n = 0;
  for (; n + kLanes <= job.weight_rows; n += kLanes) in_place_group<kRowsT, true>(job, n);
  if (n < job.weight_rows) in_place_group<kRowsT, false>(job, n);
}

// Tiles of kRowsT weight rows x kVec vectors of source rows, over one stretch of the reduction, for one panel of source rows after
// the other. Sums wait in job.sums, [weight row][kVec * kLanes], between stretches; the last tile may compute up to kRowsT - 1 rows
// too many there.
template <int kRowsT, int kVec>
static void in_place_tile_loop(const InPlaceTileJob& job) {
  assert(job.run_count > 0 && job.weight_rows > 0);
  constexpr int kWidth = kVec * kLanes;
  alignas(64) float copy[kRowsT * kWeightPitch];
  const Vec lower = splat(job.lower);
  for (int64_t n = 0; n < job.weight_rows; n += kRowsT) {
    const int64_t left = job.weight_rows - n;
    bool has_sums = job.has_sums;
    int64_t position = 0;
    for (int32_t r = 0; r < job.run_count; ++r) {
      const int64_t length = job.runs[r].length;
      const float* const weight = job.weight + n * job.weight_stride + job.runs[r].offset;
      copy_run<kRowsT>(copy, weight, job.weight_stride, left, length, weight + kRowsT * job.weight_stride);
      const bool is_last = job.is_last && r + 1 == job.run_count;
      for (int32_t p = 0; p < job.panels; ++p) {
        const float* panel = job.panel + p * job.panel_stride + position * kWidth;
        Vec acc[kRowsT][kVec];
#pragma GCC unroll 16
        for (int i = 0; i < kRowsT; ++i)
#pragma GCC unroll 16
          for (int j = 0; j < kVec; ++j) acc[i][j] = Vec{};
        int64_t k = 0;
        do {
          Vec x[kVec];
#pragma GCC unroll 16
          for (int j = 0; j < kVec; ++j) x[j] = *reinterpret_cast<const Vec*>(panel + j * kLanes);
#pragma GCC unroll 16
          for (int i = 0; i < kRowsT; ++i) {
            const Vec w = splat(copy[i * kWeightPitch + k]);
#pragma GCC unroll 16
            for (int j = 0; j < kVec; ++j) acc[i][j] += w * x[j];
          }
          panel += kWidth;
        } while (++k < length);
        float* const sums = job.sums + p * job.sums_stride + n * kWidth;
#pragma GCC unroll 16
        for (int i = 0; i < kRowsT; ++i)
#pragma GCC unroll 16
          for (int j = 0; j < kVec; ++j) {
            float* const at = sums + i * kWidth + j * kLanes;
            Vec sum = has_sums ? load(at) + acc[i][j] : acc[i][j];
            if (is_last) sum = clamp_below(sum + splat(job.bias[n + i]), lower);
            store(at, sum);
          }
      }
      has_sums = true;
      position += length;
    }
  }
}
