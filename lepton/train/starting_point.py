"""Where a run starts: afresh, from a checkpoint's weights, or at the step of a checkpoint that it resumes."""

import contextlib
import dataclasses
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lepton
from lepton import checkpoint
from lepton.config import LeptonConfig, check_names
from lepton.data.tokenizer import Tokenizer, load_tokenizer
from lepton.distributed import Ranks
from lepton.errors import InputError, naming
from lepton.model.size_config import size_config
from lepton.train.folder import sharded_steps
from lepton.train.settings import TrainSettings
from lepton.train.sharded_checkpoint import SHARDED_SUFFIX, consolidated

DEFAULT_SIZE = "tiny"
AUTO = "auto"


@dataclass(frozen=True)
class StartingPoint:
    """Everything that is decided before the model is built."""

    settings: TrainSettings
    config: LeptonConfig
    size: str | None
    tokenizer: Tokenizer
    weights: dict[str, Any] | None
    """Initial state_dict of the model; None: fresh weights."""
    resumed: dict[str, Any] | None
    """Content of the checkpoint that the run resumes."""
    path: Path | None = None
    """File of that checkpoint."""
    other_data: bool = False
    """Whether the user allows other data than the checkpoint's."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the user on these decisions, a line each."""

    @property
    def step(self) -> int:
        """Optimizer steps done already."""
        return self.resumed["step"] if self.resumed else 0

    @property
    def origin(self) -> dict[str, Any]:
        """The checkpoint's record of its data; empty in checkpoints of earlier versions."""
        return _origin(self.resumed) if self.resumed else {}


def run_folder(settings: TrainSettings, given: Collection[str]) -> Path:
    """Return the folder that the run writes to: that of the resumed checkpoint, unless the user names another."""
    if settings.resume in (None, AUTO) or "checkpoint_dir" in given:
        return Path(settings.checkpoint_dir)
    return Path(settings.resume).parent


def find_starting_point(settings: TrainSettings, given: Collection[str], ranks: Ranks | None = None) -> StartingPoint:
    """Find the checkpoint to start from, if any, and decide the settings; `given` names those that the user chose.

    Of several `ranks`, all start from what rank 0 finds.

    Raises:
        InputError: a checkpoint that is missing, torn or of another shape, or a tokenizer that does not fit.
    """
    path = _resume_path(settings) if ranks is None or ranks.leads else None
    path = path if ranks is None else ranks.told(path)
    if path is not None:
        start = _resume(settings, given, path)
        return dataclasses.replace(start, notes=_skipped(settings, path) + start.notes)
    if settings.init_from:
        return _initialise(settings, Path(settings.init_from))
    tokenizer = _load_tokenizer(settings)
    size = settings.model_size or DEFAULT_SIZE
    shape = {"eos_id": tokenizer.eos_id, "dense": settings.dense, **settings.overrides}
    notes = [f"no checkpoint in {settings.checkpoint_dir} yet: starting afresh"] if settings.resume else []
    return _checked(StartingPoint(settings, size_config(size, **shape), size, tokenizer, None, None, notes=notes))


def going_on(settings: TrainSettings, given: Collection[str]) -> TrainSettings:
    """Return the settings of a run whose processes the launcher has started again: it resumes its newest checkpoint."""
    folder = run_folder(settings, given)
    path = newest(folder)
    return settings if path is None else settings.replace(resume=str(path), init_from=None)


def _resume_path(settings: TrainSettings) -> Path | None:
    """Return the file to resume; a sharded checkpoint is made one file of."""
    if settings.resume == AUTO:
        return newest(settings.checkpoint_dir)
    path = Path(settings.resume) if settings.resume else None
    return consolidated(path) if path is not None and path.suffix == SHARDED_SUFFIX else path


def newest(folder: str | Path) -> Path | None:
    """Return the newest whole checkpoint of a folder as one file, sharded ones included; None: there is none."""
    found = checkpoint.newest_whole(folder)
    step = (None if found is None else checkpoint.step_of(found)) or 0
    for sharded, path in reversed(sharded_steps(folder)):
        if sharded > step:
            with contextlib.suppress(InputError):  # an earlier one may do
                return consolidated(path)
    return found


def _skipped(settings: TrainSettings, path: Path) -> list[str]:
    """Say which newer checkpoints `--resume auto` found and could not use."""
    if settings.resume != AUTO:
        return []
    steps = checkpoint.steps_in(settings.checkpoint_dir)
    chosen = next((step for step, found in steps if found == path), -1)
    return [f"skipped {found}: not whole" for step, found in steps if step > chosen]


