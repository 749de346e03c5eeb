"""The command line: ``lowrank calibrate | plan | compress | eval | inspect | bench | demo | setup``.

Exit codes: 0 done, 2 wrong use, 1 failed. A failure is one line on stderr; ``--debug`` adds the
traceback. Progress bars appear on terminals only, and never with ``-q``.
"""

from __future__ import annotations

import inspect as inspect_module  # a command below has the short name
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TextIO

import typer
from torch import nn

from lowrank import pipeline
from lowrank.errors import (
    BudgetError,
    CheckpointError,
    DataError,
    LowRankError,
    RankError,
    SchemeError,
    TargetError,
)
from lowrank.planning import Plan
from lowrank.statistics import Stats
from lowrank.text import to_json

app = typer.Typer(
    name="lowrank",
    help="Make trained PyTorch models smaller and faster by low-rank factorization.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

WRONG_USE = (BudgetError, DataError, RankError, SchemeError, TargetError)

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
    bool, typer.Option("--residual", help="Let factors correct coded weights, in place of replacing them.")
]
Slow = Annotated[str, typer.Option(help="Of int4 that no kernel multiplies: warn, refuse or allow.")]
Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no table.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]


@app.command()
def plan(
    source: Source,
    rank: Rank = None,
    keep: Keep = None,
    energy: Energy = None,
    error: Error = None,
    max_bytes: MaxBytes = None,
    speedup: Speedup = None,
    data: Data = None,
    stats_folder: StatsFolder = None,
    windows: Windows = None,
    metric: MetricName = "auto",
    add_bias: AddBias = False,
    targets: Targets = None,
    ignore: Ignore = None,
    overrule: Overrule = None,
    allocation: Allocation = "global",
    round_to: RoundTo = 8,
    share: Share = None,
    share_size: ShareSize = None,
    quantize: Quantize = None,
    group_size: GroupSize = None,
    residual: Residual = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the plan here.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="Draw the ranks into this file.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Decide every layer's rank and predict its error; change nothing."""
    from lowrank.atomicfile import check_file

    for file in (out, picture):
        if file is not None:
            check_file(file)
    model = _load(source, quiet)
    samples = _samples(model, source, data, windows)
    made = pipeline.plan(
        model,
        rank=rank,
        keep=keep,
        energy=energy,
        error=error,
        max_bytes=max_bytes,
        speedup=speedup,
        inputs=_first(samples),
        stats=_stats(model, samples, stats_folder, not quiet, overrule, both=speedup is not None),
        metric=metric,
        add_bias=add_bias,
        targets=targets,
        ignore=ignore,
        overrule=overrule,
        allocation=allocation,
        round_to=round_to,
        share=share,
        share_size=share_size,
        quantize=quantize,
        group_size=group_size,
        residual=residual,
        progress=not quiet,
    )
    if out is not None:
        made.save(out)
    if picture is not None:
        from lowrank.plot import plot_ranks

        plot_ranks(made, picture)
    _show(made, as_json, quiet)


@app.command()
def compress(
    source: Source,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    rank: Rank = None,
    keep: Keep = None,
    energy: Energy = None,
    error: Error = None,
    max_bytes: MaxBytes = None,
    speedup: Speedup = None,
    data: Data = None,
    stats_folder: StatsFolder = None,
    windows: Windows = None,
    metric: MetricName = "auto",
    add_bias: AddBias = False,
    targets: Targets = None,
    ignore: Ignore = None,
    overrule: Overrule = None,
    allocation: Allocation = "global",
    round_to: RoundTo = 8,
    share: Share = None,
    share_size: ShareSize = None,
    quantize: Quantize = None,
    group_size: GroupSize = None,
    residual: Residual = False,
    slow: Slow = "warn",
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Carry out this plan instead.")] = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Fit layers to the compressed model's inputs, with --data.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the randomized solver.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that has files.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress a checkpoint and write it, ready for from_pretrained."""
    from lowrank.checkpoint import write
    from lowrank.folders import check_folder, staged
    from lowrank.hf.tokenizer import vocabulary_of
    from lowrank.reporting import report

    budget: dict[str, Any] = {"rank": rank, "keep": keep, "energy": energy, "error": error}
    budget |= {"max_bytes": max_bytes, "speedup": speedup}
    choice: dict[str, Any] = {"targets": targets, "ignore": ignore, "allocation": allocation}
    choice |= {
        "overrule": overrule,
        "metric": metric,
        "add_bias": add_bias,
        "round_to": round_to,
        "share": share,
    }
    choice |= {"share_size": share_size}
    choice |= {"quantize": quantize, "group_size": group_size, "residual": residual}
    if plan_file is not None:
        _check_plan_says_all(budget | choice)
    check_folder(out, overwrite)
    model = _load(source, quiet)
    samples = _samples(model, source, data, windows)
    both = sequential or speedup is not None
    stats = _stats(model, samples, stats_folder, not quiet, overrule, both=both)
    how: dict[str, Any] = {"stats": stats, "sequential": sequential, "seed": seed, "progress": not quiet}
    how |= {"slow": slow}
    if sequential and samples is not None:
        how |= {"data": samples.data, "tokenizer": samples.tokenizer}
    if plan_file is not None:
        pipeline.apply(model, Plan.load(plan_file), **how)
    else:
        pipeline.compress(model, **budget, **choice, **how, inputs=_first(samples))
    with staged(out, overwrite) as folder:
        write(model, folder)
        if vocabulary_of(model) is not None:
            _copy_tokenizer(model, source, folder, out, quiet)
    _show(report(model), as_json, quiet)


def _check_plan_says_all(options: dict[str, Any]) -> None:
    """Refuse options beside ``--plan`` that would be dropped without a word."""
    defaults = inspect_module.signature(pipeline.compress).parameters
    given = [name for name, value in options.items() if value != defaults[name].default]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise BudgetError(
            f"Give either --plan or a budget, not both: the plan says it all. Leave out {names}."
        )


@app.command()
def calibrate(
    source: Source,
    out: Annotated[Path, typer.Argument(help="The folder to write the statistics to.")],
    data: Annotated[Path, typer.Option(help="Text: a sample per line, or one text for a language model.")],
    windows: Windows = None,
    overrule: Overrule = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that has files.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Learn what the layers read and how much it matters; plan and compress take it as --stats."""
    from lowrank.folders import check_folder

    check_folder(out, overwrite)
    model = _load(source, quiet)
    stats = _stats(model, _samples(model, source, data, windows), None, not quiet, overrule)
    assert stats is not None
    stats.save(out, overwrite=overwrite)
    if not quiet:
        typer.echo(repr(stats))


TASKS = ("perplexity", "sts", "accuracy", "cosine")


@app.command("eval")
def evaluate(
    source: Source,
    task: Annotated[str, typer.Option(help=f"What to measure: {', '.join(TASKS)}.")],
    data: Annotated[
        Path,
        typer.Option(
            help="perplexity: a text. sts: sentence1,sentence2,score. accuracy: sentence<TAB>label. "
            "cosine: a sentence per line."
        ),
    ],
    dense: Annotated[str | None, typer.Option(help="The dense model that cosine compares with.")] = None,
    windows: Windows = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how good a checkpoint is."""
    value = _measure(source, task, data, dense, windows)
    typer.echo(
        to_json({"source": source, "task": task, "value": value}, None) if as_json else f"{task} {value:.4f}"
    )


def _measure(source: str, task: str, data: Path, dense: str | None, windows: int | None) -> float:
    from lowrank import evaluation
    from lowrank.hf.tokenizer import load_tokenizer
    from lowrank.textfiles import read_labelled, read_lines, read_pairs, read_text

    if task not in TASKS:
        raise typer.BadParameter(f"{task}: choose one of {', '.join(TASKS)}.", param_hint="--task")
    if task == "cosine" and dense is None:
        raise typer.BadParameter("cosine compares with the dense model.", param_hint="--dense")
    model, tokenizer = _load(source, quiet=True), load_tokenizer(source)
    if task == "perplexity":
        return evaluation.perplexity(model, read_text(data), tokenizer, count=windows)
    if task == "sts":
        return evaluation.sts_spearman(model, *read_pairs(data), tokenizer)
    if task == "accuracy":
        return evaluation.accuracy(model, *read_labelled(data), tokenizer)
    assert dense is not None
    return evaluation.embedding_cosine(model, _load(dense, quiet=True), read_lines(data), tokenizer)


@app.command()
def inspect(source: Source, as_json: Json = False, debug: Debug = False) -> None:
    """Report what a checkpoint costs, per layer and in total."""
    from lowrank.reporting import report

    _show(report(_load(source, quiet=True)), as_json)


@app.command()
def bench(
    dense: Source,
    small: Annotated[str, typer.Argument(help="The compressed folder.")],
    batch: Annotated[int, typer.Option(help="Sequences per batch.", min=1)] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens per sequence.", min=1)] = 128,
    repeats: Annotated[int, typer.Option(help="Timed runs; the median counts.", min=1)] = 15,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure latency and peak memory of a dense and a compressed checkpoint, side by side."""
    import torch

    from lowrank.benchmarking import benchmark
    from lowrank.hf.tokenizer import vocabulary_of

    first, second = _load(dense, quiet=True), _load(small, quiet=True)
    generator = torch.Generator().manual_seed(0)
    vocabulary = vocabulary_of(first)
    if vocabulary is None:
        raise LowRankError(
            f"{dense}: not a model of tokens, so there is no input to make up. "
            "Call lowrank.benchmark(dense, small, inputs) with inputs of your own."
        )
    ids = torch.randint(vocabulary, (batch, tokens), generator=generator)
    _show(benchmark(first, second, {"input_ids": ids}, repeats=repeats), as_json)


@app.command()
def demo(
    keep: Annotated[float, typer.Option(help="Fraction of the parameters that remains.")] = 0.8,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Shrink a real BERT, report, save, reload in a new process, and compare the outputs."""
    from lowrank.demo import run_demo

    _calm_transformers(quiet)
    run_demo(keep=keep, progress=not quiet, say=(lambda line: None) if quiet else typer.echo)


@app.command()
def setup(
    remove: Annotated[bool, typer.Option("--remove", help="Take the hook away again.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Let all programs of this Python environment load compressed checkpoints without `import lowrank`."""
    from lowrank import startup

    file = startup.uninstall() if remove else startup.install()
    if not quiet:
        typer.echo(f"{file}: {'is gone.' if remove else 'lowrank is ready when transformers is imported.'}")


def main() -> None:
    """Run the command line, and turn warnings and failures into one line each, and an exit code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app()
    except SystemExit as done:
        if done.code == 130:  # what typer makes of Ctrl-C, without a word
            _fail("interrupted", 1)
        raise
    except Exception as error:  # the last resort: a user sees one line, a developer asks for more
        if "--debug" in sys.argv:
            raise
        _fail(_one_line(error), 2 if isinstance(error, WRONG_USE) else 1)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    own = category.__module__ == LowRankError.__module__
    text = f"lowrank: {message}" if own else warnings.formatwarning(message, category, filename, lineno, line)
    typer.echo(text.rstrip(), file, err=file is None)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, LowRankError) else f"{type(error).__name__}: {text}"


def _fail(message: str, code: int) -> None:
    typer.echo(f"lowrank: {message}", err=True)
    sys.exit(code)


def _show(result: Any, as_json: bool, quiet: bool = False) -> None:
    if as_json:
        typer.echo(result.to_json())
    elif not quiet:
        typer.echo(str(result))


def _load(source: str, quiet: bool) -> nn.Module:
    _calm_transformers(quiet)
    from lowrank import hf
    from lowrank.folders import settle

    folder = Path(source)
    settle(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise LowRankError(f"{source}: no config.json here, so not a transformers folder.")
    if not folder.exists() and (folder.is_absolute() or source.startswith(".") or source.count("/") > 1):
        raise LowRankError(f"{source}: there is no such folder.")
    try:
        return hf.load(source)
    except OSError as error:
        raise LowRankError(f"{source}: cannot be loaded: {error}") from error


class _Samples(NamedTuple):
    """What a file of text holds, as `lowrank.calibrate` takes it."""

    data: list[Any]
    tokenizer: Any


def _samples(model: nn.Module, source: str, file: Path | None, windows: int | None) -> _Samples | None:
    """Read a file: a sample per line, or windows of 512 tokens for a language model."""
    if file is None:
        return None
    from lowrank import batches
    from lowrank._transformers import check_tokenizer
    from lowrank.hf.tokenizer import load_tokenizer
    from lowrank.textfiles import read_lines, read_text

    tokenizer = load_tokenizer(source)
    check_tokenizer(model, tokenizer)
    if not type(model).__name__.endswith(("CausalLM", "LMHeadModel")):
        return _Samples(read_lines(file), tokenizer)
    ids = batches.windows(read_text(file), tokenizer)[:windows]
    return _Samples([{"input_ids": pair} for pair in ids.split(2)], None)  # type: ignore[no-untyped-call]


def _first(samples: _Samples | None) -> Any:
    """Return the first samples as a batch to time: eight texts, or two windows."""
    if samples is None or samples.tokenizer is None:
        return samples.data[0] if samples is not None else None
    return dict(samples.tokenizer(samples.data[:8], padding=True, truncation=True, return_tensors="pt"))


def _stats(
    model: nn.Module,
    samples: _Samples | None,
    folder: Path | None,
    progress: bool,
    overrule: list[str] | None,
    both: bool = False,
) -> Stats | None:
    """Load the statistics, or calibrate; ``both`` if the samples have another use, too."""
    if samples is not None and folder is not None and not both:
        raise BudgetError("Give either --data or --stats, not both.")
    if folder is not None:
        return Stats.load(folder)
    if samples is None:
        return None
    return pipeline.calibrate(model, *samples, overrule=overrule, progress=progress)


def _calm_transformers(quiet: bool) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    if quiet or not sys.stderr.isatty():
        logging.disable_progress_bar()


def _copy_tokenizer(model: nn.Module, source: str, folder: Path, out: Path, quiet: bool) -> None:
    """Write the source's tokenizer into ``folder``, if it can be the model's, or say why not."""
    from lowrank.hf.tokenizer import check_tokenizer, load_tokenizer

    try:
        tokenizer = load_tokenizer(source)
        check_tokenizer(model, tokenizer)
    except (CheckpointError, DataError) as error:
        if not quiet:
            typer.echo(f"lowrank: no tokenizer is copied to {out}: {_one_line(error)}", err=True)
        return
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the package tokenizers has no class for what the file system refuses
        raise OSError(f"the tokenizer: {error}") from error
