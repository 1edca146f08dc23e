// gemm_tile: the register tile under convolution and Linear.
// A tile holds kRowsT rows (pixels or batch rows) x kVec vectors of output channels in registers and walks the reduction once:
// one vector load per weight vector, one broadcast per row and step, kRowsT * kVec fused multiply-adds.
// Product says what an element is and how two are multiplied: a float, or a pair of bfloat16 numbers in the place of one.
// Idea: implicit GEMM on NHWC, the reduction in the broadcast operand, so that channel counts need no padding; register-blocked
// outer product as in Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008.
// The sum of one output runs over k ascending in partial sums that depend on the layer only: its bits are the same for every tile
// shape, batch size and thread count.

// Totals are set before they are read, which the compiler does not see.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

// The contract of every loop below, checked in debug builds.
static FASTSEQ_INLINE void check_job(const TileJob& job, int panel_lanes) {
  assert(job.run_count > 0 && "a sum has at least one term");
  assert(job.lanes > 0 && job.lanes <= panel_lanes && "lanes of one panel");
  assert(reinterpret_cast<uintptr_t>(job.weight) % sizeof(Vec) == 0 && "panels are aligned to whole vectors");
  (void)job, (void)panel_lanes;
}

// The cache lines of kFloats weights.
template <int kFloats>
static FASTSEQ_INLINE void prefetch_ahead(const float* weight) {
#pragma GCC unroll 16
  for (int j = 0; j < kFloats; j += kLineFloats) __builtin_prefetch(weight + j);
}

// From the weights that are read to those asked for. Half of it leaves tiles waiting for weights that come from memory; more gains
// little (4096-4096, 4 rows, a Xeon with AMX: 2048, 4096 and 8192 bytes take 0.86, 0.72 and 0.68 of the time without).
constexpr int64_t kWeightsAhead = 1024;

// Sums that are multiplied by a scale first, if there is one: in one expression, so that all loops round alike.
template <typename Product>
static FASTSEQ_INLINE Vec add_bias(const TileJob& job, Vec sum, int lane) {
  const Vec bias = load(job.bias + lane);
  if constexpr (Product::kScales)
    if (__builtin_expect(job.scale != nullptr, 0)) return sum * load(job.scale + lane) + bias;
  return sum + bias;
}

struct FloatProduct {
  static constexpr bool kScales = false;
  static FASTSEQ_INLINE Vec spread(const float* x) { return splat(*x); }
  static FASTSEQ_INLINE Vec add(Vec sum, Vec x, Vec weight) { return sum + x * weight; }
};

template <typename Product, int kRowsT, int kVec>
static FASTSEQ_INLINE void accumulate(const TileJob& job, const int32_t* src_offset, const float* sums, Vec (&acc)[kRowsT][kVec]) {
  const float* src[kRowsT];
#pragma GCC unroll 16
  for (int i = 0; i < kRowsT; ++i) src[i] = job.src + src_offset[i];
#pragma GCC unroll 16
  for (int i = 0; i < kRowsT; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < kVec; ++j) acc[i][j] = Vec{};

  Vec total[kRowsT][kVec];
  bool has_total = sums != nullptr;
  if (__builtin_expect(has_total, 0)) {
#pragma GCC unroll 16
    for (int i = 0; i < kRowsT; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < kVec; ++j) total[i][j] = load(sums + i * job.sums_stride + j * kLanes);
  }
  const float* weight = job.weight;
  for (int32_t r = 0; r < job.run_count; ++r) {
    int64_t k = job.runs[r].offset;
    const int64_t end = k + job.runs[r].length;
    do {
      Vec w[kVec];
#pragma GCC unroll 16
      for (int j = 0; j < kVec; ++j) w[j] = *reinterpret_cast<const Vec*>(weight + j * kLanes);
      if constexpr (kVec > 1) prefetch_ahead<kVec * kLanes>(weight + kWeightsAhead);
#pragma GCC unroll 16
      for (int i = 0; i < kRowsT; ++i) {
        const Vec x = Product::spread(src[i] + k);
#pragma GCC unroll 16
        for (int j = 0; j < kVec; ++j) acc[i][j] = Product::add(acc[i][j], x, w[j]);
      }
      weight += kVec * kLanes;
    } while (++k < end);
    if (__builtin_expect(job.runs[r].ends_partial_sum, 0)) {
#pragma GCC unroll 16
      for (int i = 0; i < kRowsT; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < kVec; ++j) {
          total[i][j] = has_total ? total[i][j] + acc[i][j] : acc[i][j];
          acc[i][j] = Vec{};
        }
      has_total = true;
    }
  }
  if (has_total) {
#pragma GCC unroll 16
    for (int i = 0; i < kRowsT; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < kVec; ++j) acc[i][j] = total[i][j] + acc[i][j];
  }
}

