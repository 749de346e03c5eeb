"""Recover: distil what compression has lost from the dense model back into the factors.

The compressed model is trained to match its teacher's outputs and hidden states. Only factors, biases
and norms are trained, factors of embeddings among them, and the codes of linear layers straight through their
rounding; what else there is of embeddings and heads stays. Held-out batches decide which state is kept, so
the model that comes back is never worse on them than the one that was given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowrank.adapter import adapter
from lowrank.arguments import MODEL_OF, accepts, flag, function, instance, optional, path
from lowrank.calibration.data import Batch, batches
from lowrank.config import RecoveryConfig, configured, documented
from lowrank.distillation.blockwise import BlockwiseTrainer
from lowrank.distillation.distributed import (
    check_alike,
    check_whole,
    copy_from_first,
    process_number,
    processes,
    unwrapped,
)
from lowrank.distillation.losses import DistillationLoss
from lowrank.distillation.trainer import Trainer, TrainingBudget, TrainingConfig, check_finite_distance
from lowrank.errors import CheckpointError, DataError, LowRankError
from lowrank.files.folders import check_folder
from lowrank.inspection.blocks import find_blocks
from lowrank.inspection.contexts import check_has_data, eval_mode, training_only
from lowrank.inspection.devices import device_of
from lowrank.inspection.layers import check_model
from lowrank.nn import LowRankEmbedding, LowRankLinear, QuantizedLinear

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lowrank.config import RecoveryOptions

COMPRESSED = LowRankLinear, LowRankEmbedding, QuantizedLinear
"""Layers whose parameters are trained, whatever these are."""

EVALUATIONS = 8
"""How often the held-out batches are looked at, beside the first time."""


@documented(RecoveryConfig, "recover")
@accepts(
    teacher=instance(nn.Module, MODEL_OF),
    tokenizer=optional(function),
    checkpoint_dir=optional(path(CheckpointError)),
    progress=flag,
)
def recover(
    model: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    tokenizer: Callable[..., Any] | None = None,
    config: RecoveryConfig | None = None,
    *,
    checkpoint_dir: str | Path | None = None,
    progress: bool = False,
    **options: Unpack[RecoveryOptions],
) -> nn.Module:
    """Train the factors of ``model``, in place, until it does what ``teacher`` does.

    Under `torch.distributed` (``torchrun``, ``accelerate launch``) call it in every process, with the same
    data. Every step then takes a batch per process and averages the gradients; all end with one model.

    Args:
        model: A compressed model. Its factors, biases and norms are trained, in their dtype. One inside of
            `torch.nn.parallel.DistributedDataParallel` is trained without the wrapper's help.
        teacher: The dense model that it was made from, on any device; it is not changed.
        data: As for `lowrank.calibrate`. The batches are kept in memory and visited in random order.
        tokenizer: A tokenizer of transformers, for strings.
        config: The options below as an object, in place of keywords.
        checkpoint_dir: A folder that keeps where the run stands, written whenever the held-out batches are
            looked at, and on an interrupt; block by block, after each block only. The same call made again
            goes on from there. One process writes, all read.
        progress: Show a progress bar with the loss on a terminal.
        **options: listed here.

    Returns:
        The same model in its best state on the held-out batches, perhaps the one that it came in.

    Raises:
        DataError: If there are fewer than two batches, teacher and model return different things, their
            distance is not finite on a batch, or processes have different data.
        CheckpointError: If the snapshot is damaged or of another model, or cannot be written.
        LowRankError: If nothing in the model is factorized or quantized, it is sharded over processes, or not
            exactly one duration is given. With ``blockwise``, if there are no blocks, or fewer steps than
            blocks.

    Source: Hinton et al. 2015 (arXiv:1503.02531); the optimizer: Loshchilov & Hutter 2019 (AdamW).
    """
    _check(model, teacher)
    config = configured(RecoveryConfig, "recover", config, options)
    folder = Path(checkpoint_dir) if checkpoint_dir is not None else None
    if folder is not None and process_number() == 0:
        check_folder(folder, overwrite=True)
    student, teacher = unwrapped(model), unwrapped(teacher)
    adapter().check_tokenizer(teacher, tokenizer)
    device = device_of(student)
    stream = batches(
        *(data, tokenizer),
        device=device,
        batch_size=config.batch_size,
        max_length=config.max_length,
        by_length=True,
    )
    every = list(stream)
    train, held = _split(every, config.held_out)
    _make_alike(student, every, device)
    mixed = _multiplies_bfloat16(device) if config.mixed_precision is None else config.mixed_precision
    distillation_loss = DistillationLoss(
        student, teacher, config.hidden_weight, torch.autocast(device.type, torch.bfloat16, mixed)
    )
    training = TrainingConfig(train, held, config.learning_rate, EVALUATIONS, config.seed, progress)
    budget = TrainingBudget(config.minutes, config.steps)
    with _quantization_aware(student, config.qat):
        if config.blockwise:
            blocks = _trainable_blocks(student, teacher)
            with training_only(student), eval_mode(teacher):
                _finish(BlockwiseTrainer(student, distillation_loss, blocks, budget, training, folder), held)
        else:
            parameters = trainable(student, teacher)
            if not parameters:
                raise LowRankError(
                    f"{type(student).__name__} has no factor, bias or norm to train: its weights are "
                    "integers. Leave out qat=False, which keeps those of linear layers; or quantize less."
                )
            with training_only(student, parameters), distillation_loss.listening():
                _finish(Trainer(distillation_loss.distance, parameters, budget, training, folder), held)
    return model


@contextlib.contextmanager
def _quantization_aware(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Make the codes of linear layers trainable, and round them again at the end, whatever happens."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)] if wanted else []
    try:
        for layer in layers:
            layer.start_qat()
        yield
    finally:
        for layer in layers:
            layer.finish_qat()


def _finish(trainer: Trainer | BlockwiseTrainer, held: Sequence[Batch]) -> None:
    """Train to the end, and leave the best state also where that is not reached."""
    check_finite_distance(trainer.best.value, held)
    try:
        trainer.resume()
        trainer.train()
    finally:
        trainer.best.restore()


def trainable(model: nn.Module, teacher: nn.Module | None = None) -> list[nn.Parameter]:
    """Return what recovery trains: factors, integers in training, narrower weights, and every vector.

    A weight is narrower if the teacher's of the same name has another shape. Vectors are biases and norms.
    """
    changed = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, COMPRESSED)
        for parameter in module.parameters()
    }
    if teacher is not None:
        changed.update(id(parameter) for parameter in _narrower(model, teacher))
    return [p for p in model.parameters() if p.is_floating_point() and (id(p) in changed or p.ndim == 1)]


def _narrower(model: nn.Module, teacher: nn.Module) -> list[nn.Parameter]:
    """Return the weights of layers that have lost neurons."""
    before = {name: parameter.shape for name, parameter in teacher.named_parameters()}
    return [p for name, p in model.named_parameters() if p.ndim > 1 and before.get(name, p.shape) != p.shape]


def _trainable_blocks(student: nn.Module, teacher: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return what is trained of each block, by name; what blocks share belongs to the first."""
    names = list(find_blocks(teacher))
    modules, dense = dict(student.named_modules()), dict(teacher.named_modules())
    found: dict[str, list[nn.Parameter]] = {}
    taken: set[int] = set()
    for name in names:
        if name not in modules:
            raise LowRankError(
                f"The compressed model has no {name}, a block of the teacher. Give the dense model that it "
                "was made from."
            )
        own = [parameter for parameter in trainable(modules[name], dense[name]) if id(parameter) not in taken]
        taken.update(map(id, own))
        if own:
            found[name] = own
    if not found:
        why = "nothing to train in its blocks" if names else "no stack of repeated blocks"
        raise LowRankError(
            f"{type(student).__name__} has {why}, so it cannot be recovered block by block. Recover it as a "
            "whole: blockwise=False."
        )
    return found


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether bfloat16 is fast here, and not only possible."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def _check(model: nn.Module, teacher: nn.Module) -> None:
    for one in (model, teacher):
        check_has_data(check_model(one))
    if model is teacher:
        raise LowRankError("The teacher is the compressed model itself. Keep a copy of the dense model.")
    compressed = any(isinstance(module, COMPRESSED) for module in model.modules())
    if not compressed and not _narrower(model, teacher):
        raise LowRankError(
            "The model has no factorized, quantized or narrower layer, so there is nothing to recover. "
            "Compress it first."
        )


