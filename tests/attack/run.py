"""Run the attacks for a while, on several processes, and write down what happened.

    python tests/attack/run.py --minutes 60                  all of them, sharing the time
    python tests/attack/run.py --only mutations --tries 100000
    python tests/attack/run.py --only kills --attempt 1234   one attempt again, with its traceback

The figures go to ``benchmarks/results/attack.json`` (those of attacks that were not run stay), and from there
into the table of ``docs/reliability.md``. The exit status is 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # as many processes as cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
for name, quiet in (("PYTHONWARNINGS", "ignore"), ("TQDM_DISABLE", "1")):  # of thousands of attempts
    os.environ.setdefault(name, quiet)

from attacks import ATTACKS, named  # noqa: E402
from harness import Attack, Tally, once, run  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "attack.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- table: written by `make attack` -->", "<!-- end of the table -->"


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all attacks together")
    parser.add_argument("--tries", type=int, help="how much each attack tries, however long it takes")
    parser.add_argument("--only", action="append", choices=[attack.name for attack in ATTACKS])
    parser.add_argument(
        "--seed", type=int, default=secrets.randbits(32), help="by default another in each run"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--attempt", type=int, help="the seed of one attempt to repeat")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    chosen = [named(name) for name in args.only] if args.only else list(ATTACKS)
    if args.attempt is not None:
        (attack,) = chosen
        return _report({attack.name: once(attack, args.attempt)})
    if args.worker is not None:
        (attack,) = chosen
        return _work(attack, args.seed, args.minutes, args.tries, args.worker)
    print(f"--seed {args.seed}", flush=True)
    found: dict[str, Tally] = {}
    minutes: dict[str, float] = {}
    for attack in chosen:
        share = attack.weight / sum(one.weight for one in chosen)
        minutes[attack.name] = args.minutes * share
        found[attack.name] = _together(attack, args.seed, minutes[attack.name], args.tries, args.jobs)
        _write(args.out, attack, found[attack.name], args.seed)
        print(attack.name, json.dumps(found[attack.name].to_dict()["outcomes"]), flush=True)
    if args.out == RESULTS:
        write_table()
    return _report(found)


def _report(found: dict[str, Tally]) -> int:
    for name, tally in found.items():
        for text in tally.broken:
            print(f"\n{name}: {text}", file=sys.stderr)
        print(f"{name}: {tally.tried:,} tried, {len(tally.broken):,} broken", flush=True)
    return int(any(tally.broken for tally in found.values()))


def _together(attack: Attack, seed: int, minutes: float, tries: int | None, jobs: int) -> Tally:
    """Run one attack in several processes, which may crash."""
    total = Tally()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{job}.json" for job in range(jobs)]
        command = [sys.executable, __file__, "--only", attack.name]
        limits = ["--minutes", str(minutes if tries is None else 1e6)]
        limits += [] if tries is None else ["--tries", str(-(-tries // jobs))]
        workers = [
            subprocess.Popen([*command, *limits, "--seed", str(seed + job), "--worker", str(file)])
            for job, file in enumerate(files)
        ]
        for worker, file in zip(workers, files, strict=True):
            status = worker.wait()
            if file.exists():
                total.add(Tally.from_dict(json.loads(file.read_text())))
            else:
                last = file.with_suffix(".seed").read_text() if file.with_suffix(".seed").exists() else "none"
                again = f"python tests/attack/run.py --only {attack.name} --attempt {last}"
                total.outcomes["crash"] += 1
                total.broken.append(f"The process ended with status {status}.\nAgain: {again}")
    return total


def _work(attack: Attack, seed: int, minutes: float, tries: int | None, file: Path) -> int:
    begun = file.with_suffix(".seed")
    tally = run(
        attack, seed, seconds=60 * minutes, tries=tries, note=lambda own: begun.write_text(str(own)) and None
    )
    file.write_text(json.dumps(tally.to_dict()), encoding="utf-8")
    return 0


def _write(file: Path, attack: Attack, tally: Tally, seed: int) -> None:
    """Put the tally of one attack into the JSON; the others stay."""
    import torch
    import transformers

    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    results[attack.name] = {
        "what": attack.what,
        "seed": seed,
        **tally.to_dict(),
        "date": date.today().isoformat(),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    ordered = {one.name: results[one.name] for one in ATTACKS if one.name in results}
    file.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "lowrank"], capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + (" and changes" if dirty.stdout.strip() else "")


def table(results: dict[str, Any]) -> str:
    """Return the table of what was tried, how often, and what happened, in Markdown."""
    lines = ["| attack | what is tried | times | what happened | promises broken |", "|---|---|---|---|---|"]
    for name, entry in results.items():
        outcomes = sorted(entry["outcomes"].items(), key=lambda item: -item[1])
        happened = ", ".join(f"{times:,} {outcome}" for outcome, times in outcomes)
        lines.append(
            f"| {name} | {entry['what']} | {entry['tried']:,} | {happened} | {len(entry['broken'])} |"
        )
    return "\n".join(lines)


def write_table() -> None:
    """Put the table into the page, between its two marks."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    written = f"{before}{BEGIN}\n\n{table(json.loads(RESULTS.read_text()))}\n\n{END}{after}"
    PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
