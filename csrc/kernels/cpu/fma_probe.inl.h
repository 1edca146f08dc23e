// fma_probe: how fast this machine multiplies and adds.

// Independent multiply-adds on as many accumulators as a tile has: the rate no tile can exceed.
static double fma_probe(int64_t iterations, float* sink) {
  constexpr int kChains = 12;
  Vec acc[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) acc[i] = splat(static_cast<float>(i));
  const Vec x = splat(0.5f), y = splat(*sink);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = acc[i] * x + y;
  }
  Vec sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum += acc[i];
  float out = 0;
  for (int i = 0; i < kLanes; ++i) out += sum[i];
  *sink = out;
  return 2.0 * kChains * kLanes * static_cast<double>(iterations);
}
