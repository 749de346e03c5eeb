"""Recovery shared by processes: the same model in all of them, and the one that a single process would make.

The two processes are started once; each writes down what it saw, and the tests read it.
"""

import copy
import itertools
import json
import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from closeness import CANCELLED32, LAYERS32, SUMS32
from torch import nn

import lowrank.distillation.trainer
from lowrank import compress, recover
from lowrank.calibration.data import as_batch
from lowrank.distillation.losses import DistillationLoss
from lowrank.distillation.recovery import trainable
from lowrank.distillation.snapshots import Snapshot
from lowrank.distillation.trainer import mean_distance, schedule, shuffled

STEPS, HELD = 6, 3
OPTIONS = {"steps": STEPS, "learning_rate": 3e-3, "mixed_precision": False, "held_out": HELD}
MINUTE = timedelta(minutes=1)  # a process that waits for the other for ever fails
DATA = [
    {"input_ids": torch.randint(99, (4, 8), generator=torch.Generator().manual_seed(i))} for i in range(13)
]


def state(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def interrupted_in(model: nn.Module, step: int):
    """Raise in one of the training steps of ``model``."""
    counter = itertools.count(1)

    def hook(*_):
        if torch.is_grad_enabled() and next(counter) == step:
            raise KeyboardInterrupt

    return model.register_forward_hook(hook)


def recovered(teacher: nn.Module, small: nn.Module, folder: Path) -> dict:
    """Process 1 begins with other factors, and does not write."""
    if dist.get_rank() == 1:
        with torch.no_grad():
            for parameter in trainable(small):
                parameter.add_(1)
    written, bars = [], []
    save, bar = Snapshot.save, lowrank.distillation.trainer.tqdm
    Snapshot.save = lambda self, *args: (written.append(1), save(self, *args))
    lowrank.distillation.trainer.tqdm = lambda *args, **kwargs: (
        bars.append(kwargs["disable"]),
        bar(*args, **kwargs),
    )[1]
    try:
        recover(small, teacher, DATA, checkpoint_dir=folder / "plain", progress=True, **OPTIONS)
    finally:
        Snapshot.save, lowrank.distillation.trainer.tqdm = save, bar
    return {"state": state(small), "written": len(written), "hidden bar": bars[0]}


def resumed(teacher: nn.Module, small: nn.Module, folder: Path) -> dict:
    handle = interrupted_in(small, 4)
    with pytest.raises(KeyboardInterrupt):
        recover(small, teacher, DATA, checkpoint_dir=folder / "resumed", **OPTIONS)
    handle.remove()
    recover(small, teacher, DATA, checkpoint_dir=folder / "resumed", **OPTIONS)
    return {"state": state(small)}


def wrapped(teacher: nn.Module, small: nn.Module, folder: Path) -> dict:
    outer = nn.parallel.DistributedDataParallel(small, find_unused_parameters=True)
    outer(**DATA[0])  # a forward pass before, after which its hooks wait for a backward pass
    same = recover(outer, nn.parallel.DistributedDataParallel(teacher), DATA, **OPTIONS) is outer
    return {"state": state(small), "returned": same}


def timed(teacher: nn.Module, small: nn.Module, folder: Path) -> dict:
    """Process 1 is slower, and its clock is set an hour ahead."""
    calls = []
    clock = time.monotonic
    handle = teacher.register_forward_hook(
        lambda *_: (calls.append(1), time.sleep(0.02 * dist.get_rank()))[0]
    )
    time.monotonic = (lambda: clock() * 1.5) if dist.get_rank() else clock
    try:
        start = clock()
        recover(small, teacher, DATA, minutes=1 / 60, mixed_precision=False, held_out=2)
        seconds = clock() - start
    finally:
        handle.remove()
        time.monotonic = clock
    return {"state": state(small), "calls": len(calls), "seconds": seconds}


def with_other_data(teacher: nn.Module, small: nn.Module, folder: Path) -> dict:
    try:
        recover(small, teacher, DATA[dist.get_rank() :], **OPTIONS)
    except lowrank.DataError as error:
        return {"error": str(error)}
    return {"error": ""}


def with_a_folder_for_one(teacher: nn.Module, small: nn.Module, folder: Path) -> dict:
    """Process 1 is given no folder: that does for a new run, not for one that goes on."""
    checkpoint_dir = folder / "first only" if dist.get_rank() == 0 else None
    recover(small, teacher, DATA, checkpoint_dir=checkpoint_dir, **OPTIONS)
    done = state(small)
    try:
        recover(small, teacher, DATA, checkpoint_dir=checkpoint_dir, **OPTIONS)
    except lowrank.CheckpointError as error:
        return {"state": done, "error": str(error)}
    return {"state": done, "error": ""}


def of_other_shape(teacher: nn.Module, small: nn.Module, folder: Path) -> dict:
    try:
        recover(compress(copy.deepcopy(teacher), rank=4 + dist.get_rank()), teacher, DATA, **OPTIONS)
    except lowrank.LowRankError as error:
        return {"error": str(error)}
    return {"error": ""}


def sharded(teacher: nn.Module, small: nn.Module, folder: Path) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    try:
        recover(fully_shard(small, mesh=init_device_mesh("cpu", (2,))), teacher, DATA, **OPTIONS)
    except lowrank.LowRankError as error:
        return {"error": str(error)}
    return {"error": ""}


def diverging_in_one(teacher: nn.Module, small: nn.Module, folder: Path) -> dict:
    """In process 1 the loss of one batch is not a number; the other would wait for it for ever."""
    counter = itertools.count(1)

    def ruin(module, args, output):
        if dist.get_rank() == 1 and next(counter) == 5:
            output.last_hidden_state.fill_(float("nan"))

    handle = teacher.register_forward_hook(ruin)
    recover(small, teacher, DATA, **OPTIONS)
    handle.remove()
    return {"state": state(small)}


def block_by_block(teacher: nn.Module, small: nn.Module, folder: Path) -> dict:
    options = {"blockwise": True, "checkpoint_dir": folder / "blocks", **OPTIONS}
    handle = interrupted_in(small.encoder.layer[1], 2)  # when the first block is done
    with pytest.raises(KeyboardInterrupt):
        recover(small, teacher, DATA, **options)
    handle.remove()
    recover(small, teacher, DATA, **options)
    again = torch.load(folder / "models.pt", weights_only=False)[1]
    recover(again, teacher, DATA, blockwise=True, **OPTIONS)
    return {"state": state(small), "at once": state(again)}


def accelerated(teacher: nn.Module, small: nn.Module, folder: Path) -> dict:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(small)
    recover(model, teacher, DATA, **OPTIONS)
    return {"state": state(accelerator.unwrap_model(model)), "wrapper": type(model).__name__}


BEFORE = [
    recovered,
    resumed,
    wrapped,
    timed,
    with_other_data,
    with_a_folder_for_one,
    of_other_shape,
    sharded,
    diverging_in_one,
    block_by_block,
]


def work(rank: int, folder: Path, port: int) -> None:
    """Go through all scenarios in one of the two processes, and write down what came of them."""
    torch.set_num_threads(1)
    found = {}

    def run(scenario) -> None:
        teacher, small = torch.load(folder / "models.pt", weights_only=False)
        found[scenario.__name__] = scenario(teacher, small, folder)

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=MINUTE
    )
    for scenario in BEFORE:
        run(scenario)
    dist.destroy_process_group()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # as torchrun and accelerate do
    run(accelerated)
    dist.destroy_process_group()
    torch.save(found, folder / f"found-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("processes")
    config = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=99
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = BertModel(config).eval()
    torch.save((teacher, compress(copy.deepcopy(teacher), rank=8)), folder / "models.pt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(folder, port), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    """What both processes found, by scenario."""
    both = [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(2)]
    return {name: [found[name] for found in both] for name in both[0]}


@pytest.fixture(scope="module")
def expected(folder):
    """One process that sees the same batches two at a time, in a plain loop: its model and held-out loss."""
    teacher, small = torch.load(folder / "models.pt", weights_only=False)
    every = [as_batch(given, number) for number, given in enumerate(DATA)]
    held = [every[2], every[6], every[10]]  # the middles of three thirds
    order = shuffled([batch for batch in every if batch not in held], seed=0)
    parameters = trainable(small)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    distillation_loss = DistillationLoss(small, teacher)
    with distillation_loss.listening():
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = OPTIONS["learning_rate"] * schedule(step / STEPS)
            (
                (distillation_loss.distance(next(order)) + distillation_loss.distance(next(order))) / 2
            ).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            small.zero_grad()
        return state(small), mean_distance(distillation_loss.distance, held, torch.device("cpu"))


EQUAL = ["recovered", "resumed", "wrapped", "with_a_folder_for_one", "accelerated"]
SHARED = [*EQUAL, "timed", "diverging_in_one", "block_by_block"]


@pytest.mark.parametrize("scenario", SHARED)
def test_both_processes_end_with_the_same_model(seen, scenario):
    first, second = (found["state"] for found in seen[scenario])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("scenario", EQUAL)
def test_two_processes_do_what_one_does_with_two_batches_at_a_time(seen, expected, scenario):
    for mine, its in zip(seen[scenario][0]["state"], expected[0], strict=True):
        torch.testing.assert_close(mine, its, rtol=CANCELLED32, atol=SUMS32)


def test_an_interrupted_run_block_by_block_goes_on_to_the_same_end(seen, folder):
    first = seen["block_by_block"][0]
    assert all(torch.equal(a, b) for a, b in zip(first["state"], first["at once"], strict=True))
    before = state(torch.load(folder / "models.pt", weights_only=False)[1])
    assert any(not torch.equal(a, b) for a, b in zip(first["state"], before, strict=True))


def test_the_held_out_loss_is_that_of_one_process(seen, folder, expected):
    found = json.loads((folder / "plain" / "snapshot.json").read_text())
    assert found["best"] == pytest.approx(expected[1], rel=LAYERS32)
    assert found["steps"] == STEPS


def test_process_0_alone_writes_snapshots_and_shows_a_bar(seen):
    first, second = seen["recovered"]
    assert first["written"] > 0
    assert second["written"] == 0
    assert (first["hidden bar"], second["hidden bar"]) == (None, True)


def test_a_wrapper_is_given_back_as_it_came(seen):
    assert all(found["returned"] for found in seen["wrapped"])
    assert seen["accelerated"][0]["wrapper"] == "DistributedDataParallel"


def test_all_stop_after_the_same_step_by_the_clock_of_process_0(seen):
    first, second = seen["timed"]
    assert first["calls"] == second["calls"] > 4
    assert first["seconds"] < 5


REFUSED = {
    "with_other_data": "Give all of them the same",
    "of_other_shape": "different shapes",
    "with_a_folder_for_one": "find different snapshots",
    "sharded": "is sharded over processes",
}


@pytest.mark.parametrize("scenario", REFUSED)
def test_what_cannot_be_shared_is_refused_in_both(seen, scenario):
    assert all(REFUSED[scenario] in found["error"] for found in seen[scenario])


def test_a_gradient_that_one_process_lacks_counts_as_zero_and_dtypes_do_not_mix(monkeypatch):
    sent = []
    monkeypatch.setattr(lowrank.distillation.distributed, "processes", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda flat: sent.append(flat.dtype))
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    used.grad = torch.full((2, 2), 4.0)
    lowrank.distillation.distributed.average_gradients([used, unused])
    assert torch.equal(used.grad, torch.full((2, 2), 2.0))
    assert torch.equal(unused.grad, torch.zeros(3, dtype=torch.bfloat16))
    assert sent == [torch.bfloat16, torch.float32]
