"""The transformers plug-in: with the command line and the demo, the only package that imports transformers.

It teaches ``from_pretrained`` two things: a folder whose config says ``"quant_method": "lowrank"``
is loaded into factorized layers, without the dense weights ever existing; and
``from_pretrained(dense, quantization_config=LowRankConfig(rank=100))`` compresses after loading.
Importing this package registers both, and the adapter through which all else asks about transformers
models; `lowrank` imports it as soon as transformers' models are loaded.
"""

from lowrank.hf import adapter, quantizer
from lowrank.hf.config import LowRankConfig
from lowrank.hf.models import load

__all__ = ["LowRankConfig", "adapter", "load", "quantizer"]
