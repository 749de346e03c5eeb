"""Which layers may change, and for each of the others the reason, found in the model itself."""

import pytest
import torch
from blocked_layers import Holder, blocked, targeted
from torch import nn

from lowrank import compress, plan
from lowrank.errors import LowRankError
from lowrank.inspection.inspection import Inspection
from lowrank.inspection.targets import draft


def test_a_plan_lists_every_linear_layer_in_the_model_s_order_with_its_shape(tiny_bert):
    drafted = draft(Inspection(tiny_bert))
    linear = {name: m for name, m in tiny_bert.named_modules() if isinstance(m, nn.Linear)}
    assert [layer.name for layer in drafted] == list(linear)
    assert drafted.model == "BertModel"
    for layer in drafted:
        module = linear[layer.name]
        assert (layer.out_features, layer.in_features) == tuple(module.weight.shape)
        assert layer.bias == (module.bias is not None)
        assert layer.rank is None


def test_every_layer_but_the_head_is_a_target_by_default(tiny_bert):
    drafted = draft(Inspection(tiny_bert))
    assert {layer.name for layer in drafted if not layer.targeted} == {"pooler.dense"}
    assert drafted["pooler.dense"].reason == "part of a head (pooler)"
    assert len(drafted.targeted) == 12


@pytest.mark.parametrize(
    "head", ["classifier", "score", "qa_outputs", "lm_head", "pre_classifier", "vocab_projector", "cls"]
)
def test_a_head_needs_its_name_spelled(head):
    model = Holder(**{head: nn.Linear(32, 32)})
    assert targeted(model) == {"first", "last"}
    assert targeted(model, targets=["*"]) == {"first", "last"}
    assert targeted(model, targets=[head]) == {head}
    assert targeted(model, targets=[f"{head}*", "first"]) == {head, "first"}
    assert draft(Inspection(model))[head].reason == f"part of a head ({head})"


def test_a_head_inside_a_head_is_spelled_by_either_name():
    model = Holder(cls=nn.ModuleDict({"predictions": nn.ModuleDict({"dense": nn.Linear(32, 32)})}))
    assert targeted(model, targets=["cls.*"]) == {"cls.predictions.dense"}
    assert targeted(model, targets=["*predictions*"]) == {"cls.predictions.dense"}


def test_a_name_that_only_contains_a_head_s_name_is_no_head():
    assert targeted(Holder(headroom=nn.Linear(32, 32))) == {"first", "headroom", "last"}


def test_ignore_wins_over_targets(tiny_bert):
    names = targeted(tiny_bert, targets=["*.query", "*.key"], ignore=["encoder.layer.0.*"])
    assert names == {"encoder.layer.1.attention.self.query", "encoder.layer.1.attention.self.key"}
    drafted = draft(Inspection(tiny_bert), ["*.query"], ["encoder.layer.0.*"])
    assert drafted["encoder.layer.0.attention.self.query"].reason == "ignored"
    assert drafted["encoder.layer.1.output.dense"].reason == "not among the targets"


def test_no_targets_at_all_do_not_mean_all(mlp):
    with pytest.raises(LowRankError, match=r"targets=\[\] names no layer"):
        plan(mlp, rank=8, targets=[])


def test_a_factorized_layer_is_listed_with_its_rank_and_not_a_target(mlp):
    compress(mlp, rank=8, targets=["0"])
    drafted = draft(Inspection(mlp))
    assert [layer.name for layer in drafted] == ["0", "2"]  # not the linear layers inside
    assert drafted["0"].rank == 8
    assert "factorized already, at rank 8; decompress(model) undoes that" in blocked(mlp, "0")
    assert targeted(mlp) == {"2"}


def test_drafting_reads_names_only_and_works_on_the_meta_device():
    with torch.device("meta"):
        model = Holder()
    assert targeted(model) == {"first", "last"}
