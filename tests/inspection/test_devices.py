"""Where a model is, and in which dtype it computes."""

import torch
from torch import nn

from lowrank import quantize
from lowrank.inspection.devices import device_of, dtype_of


def test_the_first_parameter_tells():
    model = nn.Sequential(nn.Linear(4, 4, device="meta", dtype=torch.bfloat16), nn.Linear(4, 4))
    assert device_of(model) == torch.device("meta")
    assert dtype_of(model) == torch.bfloat16


def test_a_buffer_tells_where_a_model_without_parameters_is():
    assert device_of(nn.BatchNorm1d(4, affine=False, device="meta")) == torch.device("meta")


def test_a_model_without_any_tensor_is_on_the_cpu_in_the_default_dtype():
    assert device_of(nn.ReLU()) == torch.device("cpu")
    assert dtype_of(nn.ReLU()) == torch.get_default_dtype()


def test_a_quantized_layer_computes_in_the_dtype_that_it_was_brought_to():
    model = quantize(nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)))
    assert not list(model.parameters())
    assert dtype_of(model.to(torch.bfloat16)) == torch.bfloat16  # though its scales stay float32
