"""A pytest plugin for suites written for the CPU engine: the CUDA engine in IEEE float32, as `-p emulation.ieee`."""

import torch

torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False
