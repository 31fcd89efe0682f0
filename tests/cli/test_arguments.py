"""The parser that all commands share."""

import json

import pytest

from lepton.cli.arguments import Parser, print_json
from lepton.errors import InputError


def parser():
    made = Parser(prog="x")
    made.add_argument("--model_size")
    made.add_argument("--text")
    made.add_argument("words", nargs="*")
    return made


def test_flags_accept_dashes_and_underscores():
    assert parser().parse_args(["--model-size", "nano"]).model_size == "nano"
    assert parser().parse_args(["--model-size=na-no"]).model_size == "na-no"
    assert parser().parse_args(["--model_size=nano"]).model_size == "nano"
    assert parser().parse_args(["--", "--model-size"]).words == ["--model-size"]


def test_flags_are_not_abbreviated():
    with pytest.raises(InputError, match="unknown flag '--model'; did you mean '--model_size'"):
        parser().parse_args(["--model", "nano"])


def test_subcommands_share_the_rules():
    made = Parser(prog="x")
    inner = made.add_subparsers(required=True).add_parser("train")
    inner.add_argument("--vocab_size")
    assert made.parse_args(["train", "--vocab-size", "9"]).vocab_size == "9"
    with pytest.raises(InputError, match="unknown flag '--vocab-sice'; did you mean '--vocab_size'"):
        made.parse_args(["train", "--vocab-sice", "9"])
    with pytest.raises(InputError, match="unknown value 'trian'; did you mean 'train'"):
        made.parse_args(["trian"])


def test_a_text_may_begin_with_a_dash():
    assert parser().parse_args(["--text", "--- a", "word"]).text == "--- a"
    assert parser().parse_args(["--text=--"]).text == "--"


def test_json_is_one_line_of_ascii(capsys):
    print_json({"name": "süß", "parts": [1, None]})
    out = capsys.readouterr().out
    assert out.isascii()
    assert out.count("\n") == 1
    assert json.loads(out) == {"name": "süß", "parts": [1, None]}
