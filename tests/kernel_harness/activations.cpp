// Activations: in double precision, and each kernel against that over the whole range of float32.
#include <cmath>

#include "harness.h"

namespace fastseq::harness {

namespace {

constexpr double kLargest = std::numeric_limits<float>::max(), kRoot2 = 1.41421356237309505, kPi = 3.14159265358979324;

// What float32 makes of a value on the way.
double overflow(double x) { return x > kLargest ? kInf : x < -kLargest ? -kInf : x; }

double sigmoid(double x) { return x >= 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x)); }
double clamp(double x, double least, double greatest) { return x < least ? least : x > greatest ? greatest : x; }

// One function of the table with its parameters, and how far its results may be off: in units in the last place, and absolutely,
// where that is more.
struct Case {
  Activation kind;
  float a, b;
  double ulps, absolute;
  double tail_ulps;  // for x below -2
};

constexpr double kSubnormalTail = 0x1p-142;  // where a subnormal power of e is multiplied by x

const Case kCases[] = {
    {Activation::kLeakyRelu, 0.01f, 0, 0.5, 0, 0.5},
    {Activation::kLeakyRelu, -0.5f, 0, 0.5, 0, 0.5},
    {Activation::kLeakyRelu, 0, 0, 0, 0, 0},
    {Activation::kPrelu, 0.3f, 0, 0.5, 0, 0.5},
    {Activation::kElu, 1, 0, 2, 0, 2},
    {Activation::kElu, 0, 0, 0, 0, 0},
    {Activation::kElu, -1.5f, 0, 2, 0, 2},
    {Activation::kSelu, 0, 0, 2, 0, 2},
    {Activation::kCelu, 0.5f, 0, 2, 0, 2},
    {Activation::kCelu, 4, 0, 2, 0, 2},
    {Activation::kCelu, -2, 0, 2, 0, 2},
    {Activation::kHardtanh, -1, 1, 0, 0, 0},
    {Activation::kHardtanh, 0.5f, kInf, 0, 0, 0},
    {Activation::kHardswish, 0, 0, 3, 0x1p-22, 0},
    {Activation::kHardsigmoid, 0, 0, 1.5, 0x1p-25, 0},
    {Activation::kSigmoid, 0, 0, 2.5, 0, 2.5},
    {Activation::kTanh, 0, 0, 3, 0, 3},
    {Activation::kSilu, 0, 0, 3.5, kSubnormalTail, 3.5},
    {Activation::kGelu, 0, 0, 5, 0, 5},
    {Activation::kGeluTanh, 0, 0, 3.5, kSubnormalTail, 3.5},
    {Activation::kSoftplus, 1, 20, 2.5, 0, 2.5},
    {Activation::kSoftplus, 0.5f, 3, 2.5, 0, 2.5},
    {Activation::kSoftplus, 2, 1000, 2.5, 0, 2.5},
    {Activation::kSoftplus, -1, 20, 2.5, 0, 2.5},
    {Activation::kMish, 0, 0, 4.5, kSubnormalTail, 4.5},
};

// Random ones of all magnitudes, many of those that occur, and special ones.
std::vector<float> values_of_all_kinds(Random& random) {
  std::vector<float> values = {kNan,   kInf,    -kInf, 0.0f,   -0.0f,  1e-45f, -1e-45f, 1e-10f, -1e-10f,
                               1e-40f, -1e-40f, 3e38f, -3e38f, 1.0f,   -1.0f,  3.0f,    -3.0f,  6.0f,
                               20.0f,  -20.0f,  88.7f, 88.73f, -87.4f, -88.8f, -103.9f, -104.1f};
  for (int i = 0; i < 4000; ++i) {
    const auto pattern = static_cast<uint32_t>(random.below(int64_t{1} << 32));
    float value;
    std::memcpy(&value, &pattern, sizeof value);
    values.push_back(std::isnan(value) ? kNan : value);
  }
  for (float scale : {1.0f, 4.0f, 15.0f, 110.0f})
    for (int i = 0; i < 4000; ++i) values.push_back(scale * random.value());
  return values;
}

ActivationJob job_of(const Case& c, std::vector<float>& data, const std::vector<float>& slopes) {
  ActivationJob job = {};
  job.data = data.data(), job.rows = 1, job.lanes = job.row_stride = static_cast<int64_t>(data.size());
  job.a = c.kind == Activation::kPrelu ? kNan : c.a, job.b = c.b, job.slopes = slopes.data();
  return job;
}

