"""`python -m lepton calibrate --risk`: what it writes, what it prints, and what a user can get wrong."""

import numpy as np
import pytest
import torch

from lepton import checkpoint
from lepton.api import Lepton
from lepton.cli.promises import add
from lepton.cli.shading import MARK, visible
from lepton.data.shards import ShardedDataset
from lepton.evals.conformal import kept, promise, windows_wanted
from lepton.evals.positions import calibration_batches, collect_outcomes, evaluation_batches
from lepton.model.promise import Promise
from tests.cli.test_calibrate import command_of as calibrate_command
from tests.cli.test_calibrate import write_shards
from tests.cli.test_shading import Screen
from tests.cli.tiny import command_of, run, run_json, save_tiny

RISK = 0.6


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint, and text of which its most likely token is right half of the time, and more often where it is
    surer.
    """
    folder = tmp_path_factory.mktemp("promises")
    model, tokenizer = save_tiny(folder / "final.pt")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 300, (300, 1), generator=generator)
    with torch.no_grad():
        for _ in range(32):
            logits = model(rows).logits[:, -1]
            likely = logits.argmax(-1, keepdim=True)
            sure = torch.rand(len(rows), 1, generator=generator) < 0.55
            rows = torch.cat([rows, likely.where(sure, torch.randint(3, 300, likely.shape, generator=generator))], 1)
    data_dir = write_shards(folder / "shards", rows.numpy())
    return folder / "final.pt", data_dir, model, tokenizer


@pytest.fixture
def copy(saved, tmp_path):
    path = tmp_path / "final.pt"
    path.write_bytes(saved[0].read_bytes())
    return path


def test_it_writes_what_the_function_finds(saved, copy):
    _, data_dir, model, _ = saved
    before = checkpoint.load(copy)
    report = run_json(*calibrate_command(copy, data_dir), "--risk", RISK, "--risk", 0.01)
    data = ShardedDataset(data_dir, seq_len=16, seed=0, split="val", vocab_size=320)
    first, second = (collect_outcomes(model, half(data, 8)) for half in (calibration_batches, evaluation_batches))
    made = promise(first.uncertainty_logit_M, first.wrong_M, first.window_M, 16, RISK, data=report["data"])
    found = kept(second.uncertainty_logit_M, second.wrong_M, made.threshold)
    assert made.threshold is not None
    assert (made.windows, made.tokens) == (300, 300 * 16)
    assert found.risk <= RISK
    few, many = report["promises"]
    assert few["risk"] == 0.01
    assert (few["threshold"], few["kept"], few["measured_risk"], few["largest_kept"]) == (None, 0, None, None)
    assert few["windows_wanted"] is None or few["windows_wanted"] > 300
    assert many == made.to_dict() | {
        "windows_wanted": windows_wanted(first.uncertainty_logit_M, first.wrong_M, first.window_M, 16, RISK),
        "largest_kept": pytest.approx(torch.sigmoid(torch.tensor(made.threshold)).item(), abs=1e-6),
        "kept": pytest.approx(found.share),
        "measured_risk": pytest.approx(found.risk),
    }
    after = checkpoint.load(copy)
    assert [Promise.from_dict(each) for each in after.pop("promises")] == [
        Promise(**{name: few[name] for name in made.to_dict()}),
        made,
    ]
    assert all(torch.equal(value, after["model"][name]) for name, value in before["model"].items())
    assert {**after, "model": 0} == {**before, "model": 0}
    marked = Lepton.from_checkpoint(copy)
    assert marked.uncertainty.promises[1] == made
    found = marked.generate([5, 6, 7], 60, abstain_at=RISK, seed=0)
    assert found.abstained == [chance > many["largest_kept"] for chance in found.uncertainties]
    assert all(marked.generate([5, 6, 7], 10, abstain_at=0.01, seed=0).abstained)


def test_lines_for_people(saved, copy, tmp_path):
    out = tmp_path / "promised.pt"
    code, text, _ = run(*calibrate_command(copy, saved[1]), "--risk", RISK, "--risk", 0.01, "--out", out)
    assert code == 0
    for words in (
        "300 windows",
        "abstains from",
        "everything",
        f"{RISK:g}",
        "99% of calibrations",
        f"written to {out}",
    ):
        assert words in text
    assert "promises" not in checkpoint.load(copy)


def test_few_windows_abstain_from_everything_and_say_so(saved, copy):
    code, text, _ = run(*calibrate_command(copy, saved[1]), "--risk", RISK, "--max_tokens", 64)
    assert code == 0
    assert "all tokens will be marked" in text
    assert Lepton.from_checkpoint(copy).uncertainty.promises[0].threshold is None


def test_a_promise_that_the_other_half_breaks_is_not_written(saved, copy, tmp_path):
    rows = np.concatenate(list(map(np.load, [saved[1] / "val" / "shard_00000.npy"])))
    generator = np.random.default_rng(0)
    rows[150:] = generator.integers(3, 300, rows[150:].shape)
    data_dir, content = write_shards(tmp_path / "shards", rows), copy.read_bytes()
    code, text, err = run(*calibrate_command(copy, data_dir), "--risk", RISK)
    assert code == 2
    assert "written to" not in text
    assert f"risk {RISK:g}: more is wrong" in err
    assert copy.read_bytes() == content
    assert run(*calibrate_command(copy, data_dir), "--risk", RISK, "--force")[0] == 0
    assert checkpoint.load(copy)["promises"][0]["risk"] == RISK


def test_promises_of_other_risks_stay():
    made = [
        Promise(risk=risk, confidence=0.99, threshold=float(i), windows=9, tokens=9) for i, risk in ((0, 0.1), (1, 0.2))
    ]
    content = {"promises": [each.to_dict() for each in made]}
    add(content, [Promise(risk=0.2, confidence=0.99, threshold=5.0, windows=9, tokens=9)])
    assert [(each["risk"], each["threshold"]) for each in content["promises"]] == [(0.1, 0.0), (0.2, 5.0)]


def test_mistakes_are_one_line(saved, copy, tmp_path):
    model = saved[2]
    plain = model.config.replace(uncertainty=False)
    save_tiny(tmp_path / "plain.pt", model=Lepton(plain).state_dict(), config=plain.to_dict())
    single = write_shards(tmp_path / "single", np.full((1, 2), 5))
    for words, named in (
        ((copy, saved[1], 0), "--risk=0.0: must lie between 0 and 1"),
        ((copy, saved[1], 1.5), "--risk=1.5"),
        ((tmp_path / "plain.pt", saved[1], 0.1), "no uncertainty"),
        ((copy, single, 0.1), "name more text"),
    ):
        code, out, err = run(*calibrate_command(*words[:2]), "--risk", words[2])
        assert (code, out) == (2, "")
        assert err.splitlines()[-1].startswith("error: ")
        assert named in err


def with_promise(folder, threshold):
    made = Promise(risk=0.1, confidence=0.99, threshold=threshold, windows=9, tokens=90, data="some text")
    return folder / "promised.pt", *save_tiny(folder / "promised.pt", promises=[made.to_dict()])


FLAGS = ["--prompt", "fox", "--seed", 5, "--temperature", 2, "--max_new_tokens", 25]


def test_generated_text_is_marked_where_the_model_abstains(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    probe = with_promise(tmp_path, None)
    plain = run(*command_of(probe[0]), *FLAGS)[1]
    chances = run_json(*command_of(probe[0]), *FLAGS)["uncertainties"]
    threshold = torch.logit(torch.tensor(chances).median()).item()
    path = with_promise(tmp_path, threshold)[0]
    found = run_json(*command_of(path), *FLAGS, "--abstain_at", 0.1)
    assert len(found["abstained"]) == found["new_tokens"]
    assert set(found["abstained"]) == {True, False}
    assert found["promise"]["data"] == "some text"
    code, out, err = run(*command_of(path), *FLAGS, "--abstain_at", 0.1, screen=Screen)
    assert code == 0
    assert out.replace(MARK, "") == visible(plain)
    assert 0 < out.count(MARK) < 25
    assert "at most 10% are wrong, on text like that of the calibration (some text)" in err
    code, out, err = run(*command_of(path), *FLAGS, "--abstain_at", 0.1)
    assert (code, out) == (0, plain)
    assert "nothing is marked; --json says" in err
    assert run_json(*command_of(path), *FLAGS)["abstained"] is None


def test_without_a_threshold_every_word_is_marked(tmp_path):
    path = with_promise(tmp_path, None)[0]
    out, err = run(*command_of(path), *FLAGS, "--abstain_at", 0.1, screen=Screen)[1:]
    words = out.removeprefix("fox").split()
    assert all(word.endswith(MARK) for word in words)
    assert "marks every word: no threshold was found for risk 0.1 (some text)" in err
    err = run(*command_of(path), *FLAGS, "--abstain_at", 0.1)[2]
    assert "the model abstains from every token: no threshold was found for risk 0.1 (some text)" in err


def test_generate_names_the_command_that_calibrates(saved):
    code, out, err = run(*command_of(saved[0]), *FLAGS, "--abstain_at", 0.25)
    assert (code, out) == (2, "")
    assert "python -m lepton calibrate --checkpoint FILE --risk 0.25" in err
