"""Benchmarks side by side: results are kept as they come, also beside a job that fails and one that never ends."""

import json
import sys

import pytest

from benchmarks.side_by_side import main

SAY = f"{sys.executable} -c"


def test_each_job_is_told_and_kept(tmp_path, capsys):
    plan = tmp_path / "plan.txt"
    plan.write_text(
        "# GPU LANE SECONDS NAME COMMAND\n"
        f"0 a 60 first {SAY} 'import os; print(\"noise\"); print(os.environ[\"CUDA_VISIBLE_DEVICES\"]); "
        "print(\"{\\\"val_loss\\\": 1.5}\"); print(\"more\")'\n\n"
        f"0 a 60 second {SAY} 'raise SystemExit(\"why it failed\")'\n"
        f"1 b 6 third {SAY} 'import time; print(\"{{\\\"val_loss\\\": 2}}\", flush=True); time.sleep(60)'\n"
    )  # fmt: skip
    out = tmp_path / "out"
    assert main([str(plan), "--out", str(out), "--seconds", "50"]) == 1
    rows = {row["name"]: row for row in map(json.loads, (out / "results.jsonl").read_text().splitlines())}
    assert {name: (row["end"], row.get("val_loss")) for name, row in rows.items()} == {
        "first": ("ok", 1.5), "second": ("exit 1", None), "third": ("stopped after 6 s", 2),
    }  # fmt: skip
    assert (out / "first.log").read_text().splitlines()[:2] == ["noise", "0"]
    printed = capsys.readouterr().out
    assert "why it failed" in printed
    assert [line.split()[2] for line in printed.splitlines()[-3:]] == ["first", "second", "third"]


def test_no_job_begins_after_the_end(tmp_path):
    plan = tmp_path / "plan.txt"
    plan.write_text(f"0 a 60 late {SAY} 'print(1)'")
    assert main([str(plan), "--out", str(tmp_path / "out"), "--seconds", "0"]) == 1
    assert json.loads((tmp_path / "out" / "results.jsonl").read_text())["end"] == "no time left"


def test_a_line_that_is_none(tmp_path, capsys):
    plan = tmp_path / "plan.txt"
    plan.write_text("0 a soon name echo")
    with pytest.raises(SystemExit):
        main([str(plan), "--out", str(tmp_path)])
    assert "no line of a plan: '0 a soon name echo'" in capsys.readouterr().err
