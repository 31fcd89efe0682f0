"""The benchmark of the server: it follows every stream to its end and compares each with `generate`."""

import json

import pytest

from tests.cli.tiny import save_tiny

pytest.importorskip("starlette", reason="needs: pip install starlette uvicorn")
pytest.importorskip("uvicorn", reason="needs: pip install starlette uvicorn")

from benchmarks import serve_load
from benchmarks.serve_load import Stream


def test_every_stream_is_followed_and_compared(tmp_path, capsys):
    save_tiny(tmp_path / "x.pt")
    words = ["--checkpoint", str(tmp_path / "x.pt"), "--streams", "12", "--places", "4", "--new_tokens", "6"]
    serve_load.main([*words, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert (found["streams"], found["failed"], found["checked"], found["different"]) == (12, 0, 12, 0)
    assert 0 < found["first_token_p50"] <= found["first_token_p99"] <= found["seconds"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found


def test_a_wrong_text_is_seen(tmp_path):
    save_tiny(tmp_path / "x.pt")
    args = type("Args", (), {"dtype": "fp32", "new_tokens": 3})
    assert serve_load.different(tmp_path / "x.pt", [Stream("fox", 1, "something else")], args) == 1


@pytest.mark.parametrize("words", [[], ["--size", "nano", "--checkpoint", "x.pt"]])
def test_one_model_must_be_named(words, capsys):
    with pytest.raises(SystemExit):
        serve_load.main(words)
    assert "--checkpoint FILE or --size NAME" in capsys.readouterr().err
