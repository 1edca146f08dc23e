// The vector type of the instruction set that includes this file. kLanes is defined before; GCC and Clang vector extensions only,
// so that one source serves AVX-512, AVX2 and any other machine. Never include a library header from here: this is compiled
// inside a target region, and an inline function of the standard library that were emitted here could run on an older CPU.

#define FASTSEQ_INLINE inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float VecU __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));

static FASTSEQ_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
static FASTSEQ_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }

// x - 0 is x for every x, so this folds to a broadcast; 0 + x would turn -0.0 into +0.0 and cost an addition.
static FASTSEQ_INLINE Vec splat(float x) { return x - Vec{}; }

// v < lower ? lower : v keeps NaN, and -0.0 against 0.
static FASTSEQ_INLINE Vec clamp_below(Vec v, Vec lower) { return v < lower ? lower : v; }

// Eager's max_pool2d: `value > max || isnan(value)` takes the value, so any NaN wins and stays.
static FASTSEQ_INLINE Vec pool_max(Vec max, Vec value) {
  VecI takes = (value > max) | (value != value);
  return takes ? value : max;
}

static FASTSEQ_INLINE void store_lanes(float* p, Vec v, int lanes) {
  for (int i = 0; i < lanes; ++i) p[i] = v[i];
}
