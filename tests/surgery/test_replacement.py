"""Replacing layers: only what is planned changes, and dense weights are freed one by one."""

import gc
import weakref

from lowrank import LowRankLinear, compress, plan

FIRST = "encoder.layer.0.attention.self.query"


def test_only_the_planned_layers_change(tiny_bert):
    kept = {name: module for name, module in tiny_bert.named_modules() if not name.startswith(FIRST)}
    compress(tiny_bert, rank=8, targets=[FIRST])
    assert isinstance(tiny_bert.get_submodule(FIRST), LowRankLinear)
    now = dict(tiny_bert.named_modules())
    assert all(now[name] is module for name, module in kept.items())


def test_dense_weights_are_freed(tiny_bert):
    names = [layer.name for layer in plan(tiny_bert, rank=8).factorized]
    weights = [weakref.ref(tiny_bert.get_submodule(name).weight) for name in names]
    layers = [weakref.ref(tiny_bert.get_submodule(name)) for name in names]
    compress(tiny_bert, rank=8)
    gc.collect()
    assert len(names) == 12
    assert not any(ref() is not None for ref in [*weights, *layers])


def test_a_dense_weight_is_gone_before_the_next_layer_is_decomposed(mlp, monkeypatch):
    from lowrank.surgery import factorization

    first, alive = weakref.ref(mlp[0].weight), []
    real = factorization.truncated_svd

    def watched(*args: object, **kwargs: object) -> object:
        alive.append(first() is not None)
        return real(*args, **kwargs)

    monkeypatch.setattr(factorization, "truncated_svd", watched)
    compress(mlp, rank=8)
    assert alive == [True, False]
