// The tile limits of the baseline, 4 floats in a register, so that the inner loops of the tiles leave the stack alone (gcc 12,
// objdump). NEON has 32 registers and multiplies by an element of one: 8x3 and 12x2 vectors leave room for the weights and the
// broadcasts, 6x4 does not. SSE2 has 16, of which one holds a product on its way to the sum: 3x4 is 12 % faster than 6x2 on Zen 4,
// and 3x3 35 % faster than 4x3, which spills.
constexpr int kLanes = 4;
#if defined(__aarch64__)
constexpr bool kHasManyRegisters = true;
constexpr int kPreferredVectors = 3, kPreferredPoolVectors = 3;
constexpr int kRows1 = 12, kRows2 = 12, kRows3 = 8, kRows4 = 5;
constexpr int kWindows1 = 3, kWindows2 = 3, kWindows3 = 2, kWindows4 = 1;
constexpr int kRowPanels1 = 4, kRowPanels2 = 3, kRowPanels3 = 2;
constexpr int kInPlaceRows = 4;
constexpr int kProductRows1 = 12, kProductRows2 = 10, kProductRows3 = 7, kProductRows4 = 5;
constexpr int kPlaneOuts = 6;
#else
constexpr bool kHasManyRegisters = false;
constexpr int kPreferredVectors = 4, kPreferredPoolVectors = 2;
constexpr int kRows1 = 7, kRows2 = 6, kRows3 = 3, kRows4 = 3;
constexpr int kWindows1 = 1, kWindows2 = 1, kWindows3 = 0, kWindows4 = 0;
constexpr int kRowPanels1 = 2, kRowPanels2 = 1, kRowPanels3 = 1;
constexpr int kInPlaceRows = 4;
constexpr int kProductRows1 = 12, kProductRows2 = 6, kProductRows3 = 3, kProductRows4 = 3;
constexpr int kPlaneOuts = 2;
#endif
