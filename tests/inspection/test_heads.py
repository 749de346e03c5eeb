"""Which layer is an output head: by its name, as the last of a container, or after layers of other kinds."""

import copy

import pytest
import torch
from models import ResNet
from torch import nn

import lowrank
from lowrank import BudgetError, TargetError
from lowrank.inspection.heads import heads_of, output_layer
from lowrank.inspection.inspection import Inspection


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4))
        self.classifier = nn.Sequential(
            *(nn.Linear(256, 128), nn.ReLU(), nn.Dropout(), nn.Linear(128, 128), nn.ReLU(), nn.Dropout()),
            nn.Linear(128, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


class Classifier(nn.Module):
    """Of texts: an embedding, a recurrent layer, and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.lstm = nn.LSTM(32, 64, 2)
        self.out = nn.Linear(64, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(self.table(ids))[0][-1])


class Tokens(nn.Module):
    """PyTorch's encoder, which reads its weights by value, and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 2)
        self.to_classes = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_classes(self.encoder(x))


class UNet(nn.Module):
    """Linear layers for the time, and convolutions to the end."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64))
        self.down = nn.Conv2d(3, 64, 3)
        self.up = nn.ConvTranspose2d(64, 3, 3)


class ViT(nn.Module):
    """As torchvision's: linear layers behind a convolution, and ``heads.head``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, 32, 4, stride=4)
        self.blocks = nn.Sequential(*(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)))
        self.heads = nn.Sequential()
        self.heads.add_module("pre_logits", nn.Linear(32, 32))
        self.heads.add_module("act", nn.Tanh())
        self.heads.add_module("head", nn.Linear(32, 10))


def targeted(model: nn.Module, **patterns: list[str]) -> list[str]:
    return [layer.name for layer in lowrank.plan(model, rank=2, **patterns).targeted]


@pytest.mark.parametrize(
    ("model", "head", "kind"),
    [
        (ResNet(), "fc", "convolution (Conv2d)"),
        (ResNet("project"), "project", "convolution (Conv2d)"),
        (Classifier(), "out", "recurrent weights (LSTM)"),
        (Tokens(), "to_classes", "linear layers that stay; each has its reason"),
        (nn.Sequential(nn.Conv1d(16, 32, 5), nn.Flatten(), nn.Linear(32, 8)), "2", "convolution (Conv1d)"),
    ],
    ids=["resnet", "any-name", "lstm", "transformer", "sequential"],
)
def test_where_only_the_head_could_change_nothing_does_and_the_error_says_where_the_weights_are(
    model, head, kind
):
    before = copy.deepcopy(model.state_dict())
    message = f"(?s)no layer of {type(model).__name__} would change.*part of a head .{head}."
    with pytest.raises(BudgetError, match=message) as caught:
        lowrank.compress(model, keep=0.5)
    assert "Its parameters are:\n" in str(caught.value)
    assert kind in str(caught.value).partition("Its parameters are:\n")[2].splitlines()[0]
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)


def test_where_only_the_head_could_change_there_is_nothing_to_calibrate():
    with pytest.raises(
        TargetError, match=r"(?s)No layer of ResNet is there to calibrate.*part of a head \(fc\)"
    ):
        lowrank.calibrate(ResNet(), [torch.zeros(1, 3, 16, 16)])


@pytest.mark.parametrize("model", [ResNet(), Classifier(), Tokens()], ids=lambda model: type(model).__name__)
def test_the_last_layer_is_compressed_where_a_target_spells_it(model):
    (head,) = output_layer(Inspection(model))
    assert targeted(model, targets=[head]) == [head]
    lowrank.compress(model, rank=2, targets=["*", head])
    assert isinstance(model.get_submodule(head), lowrank.LowRankLinear)


def test_a_coded_model_keeps_its_last_layer_too():
    model = lowrank.quantize(Classifier())
    assert isinstance(model.table, lowrank.QuantizedEmbedding)
    assert type(model.out) is nn.Linear


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)),
        nn.ModuleDict({f"fc{i}": nn.Linear(32, 32) for i in (1, 2, 3)}),
        nn.Sequential(nn.Embedding(5, 32), nn.Linear(32, 32)),
    ],
    ids=["two", "named", "after-an-embedding"],
)
def test_the_last_of_a_stack_of_linear_layers_is_one_of_them(model):
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert targeted(model) == linear


def test_of_a_base_model_of_transformers_the_last_layer_is_one_of_its_layers(tiny_bert):
    assert "encoder.layer.1.output.dense" in targeted(tiny_bert)


def test_linear_layers_before_the_last_convolution_are_no_heads():
    assert targeted(UNet()) == ["time.0", "time.2"]


def test_only_the_last_layer_of_a_sequential_head_is_one():
    assert targeted(VGG()) == ["classifier.0", "classifier.3"]
    assert lowrank.plan(VGG(), rank=2)["classifier.6"].reason == "part of a head (classifier)"
    assert targeted(ViT()) == ["blocks.0", "blocks.2", "heads.pre_logits"]
    assert targeted(VGG(), targets=["classifier.*"]) == ["classifier.0", "classifier.3", "classifier.6"]
    model = lowrank.compress(VGG().eval(), rank=2)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_heads_beside_each_other_are_all_heads():
    heads = nn.ModuleList([nn.Linear(32, 4), nn.Linear(32, 4)])
    model = nn.ModuleDict({"body": nn.Linear(32, 32), "heads": heads})
    assert targeted(model) == ["body"]
    nested = nn.ModuleDict({"body": nn.Linear(32, 32), "head": nn.ModuleList([VGG().classifier] * 1)})
    assert heads_of(Inspection(nested)) == {"head.0.6": ("head",)}


def test_a_compressed_model_has_the_heads_of_the_dense_one():
    dense = VGG()
    small = lowrank.compress(copy.deepcopy(dense), rank=2)
    assert heads_of(Inspection(small)) == heads_of(Inspection(dense))
    assert output_layer(Inspection(small)) == output_layer(Inspection(dense))
