// fingerprint: a 64-bit mix of a block of weights, to see that they changed although nothing says so.
// Every 64-bit word is xored with a key that depends on its position and its halves are multiplied, so scaling, permuting or
// flipping signs changes the result. Idea: the accumulation of XXH3 (Collet, xxHash documentation). Not a defence against an
// adversary.

typedef uint64_t Words __attribute__((vector_size(8 * (kLanes / 2))));
typedef uint64_t WordsU __attribute__((vector_size(8 * (kLanes / 2)), aligned(4), may_alias));

static FASTSEQ_INLINE uint64_t mix(uint64_t h) {
  h ^= h >> 33;
  h *= 0xff51afd7ed558ccdull;
  h ^= h >> 33;
  h *= 0xc4ceb9fe1a85ec53ull;
  return h ^ (h >> 33);
}

static uint64_t fingerprint(const float* src, int64_t count, uint64_t seed) {
  constexpr int kWords = kLanes / 2;
  constexpr int kStreams = 4;
  Words acc[kStreams], key[kStreams];
  for (int s = 0; s < kStreams; ++s)
    for (int i = 0; i < kWords; ++i) {
      acc[s][i] = 0;
      key[s][i] = mix(seed + 0x9e3779b97f4a7c15ull * static_cast<uint64_t>(s * 16 + i + 1));
    }
  const Words step = Words{} + 0x9e3779b97f4a7c15ull;
  int64_t n = 0;
  for (; n + kStreams * kLanes <= count; n += kStreams * kLanes) {
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      const Words data = *reinterpret_cast<const WordsU*>(src + n + s * kLanes);
      const Words keyed = data ^ key[s];
      acc[s] += multiply_halves(keyed);
      acc[s] ^= data;
      key[s] += step;
    }
  }
  uint64_t h = mix(seed ^ static_cast<uint64_t>(count));
  for (int s = 0; s < kStreams; ++s)
    for (int i = 0; i < kWords; ++i) h = mix(h ^ acc[s][i]) + 0x9e3779b97f4a7c15ull;
  for (; n < count; ++n) {
    uint32_t bits;
    __builtin_memcpy(&bits, src + n, sizeof bits);
    h = (h ^ bits) * 0x9ddfea08eb382d69ull;
    h ^= h >> 32;
  }
  return mix(h);
}
