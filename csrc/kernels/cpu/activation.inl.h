// activation: functions of single values over rows that a step has just stored, in place. ReLU is not among them: it is the clamp
// in the epilogue of every kernel.
// Values that are not finite, and the sign of zero, go as in torch's own CPU kernels: NaN stays NaN, and x * f(x) of -inf is NaN
// where f is 0 there. A result depends on its value alone and not on where it stands.
//
// exp, expm1: Cody and Waite, "Software Manual for the Elementary Functions", 1980: x = n ln 2 + r, a polynomial in r, times 2^n.
// log1p on [0, 1]: a polynomial. The normal distribution's tail: exp(-x^2 / 2) times a function of (x - k) / (x + k), which is
// nearly a polynomial, as Schonfelder, "Chebyshev Expansions for the Error and Related Functions", 1978; the square is split so
// that its rounding does not grow with it. Coefficients: minimax fits (Lawson's iteration), relative to the result, each rounded
// to float32 before the next ones were fitted: 1.4e-8 (exp), 5.3e-9 (log1p), 2.4e-8 (tail), 2.3e-9 (near 0).
// Errors against float64 are stated in units in the last place, over the whole of float32 unless said otherwise (every 29th value,
// with and without fused multiplications); tests/kernel_harness/activations.cpp holds them. Clamps and slopes are exact or rounded
// once.

static FASTSEQ_INLINE VecI bits_of(Vec v) { return reinterpret_cast<VecI>(v); }
static FASTSEQ_INLINE Vec from_bits(VecI v) { return reinterpret_cast<Vec>(v); }
static FASTSEQ_INLINE Vec magnitude(Vec v) { return from_bits(bits_of(v) & 0x7fffffff); }
static FASTSEQ_INLINE Vec clamp_above(Vec v, Vec upper) { return v > upper ? upper : v; }  // keeps NaN
static FASTSEQ_INLINE Vec select(VecI condition, Vec yes, Vec no) { return condition ? yes : no; }

template <int kCount>
static FASTSEQ_INLINE Vec polynomial(Vec x, const float (&coefficient)[kCount]) {
  Vec sum = splat(coefficient[kCount - 1]);
#pragma GCC unroll 16
  for (int i = kCount - 2; i >= 0; --i) sum = sum * x + coefficient[i];
  return sum;
}

// exp(x + rest) = 2^n * (1 + fraction) for |x| below 2^9 ln 2; n is of no use where x is NaN, and the fraction is NaN then.
struct Exponential {
  VecI n;
  Vec fraction;
};
static FASTSEQ_INLINE Exponential exponential(Vec x, Vec rest) {
  constexpr float kLog2E = 1.44269502f;
  constexpr float kLn2High = 0.693115234f, kLn2Low = 3.19461833e-05f;  // the former has 12 bits: n times it is exact
  constexpr float kToInteger = 12582912.0f;                            // what is added to it is rounded to integers
  constexpr int32_t kToIntegerBits = 0x4b400000;
  constexpr float kExpm1[] = {0.49999997f, 0.166665465f, 0.0416674353f, 0.00836626161f, 0.00138706574f};
  const Vec shifted = x * kLog2E + kToInteger;
  const Vec n = shifted - kToInteger;
  const Vec r = ((x - n * kLn2High) - n * kLn2Low) + rest;
  return {bits_of(shifted) - kToIntegerBits, (r * r) * polynomial(r, kExpm1) + r};
}

// n from -126 to 127.
static FASTSEQ_INLINE Vec power_of_two(VecI n) { return from_bits((n + 127) << 23); }

// With n from -252 on, rounded once more where it is subnormal.
static FASTSEQ_INLINE Vec join(const Exponential& e) {
  const VecI half = e.n >> 1;
  const Vec scale = power_of_two(half);
  return (scale * e.fraction + scale) * power_of_two(e.n - half);
}

// exp(x + rest) for x up to 88; 0 where it is less than half of the least subnormal.
static FASTSEQ_INLINE Vec exp_below(Vec x, Vec rest = Vec{}) { return join(exponential(clamp_below(x, splat(-104.0f)), rest)); }

// expm1 for x <= 0. With the factors of ELU and SELU 1.9 ulp.
static FASTSEQ_INLINE Vec expm1_negative(Vec x) {
  const Exponential e = exponential(clamp_below(x, splat(-40.0f)), Vec{});
  const Vec scale = power_of_two(e.n);
  return scale * e.fraction + (scale - 1.0f);
}

// expm1 for all x. With those of CELU 1.4 ulp. Half of it is made first: 2^n may be too large.
static FASTSEQ_INLINE Vec expm1_any(Vec x) {
  const Exponential e = exponential(clamp_above(clamp_below(x, splat(-40.0f)), splat(89.0f)), Vec{});
  const Vec half = power_of_two(e.n - 1);
  return select(e.n == 0, e.fraction, 2.0f * (half * e.fraction + (half - 0.5f)));
}

