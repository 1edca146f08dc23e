"""Ten lines of use: optimise a model, check the answer, see what runs fused."""

import torch
from torch import nn

import fastseq

features = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
head = nn.Sequential(nn.Linear(16 * 16 * 16, 64), nn.ReLU(), nn.Linear(64, 10), nn.Softmax(dim=1))
model = nn.Sequential(features, head).eval()
x = torch.randn(8, 3, 32, 32)

fast = fastseq.optimize(model)  # an independent copy; `model` stays as it was
with torch.no_grad():
    torch.testing.assert_close(fast(x), model(x))

print(fastseq.explain(fast, x))
print(fastseq.stats(fast))
