"""Gradients and Hessians of small networks, dense and in double precision: what estimates are compared with."""

from __future__ import annotations

import copy

import torch
from torch.nn.utils import parameters_to_vector


def dense_loss(module, batch):
    """Loss of a batch as a function of a flat float64 vector of weights, and that vector."""
    module = copy.deepcopy(module).double()
    batch = tuple(part.double() if part.is_floating_point() else part for part in batch)
    names = [name for name, _ in module.named_parameters()]
    shapes = [p.shape for p in module.parameters()]

    def loss(vector):
        parts = torch.split(vector, [shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(_Loss(module), {f"module.{k}": v for k, v in values.items()}, (batch,))

    return loss, parameters_to_vector(module.parameters()).detach()


class _Loss(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return self.module.loss(batch)


def dense(module, batch):
    """Loss, gradient and Hessian of ``module.loss(batch)`` at the module's weights."""
    loss, weights = dense_loss(module, batch)
    weights.requires_grad_(True)
    value = loss(weights)
    (gradient,) = torch.autograd.grad(value, weights)
    return float(value.detach()), gradient, torch.autograd.functional.hessian(loss, weights.detach())


def with_weights(module, weights):
    """A copy of a module with other weights, by name."""
    module = copy.deepcopy(module)
    module.load_state_dict(weights)
    return module


def flat(weights):
    """Weights by name as one float64 vector."""
    return torch.cat([value.double().reshape(-1) for value in weights.values()])
