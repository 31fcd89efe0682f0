"""`python -m lepton eval --tasks`: the tasks of lm-evaluation-harness."""

import argparse
import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lepton.cli import figures
from lepton.cli.arguments import print_json
from lepton.cli.loading import choose, load
from lepton.errors import InputError, nearest, reason
from lepton.requirements import need

if TYPE_CHECKING:
    from lepton.data.tokenizer import Tokenizer
    from lepton.model import Network

RESAMPLES = 1000
"""Draws for the standard error of a metric that has no formula for it."""
MAX_FEWSHOT = 1000
FEW = 20
"""So many names are listed where one is unknown."""
ONE_PROCESS = "DISABLE_MULTIPROC"
"""Environment variable by which the harness computes standard errors in this process."""


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `run_tasks` reads."""
    parser.add_argument(
        "--tasks",
        metavar="NAME,...",
        help="tasks of lm-evaluation-harness to measure instead of a text (extra harness)",
    )
    parser.add_argument(
        "--task_dir", metavar="DIR", help="folder of task files of your own; names of files in them are relative to it"
    )
    parser.add_argument(
        "--num_fewshot", type=int, metavar="N", help="examples before each question (default: the task's)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="measure the first N examples of each task")


def run_tasks(args: argparse.Namespace) -> int:
    """Print each metric of each task, with its standard error where there is one."""
    _check_flags(args)
    names = list(dict.fromkeys(name.strip() for name in args.tasks.split(",") if name.strip()))
    if not names:
        raise InputError(f"--tasks {args.tasks!r}: name tasks, separated by commas")
    folder = None if args.task_dir is None else Path(args.task_dir).absolute()
    need("lm_eval", "eval --tasks")
    choose(args)
    model, tokenizer, step = load(args)
    start = time.perf_counter()
    with _quiet():
        results = measured(model, tokenizer, load_tasks(names, folder), args)
    seconds = round(time.perf_counter() - start, 3)
    report = {"checkpoint": args.checkpoint, "step": step, "tasks": results, "seconds": seconds}
    if args.json:
        print_json(report)
    else:
        print("\n".join(figures.tasks(report)))
    return 0


class Loaded(NamedTuple):
    """Tasks of the harness with their data."""

    manager: Any
    """Its index of all tasks."""
    tasks: list[Any]
    """Tasks and groups of tasks."""


def load_tasks(names: Sequence[str], folder: Path | None) -> Loaded:
    """Return the tasks and groups of these names.

    If a folder is given and has all of them, the harness's own tasks are not looked at, and nothing is fetched.

    Raises:
        InputError: there is no task of a name, or its files or data cannot be read.
    """
    from lm_eval.tasks import TaskManager

    place = contextlib.nullcontext() if folder is None else contextlib.chdir(folder)
    try:
        inside = None if folder is None else str(folder)
        manager = TaskManager(include_path=inside, include_defaults=folder is None)
        if not {*names} <= {*manager.all_tasks} and folder is not None:
            manager = TaskManager(include_path=inside)
        if unknown := [name for name in names if name not in manager.all_tasks]:
            raise InputError(f"no task {unknown[0]!r}{_hint(unknown[0], manager.all_tasks)}")
        with place:
            loaded = manager.load([*names])
    except InputError:
        raise
    except Exception as error:  # of YAML, of a task's own code, of a download: it is the user's in any case
        raise InputError(
            f"cannot load the tasks {', '.join(names)}: {type(error).__name__}: {reason(error)}"
        ) from error
    if unsafe := [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]:
        raise InputError(
            f"the task {unsafe[0]} runs code that the model writes: run it by lm_eval itself, in a sandbox"
        )
    groups = [group for name, group in loaded["groups"].items() if name in names]
    members = {task.task_name for group in groups for task in group.get_all_tasks()}
    alone = [task for name, task in loaded["tasks"].items() if name not in members]
    return Loaded(manager, [*groups, *alone])


def measured(
    model: "Network", tokenizer: "Tokenizer", loaded: Loaded, args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Return for each task and group the number of its examples, and its metrics with their standard errors."""
    from lm_eval import simple_evaluate

    from lepton.evals.harness import LeptonLM

    found = simple_evaluate(
        model=LeptonLM(model, tokenizer, args.batch_size, depth=args.depth, think=args.think),
        tasks=loaded.tasks,
        task_manager=loaded.manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        bootstrap_iters=RESAMPLES,
        log_samples=False,
    )
    counts = found.get("n-samples", {})
    report: dict[str, dict[str, Any]] = {}
    for name, values in found["results"].items():
        metrics = {}
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{kind}")
                error = error if isinstance(error, float) else None
                metrics[metric if kind == "none" else key] = {"value": value, "stderr": error}
        report[name] = {"samples": counts.get(name, {}).get("effective"), "metrics": metrics}
    return report


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep stdout for the figures, and let the harness neither log nor start processes."""
    from datasets import disable_progress_bars

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    disable_progress_bars()
    before = os.environ.get(ONE_PROCESS)
    os.environ[ONE_PROCESS] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.environ.pop(ONE_PROCESS)
        if before is not None:
            os.environ[ONE_PROCESS] = before


def _check_flags(args: argparse.Namespace) -> None:
    for name in ("data_dir", "text", "max_tokens", "ablate", "speculation"):
        if getattr(args, name):
            raise InputError(f"--tasks and --{name}: a task has texts and measures of its own; give one of the two")
    if args.task_dir is not None and not Path(args.task_dir).is_dir():
        raise InputError(f"--task_dir {args.task_dir}: no such folder")
    if args.num_fewshot is not None and not 0 <= args.num_fewshot <= MAX_FEWSHOT:
        raise InputError(f"--num_fewshot {args.num_fewshot}: must lie in 0..{MAX_FEWSHOT}")


def _hint(name: str, known: Sequence[str]) -> str:
    close = nearest(name, known)
    return close if len(known) <= FEW or "did you mean" in close else "; `lm_eval ls tasks` lists them"
