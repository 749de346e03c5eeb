"""Ctrl-C waits for the end of a step that must not be left half done."""

import copy
import os
import signal

import pytest
import torch
from bert_outputs import error

import lowrank


@pytest.fixture
def ctrl_c():
    """Have Ctrl-C interrupt, as at a terminal: a shell's background jobs are started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("at", [0, 3, 13, 30])
def test_ctrl_c_waits_for_a_whole_step_and_the_same_plan_finishes(tiny_bert, bert_stats, monkeypatch, at):
    planned = lowrank.plan(tiny_bert, rank=8, stats=bert_stats, quantize="int8", share="inputs")
    dense = copy.deepcopy(tiny_bert)
    whole = lowrank.apply(copy.deepcopy(tiny_bert), planned, stats=bert_stats)
    swaps, original = [], lowrank.surgery.replacement.replace_module

    def interrupted(model, name, new):
        if len(swaps) == at:
            os.kill(os.getpid(), signal.SIGINT)  # before anything of this swap is done
        swaps.append(name)
        original(model, name, new)

    monkeypatch.setattr(lowrank.surgery.replacement, "replace_module", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        lowrank.apply(tiny_bert, planned, stats=bert_stats)
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(swaps) > at  # the step was done
    small = lowrank.apply(tiny_bert, planned, stats=bert_stats)
    if at < 12:  # among the factors; later these may be rotated twice before they are quantized
        for name, tensor in whole.state_dict().items():
            assert torch.equal(small.state_dict()[name], tensor), name
    assert error(small, whole) < 0.1 * error(whole, dense)
