// The register tiles of gemm_tile.inl.h on pairs of bfloat16 numbers, by a unit that multiplies matrices: Intel's AMX (Intel 64 and
// IA-32 Architectures Software Developer's Manual, TDPBF16PS), or an emulation of it.
// Sixteen pairs of the reduction meet sixteen lanes of weights at a time. Within such a chunk the products of the even and of the
// odd numbers have sums of their own, from zero, and their sum is added to the tile's: the partial sums of the runs are not needed.
// A run's last chunk may be shorter, filled up with zeros on both sides, since a zero times infinite weights of the next run is
// NaN. The order of additions depends on the runs only, so the bits are the same for every tile shape. Expects kAmxRows,
// MatrixUnit, vector.inl.h, load_lanes, and the helpers of gemm_tile.inl.h.

constexpr int kChunk = 16;  // pairs, and lanes of a vector of weights, and rows that one tile holds
static_assert(kLanes == kChunk, "a vector of weights is a row of a tile");
constexpr int kSourceTile = 4, kWeightTile = 6;  // two of each; 0 to 3 hold sums

// The rows of a register tile in one or two of the unit's, and kAll vectors of lanes: as many sums as there are tiles for.
template <int kRowsT, int kAll>
struct Shape {
  static constexpr int kHalves = kRowsT > kChunk ? 2 : 1;
  static constexpr int kRows[2] = {kHalves == 1 ? kRowsT : (kRowsT + 1) / 2, kHalves == 1 ? 0 : kRowsT / 2};
  static_assert(kHalves * kAll <= 4, "tiles for all sums");
  static constexpr int sums_tile(int half, int vector) { return half * 2 + vector; }
  static MatrixUnit unit() { return MatrixUnit(kRows[0], kHalves == 1 ? kRows[0] : kRows[1]); }
};

// Sums of a tile, as vectors.
template <int kRowsT, int kAll>
struct alignas(64) TileSums {
  Vec row[kRowsT][kAll];
};

struct alignas(64) ChunkBuffer {
  Vec row[kChunk];
};

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls `use` with each of 0 to kCount - 1.
template <int kCount, typename Use>
static FASTSEQ_INLINE void each(const Use& use) {
  if constexpr (kCount > 1) each<kCount - 1>(use);
  use(Constant<kCount - 1>());
}

// A chunk of some rows of the source into a tile. Rows that do not lie at equal distances, and what is shorter than a chunk, are
// put together in a buffer.
template <int kTile, int kRowsOfTile>
static FASTSEQ_INLINE void load_source(MatrixUnit& unit, const float* src, const int32_t* offset, bool is_regular, int32_t left,
                                       ChunkBuffer& buffer) {
  if (is_regular && left >= kChunk) {
    unit.template load<kTile>(src + offset[0], kRowsOfTile > 1 ? offset[1] - offset[0] : 0);
    return;
  }
  for (int i = 0; i < kRowsOfTile; ++i) buffer.row[i] = left >= kChunk ? load(src + offset[i]) : load_lanes(src + offset[i], left);
  unit.template load<kTile>(reinterpret_cast<const float*>(buffer.row), kChunk);
}

