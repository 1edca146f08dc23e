// softmax, logsoftmax: rows of exp(x - max) over their sum, and of (x - max) - log(sum), which keeps the digits that a sum with max
// would lose. A row with NaN, +inf or nothing but -inf is NaN, -inf beside other numbers gives 0 and -inf, as in torch.
// The difference is rounded, which exp multiplies by the difference itself: what is lost comes along (Knuth's sum of two).
// softmax: 4 ulp. logsoftmax: 3 ulp, of 1 where the result is nearer to 0.

// x - max and what its rounding has lost, for exp: nothing where that is 0 or NaN anyhow.
static FASTSEQ_INLINE Vec exp_of_difference(Vec x, Vec max) {
  const Vec difference = x - max;
  const Vec rounded = difference - x;
  const Vec lost = (x - (difference - rounded)) - (max + rounded);
  return exp_below(difference, select(difference > -104.0f, lost, Vec{}));
}

// log of x from 1 on.
static FASTSEQ_INLINE Vec log_from_one(Vec x) {
  constexpr float kLn2High = 0.693145752f, kLn2Low = 1.42860677e-06f;  // the former has 16 bits: its multiples here are exact
  const VecI exponent = (bits_of(x) >> 23) - 127;
  const Vec n = __builtin_convertvector(exponent, Vec);
  const Vec fraction = from_bits((bits_of(x) & 0x7fffff) | 0x3f800000) - 1.0f;
  return select(x == x, n * kLn2High + (n * kLn2Low + log1p_unit(fraction)), x);
}

// A row of kVectors vectors, the last of which may be cut, in registers.
template <bool kIsLog, int kVectors>
static FASTSEQ_INLINE void softmax_short(const float* src, float* dst, int64_t lanes, bool can_overread) {
  const int64_t last = lanes - (kVectors - 1) * kLanes;
  const auto greater = [](Vec a, Vec b) { return clamp_below(a, b); };
  const auto plus = [](Vec a, Vec b) { return a + b; };
  Vec value[kVectors], power[kVectors];
  for (int v = 0; v < kVectors; ++v)
    value[v] = load_row(src + v * kLanes, v + 1 < kVectors ? kLanes : last, can_overread, splat(-__builtin_inff()));
  Vec max = value[0], sum = Vec{};
  for (int v = 1; v < kVectors; ++v) max = greater(max, value[v]);
  max = across(max, greater);
  for (int v = 0; v < kVectors; ++v) power[v] = exp_of_difference(value[v], max), sum += power[v];
  sum = across(sum, plus);
  const Vec log = kIsLog ? log_from_one(sum) : Vec{};
  for (int v = 0; v < kVectors; ++v)
    store_row(dst + v * kLanes, kIsLog ? (value[v] - max) - log : power[v] / sum, v + 1 < kVectors ? kLanes : last);
}

template <bool kIsLog>
static FASTSEQ_INLINE void softmax_long(const float* src, float* dst, int64_t lanes, bool can_overread) {
  const Vec none = splat(-__builtin_inff());
  const auto value = [&](int64_t lane, int64_t left) { return load_row(src + lane, left, can_overread, none); };
  const auto greater = [](Vec a, Vec b) { return clamp_below(a, b); };
  Vec most[kRowVectors] = {none, none, none, none};
  int64_t lane = 0;
  for (; lanes - lane >= kRowVectors * kLanes; lane += kRowVectors * kLanes)
#pragma GCC unroll 4
    for (int v = 0; v < kRowVectors; ++v) most[v] = greater(most[v], load(src + lane + v * kLanes));
  for (; lane < lanes; lane += kLanes) most[0] = greater(most[0], value(lane, lanes - lane));
  const Vec max = across(greater(greater(most[0], most[1]), greater(most[2], most[3])), greater);

  Vec sum[1];
  sum_row(lanes, sum, [&](int64_t at, int64_t left, Vec(&part)[1]) {
    const Vec power = exp_of_difference(value(at, left), max);
    if constexpr (!kIsLog) store_row(dst + at, power, left);
    part[0] += power;
  });
  const Vec log = kIsLog ? log_from_one(sum[0]) : Vec{};
  for (lane = 0; lane < lanes; lane += kLanes) {
    const int64_t left = lanes - lane;
    if constexpr (kIsLog) {
      store_row(dst + lane, (value(lane, left) - max) - log, left);
    } else {
      store_row(dst + lane, load_row(dst + lane, left, false, Vec{}) / sum[0], left);
    }
  }
}

template <bool kIsLog>
static void softmax_rows(const SoftmaxJob& job) {
  assert(job.lanes > 0 && (job.rows == 1 || job.dst_stride >= job.lanes) && "rows do not overlap");
  const int64_t vectors = (job.lanes + kLanes - 1) / kLanes;
  for (int64_t row = 0; row < job.rows; ++row) {
    const float* const src = job.src + row * job.src_stride;
    float* const dst = job.dst + row * job.dst_stride;
    if (vectors == 1) {
      softmax_short<kIsLog, 1>(src, dst, job.lanes, job.can_overread);
    } else if (vectors == 2) {
      softmax_short<kIsLog, 2>(src, dst, job.lanes, job.can_overread);
    } else {
      softmax_long<kIsLog>(src, dst, job.lanes, job.can_overread);
    }
  }
}