void check_values(const KernelSet& set, const Case& c, ActivationLoop loop, const std::vector<float>& values) {
  const std::vector<float> slopes(values.size() + 16, c.a);
  std::vector<float> got = values;
  loop(job_of(c, got, slopes));
  for (size_t i = 0; i < got.size(); ++i) {
    const double x = values[i], wanted = activation_value(c.kind, c.a, c.b, x);
    int exponent;
    std::frexp(wanted, &exponent);
    const double ulp = std::ldexp(1, std::max(exponent - 24, -149));
    const double error = std::max((x < -2 ? c.tail_ulps : c.ulps) * ulp, c.absolute);
    const std::string what = text("%s activation %d (%g, %g) of %.9g", set.isa, static_cast<int>(c.kind), c.a, c.b, x);
    expect(is_close(got[i], wanted, error + 1e-46), what + text(" is %.9g, not %.9g", got[i], wanted));
    if (wanted == 0 && got[i] == 0) expect(std::signbit(wanted) == std::signbit(got[i]), what + ": the sign of zero");
  }
}

// Rows of all lengths: the bits of single values, and nothing else written.
void check_rows(const KernelSet& set, const Case& c, ActivationLoop loop, Random& random) {
  for (int64_t lanes = 1; lanes <= 2 * set.lanes + 1; ++lanes) {
    const int64_t rows = 1 + random.below(3), stride = lanes + random.below(3);
    std::vector<float> data(static_cast<size_t>((rows - 1) * stride + lanes), untouched()), wanted = data;
    std::vector<float> slopes(static_cast<size_t>((lanes + set.lanes - 1) / set.lanes * set.lanes), kNan);
    for (int64_t lane = 0; lane < lanes; ++lane) slopes[lane] = random.value();
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const float x = random.below(30) ? 8 * random.value() : random.coin() ? kNan : -kInf;
        data[row * stride + lane] = x;
        std::vector<float> one = {x};
        const std::vector<float> slope(static_cast<size_t>(set.lanes), slopes[lane]);
        loop(job_of(c, one, slope));
        wanted[row * stride + lane] = one[0];
      }
    ActivationJob job = job_of(c, data, slopes);
    job.rows = rows, job.lanes = lanes, job.row_stride = stride;
    loop(job);
    expect_same(data, wanted, text("%s activation %d, %d lanes", set.isa, static_cast<int>(c.kind), static_cast<int>(lanes)));
  }
}

}  // namespace

double activation_value(Activation kind, double a, double b, double x) {
  switch (kind) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return x < 0 ? 0 : x;
    case Activation::kLeakyRelu:
    case Activation::kPrelu:
      return x > 0 ? x : x * a;
    case Activation::kElu:
      return x < 0 ? std::expm1(x) * a : x;
    case Activation::kSelu:
      return x < 0 ? std::expm1(x) * (1.67326324235437728 * 1.05070098735548049) : overflow(x * 1.05070098735548049);
    case Activation::kCelu:
      return x < 0 ? overflow(overflow(std::expm1(x / a)) * a) : x;
    case Activation::kHardtanh:
      return clamp(x, a, b);
    case Activation::kHardswish:
      return overflow(x * clamp(x + 3, 0, 6)) / 6;
    case Activation::kHardsigmoid:
      return clamp(x + 3, 0, 6) / 6;
    case Activation::kSigmoid:
      return sigmoid(x);
    case Activation::kTanh:
      return std::tanh(x);
    case Activation::kSilu:
      return x * sigmoid(x);
    case Activation::kGelu:
      return x * (0.5 * std::erfc(-x / kRoot2));
    case Activation::kGeluTanh:
      return x * sigmoid(std::sqrt(8 / kPi) * (x + 0.044715 * x * x * x));
    case Activation::kSoftplus:
      return x * a > b ? x : std::log1p(overflow(std::exp(x * a))) / a;
    case Activation::kMish:
      return x * std::tanh(std::log1p(std::exp(x)));
  }
  return kNan;
}

void check_activations(const KernelSet& set, const ActivationLoop (&activation)[kActivations], Random& random) {
  bool has_case[kActivations] = {};
  const std::vector<float> values = values_of_all_kinds(random);
  for (const Case& c : kCases) {
    const ActivationLoop loop = activation[static_cast<int>(c.kind)];
    has_case[static_cast<int>(c.kind)] = true;
    check_values(set, c, loop, values);
    check_rows(set, c, loop, random);
  }
  for (int kind = 0; kind < kActivations; ++kind)
    expect((activation[kind] != nullptr) == has_case[kind], text("%s: activation %d", set.isa, kind));
}

}  // namespace fastseq::harness