// kPanelsT panels of kVec vectors, job.panel_stride apart.
template <int kRowsT, int kPanelsT, int kVec>
static __attribute__((noinline)) void multiply(MatrixUnit& unit, const TileJob& job, const int32_t* src_offset,
                                               const float* initial, TileSums<kRowsT, kPanelsT * kVec>& result) {
  constexpr int kAll = kPanelsT * kVec;
  using Of = Shape<kRowsT, kAll>;
  bool is_regular[2] = {true, true};
#pragma GCC unroll 2
  for (int half = 0; half < Of::kHalves; ++half) {
    const int32_t* const offset = src_offset + half * Of::kRows[0];
    for (int i = 2; i < Of::kRows[half]; ++i) is_regular[half] &= offset[i] - offset[i - 1] == offset[1] - offset[0];
  }
  each<Of::kHalves>([&](auto at_half) {
    constexpr int half = at_half.value;
    each<kAll>([&](auto at_v) {
      constexpr int v = at_v.value;
      constexpr int kTile = Of::sums_tile(half, v);
      if (initial) {
        unit.template load<kTile>(initial + half * Of::kRows[0] * job.sums_stride + v * kLanes, job.sums_stride);
      } else {
        unit.template zero<kTile>();
      }
    });
  });

  ChunkBuffer buffers[2][2];
  int turn = 0;
  const auto load_rows = [&](const float* src, int32_t left) {
    turn ^= 1;
    each<Of::kHalves>([&](auto at_half) {
      constexpr int half = at_half.value;
      load_source<kSourceTile + half, Of::kRows[half]>(unit, src, src_offset + half * Of::kRows[0], is_regular[half], left,
                                                       buffers[turn][half]);
    });
  };
  const auto add_products = [&](const float* weight, int64_t panel_stride, int64_t stride) {
    each<kAll>([&](auto at_v) {
      constexpr int v = at_v.value;
      constexpr int kWeights = kWeightTile + v % 2;
      unit.template load<kWeights>(weight + v / kVec * panel_stride + v % kVec * kLanes, stride);
      each<Of::kHalves>([&](auto at_half) {
        constexpr int half = at_half.value;
        unit.template add_product<Of::sums_tile(half, v), kSourceTile + half, kWeights>();
      });
    });
  };
  const float* weight = job.weight;
  for (int32_t r = 0; r < job.run_count; ++r) {
    const float* src = job.src + job.runs[r].offset;
    int32_t left = job.runs[r].length;
    for (; left >= kChunk; left -= kChunk, src += kChunk, weight += kChunk * kVec * kLanes) {
      load_rows(src, kChunk);
      add_products(weight, job.panel_stride, kVec * kLanes);
    }
    if (left == 0) continue;
    load_rows(src, left);
    alignas(64) Vec last[kChunk][kAll];
    for (int k = 0; k < kChunk; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < kAll; ++v)
        last[k][v] = k < left ? load(weight + v / kVec * job.panel_stride + (k * kVec + v % kVec) * kLanes) : Vec{};
    add_products(reinterpret_cast<const float*>(last), kVec * kLanes, kAll * kLanes);
    weight += left * kVec * kLanes;
  }
  each<Of::kHalves>([&](auto at_half) {
    constexpr int half = at_half.value;
    each<kAll>([&](auto at_v) {
      constexpr int v = at_v.value;
      unit.template store<Of::sums_tile(half, v)>(reinterpret_cast<float*>(&result.row[half * Of::kRows[0]][v]), kAll * kLanes);
    });
  });
}

template <int kRowsT, int kVec>
static void amx_tile_loop(const TileJob& job, int64_t tiles) {
  check_job(job, kVec * kLanes);
  const int32_t* src_offset = job.src_offset;
  const int32_t* dst_offset = job.dst_offset;
  float* sums = job.sums;
  const Vec lower = splat(job.lower);
  MatrixUnit unit = Shape<kRowsT, kVec>::unit();
  for (int64_t t = 0; t < tiles; ++t, src_offset += kRowsT, dst_offset += kRowsT) {
    TileSums<kRowsT, kVec> acc;
    multiply<kRowsT, 1, kVec>(unit, job, src_offset, job.has_sums ? sums : nullptr, acc);
    if (__builtin_expect(sums != nullptr, 0)) {
      float* const to = sums;
      sums += kRowsT * job.sums_stride;
      if (!job.is_last) {
        for (int i = 0; i < kRowsT; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < kVec; ++j) store(to + i * job.sums_stride + j * kLanes, acc.row[i][j]);
        continue;
      }
    }
    for (int i = 0; i < kRowsT; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVec; ++j) acc.row[i][j] = clamp_below(add_bias<MatrixUnit>(job, acc.row[i][j], j * kLanes), lower);
      store_row<kVec>(job.dst + dst_offset[i], acc.row[i], job.lanes);
    }
  }
}

