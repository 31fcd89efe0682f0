"""Loss against time: all runners see the same batches, and the clock counts their steps alone."""

import itertools
import json
import math
import sys
import time
import types
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import curves, nanochat, time_to_loss
from benchmarks.curves import Line, Panel, line_chart
from benchmarks.peer import PeerTraining
from benchmarks.time_to_loss import RUNNERS, Runner
from benchmarks.training import LeptonTraining, Training, held_out_nats
from lepton.data.shards import Batch, ShardedDataset
from tests.cli.tiny import tiny_model

CPU = torch.device("cpu")
VOCABULARY = 300


def data_folder(path, rows=20, row_len=70):
    path.mkdir()
    tokens = np.arange(rows * row_len, dtype=np.uint16).reshape(rows, row_len) % (VOCABULARY - 1) + 1
    np.save(path / "shard_00000.npy", tokens)
    return path


class Body(torch.nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, 8)
        self.norm = torch.nn.RMSNorm(8)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, input_ids):
        return types.SimpleNamespace(last_hidden_state=self.norm(self.dropout(self.embedding(input_ids))))


class TinyLlama(torch.nn.Module):
    """As much of a model of `transformers` as is trained; with targets of its own it does not shift any."""

    def __init__(self, vocabulary):
        super().__init__()
        self.base_model = Body(vocabulary)
        self.lm_head = torch.nn.Linear(8, vocabulary, bias=False)
        self.lm_head.weight = self.base_model.embedding.weight

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, labels, shift_labels):
        logits = self.lm_head(self.base_model(input_ids).last_hidden_state)
        loss = cross_entropy(logits.flatten(0, 1).float(), shift_labels.flatten())
        return types.SimpleNamespace(logits=logits, loss=loss)


@pytest.fixture
def library(monkeypatch):
    """A stand-in for `transformers`."""
    fake = types.SimpleNamespace(
        __version__="0.0",
        LlamaConfig=types.SimpleNamespace,
        AutoModelForCausalLM=types.SimpleNamespace(from_config=lambda config, **_: TinyLlama(config.vocab_size)),
    )
    monkeypatch.setitem(sys.modules, "transformers", fake)


class Counted(Training):
    """A model whose loss falls with steps and grows with how far its rate is from the best; `seconds` are of a step."""

    params = 1_000_000

    def __init__(self, clock, seconds):
        super().__init__(CPU, 0)
        self.model = torch.nn.Linear(1, 1)
        self.clock, self.seconds = clock, seconds
        self.rate = self.best = 2.0
        self.diverges = None
        self.batches = [[]]

    @property
    def runs(self):
        """Batches of each run, without those of the preparation and of the restart that ends it."""
        return self.batches[2:]

    def flops_per_token(self, length):
        return 1.0

    def compile(self, rows, length):
        self.clock.now += 1000

    def optimizer_states(self):
        return iter(())

    def restart(self):
        super().restart()
        self.batches.append([])

    def step(self, batches, index, scale):
        self.clock.now += self.seconds
        assert self.model.training
        assert 0 < scale <= 1
        self.batches[-1].append(batches[0])
        return {}

    def nats(self, batch):
        self.clock.now += 100
        assert not self.model.training
        loss = math.nan if self.rate == self.diverges else 10.0 / len(self.batches[-1]) + abs(self.rate - self.best)
        valid_BT = torch.arange(1, batch.tokens.shape[1]) < batch.lengths[:, None]
        return torch.where(valid_BT, loss, 0.0)


