// fingerprint: a 64-bit hash of a block of weights, to see that they changed although nothing says so.
// Each lane of 64 bits is a multiply-with-carry step per word: state = low(state ^ word) * kFactor + high(state ^ word), which maps
// different words to different states and is a multiplication modulo the prime-like kFactor * 2^32 - 1. So scaling, permuting or
// flipping signs changes the result. Idea and factor: Thomas, "The MWC64X Random Number Generator". Not a defence against an
// adversary. Four operations for a vector, and enough streams to hide their latency: as fast as the L2 cache gives.

typedef uint64_t Words __attribute__((vector_size(8 * (kLanes / 2))));
typedef uint64_t WordsU __attribute__((vector_size(8 * (kLanes / 2)), aligned(2), may_alias));  // pairs of 16-bit weights too

constexpr uint64_t kFactor = 4294883355u;

static FASTSEQ_INLINE uint64_t mix_in(uint64_t h, uint64_t word) {
  h = (h ^ word) * 0x9ddfea08eb382d69ull;
  return h ^ (h >> 32);
}

static FASTSEQ_INLINE Words absorb(Words state, Words words) {
  const Words x = state ^ words;
  return multiply_low(x, Words{} + kFactor) + (x >> 32);
}

constexpr int kStreams = 8, kWords = kLanes / 2;

struct Streams {
  Words state[kStreams];

  FASTSEQ_INLINE Streams() {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s)
#pragma GCC unroll 8
      for (int i = 0; i < kWords; ++i) state[s][i] = 0x9e3779b97f4a7c15ull * static_cast<uint64_t>(s * kWords + i + 1);
  }
  FASTSEQ_INLINE void take(int stream, const float* src) {
    state[stream] = absorb(state[stream], *reinterpret_cast<const WordsU*>(src));
  }
  FASTSEQ_INLINE uint64_t end(uint64_t h) {
#pragma GCC unroll 8
    for (int half = kStreams / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int s = 0; s < half; ++s) state[s] = absorb(absorb(state[s], state[s + half]), Words{} + static_cast<uint64_t>(half));
#pragma GCC unroll 8
    for (int i = 0; i < kWords; ++i) h = mix_in(h, state[0][i]);
    return h;
  }
};

// Of `count` floats.
static uint64_t fingerprint(const float* src, int64_t count) {
  uint64_t h = static_cast<uint64_t>(count);
  int64_t n = 0;
  if (count >= kLanes) {
    Streams streams;
    for (; n + kStreams * kLanes <= count; n += kStreams * kLanes) {
#pragma GCC unroll 8
      for (int s = 0; s < kStreams; ++s) streams.take(s, src + n + s * kLanes);
    }
    for (; n + kLanes <= count; n += kLanes) streams.take(0, src + n);
    h = streams.end(h);
  }
  for (; n < count; ++n) {
    uint32_t bits;
    __builtin_memcpy(&bits, src + n, sizeof bits);
    h = mix_in(h, bits);
  }
  return mix_in(h, 0);
}

// Of kSampleLines lines of kLineFloats floats, spread from the first to the last of `count` floats.
static uint64_t fingerprint_sample(const float* src, int64_t count) {
  static_assert(kSampleLines % kStreams == 0 && kLineFloats % kLanes == 0, "whole lines in each stream");
  Streams streams;
  for (int line = 0; line < kSampleLines; line += kStreams) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s)
#pragma GCC unroll 8
      for (int i = 0; i < kLineFloats; i += kLanes)
        streams.take(s, src + (count - kLineFloats) * (line + s) / (kSampleLines - 1) + i);
  }
  return streams.end(static_cast<uint64_t>(count));
}
