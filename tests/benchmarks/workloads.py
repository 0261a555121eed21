"""Networks to measure on: small, but each of a kind that people train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


class Transformer(nn.Module):
    """Predicts the next of 64 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.body(self.embed(x), mask=mask, is_causal=True)).transpose(1, 2)


def workloads() -> dict[str, tuple[nn.Module, Any]]:
    """Name, module and one batch of each."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    resnet = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1),
        *(Residual(inputs, outputs, stride) for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    tokens = torch.randint(0, 64, (32, 33))
    return {
        "MLP 784-256-256-10, batch 512": (mlp, (torch.randn(512, 784), torch.randint(0, 10, (512,)))),
        "ResNet of 3 blocks, 32 x 32, batch 64": (resnet, (torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,)))),
        "Transformer of 2 layers, 32 x 32 tokens": (Transformer(), (tokens[:, :-1], tokens[:, 1:])),
    }


def loss(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])
