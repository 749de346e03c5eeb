"""What a plan says of the rest of the model: how much it can change, and what stays, with reasons."""

import json
import warnings

import pytest
import torch
import transformers
from models import ResNet
from torch import nn
from unplanned_models import mixtral

import lowrank
from lowrank import Plan, ReachWarning


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(32, 32)
        self.lstm = nn.LSTM(32, 64)
        self.attention = nn.MultiheadAttention(64, 4)
        self.scale = nn.Parameter(torch.ones(64, 8))
        self.bag = nn.EmbeddingBag(50, 64)
        self.after = nn.Linear(64, 64)
        self.out = nn.Linear(64, 64)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4)
    )


MODELS = {"mixtral": mixtral, "tagger": Tagger, "gpt2": gpt2, "resnet": ResNet}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_parameter_is_in_a_layer_of_the_plan_or_listed_beside_it(make):
    model = make()
    plan = lowrank.plan(model, rank=4, targets=["*", "fc"] if make is ResNet else None)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert plan.model_parameters == total
    modules = dict(model.named_modules())
    embeddings = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    in_layers = sum(x.dense_parameters for x in plan if id(modules[x.name].weight) not in embeddings)
    assert in_layers + sum(weight.parameters for weight in plan.unplanned) == total
    planned = {f"{layer.name}.weight" for layer in plan}
    named = {weight.name: weight for weight in plan.unplanned}
    for name, parameter in model.named_parameters():
        if name not in planned and parameter.numel() > total / 100:
            assert (named[name].shape, named[name].parameters) == (tuple(parameter.shape), parameter.numel())
            assert named[name].reason and named[name].tensors == 1
            assert name in str(plan)


def test_the_reasons_name_the_kind_of_each_weight():
    def reasons(model: nn.Module, **patterns: list[str]) -> dict[str, str]:
        return {weight.name: weight.reason for weight in lowrank.plan(model, rank=4, **patterns).unplanned}

    found = reasons(Tagger())
    assert found["lstm.weight_ih_l0"] == found["lstm.weight_hh_l0"] == "recurrent weights (LSTM)"
    assert found["attention.in_proj_weight"] == (
        "in_proj_weight of MultiheadAttention, which is in no layer of its own"
    )
    assert found["bag.weight"] == "embedding (EmbeddingBag)"
    assert found["scale"] == "matrix of Tagger, which is no linear layer"
    assert "biases, norms and other vectors" in found.values()
    assert reasons(mixtral())["model.layers.0.mlp.experts.down_proj"] == (
        "weight in 3 dimensions (MixtralExperts), experts"
    )
    assert reasons(gpt2())["transformer.wte.weight"] == "embedding that no target spells"
    assert reasons(ResNet(), targets=["fc"])["layer1.0.conv1.weight"] == "convolution (Conv2d)"
    bound = nn.Sequential(nn.Embedding(50, 32, max_norm=1.0), nn.Linear(32, 32))
    assert reasons(bound)["0.weight"] == "embedding that has a max_norm, so that reading changes it"


def test_small_tensors_with_one_reason_are_one_entry():
    plan = lowrank.plan(mixtral(), rank=4)
    (vectors,) = (x for x in plan.unplanned if x.reason.startswith("biases"))
    assert (vectors.tensors, vectors.parameters, vectors.shape) == (5, 5 * 64, (64,))


def test_a_plan_and_a_report_begin_with_the_share_that_can_change(tmp_path, capsys):
    model = mixtral()
    plan = lowrank.plan(model, rank=8)
    total = sum(parameter.numel() for parameter in model.parameters())
    attention = 2 * 4 * 64 * 64
    assert (plan.reachable_parameters, plan.reachable_fraction) == (attention, attention / total)
    first, second = str(plan).splitlines()[:2]
    share = f"{attention / total:.1%} of {total:,} parameters"
    assert first == f"MixtralForCausalLM: {share} are in layers that can change."
    experts = 2 * 8 * 3 * 64 * 128
    assert second == (f"  {experts / total:6.1%}  weight in 3 dimensions (MixtralExperts), experts")
    with pytest.warns(ReachWarning, match=share):
        lowrank.compress(model, rank=8)
    report = lowrank.report(model)
    assert str(report).splitlines()[:2] == [first, second]
    assert (report.reachable_parameters, report.unplanned) == (attention, plan.unplanned)
    data = json.loads(report.to_json())
    assert data["unplanned"][0]["name"] == plan.unplanned[0].name
    assert data["reachable_fraction"] == report.reachable_fraction == attention / total


def test_what_is_coded_can_be_reached_too():
    model = gpt2()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = lowrank.plan(model, rank=8, quantize="int8")
    assert plan.reachable_parameters == sum(x.dense_parameters for x in plan.targeted) + sum(
        table.weight.numel() for table in model.modules() if isinstance(table, nn.Embedding)
    )
    assert all("embedding" not in weight.reason for weight in plan.unplanned)
    lowrank.apply(model, plan)
    assert lowrank.report(model).reachable_parameters == plan.reachable_parameters
    assert lowrank.report(model).parameters_before == plan.model_parameters


def test_little_reach_is_a_warning_that_says_what_the_rest_is():
    told = r"^MixtralForCausalLM: only 7\.4% of 440,000 parameters are in layers that can change\. "
    with pytest.warns(ReachWarning, match=told) as caught:
        lowrank.compress(mixtral(), rank=8)
    text = str(caught[0].message)
    assert "The largest part of the rest: 89.4%  weight in 3 dimensions (MixtralExperts)" in text
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("model", "options"),
    [(mixtral(), {"targets": ["*"]}), (mixtral(), {"ignore": ["*.q_proj"]}), (gpt2(), {})],
    ids=["targets", "ignore", "enough"],
)
def test_there_is_no_warning_where_enough_can_change_or_the_user_has_chosen(model, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowrank.compress(model, rank=8, **options)


def test_a_warning_made_an_error_leaves_the_model_as_it_was():
    model = mixtral()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ReachWarning, match="in layers that can change"):
            lowrank.compress(model, rank=8)
    assert not any(isinstance(module, lowrank.LowRankLinear) for module in model.modules())


def test_a_compressed_checkpoint_keeps_it(tmp_path):
    model = lowrank.compress(mixtral(), rank=8, targets=["*"])
    model.save_pretrained(tmp_path)
    loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path)
    recorded = Plan.from_dict(loaded.config.quantization_config.plan)
    assert recorded.model_parameters == 440_000
    assert recorded.unplanned[0].reason
