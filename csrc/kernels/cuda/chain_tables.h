// A family of chain kernels is compiled in several files, so that they compile side by side; its table joins theirs.
#pragma once

#include <initializer_list>
#include <vector>

#include "kernels/cuda/kernels.h"

namespace fastseq::cuda {

inline std::vector<ChainKernel> join_tables(std::initializer_list<Table<ChainKernel>> tables) {
  std::vector<ChainKernel> rows;
  for (const Table<ChainKernel>& table : tables) rows.insert(rows.end(), table.begin(), table.end());
  return rows;
}
inline Table<ChainKernel> table_of(const std::vector<ChainKernel>& rows) { return {rows.data(), static_cast<int>(rows.size())}; }

}  // namespace fastseq::cuda
