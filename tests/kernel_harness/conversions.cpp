// Between floats and 16-bit types: every value of the latter, and floats at, between and beyond them.
#include <cmath>

#include "harness.h"

namespace fastseq::harness {

namespace {

constexpr Storage kNarrowTypes[] = {Storage::kBf16, Storage::kF16};
const char* name_of(Storage storage) { return storage == Storage::kBf16 ? "bfloat16" : "float16"; }

// What a type has: bits of the fraction, and the exponents of its least normal and largest numbers.
struct Format {
  int fraction, least, largest;
};
Format format_of(Storage storage) { return storage == Storage::kBf16 ? Format{7, -126, 127} : Format{10, -14, 15}; }

float from_bits(uint32_t pattern) {
  float result;
  std::memcpy(&result, &pattern, sizeof result);
  return result;
}

// Every number of the type and what lies between it and its neighbour, from both sides and in the middle; NaN, and any pattern.
std::vector<float> floats_around(Storage storage, Random& random) {
  std::vector<float> values = {kNan, -kNan, from_bits(0x7f800001), from_bits(0xff800001), from_bits(0x7fffffff), kInf, -kInf};
  for (uint32_t pattern = 0; pattern < 0x10000; ++pattern) {
    const float value = widened(storage, static_cast<uint16_t>(pattern));
    const float next = widened(storage, static_cast<uint16_t>(pattern + 1));
    if (std::isnan(value)) continue;
    values.push_back(value);
    if (!std::isfinite(value) || std::signbit(value) != std::signbit(next)) continue;
    // Behind the largest number comes what would be the next one.
    const Format format = format_of(storage);
    const float beyond = std::ldexp(2 - std::ldexp(1.0f, -1 - format.fraction), format.largest);
    const float middle = std::isfinite(next) ? value + (next - value) / 2 : std::copysign(beyond, value);
    values.insert(values.end(), {middle, std::nextafter(middle, kInf), std::nextafter(middle, -kInf)});
  }
  for (int i = 0; i < 20000; ++i) values.push_back(from_bits(static_cast<uint32_t>(random.below(int64_t{1} << 32))));
  return values;
}

bool is_nan(Storage storage, uint16_t value) { return std::isnan(widened(storage, value)); }

void check_values(const KernelSet& set, Storage storage, ConvertLoop widen, ConvertLoop narrow, ActivationLoop round,
                  Random& random) {
  const std::string what = text("%s %s", set.isa, name_of(storage));
  std::vector<uint16_t> all(0x10000);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  std::vector<float> wide(all.size(), untouched());
  widen({all.data(), wide.data(), 1, 0x10000, 0x10000, 0x10000});
  for (size_t i = 0; i < all.size(); ++i) {
    const float wanted = widened(storage, all[i]);
    expect(std::isnan(wanted) ? std::isnan(wide[i]) : bits(wide[i]) == bits(wanted),
           what + text(" %04zx is %.9g, not %.9g", i, wide[i], wanted));
  }

  const std::vector<float> values = floats_around(storage, random);
  const auto count = static_cast<int64_t>(values.size());
  std::vector<uint16_t> got(values.size());
  narrow({values.data(), got.data(), 1, count, count, count});
  std::vector<float> rounded = values;
  ActivationJob job = {};
  job.data = rounded.data(), job.rows = 1, job.lanes = job.row_stride = count;
  round(job);
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t wanted = narrowed(storage, values[i]);
    const bool is_right = is_nan(storage, wanted) ? is_nan(storage, got[i]) : got[i] == wanted;
    expect(is_right, what + text(" of %.9g is %04x, not %04x", values[i], got[i], wanted));
    const float wide_again = widened(storage, wanted);
    expect(std::isnan(wide_again) ? std::isnan(rounded[i]) : bits(rounded[i]) == bits(wide_again),
           what + text(" of %.9g rounded is %.9g, not %.9g", values[i], rounded[i], wide_again));
  }
}

// Rows of all lengths and strides: the numbers of long rows, and nothing else read or written.
void check_rows(const KernelSet& set, Storage storage, ConvertLoop widen, ConvertLoop narrow, Random& random) {
  for (int64_t lanes = 1; lanes <= 3 * set.lanes + 1; ++lanes) {
    const int64_t rows = 1 + random.below(3), stride = lanes + random.below(3), wide_stride = lanes + random.below(3);
    const std::string what = text("%s %s, rows of %d", set.isa, name_of(storage), static_cast<int>(lanes));
    std::vector<float> wide(static_cast<size_t>((rows - 1) * wide_stride + lanes));
    for (float& value : wide) value = 300 * random.value();
    std::vector<uint16_t> small(static_cast<size_t>((rows - 1) * stride + lanes), 0x1234), wanted = small;
    std::vector<float> wide_again(wide.size(), untouched()), wanted_wide = wide_again;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t lane = 0; lane < lanes; ++lane) {
        wanted[row * stride + lane] = narrowed(storage, wide[row * wide_stride + lane]);
        wanted_wide[row * wide_stride + lane] = widened(storage, wanted[row * stride + lane]);
      }
    narrow({wide.data(), small.data(), rows, lanes, wide_stride, stride});
    expect(small == wanted, what + " narrowed");
    widen({small.data(), wide_again.data(), rows, lanes, stride, wide_stride});
    expect_same(wide_again, wanted_wide, what + " widened");
  }
}

}  // namespace

