"""`python -m lepton serve`: its flags. The server itself is tested in tests/serve/."""

import importlib.util

import pytest

from lepton.cli.serve import is_loopback, read_keys
from lepton.errors import InputError
from tests.cli.tiny import run

COMMAND = "serve", "--checkpoint", "no.pt"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("LEPTON_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: others can reach this address, so clients must give a key"),
        (["--host", "example.org"], "must give a key"),
        (["--places", "0"], "--places=0: must be a whole number, at least 1"),
        (["--max_body", "0"], "max_body=0"),
        (["--max_streams", "-1"], "max_streams=-1"),
        (["--max-seconds", "x"], "--max_seconds: invalid int value: 'x'"),
        (["--warm_up", "1", "65"], "--warm_up=65: must be a whole number, in 1..64"),
        (["--drain_seconds", "-1"], "--drain_seconds=-1"),
        (["--name", "a/b"], "--name 'a/b'"),
        (["--api_key_file", "no-such-file"], "no-such-file"),
        (["--prot", "1"], "did you mean '--port'"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(flags, message):
    code, out, err = run(*COMMAND, *flags)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_missing_library_is_named_with_the_way_to_get_it(monkeypatch):
    find = importlib.util.find_spec
    gone = ("starlette", "uvicorn")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    code, _, err = run(*COMMAND)
    assert code == 2
    assert "the server needs starlette; get it with: " in err
    assert err.endswith("-m pip install starlette\n")


def test_addresses_of_this_machine():
    assert all(map(is_loopback, ["127.0.0.1", "127.8.8.8", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "192.168.1.2", "example.org", "", "localhost.example.org"]))


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "key"
    assert read_keys(None) == ()
    monkeypatch.setenv("LEPTON_API_KEY", "from-the-environment")
    assert read_keys(None) == ("from-the-environment",)
    path.write_text(" from-a-file\n", encoding="utf-8")
    assert read_keys(str(path)) == ("from-a-file",)
    path.write_text("one\n\n two\n", encoding="utf-8")
    assert read_keys(str(path)) == ("one", "two")
    for text in ("", " \n", "two words", "schlüssel", "a\tb", "one\ntwo words"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="a key has one or more"):
            read_keys(str(path))
    monkeypatch.setenv("LEPTON_API_KEY", "")
    with pytest.raises(InputError, match="LEPTON_API_KEY"):
        read_keys(None)
