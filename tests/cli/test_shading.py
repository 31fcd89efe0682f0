"""What a terminal shows of generated text, and what a pipe gets."""

import io
import re
import sys

from lepton.cli import generate as command
from lepton.cli import shading
from lepton.engine.stats import Stats
from tests.cli.tiny import command_of, run


class Screen(io.StringIO):
    def isatty(self):
        return True


PIECES = [
    shading.Piece(text, uncertainty)
    for text, uncertainty in [("The", 0.1), (" qu", 0.85), ("ick\n", 0.3), ("\n", 0.9), ("fox", 0.5), ("es run", 1.0)]
]
PALE, WARM, HOT, OFF = *(f"\033[30;48;5;{colour}m" for colour in (229, 222, 210)), "\033[0m"


def test_colours_shade_words_by_uncertainty_and_no_white_space():
    expected = f"The {HOT}qu{OFF}{PALE}ick{OFF}\n\n{WARM}fox{OFF}{HOT}es{OFF} {HOT}run{OFF}"
    assert "".join(shading.shaded(PIECES)) == expected


def test_the_legend_shows_every_shade():
    legend = shading.legend()
    assert legend.startswith("chance that the model's best guess is wrong:  0-20 % \033[30;48;5;229m 20-40 % \033[0m")
    assert all(f";{colour}m" in legend for colour in shading.SHADES[1:])


def test_marks_stand_behind_words():
    assert "".join(shading.marked(PIECES)) == "The quick[?]\n\nfoxes[?] run[?]"
    assert "".join(shading.marked([])) == ""
    assert "".join(shading.marked(PIECES, above=0.85)) == "The quick\n\nfoxes[?] run[?]"
    assert "".join(shading.marked(PIECES, above=float("-inf"))) == "The[?] quick[?]\n\nfoxes[?] run[?]"


def test_a_terminal_obeys_nothing_in_the_text():
    assert shading.visible("a\x1b[2Jb\r\n\tc\x07\x7f\x9bü東") == "a␛[2Jb␍\n\tc␇␡�ü東"


def test_colours_are_for_terminals_whose_user_wants_them(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert shading.has_colours(Screen())
    assert not shading.has_colours(io.StringIO())
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not shading.has_colours(Screen())


SPEED = r"25 new tokens in \d+\.\d s \(\d+\.\d tokens/s\)"
FIGURES = (
    SPEED + r"; \d+ passes through the model; [1-5]\.\d\d tokens per pass; "
    r"drafts accepted by position: \d+%, \d+%, \d+%, \d+%; mean depth 3\.00 blocks"
)


def uncertain(saved, *flags, **options):
    return run(
        *command_of(saved[0]),
        "--prompt",
        "fox",
        "--seed",
        5,
        "--temperature",
        2,
        "--max_new_tokens",
        25,
        *flags,
        **options,
    )


def test_a_pipe_gets_the_text_alone(saved):
    plain = uncertain(saved)
    assert plain[2] == ""
    code, out, err = uncertain(saved, "--uncertainty")
    assert (code, out) == (0, plain[1])
    meaning, figures = err.splitlines()
    assert meaning.startswith("stdout is not a terminal, so the text is not shaded; --json")
    assert re.fullmatch(FIGURES, figures)


def test_a_terminal_is_kept_informed(saved):
    code, out, err = uncertain(saved, screen=Screen)
    assert (code, out) == (0, shading.visible(uncertain(saved)[1]))
    loading, speed = err.splitlines()
    assert loading == f"loading {saved[0]}"
    assert re.fullmatch(SPEED, speed)


def test_uncertainty_on_a_terminal(saved, monkeypatch):
    plain = shading.visible(uncertain(saved)[1])
    monkeypatch.setattr(shading, "DOUBTFUL", 0.5)
    monkeypatch.setenv("TERM", "dumb")
    out, err = uncertain(saved, "--uncertainty", screen=Screen)[1:]
    assert 0 < out.count(shading.MARK) < 25
    assert out.replace(shading.MARK, "") == plain
    assert err.splitlines()[1].startswith("[?] marks words with a token of uncertainty")
    assert re.fullmatch(FIGURES, err.splitlines()[2])
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    out, err = uncertain(saved, "--uncertainty", screen=Screen)[1:]
    assert "\033[30;48;5;" in out
    assert re.sub(r"\033\[[\d;]*m", "", out) == plain
    assert err.splitlines()[1] == shading.legend()


def test_figures_without_drafts():
    stats = Stats(new_tokens=3, forward_calls=3, positions=5, blocks=15)
    assert command.describe(stats, 0.5, uncertainty=False) == "3 new tokens in 0.5 s (6.0 tokens/s)"
    assert command.describe(stats, 0.5, uncertainty=True) == (
        "3 new tokens in 0.5 s (6.0 tokens/s); 3 passes through the model; mean depth 3.00 blocks"
    )