def _make_alike(model: nn.Module, every: list[Batch], device: torch.device) -> None:
    """Begin in every process with the model of process 0, and with the same batches.

    Each takes its own share of them, and none may train on what another holds out.
    """
    if processes() == 1:
        return
    check_whole(model)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.restore()  # a process that has called its model may have its codes in another order
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()]
    shapes = hash(tuple(tuple(tensor.shape) for tensor in tensors))
    unlike = LowRankError("The processes have models of different shapes. Compress with one plan in all.")
    check_alike(shapes, device, unlike)
    unlike = DataError(
        "The processes have different data. Give all of them the same, in the same order: each takes its own "
        "share. A DataLoader is given as it was before accelerator.prepare, and must not shuffle at will."
    )
    check_alike(hash(tuple(batch.digest() for batch in every)), device, unlike)
    copy_from_first(tensors)


def _split(every: list[Batch], held_out: int | None) -> tuple[list[Batch], list[Batch]]:
    """Hold out batches spread evenly over the data."""
    count = min(8, max(1, len(every) // 16)) if held_out is None else held_out
    if not 1 <= count < len(every):
        raise DataError(
            f"{len(every)} batches, of which {count} would be held out: recovery needs at least one of "
            "each kind. Give more data, or smaller batches."
        )
    stride = len(every) / count
    chosen = {int((i + 0.5) * stride) for i in range(count)}
    return [b for i, b in enumerate(every) if i not in chosen], [every[i] for i in sorted(chosen)]
