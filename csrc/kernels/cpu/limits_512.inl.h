// The tile limits of 32 registers of 16 floats, shared by AVX-512 and its emulation.
constexpr int kLanes = 16;
constexpr bool kHasManyRegisters = true;
constexpr int kPreferredVectors = 4, kPreferredPoolVectors = 2;
constexpr int kRows1 = 12, kRows2 = 12, kRows3 = 9, kRows4 = 7;
constexpr int kWindows1 = 2, kWindows2 = 2, kWindows3 = 2, kWindows4 = 1;
constexpr int kRowPanels1 = 4, kRowPanels2 = 2, kRowPanels3 = 2;
constexpr int kInPlaceRows = 8;
constexpr int kProductRows1 = 14, kProductRows2 = 14, kProductRows3 = 9, kProductRows4 = 7;
constexpr int kPlaneOuts = 6;
