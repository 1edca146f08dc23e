// ptx.h for nvcc.
#pragma once

#define FS_DEVICE __device__ __forceinline__
#define FS_DEVICE_CALL __device__ __noinline__
#define FS_KERNEL(threads, blocks_per_multiprocessor) __global__ void __launch_bounds__(threads, blocks_per_multiprocessor)
#define FS_ARGS const __grid_constant__

namespace fastseq::cuda {

// Elements -------------------------------------------------------------------------------------------------------------------

FS_DEVICE float to_float(float value) { return value; }
FS_DEVICE float to_float(Half value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
FS_DEVICE float to_float(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }

template <typename T>
FS_DEVICE T from_float(float value);
template <>
FS_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
FS_DEVICE Half from_float<Half>(float value) {
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}
template <>
FS_DEVICE BFloat16 from_float<BFloat16>(float value) {
  BFloat16 result;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
  const uint32_t bits = __float_as_uint(value);
  result.bits = value != value ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
  return result;
}

template <typename T>
FS_DEVICE uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
template <typename T>
FS_DEVICE float unpack_low(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair)});
}
template <typename T>
FS_DEVICE float unpack_high(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

FS_DEVICE uint32_t to_tf32(float value) {
#if __CUDA_ARCH__ >= 800
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
  return result;
#else
  return __float_as_uint(value);
#endif
}

FS_DEVICE uint32_t round_bits_to_tf32(uint32_t bits) { return to_tf32(__uint_as_float(bits)); }
FS_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

FS_DEVICE float max_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a != a ? a : b != b ? b : fmaxf(a, b);
#endif
}
FS_DEVICE float relu(float value) { return max_nan(value, 0.0f); }

// The full functions of CUDA's library, which torch's own kernels call: two units in the last place, the last one five.
FS_DEVICE float exp_of(float value) { return expf(value); }
FS_DEVICE float expm1_of(float value) { return expm1f(value); }
FS_DEVICE float log1p_of(float value) { return log1pf(value); }
FS_DEVICE float tanh_of(float value) { return tanhf(value); }
FS_DEVICE float reciprocal_root(float value) { return rsqrtf(value); }
FS_DEVICE float normal_distribution(float value) { return normcdff(value); }

// Tensor cores ---------------------------------------------------------------------------------------------------------------

FS_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}

FS_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

FS_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

// Shared memory --------------------------------------------------------------------------------------------------------------

FS_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char fastseq_shared_memory[];
  return fastseq_shared_memory;
}

FS_DEVICE uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

FS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
FS_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

#if __CUDA_ARCH__ >= 800
FS_DEVICE void cp_async_16(void* shared, const void* global, bool is_valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(is_valid ? 16 : 0)
               : "memory");
}
FS_DEVICE void cp_async_8(void* shared, const void* global, bool is_valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(is_valid ? 8 : 0)
               : "memory");
}
FS_DEVICE void cp_async_4(void* shared, const void* global, bool is_valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(is_valid ? 4 : 0)
               : "memory");
}
FS_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int n>
FS_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}
#else
// Turing has no asynchronous copies: these are done when they return, and nothing is ever pending.
FS_DEVICE void cp_async_16(void* shared, const void* global, bool is_valid) {
  *static_cast<uint4*>(shared) = is_valid ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
}
FS_DEVICE void cp_async_8(void* shared, const void* global, bool is_valid) {
  *static_cast<uint2*>(shared) = is_valid ? *static_cast<const uint2*>(global) : make_uint2(0, 0);
}
FS_DEVICE void cp_async_4(void* shared, const void* global, bool is_valid) {
  *static_cast<uint32_t*>(shared) = is_valid ? *static_cast<const uint32_t*>(global) : 0;
}
FS_DEVICE void cp_async_commit() {}
template <int n>
FS_DEVICE void cp_async_wait() {}
#endif

FS_DEVICE void block_barrier() { __syncthreads(); }
FS_DEVICE void warp_barrier() { __syncwarp(); }

// Warps ----------------------------------------------------------------------------------------------------------------------

template <typename T>
FS_DEVICE T shfl_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <typename T>
FS_DEVICE T shfl(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
FS_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

// Across streams -------------------------------------------------------------------------------------------------------------

FS_DEVICE void threadfence() { __threadfence(); }
template <typename T>
FS_DEVICE T load_volatile(const T* pointer) {
  return *static_cast<const volatile T*>(pointer);
}

}  // namespace fastseq::cuda
