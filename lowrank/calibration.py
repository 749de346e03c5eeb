"""Calibrate: run the model over data once, and sum what each linear layer reads and how much it matters.

Hooks on the layers take the inputs; a backward pass of an objective gives the outputs' gradients.
Parameters get no gradient. Products are float32 per batch and summed in float64, so the memory does
not depend on the amount of data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.batches import Batch, batches
from lowrank.errors import DataError, StatsError
from lowrank.fingerprints import fingerprint_of_model, fingerprint_of_tokenizer
from lowrank.linalg.metric import gram
from lowrank.nn import kind_of
from lowrank.objectives import of_loss, self_supervised
from lowrank.obstacles import check_model
from lowrank.statistics import Fingerprint, Gradients, Moments, Stats

WIDEST = 8192
"""Features up to which the products of all pairs are kept (0.5 GB in float64); beyond, each with itself."""


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    tokenizer: Callable[..., Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | str | None = "auto",
    device: torch.device | str | None = None,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Stats:
    """Collect what every linear layer reads, and how much its outputs matter to the loss.

    Args:
        model: Any module on any device. It runs in eval mode, and is left as it was.
        data: Strings, with a ``tokenizer``; or any iterable of batches: dicts, tensors, or tuples
            whose first element is the model's input (a DataLoader, a column of `datasets`).
        tokenizer: A tokenizer of transformers, for strings.
        loss: ``"auto"`` makes an objective from the outputs without labels (`lowrank.objectives`).
            A function ``loss(outputs, batch)`` returns a scalar, the mean over the batch's samples.
            ``None`` spares the backward pass; the metric ``"loss"`` is then not available.
        device: Where batches are moved to; by default where the model's first parameter is.
        batch_size: Strings per batch.
        max_length: Longest string in tokens; by default what the tokenizer allows, at most 512.
        seed: Seed of the sampled labels; the global random state is not touched.
        progress: Show a progress bar on a terminal.

    Returns:
        `Stats`, which answer every metric and budget. Add those of further data with ``+``.

    Raises:
        DataError: If there are no data, the model refuses a batch, or a loss is no scalar.
        StatsError: If a layer reads NaN or infinite values.

    Source: for the gradients, Martens & Grosse 2015 (K-FAC, arXiv:1503.05671).

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> stats = calibrate(model, [torch.randn(32, 8), torch.randn(32, 8)])
        >>> stats.tokens, sorted(stats.gradients)
        (64, ['0', '2'])
    """
    check_model(model)
    if loss is not None and loss != "auto" and not callable(loss):
        raise DataError(f'loss={loss!r}: give "auto", a function loss(outputs, batch), or None.')
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(seed)
    collector = _Collector(model, differentiate=loss is not None)
    stream = batches(data, tokenizer, device=device, batch_size=batch_size, max_length=max_length)
    data_digest = tokens = terms = 0
    bar = tqdm(stream, desc="calibrating", unit="batch", disable=None if progress else True)
    with _as_it_was(model), collector.listening(), torch.set_grad_enabled(loss is not None):
        for batch in bar:
            collector.start(batch)
            outputs = batch.call(model)
            if loss is not None:
                made = (
                    self_supervised(outputs, batch, generator)
                    if isinstance(loss, str)
                    else of_loss(loss, outputs, batch)
                )
                made.total.backward()  # type: ignore[no-untyped-call]
                terms += made.terms
            data_digest = (data_digest + batch.digest()) % 2**64
            tokens += batch.tokens
    fingerprint = Fingerprint(
        fingerprint_of_model(model), fingerprint_of_tokenizer(tokenizer), f"{data_digest:016x}"
    )
    return collector.stats(fingerprint, tokens, terms)


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode with frozen parameters, and undo both."""
    training = {module: module.training for module in model.modules()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval()
        for parameter in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, was in training.items():
            module.training = was
        for parameter, requires in required.items():
            parameter.requires_grad_(requires)


class _Collector:
    """Sums moments of inputs and products of gradients, one layer at a time, as the model runs."""

    def __init__(self, model: nn.Module, differentiate: bool) -> None:
        self._layers = {name: m for name, m in model.named_modules() if kind_of(m) is not None}
        self._differentiate = differentiate
        self._inputs: dict[str, Moments] = {}
        self._gradients: dict[str, Gradients] = {}
        self._sources: dict[str, str] = {}
        self._batch: Batch | None = None
        self._seen: dict[int, tuple[Tensor, str]] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Attach the hooks, and remove these, and no others, at the end."""
        handles = []
        try:
            for name, layer in self._layers.items():
                hook = self._hook(name)
                handles.append(layer.register_forward_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    def start(self, batch: Batch) -> None:
        """Begin a batch: tensors are recognised within one forward pass only."""
        self._batch = batch
        self._seen.clear()

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
            self._read(name, args[0] if args else kwargs["input"])
            if not self._differentiate:
                return output
            if not output.requires_grad:  # nothing before it has a gradient: the graph begins here
                output = output.detach().requires_grad_().clone()
            if output.requires_grad:
                output.register_hook(lambda gradient: self._felt(name, layer, gradient))  # type: ignore[no-untyped-call]
            return output

        return hook

    def _read(self, name: str, tensor: Tensor) -> None:
        """Add a layer's input, unless another layer has read the same tensor in this forward pass."""
        assert self._batch is not None
        known = self._seen.get(id(tensor))
        key = known[1] if known is not None else name
        if self._sources.setdefault(name, key) != key:
            raise StatsError(
                f"{name}: shared its input with {self._sources[name]} at first, but not in batch "
                f"{self._batch.index}. A structure that depends on the data cannot be calibrated."
            )
        if known is None:
            self._seen[id(tensor)] = (tensor, name)
            rows = self._batch.real(tensor.detach())
            moments = _moments(rows)
            if not bool(moments.total.isfinite().all()):
                raise StatsError(
                    f"{name}: reads NaN or infinite values in batch {self._batch.index}. It overflows, "
                    "in half precision perhaps, or the data are not finite."
                )
            self._inputs[name] = self._inputs[name] + moments if name in self._inputs else moments

    def _felt(self, name: str, layer: nn.Module, gradient: Tensor) -> None:
        """Add the gradient with respect to a layer's output."""
        assert self._batch is not None
        kind = kind_of(layer)
        assert kind is not None
        weight = kind.weight(layer).detach()
        gradients = _gradients(self._batch.real(gradient.detach()), weight)
        if not bool(gradients.products.diagonal(0, -1, -1 - (gradients.products.ndim > 1)).isfinite().all()):
            raise StatsError(
                f"{name}: the gradient has NaN or infinite values in batch {self._batch.index}. "
                "Load the model in float32, or calibrate with loss=None."
            )
        known = self._gradients.get(name)
        self._gradients[name] = known + gradients if known is not None else gradients

    def stats(self, fingerprint: Fingerprint, tokens: int, terms: int) -> Stats:
        """Return the sums; layers that were never called are absent."""
        return Stats(fingerprint, self._inputs, self._sources, self._gradients, tokens, terms)


def _moments(rows: Tensor) -> Moments:
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return Moments(len(rows), rows.sum(0, dtype=torch.float64), _products(rows))


def _gradients(rows: Tensor, weight: Tensor) -> Gradients:
    rows = rows if rows.dtype == torch.float64 else rows.float()
    pulled_back = weight.shape[0] > weight.shape[1]
    if pulled_back:
        rows = rows @ weight.to(rows)  # Wᵀ g
    return Gradients(len(rows), _products(rows), pulled_back)


def _products(rows: Tensor) -> Tensor:
    """Return ``Σ x xᵀ`` of ``rows (tokens, n)``, or its diagonal for a very wide layer, in float64."""
    if rows.shape[1] > WIDEST:
        return rows.square().sum(0, dtype=torch.float64)
    products = gram(rows.T)
    if not bool(products.diagonal().isfinite().all()):  # beyond 1e19 float32 overflows
        products = gram(rows.T.double())
    return products.double()
