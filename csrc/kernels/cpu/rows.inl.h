// What steps of rows share that reduce each row to a number: vectors of a row with its end, and sums.

// -1 in the first `count` lanes.
static FASTSEQ_INLINE VecI first_lanes(int64_t count) {
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(count);
}

// A vector of a row of which `left` lanes are left; `behind` in those that are not.
static FASTSEQ_INLINE Vec load_row(const float* p, int64_t left, bool can_overread, Vec behind) {
  if (left >= kLanes) return load(p);
  return select(first_lanes(left), load_channels(p, static_cast<int>(left), can_overread), behind);
}

static FASTSEQ_INLINE void store_row(float* p, Vec v, int64_t left) {
  if (left >= kLanes) {
    store(p, v);
  } else {
    store_lanes(p, v, static_cast<int>(left));
  }
}

// All lanes joined by a function of two vectors, in each lane.
template <int kStep = kLanes / 2, typename Function>
static FASTSEQ_INLINE Vec across(Vec v, const Function& function) {
  VecI partner;
  for (int i = 0; i < kLanes; ++i) partner[i] = i ^ kStep;
  v = function(v, __builtin_shuffle(v, partner));
  if constexpr (kStep > 1) return across<kStep / 2>(v, function);
  return v;
}

static FASTSEQ_INLINE Vec sum_across(Vec v) {
  return across(v, [](Vec a, Vec b) { return a + b; });
}

// So many vectors are added side by side, so that one addition does not wait for the other, and so many make a partial sum.
constexpr int kRowVectors = 4, kRowPart = 64;

// Sums over a row: add(lane, left, sums) adds what the vector at that lane has. In an order that depends on the row's length only.
template <int kSums, typename Function>
static FASTSEQ_INLINE void sum_row(int64_t lanes, Vec (&total)[kSums], const Function& add) {
  for (Vec& sum : total) sum = Vec{};
  for (int64_t lane = 0; lane < lanes;) {
    Vec part[kRowVectors][kSums] = {};
    const int64_t end = lanes - lane < kRowPart * kLanes ? lanes : lane + kRowPart * kLanes;
    for (; end - lane >= kRowVectors * kLanes; lane += kRowVectors * kLanes)
#pragma GCC unroll 4
      for (int v = 0; v < kRowVectors; ++v) add(lane + v * kLanes, kLanes, part[v]);
    for (; lane < end; lane += kLanes) add(lane, lanes - lane, part[0]);
    for (int s = 0; s < kSums; ++s) total[s] += (part[0][s] + part[1][s]) + (part[2][s] + part[3][s]);
  }
  for (Vec& sum : total) sum = sum_across(sum);
}
