"""`python -m lepton chat`: lines of a pipe, and the keys of a terminal."""

import contextlib
import io
import signal
import sys

import pytest
import torch

from lepton.cli.main import INTERRUPTED, main
from lepton.cli.shading import MARK, visible
from lepton.data.chat import ChatTemplate, Message
from lepton.engine.options import GenerationOptions
from lepton.generate.conversation import Conversation
from tests.cli.tiny import run, save_tiny
from tests.streams import Watched


def command_of(saved, *words):
    return ["chat", "--checkpoint", saved[0], "--dtype", "fp32", *words]


def expected(saved, *questions, memory=None, system=None, **options):
    """The answers as lines, and the conversation."""
    _, model, tokenizer = saved
    talk = Conversation(model, tokenizer, GenerationOptions(**options), memory=memory, system=system)
    answers = [tokenizer.decode([token for token, _ in talk.answer(question)]) for question in questions]
    return "".join(answer + "\n" for answer in answers), talk


def test_each_line_of_a_pipe_is_answered(saved):
    words = command_of(saved, "--seed", 3, "--max_new_tokens", 20)
    code, out, err = run(*words, stdin="The fox\n\nEin süßer Käse\r\nlast".encode())
    wanted, _ = expected(saved, "The fox", "Ein süßer Käse", "last", seed=3, max_new_tokens=20)
    assert (code, out, err) == (0, wanted, "")


def test_no_line_no_answer(saved):
    assert run(*command_of(saved)) == (0, "", "")


def test_a_stop_text_ends_an_answer(saved):
    words = command_of(saved, "--seed", 3, "--max_new_tokens", 30)
    plain = run(*words, stdin=b"fox")[1]
    stop = plain[8:10]
    assert plain.index(stop) == 8
    assert run(*words, "--stop", stop, stdin=b"fox")[1] == plain[: plain.index(stop) + 2] + "\n"
    code, _, err = run(*words, "--stop", "")
    assert (code, "--stop ''" in err) == (2, True)


def test_the_system_message_comes_first(saved, tmp_path):
    """What the model remembers in the end shows that it was read."""
    matrices = []
    for system in ("Bark.", None):
        path = tmp_path / "memory.safetensors"
        words = ["--seed", 3, "--max_new_tokens", 5, "--memory", path, *(["--system", system] if system else [])]
        assert run(*command_of(saved, *words), stdin=b"fox")[0] == 0
        _, talk = expected(saved, "fox", system=system, seed=3, max_new_tokens=5)
        wanted = talk.state.memory.parts["memory"].matrix_BNHU
        matrices.append(saved[1].new_state(1, memory=path).memory.parts["memory"].matrix_BNHU)
        torch.testing.assert_close(matrices[-1], wanted)
        path.unlink()
    assert not torch.allclose(*matrices)


def test_what_is_remembered_goes_to_the_file(saved, tmp_path):
    path = tmp_path / "memory.safetensors"
    words = command_of(saved, "--seed", 3, "--memory", path, "--max_new_tokens", 20)
    run(*words, stdin=b"fox\ndog")
    _, talk = expected(saved, "fox", "dog", seed=3, max_new_tokens=20)
    kept = saved[1].new_state(1, memory=path).memory
    torch.testing.assert_close(kept.parts["memory"].matrix_BNHU, talk.state.memory.parts["memory"].matrix_BNHU)
    wanted, _ = expected(saved, "again", memory=kept, seed=3, max_new_tokens=20)
    assert run(*words, stdin=b"again")[1] == wanted


@pytest.mark.parametrize(("data", "noted"), [({"folder": "x"}, True), ({"chat": "lepton-1"}, False), (None, False)])
def test_a_model_that_has_seen_no_conversation_is_noted(tmp_path, data, noted):
    save_tiny(tmp_path / "final.pt", **({} if data is None else {"data": data}))
    code, _, err = run("chat", "--checkpoint", tmp_path / "final.pt")
    assert code == 0
    assert ("was not trained on conversations" in err) == noted


