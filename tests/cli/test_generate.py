"""`python -m lepton generate`: streamed text, stop texts, figures, and what a user can get wrong."""

import argparse
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lepton import checkpoint
from lepton.cli import generate as command
from lepton.cli.loading import load
from lepton.cli.main import INTERRUPTED
from lepton.generate import generate
from tests.cli.tiny import run, run_json, save_tiny, tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "final.pt"
    return path, *save_tiny(path)


def command_of(path):
    """Run in fp32, as the comparisons do, also where the hardware has bf16."""
    return "generate", "--checkpoint", path, "--dtype", "fp32"


def expected(saved, prompt, **options):
    _, model, tokenizer = saved
    ids = tokenizer.encode(prompt)
    return tokenizer.decode(generate(model, ids, **options)[len(ids) :])


def test_text_is_the_prompt_and_its_continuation(saved):
    code, out, err = run(*command_of(saved[0]), "--prompt", "The Käse", "--seed", 3)
    assert (code, err) == (0, "")
    assert out == "The Käse" + expected(saved, "The Käse", seed=3) + "\n"


def test_sampling_flags_reach_the_engine(saved):
    flags = ["--max-new-tokens", 12, "--temperature", 1.5, "--top_p", 0.5, "--top-k", 9, "--seed", 1]
    out = run(*command_of(saved[0]), "--prompt", "fox", *flags)[1]
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.5, "top_k": 9, "seed": 1}
    assert out == "fox" + expected(saved, "fox", **options) + "\n"


def test_json_is_alone_on_stdout(saved):
    figures = run_json(*command_of(saved[0]), "--prompt", "fox", "--seed", 2, "--max_new_tokens", 9)
    assert figures["prompt"] == "fox"
    assert figures["text"] == expected(saved, "fox", seed=2, max_new_tokens=9)
    assert figures["new_tokens"] == 9
    assert figures["prompt_tokens"] == len(saved[2].encode("fox"))
    assert figures["ended_by"] == "max_new_tokens"
    assert figures["tokens_per_second"] > 0


def test_json_names_the_end_of_a_document(tmp_path):
    model, tokenizer = tiny_model(), save_tiny(tmp_path / "x.pt")[1]
    first = generate(model, tokenizer.encode("fox"), 1, temperature=0)[-1]
    ends = model.config.replace(eos_id=first).to_dict()
    checkpoint.save(tmp_path / "x.pt", checkpoint.load(tmp_path / "x.pt") | {"config": ends})
    figures = run_json(*command_of(tmp_path / "x.pt"), "--prompt", "fox", "--temperature", 0)
    assert (figures["ended_by"], figures["new_tokens"]) == ("end of document", 1)


def test_a_prompt_from_stdin(saved):
    words = [*command_of(saved[0]), "--prompt", "-", "--max_new_tokens", 3, "--seed", 0]
    out = run(*words, stdin="süß\n".encode())[1]
    assert out == "süß" + expected(saved, "süß", max_new_tokens=3, seed=0) + "\n"
    assert "�" in run(*words, stdin=b"\xff\xfe fox")[1], "bytes that are no UTF-8 do not crash"


def test_a_stop_text_ends_the_output_and_is_kept(saved):
    words = [*command_of(saved[0]), "--prompt", "fox", "--seed", 5, "--temperature", 2]
    whole = run(*words)[1].removesuffix("\n")
    stop = whole[23:27]
    end = whole.index(stop, 3) + len(stop)
    assert run(*words, "--stop", "no such text at all", "--stop", stop)[1] == whole[:end] + "\n"
    assert run_json(*words, "--stop", stop)["ended_by"] == "stop"


class Pieces:
    """A tokenizer whose ids stand for given strings."""

    def __init__(self, pieces):
        self.push = pieces.__getitem__
        self.flush = lambda: ""

    def stream_decoder(self):
        return self


@pytest.mark.parametrize(
    ("stops", "text", "taken"),
    [
        ([], "abcdeabf", 4),
        (["cd"], "abcd", 2),
        (["e"], "abcde", 2),
        (["bcdea"], "abcdea", 3),
        (["zz"], "abcdeabf", 4),
        (["f", "ea", "d"], "abcd", 2),
        (["abf"], "abcdeabf", 4),
    ],
)
def test_stop_texts_are_found_across_tokens(stops, text, taken):
    ids = []
    pieces = list(command.continuation(iter(range(4)), Pieces(["abc", "de", "ab", "f"]), stops, ids))
    assert "".join(pieces) == text
    assert len(ids) == taken


def test_an_incomplete_character_is_shown_at_the_end(saved):
    tokenizer = saved[2]
    ids = tokenizer.encode("東")
    assert len(ids) > 1
    assert "".join(command.continuation(iter(ids), tokenizer, [], [])) == "東"
    assert "".join(command.continuation(iter(ids[:-1]), tokenizer, [], [])) == "�"


def test_interruption_ends_the_line(saved, monkeypatch):
    def interrupted(*args, **options):
        yield from saved[2].encode("jumps")
        raise KeyboardInterrupt

    monkeypatch.setattr("lepton.generate.generate_stream", interrupted)
    code, out, err = run(*command_of(saved[0]), "--prompt", "fox ")
    assert (code, out, err) == (INTERRUPTED, "fox jumps\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one child process")
def test_ctrl_c_in_a_real_process(saved):
    words = [
        "generate",
        "--checkpoint",
        str(saved[0]),
        "--prompt",
        "fox",
        "--temperature",
        "0",
        "--max_new_tokens",
        "1000000",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "lepton", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout.read(20).startswith(b"fox")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (INTERRUPTED, b"")
    assert out.endswith(b"\n")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--temperature", -1], "temperature=-1.0"),
        (["--top_p", 0], "top_p=0.0"),
        (["--top_k", 0], "top_k=0"),
        (["--max_new_tokens", -5], "max_new_tokens=-5"),
        (["--stop", ""], "--stop ''"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt does not exist"),
        (["--device", "cudda"], "device 'cudda'"),
        (["--tokenizer", "nowhere.json"], "nowhere.json"),
        (["--dtype", "fp23"], "did you mean 'fp32'"),
    ],
)
def test_mistakes_are_one_line(saved, flags, named):
    code, out, err = run(*command_of(saved[0]), "--prompt", "fox", *flags)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err


def test_a_checkpoint_without_a_tokenizer(tmp_path, saved):
    save_tiny(tmp_path / "bare.pt", tokenizer=None)
    (tmp_path / "t.json").write_text(saved[2].to_json(), encoding="utf-8")
    words = [*command_of(tmp_path / "bare.pt"), "--prompt", "fox", "--seed", 1]
    code, _, err = run(*words)
    assert code == 2
    assert "carries no tokenizer" in err
    assert run(*words, "--tokenizer", tmp_path / "t.json")[1] == "fox" + expected(saved, "fox", seed=1) + "\n"


def test_a_tokenizer_larger_than_the_model(tmp_path):
    small = tiny_model().config.replace(vocab_size=290)
    save_tiny(tmp_path / "x.pt", config=small.to_dict())
    code, _, err = run(*command_of(tmp_path / "x.pt"), "--prompt", "fox")
    assert code == 2
    assert "290" in err


def test_the_loaded_model_is_the_saved_one(saved):
    path, model, tokenizer = saved
    args = argparse.Namespace(checkpoint=path, tokenizer=None, device="cpu", dtype="fp32")
    loaded, its_tokenizer, step = load(args)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert (its_tokenizer.hash, step, loaded.training) == (tokenizer.hash, 7, False)
    args.dtype = "bf16"
    assert load(args)[0].embed.weight.dtype == torch.bfloat16
