// How numbers are stored in the caller's memory. The kernels compute in float32.
#pragma once

#include <cstdint>

namespace fastseq {

enum class Storage { kF32, kBf16, kF16 };
constexpr int kStorages = static_cast<int>(Storage::kF16) + 1;

constexpr int64_t bytes_of(Storage storage) { return storage == Storage::kF32 ? 4 : 2; }

}  // namespace fastseq
