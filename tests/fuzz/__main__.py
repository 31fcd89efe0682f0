"""`python -m tests.fuzz`: run cases, group the failures by cause, leave with 1 if there are any."""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

EXAMPLES = 3
"""Files that are kept of each cause, and cases that are listed."""


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Damaged files and hostile calls.")
    parser.add_argument("--files", type=int, default=1000, metavar="N", help="damaged files (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=300, metavar="N", help="calls (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at once")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="such as file-17: these cases alone")
    parser.add_argument("--target", metavar="TEXT", help="only cases of targets whose name holds this")
    parser.add_argument("--keep", metavar="DIR", help="where the files of failures go (default: a temporary folder)")
    args = parser.parse_args()
    # Before anything is imported that reads them: threads of a library do not survive a fork.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0"}

    import torch
    import torch._dynamo  # which building a model imports: once here, not in each process

    torch.set_num_threads(1)
    from tests.fuzz import specimens
    from tests.fuzz.cases import Finding, Fuzzer, Problem
    from tests.fuzz.workers import Died, Limits, run_all

    work = Path(args.keep or tempfile.mkdtemp(prefix="lepton-fuzz-")).absolute()
    with tempfile.TemporaryDirectory() as temporary:
        _in_a_process(lambda: specimens.make(Path(temporary)))
        os.environ["LEPTON_CACHE"] = f"{temporary}/cache"
        fuzzer = Fuzzer(Path(temporary), work, args.seed, limits := Limits())
        cases = args.only or [f"file-{i}" for i in range(args.files)] + [f"call-{i}" for i in range(args.calls)]
        if args.target:
            cases = [case for case in cases if args.target in fuzzer.title(case)]
        findings: dict[str, list[Finding]] = defaultdict(list)
        counts: Counter[str] = Counter()
        start = time.monotonic()
        for case, answer in run_all(cases, fuzzer.run, jobs=args.jobs, limits=limits):
            finding = answer
            if isinstance(answer, Died):
                note = work / case / "title.txt"
                title = note.read_text(encoding="utf-8", errors="replace") if note.exists() else fuzzer.title(case)
                reason = f"signal {answer.signal}" if answer.signal > 0 else f"exit code {-answer.signal}"
                finding = Finding(case, title, Problem(f"the process died ({reason}): {fuzzer.title(case)}", title))
            counts[finding.outcome] += 1
            if finding.problem:
                group = findings[finding.problem.cause]
                group.append(finding)
                if len(group) > EXAMPLES:
                    shutil.rmtree(work / case, ignore_errors=True)
            if args.only:
                print(f"{case}: {finding.title}: {finding.outcome}")
    _report(findings, work, args.seed)
    summary = ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))
    print(f"{len(cases):,} cases in {time.monotonic() - start:.0f} s: {summary}; {len(findings)} causes of failure")
    with contextlib.suppress(OSError):
        work.rmdir()
    return int(bool(findings))


def _report(findings: "dict[str, list]", work: Path, seed: int) -> None:
    for cause, group in sorted(findings.items(), key=lambda item: -len(item[1])):
        print(f"\n## {len(group)} x {cause}")
        for finding in group[:EXAMPLES]:
            print(f"  {finding.case}: {finding.title[:300]}")
        print("  " + "\n  ".join(group[0].problem.details.splitlines()))
        print(f"  repeat: python -m tests.fuzz --seed {seed} --only {group[0].case}   (files: {work / group[0].case})")


def _in_a_process(action: Callable[[], None]) -> None:
    """Run `action` in a process of its own, so that this one can be forked afterwards."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"the specimens could not be made: exit code {process.exitcode}")


if __name__ == "__main__":
    sys.exit(main())
