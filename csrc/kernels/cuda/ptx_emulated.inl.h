// ptx.h for any other compiler: on the emulated grid of tests/emulation, where threads that break a contract end the launch.
#pragma once

#include <cmath>
#include <cstring>

#include "emulated_grid.h"

#define FS_DEVICE inline
#define FS_DEVICE_CALL inline
#define FS_KERNEL(threads, blocks_per_multiprocessor) void
#define FS_ARGS const

// The caller's line, for the texts of errors.
#define FS_SITE ::fastseq::emulation::Site site = {__builtin_FILE(), __builtin_LINE()}

namespace fastseq::cuda {

// Elements -------------------------------------------------------------------------------------------------------------------

namespace emulated {
FS_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
FS_DEVICE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
constexpr uint32_t kNan = 0x7fffffff;  // the one that PTX returns
FS_DEVICE bool is_nan(uint32_t bits) { return (bits & 0x7fffffff) > 0x7f800000; }
}  // namespace emulated

FS_DEVICE float to_float(float value) { return value; }
FS_DEVICE float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
  if (rest >= 0x7c00) return emulated::float_of(sign | 0x7f800000 | rest << 13);
  const float scaled = emulated::float_of(rest << 13) * 0x1p112f;  // 112: from one exponent's bias to the other's; exact
  return emulated::float_of(sign | emulated::bits_of(scaled));
}
FS_DEVICE float to_float(BFloat16 value) { return emulated::float_of(static_cast<uint32_t>(value.bits) << 16); }

template <typename T>
FS_DEVICE T from_float(float value);
template <>
FS_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
FS_DEVICE Half from_float<Half>(float value) {
  const uint32_t bits = emulated::bits_of(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  uint32_t result;
  if (emulated::is_nan(bits)) {
    return {0x7fff};
  } else if (rest >= emulated::bits_of(0x1p16f)) {
    result = 0x7c00;
  } else if (rest < emulated::bits_of(0x1p-14f)) {
    result = emulated::bits_of(emulated::float_of(rest) + 0.5f) -
             emulated::bits_of(0.5f);  // subnormal: in units of 2^-24, which is the last place of 0.5
  } else {
    result = (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | result)};
}
template <>
FS_DEVICE BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = emulated::bits_of(value);
  return {static_cast<uint16_t>(emulated::is_nan(bits) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
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

FS_DEVICE uint32_t round_bits_to_tf32(uint32_t bits) {
  if (emulated::is_nan(bits)) return emulated::kNan;
  if ((bits & 0x7fffffff) == 0x7f800000) return bits;
  return (bits + 0x1000) & ~0x1fffu;
}
FS_DEVICE uint32_t to_tf32(float value) { return round_bits_to_tf32(emulated::bits_of(value)); }
FS_DEVICE float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

FS_DEVICE float max_nan(float a, float b) {
  if (emulated::is_nan(emulated::bits_of(a)) || emulated::is_nan(emulated::bits_of(b))) return emulated::float_of(emulated::kNan);
  if (a == b) return emulated::bits_of(a) >> 31 ? b : a;
  return a > b ? a : b;
}
FS_DEVICE float relu(float value) { return max_nan(value, 0.0f); }

FS_DEVICE float exp_of(float value) { return std::exp(value); }
FS_DEVICE float expm1_of(float value) { return std::expm1(value); }
FS_DEVICE float log1p_of(float value) { return std::log1p(value); }
FS_DEVICE float tanh_of(float value) { return std::tanh(value); }
FS_DEVICE float reciprocal_root(float value) { return static_cast<float>(1 / std::sqrt(static_cast<double>(value))); }
FS_DEVICE float normal_distribution(float value) { return static_cast<float>(std::erfc(value * -0.70710678118654752) / 2); }

// Tensor cores ---------------------------------------------------------------------------------------------------------------

namespace emulated {

// Products of such elements are exact in float; sums are rounded to nearest, k ascending.
struct MmaLane {
  float* d;
  const uint32_t *a, *b;
};

template <int k_count, typename Spread>
__attribute__((no_sanitize("alignment"))) void multiply(MmaLane* const (&lanes)[32], const Spread& spread) {
  typedef float Row __attribute__((vector_size(32)));
  float a[16][k_count];
  Row b[k_count];
  for (int i = 0; i < 32; ++i) spread(a, b, *lanes[i], i / 4, i % 4);
  for (int half = 0; half < 2; ++half) {
    for (int g = 0; g < 8; ++g) {
      const int m = 8 * half + g;
      Row sum;
      for (int n = 0; n < 8; ++n) sum[n] = lanes[4 * g + n / 2]->d[2 * half + n % 2];
      for (int k = 0; k < k_count; ++k) sum += a[m][k] * b[k];
      for (int n = 0; n < 8; ++n) lanes[4 * g + n / 2]->d[2 * half + n % 2] = sum[n];
    }
  }
}
template <int k_count, typename Spread>
FS_DEVICE void mma(const emulation::Place& place, MmaLane lane, const Spread& spread) {
  emulation::machine.collective(place, lane, [&](MmaLane* const(&lanes)[32]) { multiply<k_count>(lanes, spread); });
}

template <typename T>
FS_DEVICE void mma_16_bits(const emulation::Place& place, const MmaLane& lane) {
  mma<16>(place, lane, [](auto& a, auto& b, const MmaLane& from, int g, int t) {
    for (int j = 0; j < 4; ++j) {
      const int m = g + 8 * (j % 2), k = 2 * t + 8 * (j / 2);
      a[m][k] = unpack_low<T>(from.a[j]);
      a[m][k + 1] = unpack_high<T>(from.a[j]);
    }
    for (int j = 0; j < 2; ++j) {
      const int k = 2 * t + 8 * j;
      b[k][g] = unpack_low<T>(from.b[j]);
      b[k + 1][g] = unpack_high<T>(from.b[j]);
    }
  });
}

}  // namespace emulated

FS_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FS_SITE) {
  emulated::mma_16_bits<Half>({"mma_f16", site}, {d, a, b});
}
FS_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FS_SITE) {
  emulated::mma_16_bits<BFloat16>({"mma_bf16", site}, {d, a, b});
}
FS_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FS_SITE) {
  emulated::mma<8>({"mma_tf32", site}, {d, a, b}, [](auto& a, auto& b, const emulated::MmaLane& from, int g, int t) {
    // The hardware does not look at the low 13 bits.
    for (int j = 0; j < 4; ++j) a[g + 8 * (j % 2)][t + 4 * (j / 2)] = emulated::float_of(from.a[j] & ~0x1fffu);
    for (int j = 0; j < 2; ++j) b[t + 4 * j][g] = emulated::float_of(from.b[j] & ~0x1fffu);
  });
}