// log1p for x in [0, 1].
static FASTSEQ_INLINE Vec log1p_unit(Vec x) {
  constexpr float kLog1p[] = {-0.499999315f, 0.333304703f,   -0.24958156f,  0.196931928f,  -0.153490975f,
                              0.10670013f,   -0.0575615279f, 0.0201503336f, -0.0033065395f};
  return (x * x) * polynomial(x, kLog1p) + x;
}

// 1 / (1 + exp(-x - rest)) as above / below, both at most 2 and neither of them inexact near 0.
struct Logistic {
  Vec above, below;
};
static FASTSEQ_INLINE Logistic logistic(Vec x, Vec rest = Vec{}) {
  const Vec e = exp_below(-magnitude(x), select(x < 0.0f, rest, -rest));
  return {select(x < 0.0f, e, splat(1.0f)), e + 1.0f};
}

// 2.3 ulp.
static FASTSEQ_INLINE Vec sigmoid(Vec x) {
  const Logistic l = logistic(x);
  return l.above / l.below;
}

// 3.1 ulp; below -87, where subnormal powers of e are multiplied by x, 2^-143.
static FASTSEQ_INLINE Vec silu(Vec x) {
  const Logistic l = logistic(x);
  return x * l.above / l.below;
}

// 0.5 * x * (1 + tanh(u)) = x * sigmoid(2 u). 3.0 ulp; below -10, where results are subnormal, as silu (torch's own, having lost
// all digits by -5.8, is 0 there). 2 u in double precision: its rounding would grow with it, to 175 ulp at -10.
typedef double Wide __attribute__((vector_size(2 * sizeof(Vec))));
static FASTSEQ_INLINE Vec gelu_tanh(Vec x) {
  constexpr double kLinear = 1.5957691216057308, kCubic = 0.071354816272600241;  // 2 sqrt(2 / pi), and times 0.044715
  const Wide wide = __builtin_convertvector(x, Wide);
  const Wide exact = wide * (wide * wide * kCubic + kLinear);
  const Vec high = __builtin_convertvector(exact, Vec);
  const Vec low = __builtin_convertvector(exact - __builtin_convertvector(high, Wide), Vec);
  const Logistic l = logistic(high, select(magnitude(high) < 128.0f, low, Vec{}));  // beyond, infinity less infinity
  return x * l.above / l.below;
}

// 2.5 ulp.
static FASTSEQ_INLINE Vec tanh(Vec x) {
  const Vec t = expm1_negative(-2.0f * magnitude(x));
  const VecI sign = bits_of(x) & static_cast<int32_t>(0x80000000u);
  return from_bits(bits_of(magnitude(t / (t + 2.0f))) | sign);
}

// x times the normal distribution of x. 4.9 ulp. Near 0 the tail, half of one, would lose digits: there 1/2 + x q(x^2).
static FASTSEQ_INLINE Vec gelu(Vec x) {
  constexpr float kTail[] = {0.744416058f,   -0.565561831f,   0.315425813f,     -0.116051421f,   0.0174001697f,
                             0.00648452155f, -0.00315888086f, -0.000476456742f, 0.000408205291f, 9.65148138e-05f};
  constexpr float kNear[] = {0.398942262f, -0.066489473f, 0.0099610975f, -0.00112261251f};
  constexpr float kCenter = 3.5f, kNearest = 0.5f;
  const Vec a = clamp_above(magnitude(x), splat(15.0f));
  const Vec inverse = 1.0f / (a + kCenter);
  const Vec high = from_bits(bits_of(a) & ~0xfff);
  const Exponential e = exponential(-0.5f * (high * high), -0.5f * ((a - high) * (a + high)));
  const Vec factor = inverse * polynomial((a - kCenter) * inverse, kTail);
  // The power of e last: with the factor alone it is subnormal where the result is not.
  const Vec far = select(x < 0.0f, (x * factor) * join(e), x * (1.0f - factor * join(e)));
  return select(a < kNearest, x * (x * polynomial(a * a, kNear) + 0.5f), far);
}

// x * tanh(log1p(e)) with e = exp(x): e (e + 2) / (e (e + 2) + 2). 4.3 ulp; below -87 as silu.
static FASTSEQ_INLINE Vec mish(Vec x) {
  const Vec e = exp_below(clamp_above(x, splat(20.0f)));
  const Vec n = e * (e + 2.0f);
  return x * (n / (n + 2.0f));
}

