"""Stacks of linear layers and inputs of any size, on fixed seeds."""

import itertools

import torch
from random_tensors import gaussian
from torch import nn


def net(*sizes: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    for number, layer in enumerate(layers):
        layer.weight.data = gaussian(*layer.weight.shape, seed=number) / layer.in_features**0.5
        layer.bias.data = gaussian(layer.out_features, seed=number + 100)
    parts = [part for layer in layers for part in (layer, nn.ReLU())]
    return nn.Sequential(*parts[:-1]).to(dtype)


def batches(features: int, size: float = 1.0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [size * gaussian(50, features, seed=200 + number).to(dtype) for number in range(9)]
