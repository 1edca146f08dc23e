// The register tiles of gemm_tile.inl.h on pairs of bfloat16 numbers: where a float would stand is a pair, the first in the lower
// half, of the source along the reduction, and of each lane's weights. A lane adds both products, in float32.
// Expects PairProduct, and the tile limits of the KernelSet beside it.

static constexpr Bf16Tiles make_bf16_tiles() { return {kBf16Isa, kBf16Speed, make_tile_table<PairProduct>()}; }
