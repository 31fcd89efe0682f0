import multiprocessing
import sysconfig
from pathlib import Path

import pytest

from lepton.data import stdlib
from lepton.data.shards import ShardedDataset, read_metadata
from lepton.data.stdlib import cache_folder, default_corpus, stdlib_files
from lepton.data.tokenizer import Tokenizer, load_tokenizer
from lepton.errors import InputError


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library, and a cache of its own."""
    root = tmp_path / "python"
    make_library(root)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(root)}[name])
    monkeypatch.setenv(stdlib.CACHE_VARIABLE, str(tmp_path / "cache"))
    return root


def make_library(root: Path) -> None:
    names = ["b.py", "a/z.py", "a/__init__.py", *(f"module_{i}.py" for i in range(60))]
    left_out = ["site-packages/x.py", "test/x.py", "a/tests/x.py", "idlelib/x.py", "lib2to3/x.py", "pydoc_data/x.py"]
    for name in [*names, *left_out, "a/__pycache__/x.py", "_sysconfigdata_linux.py", "data.txt"]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n" + f"def {path.stem}(x):\n    return x + {len(name)}\n" * 30)
    (root / "latin.py").write_bytes(b"# caf\xe9")


def test_the_files_are_sorted_and_without_packages_and_tests(library: Path) -> None:
    names = [path.relative_to(library).as_posix() for path in stdlib_files()]
    assert names[:3] == ["a/__init__.py", "a/z.py", "b.py"]
    assert names == sorted(names)
    assert len(names) == 63


def test_at_most_so_many_bytes(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = stdlib_files()
    size = sum(path.stat().st_size for path in everything[:10])
    monkeypatch.setattr(stdlib, "MAX_BYTES", size)
    assert stdlib_files() == everything[:10]


def test_the_real_library_is_there_and_below_its_limit() -> None:
    files = stdlib_files()
    assert {"argparse.py", "zipfile.py"} & {path.name for path in files}
    assert 5e6 < sum(path.stat().st_size for path in files) <= 12e6
    assert not any("site-packages" in path.parts for path in files)


def test_it_is_prepared_once_and_says_so(
    library: Path, tmp_path: Path, shipped: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = default_corpus(shipped)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert str(folder) in err
    assert folder.parent == tmp_path / "cache" == cache_folder()
    before = (folder / "metadata.json").stat().st_mtime_ns
    assert default_corpus(shipped) == folder
    assert capsys.readouterr() == ("", "")
    assert (folder / "metadata.json").stat().st_mtime_ns == before
    metadata = read_metadata(folder)
    assert metadata["documents"] == 63
    assert metadata["val_documents"] > 0
    data = ShardedDataset(folder, seq_len=64, seed=0, split="train", vocab_size=50257, tokenizer_hash=shipped.hash)
    assert data.describe().startswith("stdlib: ")


def test_another_tokenizer_gets_another_folder(library: Path, shipped: Tokenizer, tmp_path: Path) -> None:
    form = shipped.to_json().replace('"content":"<|unk|>"', '"content":"<|odd|>"').replace('"<|unk|>":2', '"<|odd|>":2')
    other = Tokenizer.from_json(form)
    assert default_corpus(other) != default_corpus(shipped)


def test_a_half_made_folder_is_not_used(library: Path, shipped: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            default_corpus(shipped)
    assert list(cache_folder().iterdir()) == []
    (cache_folder() / ".stdlib-torn.partial").mkdir()  # what a kill leaves
    assert read_metadata(default_corpus(shipped))["documents"] == 63


def _prepare_in_another_process(root: str, start: "multiprocessing.synchronize.Barrier", results: "object") -> None:
    sysconfig.get_path = lambda name: root  # type: ignore[assignment, misc]
    tokenizer = load_tokenizer()
    start.wait(60)
    folder = default_corpus(tokenizer)
    results.put((str(folder), read_metadata(folder)["documents"]))  # type: ignore[attr-defined]


def test_two_processes_may_start_at_once(library: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    both = [context.Process(target=_prepare_in_another_process, args=(str(library), start, results)) for _ in range(2)]
    for process in both:
        process.start()
    found = {results.get(timeout=60) for _ in both}
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert len(found) == 1
    ((folder, documents),) = found
    assert documents == 63
    assert [path.name for path in cache_folder().iterdir()] == [Path(folder).name]


def test_the_later_of_two_takes_the_data_of_the_first(
    library: Path, shipped: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = stdlib.prepare

    def after_another(sources: list[Path], out: Path, *args: object, **options: object) -> object:
        publish(sources[:5], out, *args, **options)  # type: ignore[arg-type]
        return publish(sources, out, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(stdlib, "prepare", after_another)
    assert read_metadata(default_corpus(shipped))["documents"] == 5


def test_a_python_without_source_is_told(library: Path, shipped: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library / "nowhere"))
    with pytest.raises(InputError, match=r"no source of its standard library in .*nowhere.*--data_dir"):
        default_corpus(shipped)


def test_a_cache_that_cannot_be_written_is_told(library: Path, shipped: Tokenizer) -> None:
    cache_folder().write_text("a file is in the way")
    with pytest.raises(InputError, match=r"cannot write .*cache.*LEPTON_CACHE"):
        default_corpus(shipped)


def test_the_cache_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(stdlib.CACHE_VARIABLE, raising=False)
    assert cache_folder().is_absolute()
    assert "lepton" in cache_folder().parts
