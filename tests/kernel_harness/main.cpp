// The CPU kernels and plans by themselves, without Python and torch, on whatever machine this was compiled for: each kernel of
// each instruction set against double precision, then whole plans. Returns 0, or says what is wrong.
// A kernel that it does not know is an error: a new member of KernelSet does not compile in check_isa, and a new op in
// kernel_rows() is named at run time.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "harness.h"
#include "plan/pack.h"

namespace fastseq::harness {

namespace {

void check_isa(const KernelSet& set) {
  // All members by name: with one more this does not compile before the new one has its check here.
  const auto& [isa, lanes, tiles, in_place, in_place_tile, in_place_rows, product_rows, product, winograd_input,
               winograd_small_input, winograd_output, winograd_small_output, plane_row, depthwise_rows, depthwise_pixels, pool_row,
               average_row, blend_row, scale_rows, centered_rows, channel_moments, layer_norm_rows, softmax_rows, activation, widen,
               narrow, round, transpose, fingerprint, fingerprint_sample, fma_probe] = set;
  const std::string name = isa;
  Random random(3);

  check_tiles(set, tiles, random);
  check_in_place(set, tiles.tile[1][1], in_place, in_place_rows, in_place_tile, tiles.max_rows, random);
  check_products(set, product, product_rows, random);
  check_winograd_input(set, winograd_input, false, random);
  check_winograd_input(set, winograd_small_input, true, random);
  check_winograd_outputs(set, winograd_output, winograd_small_output, random);
  check_plane_row(set, plane_row, random);
  expect(depthwise_pixels > 0, name + ": depthwise kernels take pixels");
  check_depthwise_rows(set, depthwise_rows, random);
  check_pool_row(set, pool_row, average_row, random);
  check_blend_row(set, blend_row, random);
  check_scale_rows(set, scale_rows, random);
  check_centered_rows(set, centered_rows, random);
  check_channel_moments(set, channel_moments, random);
  check_layer_norm_rows(set, layer_norm_rows, random);
  check_softmax_rows(set, softmax_rows, random);
  check_activations(set, activation, random);
  check_conversions(set, widen, narrow, round, random);
  check_transpose(set, transpose, random);
  check_fingerprint(set, fingerprint, random);
  check_fingerprint_sample(set, fingerprint_sample, random);
  check_fma_probe(set, fma_probe);
  check_kernel_list(set);
  for (const char* forced : {"", "conv2d_winograd", "conv2d_plane", "linear_in_place", "conv2d_grouped"}) check_plans(set, forced);
  for (const char* forced : {"", "conv2d_winograd"}) check_plans(set, forced, Storage::kBf16);
  for (const char* forced : {"conv2d_plane", "linear_in_place"}) check_plans(set, forced, Storage::kF16);
}

void check_bf16(const KernelSet& set, const Bf16Tiles& bf16) {
  Random random(17);
  expect(select_isa(bf16.isa) == &set && select_bf16(bf16.isa) == &bf16, std::string(bf16.isa) + " is chosen when it is named");
  check_bf16_tiles(set, bf16, random);
  check_kernel_list(set, &bf16);
  for (const Storage storage : {Storage::kF32, Storage::kBf16}) check_plans(set, "", storage, &bf16);
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

// names: of the instruction sets to run, all that this CPU has if there are none.
int run_all(const std::vector<std::string>& names) {
  std::vector<const KernelSet*> run;
  for (const Isa& isa : isas()) {
    const KernelSet& set = *isa.kernels;
    if (!isa.is_supported) {
      std::printf("%s: not supported here\n", set.isa);
      continue;
    }
    expect(select_isa(set.isa) == &set, std::string(set.isa) + " is chosen when it is named");
    if (!names.empty() && std::find(names.begin(), names.end(), set.isa) == names.end()) continue;
    const int64_t before = comparisons;
    check_isa(set);
    for (const Isa::Bf16& bf16 : isa.bf16)
      if (bf16.is_supported) check_bf16(set, *bf16.tiles);
    std::printf("%s: %lld comparisons\n", set.isa, static_cast<long long>(comparisons - before));
    run.push_back(&set);
  }
  expect(!run.empty() && (!names.empty() || select_isa("") == run.front()), "the best instruction set is chosen");
  expect(!select_isa("no such instruction set"), "no instruction set has that name");
  check_agreement(run);
  if (failures)
    std::fprintf(stderr, "%lld of %lld comparisons failed\n", static_cast<long long>(failures),
                 static_cast<long long>(comparisons));
  return failures ? 1 : 0;
}

}  // namespace

}  // namespace fastseq::harness

int main(int count, char** arguments) {
  try {
    return fastseq::harness::run_all({arguments + 1, arguments + count});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "wrong: %s\n", error.what());
    return 1;
  }
}