template <int kWindows, int kVec>
static void amx_pool_tile_loop(const TileJob& job, int64_t tiles) {
  check_job(job, kVec * kLanes);
  const int32_t* src_offset = job.src_offset;
  const int32_t* dst_offset = job.dst_offset;
  const Vec lower = splat(job.lower);
  MatrixUnit unit = Shape<4 * kWindows, kVec>::unit();
  for (int64_t t = 0; t < tiles; ++t, src_offset += 4 * kWindows, dst_offset += kWindows) {
    TileSums<4 * kWindows, kVec> acc;
    multiply<4 * kWindows, 1, kVec>(unit, job, src_offset, nullptr, acc);
    for (int i = 0; i < kWindows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVec; ++j)
        acc.row[i][j] = clamp_below(pool_sums<MatrixUnit>(job, acc.row[4 * i][j], acc.row[4 * i + 1][j], acc.row[4 * i + 2][j],
                                                          acc.row[4 * i + 3][j], j * kLanes),
                                    lower);
      store_row<kVec>(job.dst + dst_offset[i], acc.row[i], job.lanes);
    }
  }
}

template <int kRowsT, int kPanelsT, int kVec>
static void amx_row_tile_loop(const TileJob& job, int64_t tiles) {
  check_job(job, kVec * kLanes);
  constexpr int kAll = kPanelsT * kVec;
  const int32_t* src_offset = job.src_offset;
  const int32_t* dst_offset = job.dst_offset;
  const Vec lower = splat(job.lower);
  MatrixUnit unit = Shape<kRowsT, kAll>::unit();
  for (int64_t t = 0; t < tiles; ++t, src_offset += kRowsT, dst_offset += kRowsT) {
    TileSums<kRowsT, kAll> acc;
    multiply<kRowsT, kPanelsT, kVec>(unit, job, src_offset, nullptr, acc);
    for (int i = 0; i < kRowsT; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kAll; ++j) acc.row[i][j] = clamp_below(add_bias<MatrixUnit>(job, acc.row[i][j], j * kLanes), lower);
      store_row<kAll>(job.dst + dst_offset[i], acc.row[i], (kPanelsT - 1) * kVec * kLanes + job.lanes);
    }
  }
}

// --- the table ------------------------------------------------------------------------------------------------------------

constexpr int kAmxVectors = 2, kAmxRowPanels = 2;

template <int kVec, int kRowsT>
static constexpr void add_amx_tiles(TileTable& table) {
  table.tile[kVec][kRowsT] = amx_tile_loop<kRowsT, kVec>;
  if constexpr (kRowsT % 4 == 0) table.pool_tile[kVec][kRowsT / 4] = amx_pool_tile_loop<kRowsT / 4, kVec>;
  if constexpr (kRowsT > 1) add_amx_tiles<kVec, kRowsT - 1>(table);
}

template <int kRowsT, int kPanelsT>
static constexpr void add_amx_row_tiles(TileTable& table) {
  table.row_tile[kRowsT][kPanelsT] = amx_row_tile_loop<kRowsT, kPanelsT, kAmxVectors>;
  if constexpr (kPanelsT > 1) {
    add_amx_row_tiles<kRowsT, kPanelsT - 1>(table);
  } else if constexpr (kRowsT > 1) {
    add_amx_row_tiles<kRowsT - 1, kAmxRowPanels>(table);
  }
}

static constexpr Bf16Tiles make_amx_tiles() {
  TileTable table = {};
  table.preferred_vectors = table.preferred_pool_vectors = kAmxVectors;
  for (int v = 1; v <= kAmxVectors; ++v) table.max_rows[v] = table.pool_rows[v] = kAmxRows;
  for (int rows = 1; rows <= 3; ++rows) table.row_panels[rows] = kAmxRowPanels;
  add_amx_tiles<1, kAmxRows>(table), add_amx_tiles<2, kAmxRows>(table);
  add_amx_row_tiles<3, kAmxRowPanels>(table);
  return {kAmxIsa, kAmxSpeed, table};
}
