"""The commands, each a few lines around the verbs of the library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowrank.cli.inputs import (
    calm_transformers,
    copy_tokenizer,
    first_batch,
    load_model,
    read_samples,
    statistics_of,
)
from lowrank.cli.options import (
    Data,
    Debug,
    Ignore,
    Json,
    Loss,
    Overrule,
    Overwrite,
    Quiet,
    Seed,
    Source,
    StatsFolder,
    Targets,
    Windows,
    config_of,
    given_flags,
    layers_of,
    takes_options,
)
from lowrank.errors import (
    BudgetError,
    LowRankError,
)
from lowrank.pipeline.apply import apply as apply_to_model
from lowrank.pipeline.compress import compress as compress_model
from lowrank.pipeline.compress import plan as plan_model
from lowrank.plans.formatting import to_json
from lowrank.plans.plan import Plan

app = typer.Typer(
    name="lowrank",
    help="Make trained PyTorch models smaller and faster by low-rank factorization.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.command()
@takes_options("plan")
def plan(
    source: Source,
    data: Data = None,
    stats_folder: StatsFolder = None,
    windows: Windows = None,
    loss: Loss = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the plan here.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="Draw the ranks into this file.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Decide every layer's rank and predict its error; change nothing."""
    from lowrank.files.atomic_file import check_file

    config = config_of(options)
    for file in (out, picture):
        if file is not None:
            check_file(file)
    model = load_model(source, quiet)
    samples = read_samples(model, source, data, windows)
    both = config.speedup is not None
    stats = statistics_of(model, samples, stats_folder, not quiet, loss, both=both, **layers_of(config))
    made = plan_model(model, config, inputs=first_batch(samples), stats=stats, progress=not quiet)
    if out is not None:
        made.save(out)
    if picture is not None:
        from lowrank.reports.plots import plot_ranks

        plot_ranks(made, picture)
    _show(made, as_json, quiet)


@app.command()
@takes_options("compress")
def compress(
    source: Source,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    data: Data = None,
    stats_folder: StatsFolder = None,
    windows: Windows = None,
    loss: Loss = "auto",
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Carry out this plan instead.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Compress a checkpoint and write it, ready for from_pretrained."""
    from lowrank.checkpoint.checkpoint import write
    from lowrank.files.folders import check_folder, staged
    from lowrank.hf.tokenizer import vocabulary_of
    from lowrank.reports.report import report

    config = config_of(options)
    if plan_file is not None:
        _check_plan_says_all(options)
    check_folder(out, overwrite)
    model = load_model(source, quiet)
    samples = read_samples(model, source, data, windows)
    both = config.sequential or config.speedup is not None
    which = {**layers_of(config), "seed": config.seed}
    stats = statistics_of(model, samples, stats_folder, not quiet, loss, both=both, **which)
    again: dict[str, Any] = {"stats": stats, "progress": not quiet}
    if config.sequential and samples is not None:
        again |= {"data": samples.data, "tokenizer": samples.tokenizer}
    if plan_file is not None:
        how = {name: getattr(config, name) for name in ("sequential", "offload_folder", "on_missing_kernel")}
        apply_to_model(model, Plan.load(plan_file), seed=config.seed, **how, **again)
    else:
        compress_model(model, config, inputs=first_batch(samples), **again)
    with staged(out, overwrite) as folder:
        write(model, folder)
        if vocabulary_of(model) is not None:
            copy_tokenizer(model, source, folder, out, quiet)
    _show(report(model), as_json, quiet)


def _check_plan_says_all(options: dict[str, Any]) -> None:
    """Refuse options beside ``--plan`` that would be dropped without a word."""
    given = given_flags(options, "plan")
    if given:
        raise BudgetError(
            f"Give either --plan or a budget, not both: the plan says it all. Leave out {', '.join(given)}."
        )


@app.command()
def calibrate(
    source: Source,
    out: Annotated[Path, typer.Argument(help="The folder to write the statistics to.")],
    data: Annotated[Path, typer.Option(help="Text: a sample per line, or one text for a language model.")],
    windows: Windows = None,
    targets: Targets = None,
    ignore: Ignore = None,
    overrule: Overrule = None,
    loss: Loss = "auto",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Learn what the layers read and how much it matters; plan and compress take it as --stats."""
    from lowrank.files.folders import check_folder

    check_folder(out, overwrite)
    model = load_model(source, quiet)
    samples = read_samples(model, source, data, windows)
    which: dict[str, Any] = {"targets": targets, "ignore": ignore, "overrule": overrule, "seed": seed}
    stats = statistics_of(model, samples, None, not quiet, loss, **which)
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
    from lowrank.calibration.text_files import read_labelled, read_lines, read_pairs, read_text
    from lowrank.hf.tokenizer import load_tokenizer
    from lowrank.reports import evaluation

    if task not in TASKS:
        raise typer.BadParameter(f"{task}: choose one of {', '.join(TASKS)}.", param_hint="--task")
    if task == "cosine" and dense is None:
        raise typer.BadParameter("cosine compares with the dense model.", param_hint="--dense")
    model, tokenizer = load_model(source, quiet=True), load_tokenizer(source)
    if task == "perplexity":
        return evaluation.perplexity(model, read_text(data), tokenizer, count=windows)
    if task == "sts":
        return evaluation.sts_spearman(model, *read_pairs(data), tokenizer)
    if task == "accuracy":
        return evaluation.accuracy(model, *read_labelled(data), tokenizer)
    assert dense is not None
    return evaluation.embedding_cosine(model, load_model(dense, quiet=True), read_lines(data), tokenizer)


@app.command()
def inspect(source: Source, as_json: Json = False, debug: Debug = False) -> None:
    """Report what a checkpoint costs, per layer and in total."""
    from lowrank.reports.report import report

    _show(report(load_model(source, quiet=True)), as_json)


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

    from lowrank.hf.tokenizer import vocabulary_of
    from lowrank.reports.benchmark import benchmark

    first, second = load_model(dense, quiet=True), load_model(small, quiet=True)
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

    calm_transformers(quiet)
    run_demo(keep=keep, progress=not quiet, say=(lambda line: None) if quiet else typer.echo)


@app.command()
def setup(
    remove: Annotated[bool, typer.Option("--remove", help="Take the hook away again.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Let all programs of this Python environment load compressed checkpoints without `import lowrank`."""
    from lowrank.cli import startup

    file = startup.uninstall() if remove else startup.install()
    if not quiet:
        typer.echo(f"{file}: {'is gone.' if remove else 'lowrank is ready when transformers is imported.'}")


def _show(result: Any, as_json: bool, quiet: bool = False) -> None:
    if as_json:
        typer.echo(result.to_json())
    elif not quiet:
        typer.echo(str(result))
