"""Hidden states of the dense and of the compressed model, cached block by block."""

import copy

import torch
from closeness import LAYERS32, SUMS32
from residual_models import bert, hidden, ids, llama

from lowrank import calibrate, compress
from lowrank.nn import LowRankLinear


def test_padding_has_no_say():
    dense = bert()
    batches = [dict(batch, attention_mask=torch.ones(4, 16, dtype=torch.long)) for batch in ids()]
    for batch in batches:
        batch["attention_mask"][:, 10:] = 0
    other = [dict(batch, input_ids=batch["input_ids"].clone()) for batch in batches]
    for batch in other:
        batch["input_ids"][:, 10:] = 7
    stats = calibrate(dense, batches)
    first, second = (
        compress(copy.deepcopy(dense), keep=0.5, data=data, stats=stats, sequential=True)
        for data in (batches, other)
    )
    torch.testing.assert_close(hidden(first), hidden(second), rtol=LAYERS32, atol=SUMS32)


def test_hidden_states_on_a_disk_give_the_same_model_and_leave_nothing(tmp_path):
    dense, data = bert(), ids()
    here = compress(copy.deepcopy(dense), keep=0.5, data=data, sequential=True)
    there = compress(copy.deepcopy(dense), keep=0.5, data=data, sequential=True, offload_folder=tmp_path)
    assert torch.equal(hidden(here), hidden(there))
    assert not list(tmp_path.iterdir())


def test_half_precision_keeps_its_dtype():
    small = compress(llama().bfloat16(), keep=0.5, data=ids(), sequential=True)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert hidden(small).isfinite().all()


def test_modes_hooks_and_random_state_stay_as_they_were():
    model = bert().train()
    model.encoder.layer[1].eval()
    state = torch.get_rng_state()
    compress(model, keep=0.5, data=ids(), sequential=True)
    assert torch.equal(torch.get_rng_state(), state)
    layers = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    assert layers and all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    for name, module in model.named_modules():
        assert module.training == (not name.startswith("encoder.layer.1")), name
    assert all(p.requires_grad for p in model.parameters())


def test_a_cache_of_keys_and_values_is_not_carried_along():
    torch.testing.assert_close(
        hidden(compress(llama(use_cache=True), keep=0.5, data=ids(), sequential=True)),
        hidden(compress(llama(use_cache=False), keep=0.5, data=ids(), sequential=True)),
    )
