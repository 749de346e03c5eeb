"""Keep transformers' lists of tied weights right once an embedding is factorized or quantized.

transformers ties a head to an embedding by giving both one parameter, whenever it saves, loads, or is asked
to (``tie_weights``). Of an embedding that is factorized or quantized there is no such parameter: its head
uses the module (`lowrank.nn.TiedLinear`), and the pair is taken from the model's lists of ties. Ties of
biases stay in them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedModel

from lowrank.errors import CheckpointError, LowRankError
from lowrank.nn import LowRankEmbedding, LowRankLinear, QuantizedEmbedding, QuantizedModule, TiedLinear
from lowrank.plans.layer_plan import LayerPlan
from lowrank.plans.plan import Plan

_KEYS, _RESIZE = "_tied_weights_keys", "resize_token_embeddings"
"""What an instance gets in place of what its class has."""


def with_tied_heads(model: PreTrainedModel, plan: Plan) -> Plan:
    """Return ``plan`` with the heads that ``model``'s class ties to embeddings that it changes.

    A checkpoint of a base model knows of no head.

    Raises:
        CheckpointError: If something else than a linear layer is tied to such an embedding.
    """
    changed = {layer.name for layer in plan.factorized if layer.is_embedding}
    changed |= {stored.name for stored in plan.quantized if stored.is_embedding}
    layers = {layer.name: layer for layer in plan}
    for pair in model.all_tied_weights_keys.items():  # before loading, the parameters are not one yet
        names = {name.removesuffix(".weight") for name in pair}
        for embedding in names & changed:
            (user,) = names - {embedding}
            module = model.get_submodule(user)
            if type(module) is not nn.Linear:
                raise CheckpointError(
                    f"config.json: {embedding} is factorized or quantized, but {type(model).__name__} ties "
                    "it to "
                    f"{user}, which cannot follow. Load the base model, or call decompress(model) on that "
                    "and save it."
                )
            layers[user] = (layers.get(user) or _describe(user, module)).following(embedding)
    return replace(plan, layers=tuple(layers.values()))


def _describe(name: str, head: nn.Linear) -> LayerPlan:
    return LayerPlan(name, "linear", head.in_features, head.out_features, head.bias is not None)


def rewrite_ties(model: nn.Module) -> None:
    """Make the lists of ties of each transformers model in ``model`` name the dense weights only.

    Where everything is dense again, the lists are those of the model's class again.
    """
    ours = LowRankEmbedding, QuantizedEmbedding, TiedLinear
    changed = any(isinstance(module, ours) for module in model.modules())
    for part in reversed([m for m in model.modules() if isinstance(m, PreTrainedModel)]):
        if changed or _KEYS in vars(part) or _RESIZE in vars(part):
            _rewrite(part)


def _rewrite(part: PreTrainedModel) -> None:
    ours = LowRankEmbedding, LowRankLinear, QuantizedModule, TiedLinear
    own = {n for n, m in part.named_modules() if isinstance(m, ours)}

    def is_dense(*pair: str) -> bool:
        return not any(n.endswith(".weight") and n.removesuffix(".weight") in own for n in pair)

    of_class, of_model = type(part)._tied_weights_keys or {}, vars(part).get(_KEYS) or {}
    known = of_class if of_model.items() <= of_class.items() else of_model  # some classes make their own
    kept = {target: source for target, source in known.items() if is_dense(target, source)}
    vars(part).pop(_KEYS, None)
    if kept != of_class:
        vars(part)[_KEYS] = kept
    before = part.all_tied_weights_keys
    pairs = before | part.get_expanded_tied_weights_keys(all_submodels=True)
    part.all_tied_weights_keys = {
        target: source
        for target, source in pairs.items()
        if is_dense(target, source) and (target in before or _are_one(part, target, source))
    }
    vars(part).pop(_RESIZE, None)
    if isinstance(_input_table(part), (LowRankEmbedding, QuantizedEmbedding)):
        vars(part)[_RESIZE] = refuse_resizing


def _are_one(part: PreTrainedModel, target: str, source: str) -> bool:
    return part.get_parameter_or_buffer(target) is part.get_parameter_or_buffer(source)


def _input_table(part: PreTrainedModel) -> nn.Module | None:
    try:
        return part.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # a model that has none
        return None


def refuse_resizing(*args: Any, **kwargs: Any) -> NoReturn:
    """Stand in for ``resize_token_embeddings`` of a model whose embedding is factorized or quantized."""
    raise LowRankError(
        "resize_token_embeddings: the embedding of this model is factorized or quantized. Call "
        "lowrank.decompress(model) first, resize, and compress again; or resize the dense checkpoint."
    )
