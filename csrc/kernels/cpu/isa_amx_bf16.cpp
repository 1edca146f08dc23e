// AMX with tdpbf16ps: register tiles on pairs of bfloat16 numbers, beside the kernels of isa_avx512.cpp.
#if defined(__x86_64__)
#include <immintrin.h>

#include <type_traits>

#include "kernels/cpu/kernels.h"

#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")

namespace fastseq::cpu {
namespace {
namespace amx_bf16 {

constexpr char kAmxIsa[] = "amx_bf16";
constexpr int kAmxRows = 32;
// Against the float32 tiles at 0.93 of a core's 172 GFLOP/s: 6.0 in 3x3 64-64 on 28x28 (60 us), 4.9 in 256-256 on 14x14 (293 us).
constexpr double kAmxSpeed = 6;

#include "kernels/cpu/limits_512.inl.h"
#include "kernels/cpu/vector.inl.h"

#include "kernels/cpu/gemm_tile.inl.h"

static FASTSEQ_INLINE Vec load_lanes(const float* p, int lanes) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << lanes) - 1), p);
}

// Eight tiles of up to 16 rows of 16 pairs, or floats where they are sums. The instructions are written out, with the numbers of
// tiles as template arguments, which the compiler's macros do not take. The memory clobbers keep stores in front of what loads
// them.
class MatrixUnit {
 public:
  static constexpr bool kScales = true;
  // Rows of tiles 0, 1 and 4, and of 2, 3 and 5; 6 and 7 have 16.
  MatrixUnit(int first, int second) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const int rows[8] = {first, first, second, second, first, second, 16, 16};
    for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = static_cast<uint8_t>(rows[tile]);
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~MatrixUnit() { asm volatile("tilerelease"); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;

  template <int kTile>
  FASTSEQ_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  // stride: floats from a row to the next.
  template <int kTile>
  FASTSEQ_INLINE void load(const float* src, int64_t stride) {
    asm volatile("tileloadd (%0,%1,4), %%tmm%c2" ::"r"(src), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  FASTSEQ_INLINE void store(float* dst, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,4)" ::"r"(dst), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kSums, int kSource, int kWeights>
  FASTSEQ_INLINE void add_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kSource), "i"(kWeights));
  }
};

#include "kernels/cpu/amx_tiles.inl.h"

}  // namespace amx_bf16
}  // namespace

constexpr Bf16Tiles kAmxBf16Tiles = amx_bf16::make_amx_tiles();
const Bf16Tiles& bf16_tiles_amx() { return kAmxBf16Tiles; }

}  // namespace fastseq::cpu
#endif  // __x86_64__
