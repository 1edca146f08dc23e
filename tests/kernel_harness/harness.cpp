// Comparisons, counted, and what is said of those that fail.
#include "harness.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>

namespace fastseq::harness {

int64_t comparisons = 0, failures = 0;

namespace {

// The plan's promise: no chain of additions is longer than a partial sum, and then come the partial sums.
constexpr int64_t kLongestPartialSum = 191, kShortestPartialSum = 64;

bool is_same(float a, float b) {
  return bits(a) == bits(b) || (std::isnan(a) && std::isnan(b) && bits(a) != bits(untouched()) && bits(b) != bits(untouched()));
}

}  // namespace

void fail(const std::string& what) {
  constexpr int kShown = 20;
  if (++failures <= kShown) std::fprintf(stderr, "wrong: %s\n", what.c_str());
  if (failures == kShown) std::fprintf(stderr, "(no more are shown)\n");
}

void expect(bool is_so, const std::string& what) {
  ++comparisons;
  if (!is_so) fail(what);
}

std::string text(const char* format, ...) {
  char buffer[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

bool is_close(float value, double wanted, double error) {
  if (std::isnan(wanted)) return std::isnan(value) && bits(value) != bits(untouched());
  if (std::isinf(wanted)) return value == wanted;
  return std::fabs(value - wanted) <= error;
}

void expect_same(const std::vector<float>& got, const std::vector<float>& wanted, const std::string& what) {
  comparisons += static_cast<int64_t>(wanted.size());
  if (got.size() != wanted.size()) return fail(what + ": another size");
  for (size_t i = 0; i < got.size(); ++i)
    if (!is_same(got[i], wanted[i])) return fail(what + text(": [%zu] is %.9g, not %.9g", i, got[i], wanted[i]));
}

double sum_error(int64_t terms) {
  return kRounding * static_cast<double>(std::min(terms, kLongestPartialSum) + terms / kShortestPartialSum + 2);
}

}  // namespace fastseq::harness