// Shared memory --------------------------------------------------------------------------------------------------------------

FS_DEVICE unsigned char* shared_memory() { return emulation::machine.shared(); }

namespace emulated {
struct LdmatrixLane {
  uint32_t* r;
  const void* row;
};
template <int matrices>
FS_DEVICE void ldmatrix(const emulation::Place& place, LdmatrixLane lane) {
  if (emulation::machine.lane() < 8 * matrices) emulation::machine.check_shared(place, lane.row, 16, 16);
  emulation::machine.collective(place, lane, [&](LdmatrixLane* const(&lanes)[32]) {
    for (int j = 0; j < matrices; ++j) {
      for (int i = 0; i < 32; ++i) {
        std::memcpy(&lanes[i]->r[j], static_cast<const unsigned char*>(lanes[8 * j + i / 4]->row) + 4 * (i % 4), 4);
      }
    }
  });
}
}  // namespace emulated

FS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row, FS_SITE) { emulated::ldmatrix<4>({"ldmatrix_x4", site}, {r, row}); }
FS_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row, FS_SITE) { emulated::ldmatrix<2>({"ldmatrix_x2", site}, {r, row}); }

FS_DEVICE void cp_async_16(void* shared, const void* global, bool is_valid, FS_SITE) {
  emulation::machine.copy_async({"cp_async_16", site}, shared, global, 16, is_valid);
}
FS_DEVICE void cp_async_8(void* shared, const void* global, bool is_valid, FS_SITE) {
  emulation::machine.copy_async({"cp_async_8", site}, shared, global, 8, is_valid);
}
FS_DEVICE void cp_async_4(void* shared, const void* global, bool is_valid, FS_SITE) {
  emulation::machine.copy_async({"cp_async_4", site}, shared, global, 4, is_valid);
}
FS_DEVICE void cp_async_commit() { emulation::machine.commit_copies(); }
template <int n>
FS_DEVICE void cp_async_wait(FS_SITE) {
  static_assert(n >= 0);
  emulation::machine.wait_copies({"cp_async_wait", site}, n);
}

FS_DEVICE void block_barrier(FS_SITE) { emulation::machine.block_barrier({"block_barrier", site}); }
FS_DEVICE void warp_barrier(FS_SITE) {
  int nothing = 0;
  emulation::machine.collective({"warp_barrier", site}, nothing, [](int* const(&)[32]) {});
}

// Warps ----------------------------------------------------------------------------------------------------------------------

namespace emulated {
template <typename T>
struct ShuffleLane {
  T value;
  int source;
  T result;
};
template <typename T>
FS_DEVICE T shuffle(const emulation::Place& place, T value, int source) {
  static_assert(sizeof(T) == 4, "float, int or uint32_t");
  if (source < 0 || source >= 32) emulation::machine.fail(place, emulation::text("there is no lane %d", source));
  ShuffleLane<T> lane{value, source, value};
  emulation::machine.collective(place, lane, [](ShuffleLane<T>* const(&lanes)[32]) {
    for (ShuffleLane<T>* to : lanes) to->result = lanes[to->source]->value;
  });
  return lane.result;
}
}  // namespace emulated

template <typename T>
FS_DEVICE T shfl_xor(T value, int mask, FS_SITE) {
  return emulated::shuffle({"shfl_xor", site}, value, emulation::machine.lane() ^ mask);
}
template <typename T>
FS_DEVICE T shfl(T value, int lane, FS_SITE) {
  return emulated::shuffle({"shfl", site}, value, lane);
}
FS_DEVICE uint32_t ballot(bool predicate, FS_SITE) {
  uint32_t votes = predicate;
  emulation::machine.collective({"ballot", site}, votes, [](uint32_t* const(&lanes)[32]) {
    uint32_t mask = 0;
    for (int i = 0; i < 32; ++i) mask |= *lanes[i] << i;
    for (uint32_t* lane : lanes) *lane = mask;
  });
  return votes;
}

// Across streams -------------------------------------------------------------------------------------------------------------

FS_DEVICE void threadfence() { __asm__ volatile("" ::: "memory"); }
template <typename T>
FS_DEVICE T load_volatile(const T* pointer) {
  return *static_cast<const volatile T*>(pointer);
}

}  // namespace fastseq::cuda
