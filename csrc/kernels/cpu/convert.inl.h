// widen, narrow, round: between floats and the 16-bit types that models are stored in, and floats rounded to what those can hold.
// To nearest, ties to even, subnormal numbers included; what is too large becomes infinite, NaN stays NaN. No mode of the
// CPU that flushes subnormal numbers changes a result, and every instruction set gives the same.

typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint16_t HalvesU __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));

// Of each type the value as float, and the bits, in the low half, of the nearest one to a float.
struct Bf16 {
  static FASTSEQ_INLINE Vec widen(Bits h) { return reinterpret_cast<Vec>(h << 16); }
  static FASTSEQ_INLINE Bits narrow(Vec v) {
    const Bits b = reinterpret_cast<Bits>(v);
    const Bits nearest = b + 0x7fff + ((b >> 16) & 1);
    return (v != v ? b | 0x400000 : nearest) >> 16;
  }
};

struct F16 {
  static constexpr uint32_t kBias = uint32_t{127 - 15} << 23;  // between the exponents

  static FASTSEQ_INLINE Vec widen(Bits h) {
    const Bits magnitude = h & 0x7fff, sign = (h & 0x8000) << 16;
    const Bits exponent = magnitude & 0x7c00;
    // A subnormal number is the fraction of one with the least exponent, without its leading one.
    const Bits least = Bits{} + (kBias + (1u << 23));
    const Vec fraction = reinterpret_cast<Vec>((magnitude << 13) + least) - reinterpret_cast<Vec>(least);
    const Bits normal = (magnitude << 13) + (exponent == 0x7c00 ? Bits{} + 2 * kBias : Bits{} + kBias);
    return reinterpret_cast<Vec>((exponent == 0 ? reinterpret_cast<Bits>(fraction) : normal) | sign);
  }

  static FASTSEQ_INLINE Bits narrow(Vec v) {
    const Bits all = reinterpret_cast<Bits>(v);
    const Bits b = all & 0x7fffffff, sign = (all >> 16) & 0x8000;
    const Bits nearest = (b + 0xfff + ((b >> 13) & 1) - kBias) >> 13;
    // Below the least normal number the unit is 2^-24, that of the floats from 0.5 on: the addition rounds.
    const Vec half = Vec{} + 0.5f;
    const Bits subnormal = reinterpret_cast<Bits>(reinterpret_cast<Vec>(b) + half) - reinterpret_cast<Bits>(half);
    const Bits finite = b < Bits{} + (kBias + (1u << 23)) ? subnormal : nearest;
    const Bits special = b > Bits{} + 0x7f800000u ? (b >> 13 & 0x3ff) | 0x7e00 : Bits{} + 0x7c00;
    return (b >= Bits{} + 0x47800000u ? special : finite) | sign;  // from 2^16 on
  }
};

template <typename Type>
static void widen(const ConvertJob& job) {
  for (int64_t row = 0; row < job.rows; ++row) {
    const uint16_t* const src = static_cast<const uint16_t*>(job.src) + row * job.src_stride;
    float* const dst = static_cast<float*>(job.dst) + row * job.dst_stride;
    if (job.lanes < kLanes) {
      Bits h = {};
      for (int64_t i = 0; i < job.lanes; ++i) h[i] = src[i];
      store_lanes(dst, Type::widen(h), static_cast<int>(job.lanes));
      continue;
    }
    // The last vector overlaps the one before and writes the same numbers again.
    for (int64_t lane = 0; lane < job.lanes; lane += kLanes) {
      const int64_t i = lane + kLanes <= job.lanes ? lane : job.lanes - kLanes;
      store(dst + i, Type::widen(__builtin_convertvector(*reinterpret_cast<const HalvesU*>(src + i), Bits)));
    }
  }
}

template <typename Type>
static void narrow(const ConvertJob& job) {
  for (int64_t row = 0; row < job.rows; ++row) {
    const float* const src = static_cast<const float*>(job.src) + row * job.src_stride;
    uint16_t* const dst = static_cast<uint16_t*>(job.dst) + row * job.dst_stride;
    if (job.lanes < kLanes) {
      Vec v = {};
      for (int64_t i = 0; i < job.lanes; ++i) v[i] = src[i];
      const Bits h = Type::narrow(v);
      for (int64_t i = 0; i < job.lanes; ++i) dst[i] = static_cast<uint16_t>(h[i]);
      continue;
    }
    for (int64_t lane = 0; lane < job.lanes; lane += kLanes) {
      const int64_t i = lane + kLanes <= job.lanes ? lane : job.lanes - kLanes;
      *reinterpret_cast<HalvesU*>(dst + i) = __builtin_convertvector(Type::narrow(load(src + i)), Halves);
    }
  }
}

template <typename Type>
static void round_rows(const ActivationJob& job) {
  for_rows(job, [](Vec v, int64_t) { return Type::widen(Type::narrow(v)); });
}

template <typename Type>
static constexpr void add_conversions(KernelSet& set, Storage storage) {
  set.widen[static_cast<int>(storage)] = widen<Type>, set.narrow[static_cast<int>(storage)] = narrow<Type>;
  set.round[static_cast<int>(storage)] = round_rows<Type>;
}
