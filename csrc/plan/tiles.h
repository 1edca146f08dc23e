// How many rows become tiles.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/kernels.h"

namespace fastseq {

// Blocks of at most `most` rows, nearly equal, and where there are few a multiple of the threads.
inline int64_t block_count(int64_t rows, int64_t most, int threads) {
  int64_t blocks = std::max<int64_t>(1, (rows + most - 1) / most);
  if (blocks < 4 * threads) blocks = std::min(rows, (blocks + threads - 1) / threads * threads);
  return blocks;
}

// `count` rows (or windows) through tiles of at most `most`, as evenly as possible: a tail of one row would wait for its own sums.
inline void run_tiles(const cpu::TileLoop* loops, int most, cpu::TileJob job, int64_t count, int src_entries) {
  const int64_t tiles = (count + most - 1) / most;
  const int64_t size = count / tiles, larger = count % tiles;
  if (larger) {
    loops[size + 1](job, larger);
    job.src_offset += larger * (size + 1) * src_entries;
    job.dst_offset += larger * (size + 1);
    if (job.sums) job.sums += larger * (size + 1) * job.sums_stride;
  }
  loops[size](job, tiles - larger);
}

}  // namespace fastseq