float widened(Storage storage, uint16_t value) {
  const Format format = format_of(storage);
  const int fraction = value & ((1 << format.fraction) - 1), exponent = (value & 0x7fff) >> format.fraction;
  const float sign = value & 0x8000 ? -1.0f : 1.0f;
  if (exponent == format.largest - format.least + 2) return fraction ? kNan : sign * kInf;
  const int significand = exponent ? fraction + (1 << format.fraction) : fraction;
  return sign * std::ldexp(static_cast<float>(significand), std::max(exponent, 1) - 1 + format.least - format.fraction);
}

uint16_t narrowed(Storage storage, float value) {
  const Format format = format_of(storage);
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const auto infinite = static_cast<uint16_t>((format.largest - format.least + 2) << format.fraction);
  if (std::isnan(value)) return static_cast<uint16_t>(infinite + 1);
  if (std::isinf(value)) return sign | infinite;
  int exponent;
  std::frexp(value, &exponent);
  const int unit = std::max(exponent - 1, format.least) - format.fraction;
  // In double precision, where halves of the unit are exact, to the nearest even number of units.
  const double units = std::nearbyint(std::ldexp(std::fabs(static_cast<double>(value)), -unit));
  const double largest = std::ldexp(2 - std::ldexp(1, -format.fraction), format.largest);
  const double result = std::ldexp(units, unit);
  if (result > largest) return sign | infinite;
  if (result < std::ldexp(1, format.least)) return sign | static_cast<uint16_t>(units);
  std::frexp(result, &exponent);
  const int significand = static_cast<int>(std::ldexp(result, format.fraction - (exponent - 1)));
  return static_cast<uint16_t>(sign | ((exponent - 1 - format.least) * (1 << format.fraction) + significand));
}

double rounding_error(Storage storage, double value) {
  if (storage == Storage::kF32 || !std::isfinite(value)) return 0;
  const Format format = format_of(storage);
  return std::max(std::ldexp(std::fabs(value), -1 - format.fraction), std::ldexp(0.5, format.least - format.fraction));
}

void check_conversions(const KernelSet& set, const Conversions& widen, const Conversions& narrow,
                       const ActivationLoop (&round)[kStorages], Random& random) {
  const auto f32 = static_cast<size_t>(Storage::kF32);
  expect(!widen[f32] && !narrow[f32] && !round[f32], text("%s converts no floats to floats", set.isa));
  for (const Storage storage : kNarrowTypes) {
    const auto i = static_cast<size_t>(storage);
    check_values(set, storage, widen[i], narrow[i], round[i], random);
    check_rows(set, storage, widen[i], narrow[i], random);
  }
}

}  // namespace fastseq::harness
