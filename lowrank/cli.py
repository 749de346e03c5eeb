"""The command line: ``lowrank plan | compress | inspect | bench | demo``.

Exit codes: 0 done, 2 wrong use, 1 failed. A failure is one line on stderr; ``--debug`` adds the
traceback. Progress bars appear on terminals only, and never with ``-q``.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from lowrank import pipeline
from lowrank.errors import BudgetError, LowRankError, RankError, TargetError
from lowrank.planning import Plan

app = typer.Typer(
    name="lowrank",
    help="Make trained PyTorch models smaller and faster by low-rank factorization.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

WRONG_USE = (BudgetError, RankError, TargetError)

Source = Annotated[str, typer.Argument(help="A folder, or a name on the hub.")]
Rank = Annotated[int | None, typer.Option(help="Inner size for every layer.")]
Keep = Annotated[float | None, typer.Option(help="Fraction of the targeted parameters that remains.")]
Energy = Annotated[float | None, typer.Option(help="Fraction of each weight's squared norm to retain.")]
Error = Annotated[float | None, typer.Option(help="Largest relative error of each weight.")]
Targets = Annotated[list[str] | None, typer.Option(help="Pattern of layers to factorize; repeatable.")]
Ignore = Annotated[list[str] | None, typer.Option(help="Pattern of layers to leave alone; repeatable.")]
Allocation = Annotated[str, typer.Option(help="How --keep is spread: global or uniform.")]
RoundTo = Annotated[int, typer.Option(help="Chosen ranks are multiples of this.")]
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
    targets: Targets = None,
    ignore: Ignore = None,
    allocation: Allocation = "global",
    round_to: RoundTo = 8,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the plan here.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="Draw the ranks into this file.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Decide every layer's rank and predict its error; change nothing."""
    made = pipeline.plan(
        _load(source, quiet),
        rank=rank,
        keep=keep,
        energy=energy,
        error=error,
        targets=targets,
        ignore=ignore,
        allocation=allocation,
        round_to=round_to,
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
    targets: Targets = None,
    ignore: Ignore = None,
    allocation: Allocation = "global",
    round_to: RoundTo = 8,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Carry out this plan instead.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the randomized solver.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that has files.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress a checkpoint and write it, ready for from_pretrained."""
    from lowrank.checkpoint import save
    from lowrank.folders import check_folder
    from lowrank.reporting import report

    budget = {"rank": rank, "keep": keep, "energy": energy, "error": error}
    if plan_file is not None and any(value is not None for value in budget.values()):
        raise BudgetError("Give either --plan or a budget, not both.")
    check_folder(out, overwrite)
    model = _load(source, quiet)
    if plan_file is not None:
        pipeline.apply(model, Plan.load(plan_file), seed=seed, progress=not quiet)
    else:
        choice: dict[str, Any] = {"targets": targets, "ignore": ignore, "allocation": allocation}
        pipeline.compress(model, **budget, **choice, round_to=round_to, seed=seed, progress=not quiet)  # type: ignore[arg-type]
    save(model, out, overwrite=overwrite)
    _copy_tokenizer(source, out)
    _show(report(model), as_json, quiet)


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

    first, second = _load(dense, quiet=True), _load(small, quiet=True)
    generator = torch.Generator().manual_seed(0)
    vocabulary = first.config.get_text_config().to_dict().get("vocab_size")  # type: ignore[union-attr,operator]
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


def main() -> None:
    """Run the command line, and turn failures into one line and an exit code."""
    try:
        app()
    except SystemExit as done:
        if done.code == 130:  # what typer makes of Ctrl-C, without a word
            _fail("interrupted", 1)
        raise
    except Exception as error:  # the last resort: a user sees one line, a developer asks for more
        if "--debug" in sys.argv:
            raise
        _fail(_one_line(error), 2 if isinstance(error, WRONG_USE) else 1)


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

    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise LowRankError(f"{source}: no config.json here, so not a transformers folder.")
    if not folder.exists() and (folder.is_absolute() or source.startswith(".") or source.count("/") > 1):
        raise LowRankError(f"{source}: there is no such folder.")
    try:
        return hf.load(source)
    except OSError as error:
        raise LowRankError(f"{source}: cannot be loaded: {error}") from error


def _calm_transformers(quiet: bool) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    if quiet or not sys.stderr.isatty():
        logging.disable_progress_bar()


def _copy_tokenizer(source: str, folder: Path) -> None:
    """Write the source's tokenizer into ``folder``, if it has one, so that the folder is complete."""
    from transformers import AutoTokenizer

    with suppress(OSError, ValueError):
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