template <int kVec>
static FASTSEQ_INLINE void store_row(float* dst, const Vec (&row)[kVec], int lanes) {
  if (__builtin_expect(lanes == kVec * kLanes, 1)) {
#pragma GCC unroll 16
    for (int j = 0; j < kVec; ++j) store(dst + j * kLanes, row[j]);
    return;
  }
#pragma GCC unroll 16
  for (int j = 0; j < kVec; ++j) {
    const int left = lanes - j * kLanes;
    if (left >= kLanes) {
      store(dst + j * kLanes, row[j]);
    } else if (left > 0) {
      store_lanes(dst + j * kLanes, row[j], left);
    }
  }
}

// conv2d and linear: kRowsT rows x kVec vectors per tile.
template <typename Product, int kRowsT, int kVec>
static void tile_loop(const TileJob& job, int64_t tiles) {
  check_job(job, kVec * kLanes);
  const int32_t* src_offset = job.src_offset;
  const int32_t* dst_offset = job.dst_offset;
  float* sums = job.sums;
  const Vec lower = splat(job.lower);
  for (int64_t t = 0; t < tiles; ++t, src_offset += kRowsT, dst_offset += kRowsT) {
    Vec acc[kRowsT][kVec];
    accumulate<Product, kRowsT, kVec>(job, src_offset, job.has_sums ? sums : nullptr, acc);
    if (__builtin_expect(sums != nullptr, 0)) {
      float* const to = sums;
      sums += kRowsT * job.sums_stride;
      if (!job.is_last) {
#pragma GCC unroll 16
        for (int i = 0; i < kRowsT; ++i)
#pragma GCC unroll 16
          for (int j = 0; j < kVec; ++j) store(to + i * job.sums_stride + j * kLanes, acc[i][j]);
        continue;
      }
    }
#pragma GCC unroll 16
    for (int j = 0; j < kVec; ++j)
#pragma GCC unroll 16
      for (int i = 0; i < kRowsT; ++i) acc[i][j] = clamp_below(add_bias<Product>(job, acc[i][j], j * kLanes), lower);
#pragma GCC unroll 16
    for (int i = 0; i < kRowsT; ++i) store_row<kVec>(job.dst + dst_offset[i], acc[i], job.lanes);
  }
}

// A scale may be negative: then it comes first.
template <typename Product>
static FASTSEQ_INLINE Vec pool_sums(const TileJob& job, Vec a, Vec b, Vec c, Vec d, int lane) {
  if constexpr (Product::kScales)
    if (__builtin_expect(job.scale != nullptr, 0))
      return pool_max(
          pool_max(pool_max(add_bias<Product>(job, a, lane), add_bias<Product>(job, b, lane)), add_bias<Product>(job, c, lane)),
          add_bias<Product>(job, d, lane));
  return pool_max(pool_max(pool_max(a, b), c), d) + load(job.bias + lane);
}

// conv2d + 2x2 max-pool: rows are numbered window by window, so that a window's four sums sit in one tile.
// The raw sums are pooled and bias, ReLU and rounding follow once per window: rounding is monotone and ReLU too, so the bits are
// those of pooling last, for a quarter of the work.
template <typename Product, int kWindows, int kVec>
static void pool_tile_loop(const TileJob& job, int64_t tiles) {
  check_job(job, kVec * kLanes);
  const int32_t* src_offset = job.src_offset;
  const int32_t* dst_offset = job.dst_offset;
  const Vec lower = splat(job.lower);
  for (int64_t t = 0; t < tiles; ++t, src_offset += 4 * kWindows, dst_offset += kWindows) {
    Vec acc[4 * kWindows][kVec];
    accumulate<Product, 4 * kWindows, kVec>(job, src_offset, nullptr, acc);
#pragma GCC unroll 16
    for (int j = 0; j < kVec; ++j)
#pragma GCC unroll 16
      for (int i = 0; i < kWindows; ++i)
        acc[i][j] = clamp_below(
            pool_sums<Product>(job, acc[4 * i][j], acc[4 * i + 1][j], acc[4 * i + 2][j], acc[4 * i + 3][j], j * kLanes), lower);
#pragma GCC unroll 16
    for (int i = 0; i < kWindows; ++i) store_row<kVec>(job.dst + dst_offset[i], acc[i], job.lanes);
  }
}

