"""The generation benchmark: what it counts and how it says it, without `transformers` and without a clock."""

import json
import sys
import time
import types
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import decoding, generate_speed, long_stream, peer_decoding, subjects
from benchmarks.bars import Bar, bar_chart
from benchmarks.decoding import Decoding, Round, Watched
from benchmarks.generate_speed import Case, read_cases
from lepton.cli import train
from lepton.cli.arguments import Parser
from lepton.config import LeptonConfig
from lepton.errors import InputError
from tests.cli.tiny import save_tiny, tiny_model
from tests.laws.lab import SHAPE

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FIELDS = {
    "case", "tokens_per_s", "cycle_ms", "cycle_ms_p99", "first_token_ms", "tokens_a_cycle", "of_floor", "state_bytes",
    "peak_gb", "warm_up_seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


def prompts(count=6, length=12):
    return torch.randint(1, 300, (count, length), generator=torch.Generator().manual_seed(0)).tolist()


def data_folder(path, rows=20, row_len=32):
    path.mkdir()
    np.save(path / "shard_00000.npy", np.arange(1, rows * row_len + 1, dtype=np.uint16).reshape(rows, row_len) % 300)
    return path


def test_what_a_case_leaves_out_stands_for_all():
    assert read_cases("64x512/drafts/0.8", GPU) == [Case(64, 512, "drafts", 0.8)]
    assert list(map(str, read_cases("1x8192/auto", CPU))) == ["1x8192/auto/0", "1x8192/auto/0.8"]
    assert read_cases("1x512/dynamic", CPU) == [Case(1, 512, "dynamic", 0.0)]
    modes = {case.mode for case in read_cases("1x512", GPU)}
    assert modes == {"plain", "drafts", "auto", "depth", "static", "dynamic"}
    assert {case.mode for case in read_cases("1x512", CPU)} == modes - {"static"}


def test_the_cases_of_each_device_can_be_read():
    for device in (CPU, GPU):
        assert all(read_cases(name, device) for name in generate_speed.DEFAULT_CASES[device.type])


@pytest.mark.parametrize(
    "name", ["1", "1x", "0x512", "1x0", "1x512/fast", "1x512/plain/hot", "1x512/plain/-1", "1x512/plain/nan",
             "1x512/static/0.8", "1x512/plain/0/0"]
)  # fmt: skip
def test_a_bad_case_is_named(name):
    with pytest.raises(InputError, match=name):
        read_cases(name, GPU)


def test_prompts_are_windows_that_begin_at_equal_distances():
    found = subjects.spread(np.arange(1000), 10, 100)
    assert sorted(prompt[0] for prompt in found) == list(range(0, 901, 100))
    assert all(prompt == list(range(prompt[0], prompt[0] + 100)) for prompt in found)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 255, 256])