@pytest.fixture
def counted(monkeypatch):
    """Two runners on a clock of their own, `slow` and `searched`."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    slow, searched = Counted(clock, 3.0), Counted(clock, 1.0)
    monkeypatch.setitem(RUNNERS, "slow", lambda setup: Runner(slow, time_to_loss.linear_decay))
    rates = (1.0, 2.0, 3.0)
    monkeypatch.setitem(RUNNERS, "searched", lambda setup: Runner(searched, time_to_loss.linear_decay, rates))
    return types.SimpleNamespace(slow=slow, searched=searched)


def run(tmp_path, *words):
    """Run the benchmark; return what it wrote as JSON."""
    folder = tmp_path / "data"
    if not folder.exists():
        data_folder(folder)
    files = ["--json", tmp_path / "found.json", "--svg", tmp_path / "curves.svg"]
    time_to_loss.main([*map(str, ["--data_dir", folder, *files]), "--device", "cpu", *words])
    return json.loads((tmp_path / "found.json").read_text())


FLAGS = ("--size", "nano", "--batch_size", "2", "--seq_len", "32", "--tokens", "640", "--points", "5")


def test_all_see_the_same_batches_and_the_clock_counts_steps_alone(tmp_path, counted):
    found = run(tmp_path, *FLAGS, "--runners", "slow", "searched", "--search_tokens", "192")
    slow, searched = found["runners"]
    (of_slow,), (*tries, of_searched) = counted.slow.runs, counted.searched.runs
    seen, also_seen = ([batch.tokens.tolist() for batch in each] for each in (of_slow, of_searched))
    assert len(seen) == 10
    assert seen == also_seen
    assert len(set(map(str, seen))) == 10, "each step has a batch of its own"
    assert [[batch.tokens.tolist() for batch in each] for each in tries] == [seen[:3]] * 3
    assert ([point["seconds"] for point in slow["curve"]], slow["seconds"]) == ([6, 12, 18, 24, 30], 30)
    assert searched["seconds"] == 10, "neither tries nor preparation count"
    assert [point["tokens"] for point in slow["curve"]] == [point["tokens"] for point in searched["curve"]]
    assert slow["tokens"] == sum(int((batch.lengths - 1).sum()) for batch in of_slow)
    assert slow["tokens_per_s"] == round(slow["tokens"] / 30)


def test_the_best_rate_counts(tmp_path, counted):
    (found,) = run(tmp_path, *FLAGS, "--runners", "searched")["runners"]
    assert (found["rate"], found["rate_at_edge"]) == (2.0, False)
    assert found["rates"] == {"1": 2.0, "2": 1.0, "3": 2.0}
    assert found["loss"] == 1.0
    assert len(counted.searched.runs) == 3, "a whole run at the best rate is not repeated"


def test_a_rate_at_the_edge_and_one_that_diverges_are_said(tmp_path, counted, capsys):
    counted.searched.best, counted.searched.diverges = 3.0, 1.0
    (found,) = run(tmp_path, *FLAGS, "--runners", "searched")["runners"]
    assert (found["rate"], found["rate_at_edge"], found["rates"]) == (3.0, True, {"1": None, "2": 2.0, "3": 1.0})
    assert "outermost" in capsys.readouterr().out


def test_the_table_says_what_the_json_says(tmp_path, counted, capsys):
    found = run(tmp_path, *FLAGS, "--runners", "slow", "searched")
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == found
    for row, each in zip(lines[-4:-2], found["runners"], strict=True):
        cells = row.split()
        assert cells[0] == each["name"]
        assert list(map(float, cells[3:7])) == [each[key] for key in ("prepare_s", "tokens_per_s", "seconds", "loss")]
        assert float(cells[7]) == pytest.approx(each["loss_at_equal_tokens"], abs=1e-4)
        assert float(cells[8]) == pytest.approx(each["loss_at_equal_seconds"], abs=1e-4)
    root = ET.parse(tmp_path / "curves.svg").getroot()
    assert sum(each.tag.endswith("polyline") for each in root.iter()) == 2 * 2


def test_no_runner_is_begun_when_the_time_is_over(tmp_path, counted, capsys):
    found = run(tmp_path, *FLAGS, "--runners", "slow", "searched", "--seconds", "500")
    assert [each["name"] for each in found["runners"]] == ["slow"]
    assert "searched: left out" in capsys.readouterr().out


def curve(*points):
    return [{"tokens": tokens, "seconds": seconds, "loss": loss} for tokens, seconds, loss in points]


def test_runners_are_compared_at_equal_tokens_seconds_and_loss():
    fast, slow = {"curve": curve((10, 1, 5.0), (20, 2, 4.0))}, {"curve": curve((10, 4, 4.5), (20, 8, 3.0))}
    at = time_to_loss.compare([fast, slow])
    assert at == {"equal_tokens": 20, "equal_seconds": 2, "equal_loss": 4.0}
    assert (fast["loss_at_equal_tokens"], slow["loss_at_equal_tokens"]) == (4.0, 3.0)
    assert (fast["loss_at_equal_seconds"], slow["loss_at_equal_seconds"]) == (4.0, 4.5)
    assert fast["seconds_to_equal_loss"] == 2
    assert slow["seconds_to_equal_loss"] == pytest.approx(4 + 4 / 3)
    assert time_to_loss.seconds_to(1.0, [1, 2], [5.0, 4.0]) is None
    assert time_to_loss.seconds_to(6.0, [1, 2], [5.0, 4.0]) == 1


def test_the_rate_of_the_llama_rises_and_then_falls_to_zero():
    scales = [time_to_loss.linear_decay(step, 100) for step in range(100)]
    top = scales.index(max(scales))
    assert top == 10
    assert scales[top] == 1
    assert all(b > a for a, b in itertools.pairwise(scales[: top + 1]))
    assert np.allclose(np.diff(scales[top:]), -1 / 90)
    assert scales[-1] == pytest.approx(1 / 90)


def trainings():
    return [LeptonTraining(tiny_model(), "plain"), PeerTraining("nano", "peer", "plain", CPU)]


def random_batch(seed, rows=2, length=24):
    tokens = torch.randint(1, VOCABULARY, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, torch.tensor([length + 1, length // 2])[:rows])


@pytest.mark.parametrize("kind", [0, 1], ids=["lepton", "llama"])
def test_preparing_and_restarting_leave_no_trace(library, kind):
    """So runs of one model, at rates to be tried, are the runs of models built anew."""

    def losses(training):
        found = [training.step([random_batch(i)], i, 1.0)["loss"].item() for i in range(3)]
        return [*found, *(parameter.detach().double().sum().item() for parameter in training.model.parameters())]

    fresh, prepared = trainings()[kind], trainings()[kind]
    fresh.compile(2, 24)
    torch.manual_seed(fresh.seed)
    expected = losses(fresh)
    prepared.prepare(2, 24)
    assert losses(prepared) == expected
    assert losses(prepared)[:3] != expected[:3], "it has learnt"
    prepared.restart()
    assert losses(prepared) == expected


@pytest.mark.parametrize("kind", [0, 1], ids=["lepton", "llama"])
def test_the_loss_of_a_step_is_the_mean_of_its_nats(library, kind):
    """Over all targets of its micro-batches, the padding of short rows left out."""
    training = trainings()[kind]
    training.compile(2, 24)
    if kind == 0:
        training.model.compute_dtype = torch.float32
        training.model.idea("thoughts").rounds_in_training = lambda rows, generator: None
    else:
        training.dtype = torch.float32
        training.model.base_model.dropout.p = 0.0
    batches = [random_batch(0), random_batch(1, rows=1)]
    with torch.no_grad():
        nats = [training.nats(batch) for batch in batches]
    assert (nats[0][1, 11:] == 0).all()
    assert (nats[0][1, :11] > 0).all()
    targets = 24 + 11 + 24
    expected = sum(each.sum() for each in nats) / targets
    assert training.step(batches, 0, 1.0)["loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_held_out_nats_are_those_of_the_loss(tmp_path):
    data = ShardedDataset(data_folder(tmp_path / "data"), seq_len=48, seed=0, split="train", vocab_size=320)
    training = LeptonTraining(tiny_model(), "plain")
    training.model.compute_dtype = torch.float32
    nats, targets = held_out_nats(training.model, training.nats, data, 4, 2)
    assert training.model.training
    batches = list(data.batches(4, 2))
    counts = [int(batch.lengths.sum()) - len(batch.lengths) for batch in batches]
    with torch.no_grad():
        training.model.eval()
        means = [training.model.loss(b.tokens, lengths=b.lengths, auxiliary=False).parts["ce"].item() for b in batches]
    assert targets.sum() == sum(counts)
    expected = sum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts)
    assert (nats.sum() / targets.sum()).item() == pytest.approx(expected, rel=1e-4)


def test_the_smoke_run(tmp_path, library):
    found = run(tmp_path, "--smoke")
    lepton, dense, llama = found["runners"]
    assert [each["name"] for each in (lepton, dense, llama)] == ["lepton", "dense", "llama"]
    assert dense["params_m"] == pytest.approx(lepton["params_m"], rel=0.01)
    assert lepton["tokens"] == dense["tokens"] == llama["tokens"]
    for each in (lepton, dense):
        losses = [point["loss"] for point in each["curve"]]
        assert losses[0] == pytest.approx(math.log(50257), rel=0.1)
        assert losses[-1] < losses[0] - 1
    assert found["transformers"] == "0.0"
    assert llama["rate"] in (1e-3, 2e-3, 4e-3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--runners", "leptn"], "lepton"),
        (["--tokens", "0"], "tokens=0"),
        (["--size", "tinny"], "tiny"),
        (["--svg", "nowhere/curves.svg"], "nowhere"),
        (["--runners", "nanochat_d10"], "NANOCHAT_DIR"),
        ([], "pip install transformers"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_trained(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delenv("NANOCHAT_DIR", raising=False)
    with pytest.raises(SystemExit):
        run(tmp_path, *words)
    assert said in capsys.readouterr().err


def test_the_schedules_of_nanochat_follow_its_training_script():
    training = object.__new__(nanochat.NanochatTraining)
    training.rows, training.length, training.rate, training.tuned_tokens = 64, 512, 0.25, 1.3e9
    training.optimizer = types.SimpleNamespace(param_groups=[{"kind": "muon"}, {"kind": "adamw"}])
    muon, other = training.optimizer.param_groups
    shares = [training.schedule(step, 1000) for step in range(1000)]
    assert shares[0] == 1 / 40
    assert shares[39] == shares[350] == 1
    assert shares[999] == pytest.approx(0.05, abs=0.002)
    assert muon["weight_decay"] == pytest.approx(0, abs=1e-5)
    assert "weight_decay" not in other
    for step, momentum in ((0, 0.85), (200, 0.91), (1000, 0.90)):
        training.schedule(step, 1000)
        assert muon["momentum"] == pytest.approx(momentum)
    training.schedule(0, 1000)
    assert muon["weight_decay"] == pytest.approx(0.28 * (2**15 / 2**19) / 0.25 * 1.3e9 / (1000 * 2**15))


def test_the_chart_is_valid_xml_and_labels_do_not_meet():
    lines = [Line("a & b", [(0, 9.0), (1, 4.0)]), Line("c", [(0, 8.0), (2, 4.01)]), Line("d", [(1, math.nan)])]
    text = line_chart("x < y", [Panel("one", lines), Panel("none", [])], span=1.0)
    root = ET.fromstring(text)
    labels = [each for each in root.iter() if each.get("class", "").startswith("e ")]
    assert [each.text for each in labels] == ["a & b", "c"]
    assert abs(float(labels[0].get("y")) - float(labels[1].get("y"))) >= curves.LABEL - 0.1
    assert float(labels[0].get("x")) < float(labels[1].get("x"))
    first, _, third = (each for each in root.iter() if each.tag.endswith("polyline"))
    assert float(first.get("points").split()[0].split(",")[1]) < 0, "above what is shown, and cut off"
    assert third.get("points") == ""
    assert "nan" not in text


@pytest.mark.parametrize(("low", "high"), [(3.6, 4.6), (0, 109), (0, 49), (8.4, 10.9), (0, 0.0013), (0, 1)])
def test_ticks_are_round_and_few(low, high):
    marks = curves.ticks(low, high)
    assert 2 <= len(marks) <= 7
    assert all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)
    assert all(len(f"{mark:g}") <= 6 for mark in marks)