// linear with one to three rows: kPanels panels side by side, so that there are enough independent sums to hide the latency of a
// fused multiply-add, and the weights stream from several places at once. The panels are job.panel_stride apart.
template <typename Product, int kRowsT, int kPanelsT, int kVec>
static void row_tile_loop(const TileJob& job, int64_t tiles) {
  check_job(job, kVec * kLanes);
  constexpr int kAll = kPanelsT * kVec;
  const int32_t* src_offset = job.src_offset;
  const int32_t* dst_offset = job.dst_offset;
  const Vec lower = splat(job.lower);
  for (int64_t t = 0; t < tiles; ++t, src_offset += kRowsT, dst_offset += kRowsT) {
    Vec acc[kRowsT][kAll];
#pragma GCC unroll 16
    for (int i = 0; i < kRowsT; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < kAll; ++j) acc[i][j] = Vec{};
    Vec total[kRowsT][kAll];
    bool has_total = false;
    int64_t position = 0;
    for (int32_t r = 0; r < job.run_count; ++r) {
      const float* src = job.src + job.runs[r].offset;
      const float* weight = job.weight + position * kVec * kLanes;
      const int32_t length = job.runs[r].length;
      for (int32_t k = 0; k < length; ++k, weight += kVec * kLanes) {
        Vec x[kRowsT];
#pragma GCC unroll 16
        for (int i = 0; i < kRowsT; ++i) x[i] = Product::spread(src + src_offset[i] + k);
#pragma GCC unroll 16
        for (int p = 0; p < kPanelsT; ++p)
#pragma GCC unroll 16
          for (int j = 0; j < kVec; ++j) {
            const Vec w = *reinterpret_cast<const Vec*>(weight + p * job.panel_stride + j * kLanes);
#pragma GCC unroll 16
            for (int i = 0; i < kRowsT; ++i) acc[i][p * kVec + j] = Product::add(acc[i][p * kVec + j], x[i], w);
          }
      }
      position += length;
      if (__builtin_expect(job.runs[r].ends_partial_sum, 0)) {
#pragma GCC unroll 16
        for (int i = 0; i < kRowsT; ++i)
#pragma GCC unroll 16
          for (int j = 0; j < kAll; ++j) {
            total[i][j] = has_total ? total[i][j] + acc[i][j] : acc[i][j];
            acc[i][j] = Vec{};
          }
        has_total = true;
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRowsT; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kAll; ++j) {
        if (has_total) acc[i][j] = total[i][j] + acc[i][j];
        acc[i][j] = clamp_below(add_bias<Product>(job, acc[i][j], j * kLanes), lower);
      }
      store_row<kAll>(job.dst + dst_offset[i], acc[i], (kPanelsT - 1) * kVec * kLanes + job.lanes);
    }
  }
}

// --- the table ------------------------------------------------------------------------------------------------------------

template <typename Product, int kVec, int kRowsT>
static constexpr void add_tiles(TileTable& table) {
  table.tile[kVec][kRowsT] = tile_loop<Product, kRowsT, kVec>;
  if constexpr (kRowsT > 1) add_tiles<Product, kVec, kRowsT - 1>(table);
}

template <typename Product, int kVec, int kWindows>
static constexpr void add_pool_tiles(TileTable& table) {
  if constexpr (kWindows > 0) {
    table.pool_tile[kVec][kWindows] = pool_tile_loop<Product, kWindows, kVec>;
    add_pool_tiles<Product, kVec, kWindows - 1>(table);
  }
}

template <typename Product, int kRowsT, int kPanelsT>
static constexpr void add_row_tiles(TileTable& table) {
  table.row_tile[kRowsT][kPanelsT] = row_tile_loop<Product, kRowsT, kPanelsT, kPreferredVectors>;
  if constexpr (kPanelsT > 1) add_row_tiles<Product, kRowsT, kPanelsT - 1>(table);
}

template <typename Product>
static constexpr TileTable make_tile_table() {
  TileTable table = {};
  table.preferred_vectors = kPreferredVectors, table.preferred_pool_vectors = kPreferredPoolVectors;
  table.max_rows[1] = kRows1, table.max_rows[2] = kRows2, table.max_rows[3] = kRows3, table.max_rows[4] = kRows4;
  table.pool_rows[1] = 4 * kWindows1, table.pool_rows[2] = 4 * kWindows2;
  table.pool_rows[3] = 4 * kWindows3, table.pool_rows[4] = 4 * kWindows4;
  table.row_panels[1] = kRowPanels1, table.row_panels[2] = kRowPanels2, table.row_panels[3] = kRowPanels3;
  add_tiles<Product, 1, kRows1>(table), add_tiles<Product, 2, kRows2>(table);
  add_tiles<Product, 3, kRows3>(table), add_tiles<Product, 4, kRows4>(table);
  add_pool_tiles<Product, 1, kWindows1>(table), add_pool_tiles<Product, 2, kWindows2>(table);
  add_pool_tiles<Product, 3, kWindows3>(table), add_pool_tiles<Product, 4, kWindows4>(table);
  add_row_tiles<Product, 1, kRowPanels1>(table), add_row_tiles<Product, 2, kRowPanels2>(table);
  add_row_tiles<Product, 3, kRowPanels3>(table);
  return table;
}
