"""`python -m lepton calibrate --max_cost`: what it writes, what it prints, and what a user can get wrong."""

import numpy as np
import pytest
import torch

from lepton import checkpoint
from lepton.api import Lepton
from lepton.cli.budgets import add
from lepton.data.shards import ShardedDataset
from lepton.errors import InputError
from lepton.evals.budgets import find_budget
from lepton.evals.positions import calibration_batches
from lepton.model.budget import Budget
from tests.cli.test_calibrate import command_of as calibrate_command
from tests.cli.test_calibrate import write_shards
from tests.cli.tiny import command_of, run, run_json, save_tiny

COSTS = (0.5, 0.02)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint, and text that it wrote at full depth."""
    folder = tmp_path_factory.mktemp("budgets")
    model, tokenizer = save_tiny(folder / "final.pt")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 300, (100, 1), generator=generator)
    with torch.no_grad():
        for _ in range(32):
            chance = (2 * model(rows).logits[:, -1]).softmax(-1)
            rows = torch.cat([rows, chance.multinomial(1, generator=generator).clamp(min=3)], 1)
    return folder / "final.pt", write_shards(folder / "shards", rows.numpy()), model, tokenizer


@pytest.fixture
def copy(saved, tmp_path):
    path = tmp_path / "final.pt"
    path.write_bytes(saved[0].read_bytes())
    return path


def flags(*costs):
    return [word for cost in costs for word in ("--max_cost", cost)]


def test_it_writes_what_the_function_finds(saved, copy):
    _, data_dir, model, _ = saved
    before = checkpoint.load(copy)
    report = run_json(*calibrate_command(copy, data_dir), *flags(*COSTS), "--force")
    data = ShardedDataset(data_dir, seq_len=16, seed=0, split="val", vocab_size=320)
    made = [
        find_budget(model.eval(), lambda: calibration_batches(data, 8), 1 << 16, cost, data=report["data"])
        for cost in sorted(COSTS)
    ]
    names = made[0].to_dict().keys()
    assert [{name: each[name] for name in names} for each in report["budgets"]] == [each.to_dict() for each in made]
    assert made[1].share < made[0].share <= 1
    after = checkpoint.load(copy)
    assert [Budget.from_dict(each) for each in after.pop("budgets")] == made
    assert all(torch.equal(value, after["model"][name]) for name, value in before["model"].items())
    assert {**after, "model": 0} == {**before, "model": 0}
    budgeted = Lepton.from_checkpoint(copy)
    assert budgeted.router.budgets == tuple(made)
    assert len(budgeted.generate([5, 6, 7], 8, max_cost=0.5, seed=0)) > 3


def test_lines_for_people(saved, copy, tmp_path):
    out = tmp_path / "budgets.pt"
    code, text, _ = run(*calibrate_command(copy, saved[1]), *flags(0.5), "--out", out, "--force")
    assert code == 0
    for words in ("1,600 tokens of its first half", "nats a token at most", "went deep", "0.5", f"written to {out}"):
        assert words in text
    assert "budgets" not in checkpoint.load(copy)
    code, text, _ = run(*command_of(out), "--prompt", "The", "--max_cost", 0.5, "--max_new_tokens", 3)
    assert code == 0


def test_a_budget_that_the_other_half_breaks_is_not_written(saved, copy, tmp_path):
    """In the second half what the stem says is wrong more often than what all blocks say."""
    _, data_dir, model, _ = saved
    rows = np.load(data_dir / "val" / "shard_00000.npy").copy()
    with torch.no_grad():
        for place in range(1, rows.shape[1]):
            read = torch.from_numpy(rows[:50, :place]).long()
            logits = model.head(model.trunk(read, depth=0).hidden[:, -1])
            rows[:50, place] = logits.argmax(-1).clamp(min=3)
    other, content = write_shards(tmp_path / "shards", rows), copy.read_bytes()
    code, text, err = run(*calibrate_command(copy, other), *flags(0.01))
    assert code == 2
    assert "written to" not in text
    assert "cost 0.01: the half that was not calibrated on loses more" in err
    assert copy.read_bytes() == content
    assert run(*calibrate_command(copy, other), *flags(0.01), "--force")[0] == 0
    assert checkpoint.load(copy)["budgets"][0]["max_cost"] == 0.01


def test_each_cost_has_one_budget():
    figures = {"share": 0.5, "cost": 0.01, "error": 0.001, "tokens": 1000}
    old, new = (Budget(max_cost=0.02, least=least, **figures) for least in (0.1, 0.2))
    other, content = Budget(max_cost=0.1, least=0.5, **figures), {"budgets": [old.to_dict()]}
    add(content, [other])
    add(content, [new])
    assert content["budgets"] == [other.to_dict(), new.to_dict()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"least": "0.1"}, "least='0.1', which no budget has"),
        ({"least": float("nan")}, "least=nan, which no budget has"),
        ({"tokens": 1.0}, r"tokens=1\.0, which no budget has"),
        ({"max_cost": -0.1}, r"max_cost=-0\.1: must be a positive number"),
        ({"more": 1}, "must have the fields cost, data, error, least, max_cost, share, tokens"),
    ],
)
def test_a_damaged_budget_is_refused(changes, message):
    made = Budget(max_cost=0.02, least=0.1, share=0.5, cost=0.01, error=0.001, tokens=1000)
    assert Budget.from_dict(made.to_dict()) == made
    with pytest.raises(InputError, match=message):
        Budget.from_dict(made.to_dict() | changes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max_cost", 0), "--max_cost=0.0: must be a positive number of nats"),
        (("--max_cost", 0.1, "--risk", 0.1), "--risk with --max_cost"),
        (("--max_cost", 0.1, "--max_tokens", 0), "--max_tokens 0"),
    ],
)
def test_what_a_user_can_get_wrong(saved, copy, words, message):
    code, _, err = run(*calibrate_command(copy, saved[1]), *words)
    assert code == 2
    assert message in err


def test_a_model_without_a_router_is_refused(saved, tmp_path):
    content = checkpoint.load(saved[0])
    model = Lepton.restored(content, "x")
    dense = Lepton(model.config.replace(router=False))
    content["config"], content["model"] = dense.config.to_dict(), dense.state_dict()
    checkpoint.save(tmp_path / "x.pt", content)
    code, _, err = run(*calibrate_command(tmp_path / "x.pt", saved[1]), *flags(0.1))
    assert code == 2
    assert "has no router" in err
