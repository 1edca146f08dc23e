// The CPU kernels and plans by themselves, without Python and torch, on whatever machine this was compiled for: each kernel of
// each instruction set against double precision, then whole plans. Returns 0, or says what is wrong.
// A kernel that it does not know is an error: a new member of KernelSet does not compile in check_isa, and a new op in
// kernel_rows() is named at run time.
#include <algorithm>
#include <cstdio>
#include <exception>

#include "harness.h"
#include "plan/pack.h"

namespace fastseq::harness {

namespace {

void check_isa(const KernelSet& set) {
  // All members by name: with one more this does not compile before the new one has its check here.
  const auto& [isa, lanes, max_rows, pool_rows, preferred_vectors, preferred_pool_vectors, tile, pool_tile, row_tile, row_panels,
               in_place, in_place_tile, in_place_rows, product_rows, product, winograd_input, winograd_small_input, winograd_output,
               winograd_small_output, plane_row, pool_row, activation, transpose, fingerprint, fingerprint_sample, fma_probe] = set;
  const std::string name = isa;
  Random random(3);

  expect(max_rows[preferred_vectors] > 0 && pool_rows[preferred_pool_vectors] > 0, name + ": preferred tiles exist");
  for (int vectors = 1; vectors <= 40; ++vectors)
    for (int panel : split_vectors(vectors, preferred_vectors, max_rows))
      expect(panel >= 1 && panel <= kMaxVectors && max_rows[panel] > 0, name + ": every panel has a tile");

  check_tiles(set, tile, max_rows, pool_tile, pool_rows, row_tile, row_panels, random);
  check_in_place(set, tile[1][1], in_place, in_place_rows, in_place_tile, max_rows, random);
  check_products(set, product, product_rows, random);
  check_winograd_input(set, winograd_input, false, random);
  check_winograd_input(set, winograd_small_input, true, random);
  check_winograd_outputs(set, winograd_output, winograd_small_output, random);
  check_plane_row(set, plane_row, random);
  check_pool_row(set, pool_row, random);
  check_activations(set, activation, random);
  check_transpose(set, transpose, random);
  check_fingerprint(set, fingerprint, random);
  check_fingerprint_sample(set, fingerprint_sample, random);
  check_fma_probe(set, fma_probe);
  check_kernel_list(set);
  for (const char* forced : {"", "conv2d_winograd", "conv2d_plane", "linear_in_place"}) check_plans(set, forced);
}

// Instruction sets with equally many lanes must agree on what a fingerprint is: an emulated one stands for the real one.
void check_agreement(const std::vector<const KernelSet*>& sets) {
  Random random(5);
  const std::vector<float> src = random.values(1000);
  for (const KernelSet* a : sets)
    for (const KernelSet* b : sets)
      if (a->lanes == b->lanes)
        expect(a->fingerprint(src.data(), 1000) == b->fingerprint(src.data(), 1000),
               std::string(a->isa) + " and " + b->isa + " make different fingerprints");
}

int run_all() {
  std::vector<const KernelSet*> run;
  for (const Isa& isa : isas()) {
    const KernelSet& set = *isa.kernels;
    if (!isa.is_supported) {
      std::printf("%s: not supported here\n", set.isa);
      continue;
    }
    expect(select_isa(set.isa) == &set, std::string(set.isa) + " is chosen when it is named");
    const int64_t before = comparisons;
    check_isa(set);
    std::printf("%s: %lld comparisons\n", set.isa, static_cast<long long>(comparisons - before));
    run.push_back(&set);
  }
  expect(select_isa("") == run.front(), "the best instruction set is chosen");
  expect(!select_isa("no such instruction set"), "no instruction set has that name");
  check_agreement(run);
  if (failures)
    std::fprintf(stderr, "%lld of %lld comparisons failed\n", static_cast<long long>(failures),
                 static_cast<long long>(comparisons));
  return failures ? 1 : 0;
}

}  // namespace

}  // namespace fastseq::harness

int main() {
  try {
    return fastseq::harness::run_all();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "wrong: %s\n", error.what());
    return 1;
  }
}
