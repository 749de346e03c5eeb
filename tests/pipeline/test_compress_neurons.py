"""Feed-forward blocks that lose neurons, and whose narrower layers are then stored as integers."""

import copy

import pytest
import torch
from residual_models import bert, gpt2, hidden, ids, llama

import lowrank
from lowrank import BudgetError, StatsError, calibrate, compress, quantize
from lowrank.nn import QuantizedLinear, features_before

FORMS = (["neurons"], ["factors", "neurons"])


@pytest.fixture(scope="module", params=[bert, llama, gpt2])
def case(request):
    dense, data = request.param(), ids(16)
    return dense, data, calibrate(dense, data)


def compressed(case, forms, budget=0.5, **options):
    dense, data, stats = case
    return compress(copy.deepcopy(dense), keep=budget, stats=stats, forms=forms, inputs=data[0], **options)


def narrower(model):
    return {name: module for name, module in model.named_modules() if features_before(module)}


@pytest.mark.parametrize("forms", FORMS, ids=str)
def test_narrower_layers_are_quantized_in_the_same_call(case, forms, tmp_path):
    dense = case[0]
    small, whole = compressed(case, forms, quantize="int8"), compressed(case, forms)
    layers = narrower(small)
    assert layers and all(isinstance(layer, QuantizedLinear) for layer in layers.values())
    lost = (hidden(whole) - hidden(dense)).norm()
    assert (hidden(small) - hidden(whole)).norm() < 0.5 * hidden(dense).norm()
    assert (hidden(small) - hidden(dense)).norm() < 2 * lost + 0.1 * hidden(dense).norm()
    assert lowrank.report(small).checkpoint_bytes < 0.6 * lowrank.report(whole).checkpoint_bytes
    small.save_pretrained(tmp_path)
    loaded = type(dense).from_pretrained(tmp_path)
    assert narrower(loaded).keys() == layers.keys()
    assert torch.equal(hidden(loaded), hidden(small))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_narrower_layers_are_quantized_in_a_second_call_and_dense_again(case, scheme):
    small = compressed(case, ["neurons"], budget=0.85, round_to=32)
    before, widths = copy.deepcopy(small), narrower(small)
    quantize(small, scheme, stats=calibrate(small, case[1]), on_missing_kernel="allow")
    assert widths and all(
        features_before(small.get_submodule(n)) == features_before(x) for n, x in widths.items()
    )
    lowrank.decompress(small)
    assert narrower(small).keys() == widths.keys()
    for name, layer in narrower(small).items():
        old = before.get_submodule(name)
        assert type(layer) is type(old) and layer.weight.shape == old.weight.shape
        error = (layer.weight - old.weight).norm() / old.weight.norm()
        assert (
            error < {"int8": 0.02, "int4": 0.2}[scheme]
        )  # of codes with 8 and 4 bits, scaled by the largest


def test_statistics_of_the_dense_model_are_refused_for_narrower_layers(case):
    small = compressed(case, FORMS[1])
    state = copy.deepcopy(small.state_dict())
    with pytest.raises(StatsError, match="Calibrate this model, as it is now"):
        quantize(small, "int8", stats=case[2])
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())


def test_integers_follow_one_block_after_the_other(case):
    dense, data, stats = case
    options = {"data": data, "stats": stats, "sequential": True, "forms": FORMS[1], "keep": 0.5}
    small = compress(copy.deepcopy(dense), quantize="int8", **options)
    fitted = compress(copy.deepcopy(dense), **options)
    error = (hidden(small) - hidden(fitted)).norm() / hidden(fitted).norm()
    assert error < 0.2  # of toy models, whose int8 errors are large; see the test above


def test_quantized_models_that_have_lost_neurons_are_trained():
    dense, data = bert(), ids(16)
    small = compressed((dense, data, calibrate(dense, data)), ["neurons"], quantize="int8")
    before = (hidden(small, data) - hidden(dense, data)).norm()
    lowrank.recover(small, dense, data, steps=20, learning_rate=1e-3)
    assert (hidden(small, data) - hidden(dense, data)).norm() < before


def test_budgets_that_do_not_price_both_are_refused(case):
    with pytest.raises(BudgetError, match="does not go with max_bytes=, with quantize=: it is for keep="):
        lowrank.CompressionConfig(max_bytes=10**6, forms=FORMS[1], quantize="int8")
