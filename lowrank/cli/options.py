"""The options of the commands, each once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[str, typer.Argument(help="A folder, or a name on the hub.")]


Rank = Annotated[int | None, typer.Option(help="Inner size for every layer.")]


Keep = Annotated[float | None, typer.Option(help="Fraction of the targeted parameters that remains.")]


Energy = Annotated[float | None, typer.Option(help="Fraction of each weight's squared norm to retain.")]


Error = Annotated[float | None, typer.Option(help="Largest relative error of each weight.")]


MaxBytes = Annotated[int | None, typer.Option(help="Bytes that the whole model may take.")]


Speedup = Annotated[
    float | None, typer.Option(help="Dense latency over compressed latency, measured on the first of --data.")
]


Data = Annotated[
    Path | None,
    typer.Option(help="Text to calibrate on: a sample per line, or one text for a language model."),
]


StatsFolder = Annotated[Path | None, typer.Option("--stats", help="What `lowrank calibrate` wrote.")]


MetricName = Annotated[str, typer.Option("--metric", help="weight, diagonal, inputs, loss, or auto.")]


AddBias = Annotated[bool, typer.Option("--add-bias", help="Give layers without a bias one.")]


Windows = Annotated[int | None, typer.Option(help="Windows of 512 tokens to use; all by default.", min=1)]


Targets = Annotated[list[str] | None, typer.Option(help="Pattern of layers to factorize; repeatable.")]


Ignore = Annotated[list[str] | None, typer.Option(help="Pattern of layers to leave alone; repeatable.")]


Overrule = Annotated[
    list[str] | None,
    typer.Option(help="Pattern of layers that may change although the code leaves a doubt; repeatable."),
]


Allocation = Annotated[str, typer.Option(help="How --keep is spread: global or uniform.")]


RoundTo = Annotated[int, typer.Option(help="Chosen ranks are multiples of this.")]


Share = Annotated[
    str | None,
    typer.Option(
        help="Who may share a factor: inputs, readers of one input; layers, a role in adjacent blocks."
    ),
]


ShareSize = Annotated[int | None, typer.Option(help="Blocks that share, with --share layers.")]


Quantize = Annotated[
    str | None,
    typer.Option(help="int8 or int4: store the weights as integers; auto, with --max-bytes, chooses."),
]


GroupSize = Annotated[int | None, typer.Option(help="Elements that share a scale under int4.")]


Residual = Annotated[
    bool, typer.Option("--correction", help="Let factors correct coded weights, in place of replacing them.")
]


Slow = Annotated[str, typer.Option(help="Of int4 that no kernel multiplies: warn, refuse or allow.")]


Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout, for programs.")]


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no table.")]


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]
