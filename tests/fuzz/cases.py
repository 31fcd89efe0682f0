"""A case: from a seed and a number to a finding. The same seed and number give the same case, alone or among others."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import archives, damage, formats
from tests.fuzz.calls import CALLS, Call, Invocation
from tests.fuzz.confinement import confine
from tests.fuzz.judge import Problem, problem_of_error, same
from tests.fuzz.targets import TARGETS, Target, Untrue
from tests.fuzz.workers import Limits, attempt
from tests.fuzz.world import World

WHOLE, CHECKED = (
    (".xz", ".gz", ".pt", ".safetensors"),
    (archives.zip_field, formats.xz_form, *formats.EDITS[".safetensors"]),
)
"""Kinds of files with a checksum or hash of their content, and edits that leave that hash as it was."""
BOMB_SHARE, KIND_SHARE, EDIT_SHARE = 0.004, 0.06, 0.5


@dataclass(frozen=True)
class Finding:
    """What a case came to."""

    case: str
    title: str
    """The target and what was done."""
    problem: Problem | None
    refused: bool = False
    """Ended in an InputError as it should be."""

    @property
    def outcome(self) -> str:
        """One word."""
        return "failed" if self.problem else "refused" if self.refused else "accepted"


class Fuzzer:
    """Runs cases by name: ``file-12``, ``call-3``."""

    def __init__(self, specimens: Path, work: Path, seed: int, limits: Limits) -> None:
        self.world = World(specimens)
        self.work, self.seed, self.limits = work, seed, limits
        self._confined = 0
        self._originals: dict[tuple[str, str], Any] = {}

    def run(self, case: str) -> Finding:
        """Run one case. What is wrong with the fuzzer itself is a finding, too."""
        random = Random(f"{self.seed} {case}")
        place = self.work / case
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        self._enter(place)
        try:
            finding = (self._file if case.startswith("file") else self._call)(case, random, place)
        except Exception as error:
            problem = problem_of_error(error)
            finding = Finding(
                case, "fuzzer", Problem(f"fuzzer: {problem and problem.cause}", problem.details if problem else "")
            )
        if finding.problem is None:
            shutil.rmtree(place, ignore_errors=True)
        return finding

    def _enter(self, place: Path) -> None:
        """Make `place` the working folder; nothing that is written elsewhere gets there."""
        if self._confined != os.getpid():
            confine(self.work)
            self._confined = os.getpid()
            os.environ["LEPTON_CACHE"] = str(self.work / "cache")
        os.chdir(place)

    def title(self, case: str) -> str:
        """Return the name of what a case aims at, for one whose process died."""
        random = Random(f"{self.seed} {case}")
        return (_target(random) if case.startswith("file") else random.choice(CALLS)).name

    def _file(self, case: str, random: Random, place: Path) -> Finding:
        target = _target(random)
        copy, victim = self._copy(target, random, place)
        path, what, checked = _damage(random, copy, victim)
        title = f"{target.name}: {victim.relative_to(place)}: {what}"
        (place / "title.txt").write_text(title, encoding="utf-8")
        original = self._original(target) if checked and not target.skips else None
        value, error = attempt(lambda: target.load(self.world, path), self.limits)
        if error is not None:
            return self._refusal(case, title, error)
        if original is not None and not same(value, original):
            problem = Problem(f"{target.name}: silently wrong", f"differs in {_difference(original, value)}")
            return Finding(case, title, problem)
        wrong = target.check(self.world, value)
        return Finding(case, title, Problem(f"{target.name}: {wrong}", what) if wrong else None)

    def _refusal(
        self, case: str, title: str, error: BaseException, accepted: tuple[type[Exception], ...] = ()
    ) -> Finding:
        if isinstance(error, Untrue):
            return Finding(case, title, Problem(f"{title.partition(':')[0]}: {error}", title))
        problem = problem_of_error(error, accepted)
        return Finding(case, title, problem, refused=problem is None)

    def _copy(self, target: Target, random: Random, place: Path) -> tuple[Path, Path]:
        """Copy the specimen; return the copy, and the file in it that is to be damaged."""
        source = self.world.folder / target.specimen
        if source.is_file():
            shutil.copyfile(source, place / source.name)
            return place / source.name, place / source.name
        shutil.copytree(source, place / source.name)
        files = sorted(path for path in (place / source.name).rglob(target.damaged) if path.is_file())
        return place / source.name, random.choice(files)

    def _original(self, target: Target) -> Any:
        """What an undamaged file gives; a finding of its own if that fails."""
        key = (target.name, target.specimen)
        if key not in self._originals:
            place = self.work / f"original-{target.name.replace('/', '-')}-{os.getpid()}"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            copy, _ = self._copy(target, Random(0), place)
            self._originals[key] = target.load(self.world, copy)
            shutil.rmtree(place)
        return self._originals[key]

    def _call(self, case: str, random: Random, place: Path) -> Finding:
        call: Call = random.choice(CALLS)
        invocation: Invocation = call.draw(random, self.world, place)
        title = f"{call.name}({invocation.shown})"
        (place / "title.txt").write_text(title, encoding="utf-8", errors="backslashreplace")
        value, error = attempt(invocation.action, self.limits)
        if error is not None:
            return self._refusal(case, title, error, invocation.accepted)
        wrong = call.check(self.world, value)
        return Finding(case, title, Problem(f"{call.name}: {wrong}", title) if wrong else None)


def _target(random: Random) -> Target:
    return random.choices(TARGETS, [target.weight for target in TARGETS])[0]


def _damage(random: Random, copy: Path, victim: Path) -> tuple[Path, str, bool]:
    """Damage `victim`; return the name to open, what was done, and whether a hash covers it."""
    content = victim.read_bytes()
    ending = next((end for end in formats.EDITS if victim.name.endswith(end)), "")
    edits, bombs = formats.EDITS.get(ending, ()), formats.BOMBS.get(ending, ())
    draw = random.random()
    if draw < KIND_SHARE:
        kind = random.choice(damage.KINDS)
        victim.unlink()
        name = kind(random, victim)
        return (Path(name) if victim == copy else copy), kind.__name__, False
    if bombs and draw < KIND_SHARE + BOMB_SHARE:
        edit: formats.Edit = random.choice(bombs)
    elif edits and random.random() < EDIT_SHARE:
        edit = random.choice(edits)
    else:
        edit = random.choice(damage.BYTES)
    victim.write_bytes(edit(random, content))
    by_bytes = edit in damage.BYTES and edit is not damage.extension  # another whole stream may follow in a file
    return copy, edit.__name__, ending.endswith(WHOLE) and (by_bytes or edit in CHECKED)


def _difference(a: Any, b: Any, place: str = "result") -> str:
    """Name the first place where two results differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{place} has other keys"
        return next((_difference(a[key], b[key], f"{place}.{key}") for key in a if not same(a[key], b[key])), place)
    return place
