"""The benchmark of turns: what is kept is read once, and what is sent anew grows."""

import json

import pytest

from tests.cli.tiny import save_tiny

pytest.importorskip("starlette", reason="needs: pip install starlette uvicorn")
pytest.importorskip("uvicorn", reason="needs: pip install starlette uvicorn")

from benchmarks import serve_turns


def test_a_conversation_is_held_in_both_ways(tmp_path, capsys):
    save_tiny(tmp_path / "x.pt")
    words = ["--checkpoint", str(tmp_path / "x.pt"), "--turns", "4", "--new_tokens", "6"]
    serve_turns.main([*words, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    turns = found["turns"]
    assert turns[0]["read_kept"] == turns[0]["read_whole"] == turns[3]["read_kept"]
    assert turns[3]["read_whole"] > 3 * turns[3]["read_kept"]
    assert all(0 < each[f"first_{way}"] <= each[f"seconds_{way}"] for each in turns for way in ("kept", "whole"))
    assert all(each["equal"] for each in turns)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found


@pytest.mark.parametrize("words", [[], ["--size", "nano", "--checkpoint", "x.pt"]])
def test_one_model_must_be_named(words, capsys):
    with pytest.raises(SystemExit):
        serve_turns.main(words)
    assert "--checkpoint FILE or --size NAME" in capsys.readouterr().err


def test_what_the_server_refuses_ends_it(tmp_path):
    save_tiny(tmp_path / "x.pt")
    with pytest.raises(SystemExit, match="max_tokens=100000"):
        serve_turns.main(["--checkpoint", str(tmp_path / "x.pt"), "--turns", "1", "--new_tokens", "100000"])
