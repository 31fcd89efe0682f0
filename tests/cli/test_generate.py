"""`python -m lepton generate`: streamed text, stop texts, figures, and what a user can get wrong."""

import argparse
import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lepton import checkpoint
from lepton.api import Lepton
from lepton.cli import generate as command
from lepton.cli.loading import load
from lepton.cli.main import INTERRUPTED
from tests.cli.tiny import command_of, expected, run, run_json, save_tiny, tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """A checkpoint of a model without drafts and uncertainty."""
    path = tmp_path_factory.mktemp("baseline") / "final.pt"
    config = tiny_model().config.replace(drafts=0, uncertainty=False)
    save_tiny(path, model=Lepton(config).state_dict(), config=config.to_dict())
    return path


def test_text_is_the_prompt_and_its_continuation(saved):
    code, out, err = run(*command_of(saved[0]), "--prompt", "The Käse", "--seed", 3)
    assert (code, err) == (0, "")
    assert out == "The Käse" + expected(saved, "The Käse", seed=3) + "\n"


def test_sampling_flags_reach_the_engine(saved):
    flags = ["--max-new-tokens", 12, "--temperature", 1.5, "--top_p", 0.5, "--top-k", 9, "--seed", 1]
    out = run(*command_of(saved[0]), "--prompt", "fox", *flags)[1]
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.5, "top_k": 9, "seed": 1}
    assert out == "fox" + expected(saved, "fox", **options) + "\n"


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--depth", 0.5], {"depth": 0.5}),
        (["--depth", 0], {"depth": 0}),
        (["--think", 0], {"think": 0}),
        (["--think", 5], {"think": 5}),
        (["--no-speculative", "--temperature", 2], {"use_speculative": False, "temperature": 2.0}),
    ],
)
def test_the_models_knobs_reach_it(saved, flags, options):
    out = run(*command_of(saved[0]), "--prompt", "The fox", "--seed", 1, "--max_new_tokens", 20, *flags)[1]
    assert out == "The fox" + expected(saved, "The fox", seed=1, max_new_tokens=20, **options) + "\n"


def test_json_is_alone_on_stdout(saved):
    figures = run_json(*command_of(saved[0]), "--prompt", "fox", "--seed", 2, "--max_new_tokens", 9)
    assert figures["prompt"] == "fox"
    assert figures["text"] == expected(saved, "fox", seed=2, max_new_tokens=9)
    assert figures["new_tokens"] == 9
    assert figures["prompt_tokens"] == len(saved[2].encode("fox"))
    assert figures["ended_by"] == "max_new_tokens"
    assert figures["tokens_per_second"] > 0
    _, model, tokenizer = saved
    tokens, uncertainties = model.generate_with_uncertainty(tokenizer.encode("fox"), 9, seed=2)
    assert figures["tokens"] == tokens[-9:]
    assert figures["uncertainties"] == pytest.approx(uncertainties, abs=1e-4)
    stats = model.generate_with_stats(tokenizer.encode("fox"), 9, seed=2)[1]
    found, expected_stats = figures["stats"], stats.to_dict()
    assert found.keys() == expected_stats.keys()
    for name in ("new_tokens", "mean_depth"):  # how many tokens are drafted depends on measured times
        assert found[name] == expected_stats[name]
    assert 1 < found["forward_calls"] <= 9


def test_json_of_a_model_without_the_ideas(baseline):
    figures = run_json(*command_of(baseline), "--prompt", "fox", "--seed", 2, "--max_new_tokens", 9)
    assert figures["uncertainties"] is None
    assert figures["stats"] == {
        "new_tokens": 9,
        "forward_calls": 9,
        "tokens_per_step": 1.0,
        "acceptance": [],
        "mean_depth": 3.0,
    }
    code, out, err = run(*command_of(baseline), "--prompt", "fox", "--uncertainty")
    assert (code, out) == (2, "")
    assert err.startswith("error: this model has no uncertainty head")


def test_json_names_the_end_of_a_document(tmp_path):
    model, tokenizer = tiny_model(), save_tiny(tmp_path / "x.pt")[1]
    first = model.generate(tokenizer.encode("fox"), 1, temperature=0)[-1]
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
    tokens = []
    stream = ((token, token / 10) for token in range(4))
    pieces = list(command.continuation(stream, Pieces(["abc", "de", "ab", "f"]), stops, tokens))
    assert "".join(piece.text for piece in pieces) == text
    assert tokens == [(token, token / 10) for token in range(taken)]
    assert [piece.uncertainty for piece in pieces] == [token / 10 for token in range(taken)]


