"""The flags that csrc/ is compiled with for the CPU. setup.py adds torch's; tests compile kernels and plans without."""

# One binary for every CPU of an architecture: no -march here, the per-ISA files open their own target regions.
CXX_FLAGS = ["-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
CXX_FLAGS += ["-Wall", "-Wextra", "-Wno-psabi"]
RELEASE_FLAGS = ["-O3", "-g0", "-DNDEBUG"]
DEBUG_FLAGS = ["-O1", "-g", "-UNDEBUG"]
