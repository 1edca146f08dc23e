// The device primitives that kernels are written in, one contract with two sets of bodies: PTX for nvcc, and for any C++ compiler
// the CPU bodies that run on the emulated grid of the tests. Kernels include this file and no CUDA header.
//
// Elements. Half and BFloat16 are bits; arithmetic is in float.
//   float    to_float(T)               T: float, Half, BFloat16
//   T        from_float<T>(float)      rounds to nearest even
//   uint32_t pack2<T>(low, high)       two floats as 16-bit elements, `low` in the low half
//   float    unpack_low<T>(uint32_t), unpack_high<T>(uint32_t)
//   uint32_t to_tf32(float)            rounds to nearest, ties away (cvt.rna); NaN and infinities stay
//   uint32_t round_bits_to_tf32(uint32_t)    the same of a float's bits
//   float    fused_multiply_add(a, b, c)     a * b + c rounded once
//   float    max_nan(a, b)             NaN if either is NaN, +0 above -0
//   float    relu(v)                   max_nan(v, 0), which is torch.relu on CUDA: NaN stays, -0 becomes +0
//   float    exp_of, expm1_of, log1p_of, tanh_of, reciprocal_root (1 / sqrt), normal_distribution (its integral up to v)
//                                      of a float, to a few units in the last place, subnormal numbers too
//
// Tensor cores: d += a * b for the warp, fp32 accumulators. With g = lane / 4 and t = lane % 4:
//   mma_f16, mma_bf16 (m16n8k16), two elements a register:
//     a[0]: row g,   k 2t, 2t+1    a[1]: row g+8, k 2t, 2t+1    a[2]: row g, k 2t+8, 2t+9    a[3]: row g+8, k 2t+8, 2t+9
//     b[0]: k 2t, 2t+1, column g   b[1]: k 2t+8, 2t+9, column g
//   mma_tf32 (m16n8k8), one element a register:
//     a[0]: row g, k t   a[1]: row g+8, k t   a[2]: row g, k t+4   a[3]: row g+8, k t+4      b[0]: k t, column g   b[1]: k t+4
//   d[0]: row g, column 2t   d[1]: row g, column 2t+1   d[2]: row g+8, column 2t   d[3]: row g+8, column 2t+1
//   Before sm_80 mma_f16 is two m16n8k8, and mma_bf16 and mma_tf32 trap: the planner does not choose them there.
//
// Shared memory. All of it is dynamic.
//   unsigned char* shared_memory()            aligned to 16 bytes
//   ldmatrix_x4(r, row), ldmatrix_x2(r, row)  matrices of 8 rows of 16 bytes; lane i gives the address of row i % 8 of matrix i /
//   8;
//                                             r[j] is the 4-byte word t of row g of matrix j. x2 uses the addresses of lanes 0
//                                             to 15.
//   cp_async_16(shared, global, is_valid), cp_async_8, cp_async_4
//                                             copies that are visible after a wait and a barrier; zeros where not valid, in which
//                                             case `global` is not read. Both addresses aligned to the size.
//   cp_async_commit(), cp_async_wait<n>()     waits until at most the n latest committed groups are pending.
//   block_barrier(), warp_barrier()
//
// Warps. All 32 lanes take part.
//   T shfl_xor(T, mask), shfl(T, lane), uint32_t ballot(bool)     T: float, int, uint32_t
//
// Global memory across launches on different streams.
//   threadfence(), load_volatile(const T*)
//
// FS_DEVICE is inlined; FS_DEVICE_CALL is a call, for what is rare and would take registers from the rest of a kernel.
// threadIdx, blockIdx, blockDim and gridDim are CUDA's.
#pragma once

#include <cstdint>

namespace fastseq::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace fastseq::cuda

#ifdef __CUDACC__
#include "kernels/cuda/ptx_device.inl.h"
#else
#include "kernels/cuda/ptx_emulated.inl.h"
#endif