def test_an_incomplete_character_is_shown_at_the_end(saved):
    tokenizer = saved[2]
    ids = tokenizer.encode("東")
    assert len(ids) > 1
    unsure = [0.2, 0.7, *[0.1] * (len(ids) - 2)]
    tokens = list(zip(ids, unsure, strict=True))
    assert list(command.continuation(tokens, tokenizer, [], [])) == [("東", 0.7)]
    assert list(command.continuation(tokens[:-1], tokenizer, [], [])) == [("�", max(unsure[:-1]))]


def test_interruption_ends_the_line(saved, monkeypatch):
    def interrupted(stream):
        yield from ((token, 0.0) for token in saved[2].encode("jumps"))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "tokens", interrupted)
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
        [sys.executable, "-m", "lepton", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        # A shell starts what runs in its background with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.read(20).startswith(b"fox")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (INTERRUPTED, b"")
    assert out.endswith(b"\n")


# Texts that begin with a dash, escapes, the empty prompt, stdin


@pytest.mark.parametrize("prompt", ["---", "-x", "-->", "--no such flag", "--", "-1", "a=b"])
def test_a_prompt_may_look_like_a_flag(saved, prompt):
    words = [*command_of(saved[0]), "--max_new_tokens", 3, "--seed", 0]
    out = prompt + expected(saved, prompt, max_new_tokens=3, seed=0) + "\n"
    assert run(*words, "--prompt", prompt) == (0, out, "")
    assert run(*words, f"--prompt={prompt}") == (0, out, "")


def test_stop_texts_take_escapes_and_dashes(saved, monkeypatch):
    assert command.unescaped(r"\n\t\r\\n\d") == "\n\t\r\\n\\d"
    monkeypatch.setattr(command, "tokens", lambda stream: ((token, 0.0) for token in saved[2].encode("ab-->c\nd")))
    words = [*command_of(saved[0]), "--prompt", "fox "]
    assert run(*words, "--stop", "-->")[1] == "fox ab-->\n"
    assert run(*words, "--stop", r"\n")[1] == "fox ab-->c\n\n"
    assert run(*words, "--stop", r"\\n")[1] == "fox ab-->c\nd\n"


def test_an_empty_prompt_starts_a_document(saved):
    _, model, tokenizer = saved
    figures = run_json(*command_of(saved[0]), "--prompt", "", "--seed", 2, "--max_new_tokens", 9)
    tokens = model.generate([model.config.eos_id], 9, seed=2)
    assert (figures["prompt"], figures["prompt_tokens"], figures["tokens"]) == ("", 1, tokens[1:])
    assert figures["text"] == tokenizer.decode(tokens)


class Keyboard(io.BytesIO):
    def isatty(self):
        return True


def test_stdin_without_a_text(saved, monkeypatch, capsys):
    code, out, err = run(*command_of(saved[0]), "--prompt", "-", stdin=b"\n")
    assert (code, out) == (2, "")
    assert err.startswith("error: --prompt -: nothing came from stdin")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Keyboard("süß\n".encode())))
    assert command._read_stdin() == "süß"
    assert capsys.readouterr().err.startswith("type the prompt, and Ctrl-")


def test_advice_names_an_earlier_checkpoint_only_where_there_is_one(tmp_path):
    weights = tiny_model().state_dict()
    weights["blocks.0.mlp.down.weight"].fill_(3e38)
    save_tiny(tmp_path / "step_7.pt", model=weights)
    words = [*command_of(tmp_path / "step_7.pt"), "--prompt", "fox"]
    assert run(*words)[2] == "error: the model's logits are not finite: its training diverged\n"
    save_tiny(tmp_path / "step_3.pt", step=3)
    assert run(*words)[2].endswith(f"diverged; an earlier checkpoint is {tmp_path / 'step_3.pt'}\n")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--prompt"], "--prompt: expected one argument"),
        (["--prompt", "--seed", 3], "--prompt: expected one argument"),
        (["--seed", 1 << 64], "seed=18446744073709551616: must be a whole number"),
        (["--think", 10**6], "think=1000000: must be a whole number, in 0..256 rounds"),
        (["--temperature", -1], "temperature=-1.0"),
        (["--top_p", 0], "top_p=0.0"),
        (["--top_k", 0], "top_k=0"),
        (["--max_new_tokens", -5], "max_new_tokens=-5"),
        (["--depth", 1.5], "depth=1.5"),
        (["--think", -1], "think=-1"),
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
