// Copies of weights in the order that vector loads want, kept equal to the weights by the device itself: see PackJob in kernels.h.
// A block looks after one slice. It costs a read of the sample while nothing changes.
#pragma once

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/ptx.h"

namespace fastseq::cuda {

// What dst[index] should be. Word has the element's size: values are moved, not computed with.
template <typename Word>
FS_DEVICE Word packed_value(const PackJob& job, int64_t index) {
  const int l = static_cast<int>(index % job.sizes[3]);
  index /= job.sizes[3];
  const int k = static_cast<int>(index % job.sizes[2]);
  index /= job.sizes[2];
  const int j = static_cast<int>(index % job.sizes[1]);
  const int64_t i = index / job.sizes[1];
  if (l >= job.valid) return 0;
  return static_cast<const Word*>(job.src)[i * job.strides[0] + j * job.strides[1] + k * job.strides[2] + l * job.strides[3]];
}

// Whether any thread of the block has `value`; a barrier before and after. Uses the first 128 bytes of shared memory.
FS_DEVICE bool any_of_block(bool value) {
  uint32_t* const votes = reinterpret_cast<uint32_t*>(shared_memory());
  const uint32_t vote = ballot(value);
  block_barrier();
  if (threadIdx.x % 32 == 0) votes[threadIdx.x / 32] = vote;
  block_barrier();
  uint32_t all = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) all |= votes[warp];
  return all != 0;
}

template <typename Word>
FS_DEVICE void pack_slice(const PackJob& job, int slice) {
  Word* const dst = static_cast<Word*>(job.dst);
  const int64_t first = static_cast<int64_t>(slice) * kPackSlice;
  const int64_t left = pack_elements(job) - first;
  const int count = static_cast<int>(left < kPackSlice ? left : kPackSlice);

  bool differs = job.is_forced || load_volatile(job.stamps + slice) != job.magic;
  threadfence();  // elements are read after the stamp
  const bool is_sample = job.samples > 1 && job.samples < count;
  const int compared = is_sample ? job.samples : count;
  for (int i = static_cast<int>(threadIdx.x); i < compared; i += static_cast<int>(blockDim.x)) {
    const int64_t index = first + (is_sample ? static_cast<int64_t>(i) * (count - 1) / (compared - 1) : i);
    if (load_volatile(dst + index) != packed_value<Word>(job, index)) differs = true;
  }
  if (!any_of_block(differs)) return;

  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x))
    dst[first + i] = packed_value<Word>(job, first + i);
  threadfence();
  block_barrier();
  if (threadIdx.x == 0) *static_cast<volatile uint64_t*>(job.stamps + slice) = job.magic;
}

// `block` counts through the slices of all jobs.
FS_DEVICE void pack_block(const PackArgs& args, int block) {
  for (int i = 0; i < args.count; ++i) {
    const int slices = pack_slices(args.jobs[i]);
    if (block < slices) {
      if (args.element_bytes == 4) {
        pack_slice<uint32_t>(args.jobs[i], block);
      } else {
        pack_slice<uint16_t>(args.jobs[i], block);
      }
      return;
    }
    block -= slices;
  }
}

}  // namespace fastseq::cuda