def _resume(settings: TrainSettings, given: Collection[str], path: Path) -> StartingPoint:
    content = checkpoint.load(path)
    checkpoint.check_run(path, content)
    config = _config_of(content, path)
    _check_size(settings, content["size"], config, path)
    _check_overrides(settings, config, path)
    tokenizer = _tokenizer_of(settings, content, path)
    saved, asked = content["training"], settings
    with naming(path):
        settings, changes = settings.resumed_from(saved, given)
    settings = settings.replace(
        model_size=content["size"],
        dense=saved["dense"],
        overrides=saved["overrides"],
        checkpoint_dir=str(run_folder(asked, given)),
    )
    other_data = settings.allow_other_data
    if "data_dir" in given:
        other_data |= _names_other_folder(settings.data_dir, saved.get("data_dir"), _origin(content))
    else:
        settings = settings.replace(data_dir=_data_dir(settings.data_dir, _origin(content), path))
    if content["step"] > settings.max_steps:
        raise InputError(f"{path} is at step {content['step']}: give --max_steps more than {content['step']}")
    notes = [f"resuming {path} at step {content['step']:,}", *(f"changed {change}" for change in changes)]
    if content["optimizer"]["kind"] != settings.optimizer:
        notes.append(f"{settings.optimizer} starts without the momentum of {content['optimizer']['kind']}")
    weights = content["model"]
    return _checked(
        StartingPoint(settings, config, content["size"], tokenizer, weights, content, path, other_data, notes)
    )


def _origin(content: Mapping[str, Any]) -> dict[str, Any]:
    origin = content.get("data")
    return origin if isinstance(origin, dict) else {}


def _data_dir(saved: str | None, origin: Mapping[str, Any], path: Path) -> str | None:
    """Return the data folder of a resumed run: the absolute path that the checkpoint records.

    If that folder is gone (the project has moved), try the one of the settings, relative to the present folder.
    """
    before = str(origin.get("folder", ""))
    if os.path.isdir(before):
        return before
    if saved is None or os.path.isdir(saved):
        return saved
    places = before or f"{saved} (relative to the folder in which it was started)"
    raise InputError(f"the data of {path} are not where they were: {places}; name their folder with --data_dir")


def _names_other_folder(named: str | None, saved: str | None, origin: Mapping[str, Any]) -> bool:
    """Whether the user names another data folder than the checkpoint's: then other data are intended."""
    before = str(origin.get("folder", saved or ""))
    return named != saved and os.path.realpath(named or "") != os.path.realpath(before)


def _initialise(settings: TrainSettings, path: Path) -> StartingPoint:
    content = checkpoint.load(path)
    config = _config_of(content, path)
    _check_size(settings, content.get("size"), config, path)
    if settings.dense and not config.dense:
        raise InputError(f"{path} has dense=False not True: weights with the ideas cannot start the dense baseline")
    config = config.replace(**settings.overrides)  # fields that are not shapes, such as the window, may change
    tokenizer = _tokenizer_of(settings, content, path)
    return _checked(StartingPoint(settings, config, content.get("size"), tokenizer, content["model"], None))


def _config_of(content: dict[str, Any], path: Path) -> LeptonConfig:
    with naming(path):
        return LeptonConfig.from_dict(content["config"])


def _check_overrides(settings: TrainSettings, config: LeptonConfig, path: Path) -> None:
    """Raise InputError if the user asks for a field's value that is not the checkpoint's."""
    check_names(settings.overrides)
    differing = ["dense=False not True"] if settings.dense and not config.dense else []
    differing += _differing(config, config.replace(**settings.overrides), "=")
    if differing:
        raise InputError(f"{path} has {', '.join(differing)}: a resumed model keeps its shape")


def _differing(config: LeptonConfig, wanted: LeptonConfig, sign: str) -> list[str]:
    """Return the fields of `config` that are not as wanted, such as ``window=256 not 128``."""
    have, want = config.flat_dict(), wanted.flat_dict()
    names = [name for name in {**have, **want} if have.get(name) != want.get(name)]
    return [f"{name}{sign}{have.get(name)} not {want.get(name)}" for name in names]


def _check_size(settings: TrainSettings, size: str | None, config: LeptonConfig, path: Path) -> None:
    """Raise InputError if the user names a size that is not the checkpoint's."""
    if settings.model_size is None or settings.model_size == size:
        return
    differing = ", ".join(_differing(config, size_config(settings.model_size), " "))
    if size is not None or differing:
        raise InputError(
            f"{path} holds a model of size '{size}', --model_size asks for '{settings.model_size}' ({differing}); "
            "leave --model_size out or start another --checkpoint_dir"
        )


def _tokenizer_of(settings: TrainSettings, content: dict[str, Any], path: Path) -> Tokenizer:
    """Return the checkpoint's own tokenizer; one that --tokenizer names must be the same."""
    stored = content.get("tokenizer")
    if stored is None:
        return _load_tokenizer(settings)
    with naming(path):
        tokenizer = Tokenizer.from_json(stored)
    if settings.tokenizer and load_tokenizer(settings.tokenizer).hash != tokenizer.hash:
        raise InputError(f"{path} was trained with another tokenizer than {settings.tokenizer}; leave --tokenizer out")
    return tokenizer


def _load_tokenizer(settings: TrainSettings) -> Tokenizer:
    beside_train_py = Path(lepton.__file__).resolve().parent.parent
    return load_tokenizer(settings.tokenizer, beside=beside_train_py)


def _checked(start: StartingPoint) -> StartingPoint:
    if start.tokenizer.size > start.config.vocab_size:
        raise InputError(
            f"the tokenizer has {start.tokenizer.size} ids and the model's vocabulary {start.config.vocab_size}: "
            "name a smaller tokenizer with --tokenizer"
        )
    return start