// log1p(exp(y)), infinite from where torch's is: where exp(y) is. With the division by beta 2.2 ulp.
static FASTSEQ_INLINE Vec softplus(Vec y) {
  constexpr float kLast = 88.7228394f;
  const Vec sum = clamp_below(y, Vec{}) + log1p_unit(exp_below(-magnitude(y)));
  return select(y > kLast, splat(__builtin_inff()), sum);
}

// --- loops --------------------------------------------------------------------------------------------------------------

// function(values, first lane) for all rows of a job.
template <typename Function>
static FASTSEQ_INLINE void for_rows(const ActivationJob& job, const Function& function) {
  assert(job.lanes > 0 && (job.rows == 1 || job.row_stride >= job.lanes) && "rows do not overlap");
  for (int64_t row = 0; row < job.rows; ++row) {
    float* const data = job.data + row * job.row_stride;
    for (int64_t lane = 0; lane < job.lanes; lane += kLanes) {
      const int64_t left = job.lanes - lane;
      Vec v = Vec{};
      if (left >= kLanes) {
        v = load(data + lane);
      } else {
        for (int i = 0; i < left; ++i) v[i] = data[lane + i];
      }
      v = function(v, lane);
      if (left >= kLanes) {
        store(data + lane, v);
      } else {
        store_lanes(data + lane, v, static_cast<int>(left));
      }
    }
  }
}

static void hardtanh_rows(const ActivationJob& job) {
  const Vec least = splat(job.a), greatest = splat(job.b);
  for_rows(job, [&](Vec x, int64_t) { return clamp_above(clamp_below(x, least), greatest); });
}

static void leaky_relu_rows(const ActivationJob& job) {
  const Vec slope = splat(job.a);
  for_rows(job, [&](Vec x, int64_t) { return select(x > 0.0f, x, x * slope); });
}

static void prelu_rows(const ActivationJob& job) {
  for_rows(job, [&](Vec x, int64_t lane) { return select(x > 0.0f, x, x * load(job.slopes + lane)); });
}

static void elu_rows(const ActivationJob& job) {
  const Vec alpha = splat(job.a);
  for_rows(job, [&](Vec x, int64_t) { return select(x < 0.0f, expm1_negative(x) * alpha, x); });
}

static void selu_rows(const ActivationJob& job) {
  constexpr float kAlpha = 1.67326324235437728f, kScale = 1.05070098735548049f;
  for_rows(job, [](Vec x, int64_t) { return select(x < 0.0f, expm1_negative(x) * (kAlpha * kScale), x * kScale); });
}

static void celu_rows(const ActivationJob& job) {
  const Vec alpha = splat(job.a), inverse = splat(static_cast<float>(1.0 / static_cast<double>(job.a)));
  for_rows(job, [&](Vec x, int64_t) { return select(x < 0.0f, expm1_any(x * inverse) * alpha, x); });
}

static FASTSEQ_INLINE Vec from_zero_to_six(Vec x) { return clamp_above(clamp_below(x, Vec{}), splat(6.0f)); }

static void hardswish_rows(const ActivationJob& job) {
  for_rows(job, [](Vec x, int64_t) { return x * from_zero_to_six(x + 3.0f) / 6.0f; });
}

static void hardsigmoid_rows(const ActivationJob& job) {
  for_rows(job, [](Vec x, int64_t) { return from_zero_to_six(x + 3.0f) / 6.0f; });
}

static void softplus_rows(const ActivationJob& job) {
  const Vec beta = splat(job.a), threshold = splat(job.b);
  for_rows(job, [&](Vec x, int64_t) {
    const Vec y = x * beta;
    return select(y > threshold, x, softplus(y) / beta);
  });
}

template <Vec (*kFunction)(Vec)>
static void rows_of(const ActivationJob& job) {
  for_rows(job, [](Vec x, int64_t) { return kFunction(x); });
}

static constexpr void add_activations(KernelSet& set) {
  const auto add = [&](Activation kind, ActivationLoop loop) { set.activation[static_cast<int>(kind)] = loop; };
  add(Activation::kLeakyRelu, leaky_relu_rows), add(Activation::kPrelu, prelu_rows);
  add(Activation::kElu, elu_rows), add(Activation::kSelu, selu_rows), add(Activation::kCelu, celu_rows);
  add(Activation::kHardtanh, hardtanh_rows), add(Activation::kHardswish, hardswish_rows);
  add(Activation::kHardsigmoid, hardsigmoid_rows), add(Activation::kSigmoid, rows_of<sigmoid>),
      add(Activation::kTanh, rows_of<tanh>);
  add(Activation::kSilu, rows_of<silu>), add(Activation::kGelu, rows_of<gelu>), add(Activation::kGeluTanh, rows_of<gelu_tanh>);
  add(Activation::kSoftplus, softplus_rows), add(Activation::kMish, rows_of<mish>);
}
