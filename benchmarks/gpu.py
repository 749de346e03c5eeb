"""Run the main job on a CUDA device: compressing time, latency of factors and int8, agreement of outputs.

Compressing ``BertModel(BertConfig())`` is timed beside a loop of ``torch.linalg.svd`` on the same device;
the forward pass, batch 32 × 128 tokens, dense beside ``keep=0.5`` in float32 (TF32 off), float16 and int8.
"""

from __future__ import annotations

import copy

import torch
from common import finish, interleaved_medians, parser
from transformers import BertConfig, BertModel

from lowrank import benchmark, compress, plan, quantize

RANK = 100


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=5)
    options = arguments.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device.")
    torch.backends.cuda.matmul.allow_tf32 = False

    torch.manual_seed(0)
    model = BertModel(BertConfig()).eval().cuda()
    names = [layer.name for layer in plan(model, rank=RANK).factorized]
    weights = [model.get_submodule(name).weight.detach() for name in names]
    copies = [copy.deepcopy(model) for _ in range(options.repeats + 1)]

    def synchronized(work):  # type: ignore[no-untyped-def]
        work()
        torch.cuda.synchronize()

    seconds = interleaved_medians(
        {
            "compress": lambda: synchronized(lambda: compress(copies.pop(), rank=RANK)),
            "svd_loop": lambda: synchronized(
                lambda: [torch.linalg.svd(w, full_matrices=False) for w in weights]
            ),
        },
        options.repeats,
    )
    figures = {
        "gpu": torch.cuda.get_device_name(),
        "compress_seconds": seconds["compress"],
        "svd_loop_seconds": seconds["svd_loop"],
        "ratio": seconds["compress"] / seconds["svd_loop"],
    }

    ids = torch.randint(30522, (32, 128), device="cuda")
    small = compress(copy.deepcopy(model), keep=0.5)
    with torch.no_grad():
        outputs = small(ids).last_hidden_state
        moved = copy.deepcopy(small).cpu()(ids[:1].cpu()).last_hidden_state
        coded = quantize(copy.deepcopy(small))
        as_integers = coded(ids).last_hidden_state
    figures["largest_difference_to_cpu"] = float((outputs[:1].cpu() - moved).abs().max())
    figures["cosine_int8_to_float"] = float(torch.cosine_similarity(as_integers, outputs, dim=-1).mean())
    for dtype in (torch.float32, torch.float16):
        pair = (copy.deepcopy(model).to(dtype), copy.deepcopy(small).to(dtype))
        result = benchmark(*pair, {"input_ids": ids}, repeats=4 * options.repeats).model
        name = str(dtype).removeprefix("torch.")
        figures[name] = {"dense_ms": 1e3 * result.seconds_dense, "small_ms": 1e3 * result.seconds_small}
        figures[name]["speedup"] = result.speedup
    result = benchmark(model, coded, {"input_ids": ids}, repeats=4 * options.repeats).model
    figures["int8"] = {"small_ms": 1e3 * result.seconds_small, "speedup_over_float32": result.speedup}
    finish("gpu", figures, options.out)


if __name__ == "__main__":
    main()
