"""`python -m lepton generate --memory`: a file that is made, used and updated."""

import itertools

import pytest
import torch

from lepton.cli import generate as command
from lepton.cli.main import INTERRUPTED
from lepton.errors import InputError
from tests.cli.tiny import command_of, expected, run, run_json


def test_the_memory_file_is_made_used_and_updated(saved, tmp_path):
    _, model, tokenizer = saved
    path = tmp_path / "memory.safetensors"
    words = [*command_of(saved[0]), "--seed", 3, "--max_new_tokens", 60, "--memory", path]
    first = run_json(*words, "--prompt", "The fox jumps over the lazy dog.")
    assert first["text"] == expected(saved, first["prompt"], seed=3, max_new_tokens=60)
    kept = model.new_state(1, memory=path).memory
    assert kept.parts["memory"].matrix_BNHU.any()
    second = run_json(*words, "--prompt", "Ein Käse")
    tokens, state = model.generate_with_state(tokenizer.encode("Ein Käse"), 60, seed=3, memory=kept)
    assert second["tokens"] == tokens[-60:]
    assert second["text"] != expected(saved, "Ein Käse", seed=3, max_new_tokens=60), "the memory matters"
    again = model.new_state(1, memory=path).part("memory").matrix_BNHU
    torch.testing.assert_close(again, state.part("memory").matrix_BNHU)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_text_can_be_remembered_without_generating(saved, tmp_path):
    _, model, tokenizer = saved
    path = tmp_path / "memory.safetensors"
    words = [*command_of(saved[0]), "--prompt", "The fox", "--memory", path, "--max_new_tokens", 0]
    assert run(*words) == (0, "The fox\n", "")
    with torch.no_grad():
        ids = tokenizer.encode("The fox")
        opens = torch.arange(len(ids))[None] == len(ids) - 1
        read = model(torch.tensor([ids]), opens=opens).state
    torch.testing.assert_close(
        model.new_state(1, memory=path).part("memory").matrix_BNHU, read.part("memory").matrix_BNHU
    )


def test_ctrl_c_keeps_what_was_read_and_a_fault_what_was_there(saved, tmp_path, monkeypatch):
    _, model, tokenizer = saved
    path = tmp_path / "memory.safetensors"
    words = [*command_of(saved[0]), "--prompt", "fox ", "--seed", 1, "--memory", path]

    def leaving(error, after):
        def tokens(stream):
            yield from ((token, 0.0) for token in itertools.islice(stream, after))
            raise error

        monkeypatch.setattr(command, "tokens", tokens)
        return run(*words)[0]

    assert leaving(KeyboardInterrupt(), 0) == INTERRUPTED
    assert not path.exists(), "nothing was read"
    assert leaving(KeyboardInterrupt(), 7) == INTERRUPTED
    state = model.generate_with_state(tokenizer.encode("fox "), 7, seed=1)[1]
    torch.testing.assert_close(
        model.new_state(1, memory=path).part("memory").matrix_BNHU, state.part("memory").matrix_BNHU
    )
    before = path.read_bytes()
    assert leaving(InputError("fault"), 7) == 2
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("prompt", "name", "named"),
    [
        ("", "new", "--memory needs a --prompt"),
        ("fox", "file/new", "file is not a folder that can be written to"),
        ("fox", "file", "file"),
        ("fox", ".", ""),
    ],
)
def test_memory_files_that_cannot_be(saved, tmp_path, prompt, name, named):
    (tmp_path / "file").write_bytes(b"no memory")
    code, out, err = run(*command_of(saved[0]), "--prompt", prompt, "--memory", tmp_path / name)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert named in err