# A terminal


class Keyboard(io.StringIO):
    def isatty(self):
        return True


def typed(saved, keys, out, *words, monkeypatch):
    """Run with `keys` typed, and `out` as the terminal."""
    monkeypatch.setattr(sys, "stdin", Keyboard(keys))
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in command_of(saved, "--seed", "3", *words)])
    return code, err.getvalue()


def test_ctrl_d_leaves(saved, monkeypatch):
    out = Watched("nothing", lambda: None, terminal=True)
    code, err = typed(saved, "fox\n \ndog\n", out, "--max_new_tokens", 5, monkeypatch=monkeypatch)
    wanted, _ = expected(saved, "fox", "dog", seed=3, max_new_tokens=5)
    assert code == 0
    first = expected(saved, "fox", seed=3, max_new_tokens=5)[0]
    assert out.getvalue() == visible(f"> {first}> > {wanted.removeprefix(first)}> \n")
    assert "Ctrl-C stops an answer, Ctrl-D leaves" in err


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on_from_there(saved, monkeypatch):
    _, model, tokenizer = saved
    whole = expected(saved, "fox", seed=3, max_new_tokens=60)[0]
    before = signal.getsignal(signal.SIGINT)
    out = Watched("", lambda: signal.raise_signal(signal.SIGINT), nth=4, terminal=True)
    code, _ = typed(saved, "fox\ndog\n", out, "--max_new_tokens", 60, monkeypatch=monkeypatch)
    assert code == 0
    assert signal.getsignal(signal.SIGINT) is before
    first, second = out.getvalue().removesuffix("\n> \n").split("\n> ")
    first = first.removeprefix("> ")
    assert 0 < len(first) < 20
    assert visible(whole).startswith(first)
    talk = Conversation(model, tokenizer, GenerationOptions(seed=3, max_new_tokens=60))
    answer, text = talk.answer("fox"), ""
    decoder = tokenizer.stream_decoder()
    while text != first:
        text += visible(decoder.push(next(answer)[0]))
    answer.close()
    assert second == visible(tokenizer.decode([token for token, _ in talk.answer("dog")]))


def test_ctrl_c_twice_leaves(saved, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    out = Watched("", twice, nth=4, terminal=True)
    assert typed(saved, "fox\ndog\n", out, monkeypatch=monkeypatch)[0] == INTERRUPTED


def test_ctrl_c_where_a_message_is_typed_begins_the_line_anew(saved, monkeypatch):
    pressed = [KeyboardInterrupt, "fox", EOFError]

    def ask(prompt):
        key = pressed.pop(0)
        if isinstance(key, str):
            return key
        raise key

    monkeypatch.setattr("builtins.input", ask)
    out = Watched("nothing", lambda: None, terminal=True)
    code, _ = typed(saved, "", out, "--max_new_tokens", 5, monkeypatch=monkeypatch)
    assert code == 0
    assert out.getvalue() == visible("\n" + expected(saved, "fox", seed=3, max_new_tokens=5)[0] + "\n")


def test_answers_are_shaded_by_uncertainty(saved, monkeypatch):
    out = Watched("nothing", lambda: None, terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    code, err = typed(saved, "fox\n", out, "--max_new_tokens", 40, "--uncertainty", monkeypatch=monkeypatch)
    assert code == 0
    assert "40 new tokens in " in err
    assert "mean depth" in err
    assert MARK in out.getvalue()


def test_the_first_answer_reads_the_template(saved):
    _, model, tokenizer = saved
    ids = ChatTemplate(tokenizer).prompt([Message("user", "fox")])
    tokens = model.generate(ids, 5, seed=3)
    out = run(*command_of(saved, "--seed", 3, "--max_new_tokens", 5), stdin=b"fox")[1]
    assert out == tokenizer.decode(tokens[len(ids) :]) + "\n"
