"""How far a model is from its teacher."""

import copy

import pytest
import torch
from torch import nn

from lowrank import DataError, compress, recover
from lowrank.calibration.data import as_batch
from lowrank.distillation.losses import DistillationLoss
from lowrank.distillation.recovery import trainable


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda x: x[:, :0], r"Batch \d+: output of shape \(32, 0\) has no elements to match"),
        (lambda x: None, "The teacher returns NoneType, in which there is no tensor to match"),
        (lambda x: x.long(), "The teacher returns Tensor, in which there is no tensor to match"),
        (lambda x: x.detach(), r"Batch \d+: no gradient of the distance to the teacher"),
    ],
    ids=["empty", "none", "integers", "detached"],
)
def test_outputs_that_cannot_be_matched_are_refused(mlp, data, outputs, message):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = copy.deepcopy(mlp)

        def forward(self, x):
            return outputs(self.layers(x))

    dense = Model()
    small = compress(copy.deepcopy(dense), rank=8)
    with pytest.raises(DataError, match=message):
        recover(small, dense, data, steps=1)


def test_a_lesson_works_under_distributed_data_parallel(tiny_bert, tmp_path):
    import torch.distributed as dist

    small = compress(copy.deepcopy(tiny_bert), rank=8)
    for parameter in small.parameters():
        parameter.requires_grad_(False)
    for parameter in trainable(small):
        parameter.requires_grad_(True)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(small)
        distillation_loss = DistillationLoss(small, tiny_bert)
        with distillation_loss.listening():
            _, loss = distillation_loss.outputs_and_distance(
                as_batch({"input_ids": torch.arange(8)[None]}), wrapped
            )
        loss.backward()
    finally:
        dist.destroy_process_group()
    assert small.encoder.layer[0].output.dense.up.weight.grad.norm() > 0