def test_prompts_are_different_and_the_first_ones_are_spread_too(count):
    starts = [prompt[0] for prompt in subjects.spread(np.arange(100_000), count, 10)]
    assert len(set(starts)) == count
    if count > 100:
        quarters = [start * 4 // 100_000 for start in starts[:8]]
        assert set(quarters) == {0, 1, 2, 3}


def test_a_short_text_is_repeated():
    assert subjects.spread(np.arange(3), 2, 7) == [[0, 1, 2, 0, 1, 2, 0]] * 2


def test_held_out_text_is_the_validation_split_in_order(tmp_path, model):
    text = subjects.held_out(data_folder(tmp_path / "data"), model)
    assert text.tolist() == [each % 300 for each in range(19 * 32 + 1, 20 * 32 + 1)]


def test_the_command_that_trains_is_one_that_train_py_takes(tmp_path):
    data = subjects.Data(tmp_path, tmp_path / "tokenizer.json")
    _, script, *flags = subjects.training_command("nano", 20_000, data, tmp_path / "out", CPU)
    parser = Parser()
    train.add_arguments(parser)
    settings = train.settings_of(vars(parser.parse_args(flags)))
    assert Path(script).name == "train.py"
    assert (settings.model_size, settings.max_steps, settings.data_dir) == ("nano", 9, str(tmp_path))
    assert settings.tokenizer == str(data.tokenizer)


def test_a_trained_model_is_found_again(tmp_path, model):
    kept = tmp_path / "models" / "nano-1000"
    kept.mkdir(parents=True)
    save_tiny(kept / "final.pt", size="nano")
    data = subjects.Data(data_folder(tmp_path / "data"))
    found = subjects.trained_subject("nano", 1000, data, tmp_path / "models", CPU)
    assert (found.name, found.size, found.model.config) == ("nano", "nano", model.config)


@pytest.mark.parametrize("mode", decoding.MODES)
def test_a_round_counts_the_tokens_of_steady_cycles(model, mode):
    rows, tokens = 3, 5
    timed = Decoding(Watched(model, rows, 1000), mode, 0.0, prompts(), rows)
    found = timed.round(tokens)
    assert rows * tokens <= found.tokens < rows * (tokens + 5)
    assert found.tokens <= 5 * rows * len(found.cycles)
    assert found.first_token > 0
    assert bool(found.drafted) == (mode == "drafts") or mode == "auto"
    if mode in ("plain", "depth"):
        assert found.tokens == rows * len(found.cycles), "a token a row and cycle"


class Noted(Watched):
    """It notes the sequences whose prompts are read."""

    def prefill(self, work):
        self.sequences = work.sequences
        return super().prefill(work)


def test_a_round_has_the_same_prompts_in_every_mode(model):
    given = []
    for mode in ("plain", "auto"):
        timed = Decoding(Noted(model, 2, 1000), mode, 0.0, prompts(), 2)
        timed.warm_up(4)
        for _ in range(2):
            timed.round(2)
        given.append([each.prompt for each in timed.runner.sequences])
    assert given == [prompts()[2:4]] * 2


def test_a_text_goes_on_after_the_end_of_a_document(model):
    """And up to it, it is the text that `generate` gives."""
    (prompt,) = prompts(1)
    expected = model.generate(prompt, 12, temperature=0.0, use_speculative=False)[12:]
    other = type(model)(model.config.replace(eos_id=expected[5])).eval()
    other.load_state_dict(dict(model.state_dict()))
    timed = Decoding(Noted(other, 1, 1000), "plain", 0.0, [prompt], 1)
    timed.round(20)
    (sequence,) = timed.runner.sequences
    assert len(sequence.new) > 20
    assert sequence.new[:6] == expected[:6]


def test_drafts_need_a_drafter(model):
    without = tiny_model().config.replace(drafts=0)
    runner = Watched(type(model)(without).eval(), 1, 100)
    with pytest.raises(InputError, match="drafter"):
        Decoding(runner, "drafts", 0.0, prompts(), 1)


def test_a_growing_cache_has_room_for_so_many_tokens(model):
    dense = type(model)(LeptonConfig.from_dict({**SHAPE, "vocab_size": 320, "dense": True, "window": None})).eval()
    timed = Decoding(Watched(dense, 1, 5000), "plain", 0.0, prompts(), 1)
    assert timed.round(3).tokens == 3
    with pytest.raises(InputError, match="no window"):
        timed.round(5000)


def test_runners_are_lent_to_one_case_at_a_time(model):
    shelf = decoding.Shelf()
    first = shelf.take(model, 2, 10)
    second = shelf.take(model, 2, 10)
    assert first is not second
    shelf.give(first)
    assert shelf.take(model, 3, 10) is not first
    assert shelf.take(model, 2, 10) is first


def test_the_floor_is_the_weights_once_and_the_state_of_each_row(model):
    runner = Watched(model, 4, 1000)
    timed = Decoding(runner, "plain", 0.0, prompts(), 4)
    rounds = [timed.round(3)]
    figures = timed.figures(rounds)
    unused = sum(p.nbytes for name in ("drafter", "uncertainty") for p in model.idea(name).parameters())
    weights = sum(p.nbytes for p in model.parameters()) - unused
    assert figures["state_bytes"] == runner.pool.nbytes // 4
    assert figures["floor_bytes"] == weights + 4 * figures["state_bytes"]


def test_the_floor_follows_what_a_cycle_reads(model):
    everything = decoding.weight_bytes(model, drafted=1.0, deep=1.0)
    drafter, blocks = (decoding.nbytes(part) for part in (model.idea("drafter"), model.blocks))
    assert everything - decoding.weight_bytes(model, drafted=0.25, deep=1.0) == 0.75 * drafter
    assert everything - decoding.weight_bytes(model, drafted=1.0, deep=0.5) == 0.5 * blocks


def test_each_draft_reads_the_cell_and_its_proposals(model):
    drafter = model.idea("drafter")
    width, size = drafter.down.out_features, model.dtype.itemsize
    each = size * width * (2 * width + 2 * width + drafter.vocab_size)
    once = size * width * (drafter.enter.in_features + drafter.token.in_features + 2 * width)
    assert decoding.draft_bytes(model, 1) == once + each
    assert decoding.draft_bytes(model, 4) == once + 4 * each + 3 * 2 * width * size


def test_of_a_lone_row_at_half_depth_fewer_bytes_count(model):
    floors = {}
    for mode in ("plain", "depth"):
        timed = Decoding(Watched(model, 1, 1000), mode, 0.0, prompts(), 1)
        floors[mode] = timed.figures([timed.round(30)])["floor_bytes"]
    assert floors["depth"] < floors["plain"]


def test_a_profile_names_the_operators_that_take_longest():
    a = torch.randn(64, 64)
    found = decoding.kernels(lambda: a @ a, 5, CPU, top=2)
    assert found["top"][0][2] in ("aten::mm", "aten::matmul")
    assert len(found["top"]) == 2


def test_a_stream_is_measured_at_its_marks(model):
    found = long_stream.measure_stream(Watched(model, 1, 1000), prompts()[0], 30, marks=(20, 40), timed=3)
    assert [row["tokens"] for row in found["marks"]] == [20, 30]
    first, last = found["marks"]
    assert first["state_bytes"] == last["state_bytes"]
    assert min(first["token_ms"], first["read_tokens_per_s"]) > 0
    assert long_stream.is_constant([10, 11, 9])
    assert not long_stream.is_constant([10, 11.5, 9])


def test_a_limit_of_time_ends_what_takes_longer():
    with pytest.raises(TimeoutError), peer_decoding.limited(0.01):
        time.sleep(10)
    with peer_decoding.limited(60):
        pass
    time.sleep(0.02)


class Peer(torch.nn.Linear):
    """As much of a model of `transformers` as is used."""

    calls: list = []

    def generate(self, *, input_ids, attention_mask, generation_config, stopping_criteria):
        type(self).calls.append(generation_config)
        for _ in range(generation_config.max_new_tokens):
            input_ids = torch.cat([input_ids, input_ids[:, :1]], 1)
            assert not any(criterion(input_ids, None).any() for criterion in stopping_criteria)
        return input_ids


@pytest.fixture
def library(monkeypatch):
    """A stand-in for `transformers`."""
    fake = types.SimpleNamespace(
        __version__="0.0",
        LlamaConfig=types.SimpleNamespace,
        GenerationConfig=types.SimpleNamespace,
        StoppingCriteriaList=list,
        AutoModelForCausalLM=types.SimpleNamespace(from_config=lambda config, **_: Peer(config.hidden_size, 2)),
    )
    monkeypatch.setitem(sys.modules, "transformers", fake)
    Peer.calls.clear()
    return fake


@pytest.mark.parametrize("cache", peer_decoding.CACHES)
def test_a_peer_decodes_greedily_with_the_cache_that_was_asked_for(library, cache):
    timed = peer_decoding.PeerDecoding("nano", cache, prompts(), 2, CPU, 60)
    timed.warm_up(4)
    found = timed.round(4)
    assert (len(found.cycles), found.tokens) == (4, 8)
    assert len(Peer.calls) == 1 + peer_decoding.WARM_UPS[cache]
    assert {(call.max_new_tokens, call.do_sample, call.cache_implementation) for call in Peer.calls} == {
        (5, False, cache)
    }
    shape, tokens = timed.shape, 12 + 2
    row = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"] * tokens * 4
    assert timed.figures([found])["state_bytes"] == row


def test_a_peer_needs_a_size(library):
    with pytest.raises(InputError, match="size"):
        peer_decoding.PeerDecoding(None, "dynamic", prompts(), 1, CPU, 60)


def test_ratios_are_to_the_fastest_peer_and_to_plain_of_the_same_temperature():
    speeds = {
        "a/1x8/plain/0": 10.0, "a/1x8/plain/0.8": 20.0, "a/1x8/drafts/0.8": 30.0, "a/1x8/static/0": 50.0,
        "a/1x8/dynamic/0": 40.0, "b/1x8/drafts/0": 7.0,
    }  # fmt: skip
    found = [{"case": name, "tokens_per_s": speed} for name, speed in speeds.items()] + [{"case": "x", "error": "y"}]
    generate_speed.compare(found)
    assert [each.get("ratio") for each in found] == [0.2, 0.4, 0.6, 1.0, 0.8, None, None]
    assert [each.get("vs_plain") for each in found] == [1.0, 1.0, 1.5, None, None, None, None]


def test_the_chart_is_valid_xml_with_a_bar_for_each_value():
    text = bar_chart("a < b", [("x & y", [Bar("one", 2.0, True), Bar("two", 1.0, False)]), ("none", [])])
    root = ET.fromstring(text)
    bars = [each for each in root if each.tag.endswith("rect")]
    assert [each.get("class") for each in bars] == ["own", "peer"]
    assert float(bars[0].get("width")) == pytest.approx(2 * float(bars[1].get("width")), rel=0.01)
    assert len(text) < 2000


def run(tmp_path: Path, *words: str) -> None:
    save_tiny(tmp_path / "tiny.pt", size="nano")
    flags = ["--checkpoint", tmp_path / "tiny.pt", "--data_dir", data_folder(tmp_path / "data"), "--no_compile"]
    files = ["--json", tmp_path / "found.json", "--svg", tmp_path / "chart.svg"]
    generate_speed.main([*map(str, [*flags, *files]), "--new_tokens", "3", "--rounds", "2", *words])


def test_a_run_prints_a_table_and_json_and_writes_both_files(tmp_path, capsys, library):
    run(tmp_path, "--cases", "1x20", "2x20/plain/0", "--stream", "5")
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert json.loads((tmp_path / "found.json").read_text(encoding="utf-8")) == found
    names = [each["case"] for each in found["cases"]]
    expected = [f"nano/1x20/{mode}/{t}" for mode in decoding.MODES for t in ("0", "0.8")]
    assert names == [*expected, "nano/1x20/dynamic/0", "nano/2x20/plain/0"]
    assert [line.split()[0] for line in lines[-len(names) :]] == names
    for each in found["cases"]:
        assert each.keys() >= FIELDS, each
    assert all("ratio" in each for each in found["cases"][:-1])
    assert found["transformers"] == "0.0"
    assert found["streams"][0]["marks"][0]["tokens"] == 5
    ET.parse(tmp_path / "chart.svg")


def test_a_case_that_fails_says_why_and_the_others_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    run(tmp_path, "--cases", "1x20/dynamic", "1x20/plain/0", "--seconds", "1e9")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    failed, worked = sorted(found["cases"], key=lambda each: "error" not in each)
    assert "transformers" in failed["error"]
    assert worked["tokens_per_s"] > 0


def test_no_case_is_begun_when_the_time_is_over(tmp_path, capsys):
    run(tmp_path, "--cases", "1x20/plain/0", "--seconds", "0")
    (case,) = json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]
    assert "no time left" in case["error"]


def test_a_model_that_cannot_be_loaded_is_named(tmp_path, capsys):
    generate_speed.main(["--checkpoint", str(tmp_path / "none.pt"), "--cases", "1x20/plain/0"])
    (case,) = json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]
    assert "none.pt" in case["error"]


def test_rounds_give_tokens_a_second():
    assert Round(0.1, [0.5, 0.5], tokens=8).tokens_per_s == 8
