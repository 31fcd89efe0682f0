"""What `load_state_dict` and `from_checkpoint` take over, and what they refuse before anything is taken over."""

import copy
import pickle
import re

import pytest
import torch

from lepton import checkpoint
from lepton.api import Lepton
from lepton.errors import InputError
from lepton.model.weights import Origin, fingerprint
from tests.laws.lab import build


def saved(model, path, **config):
    content = {"model": model.state_dict(), "config": model.config.to_dict() | config, "step": 3}
    checkpoint.save(path, content)
    return path


@pytest.mark.parametrize(
    ("field", "value"),
    [("eos_id", 5), ("window", 16), ("thoughts.rounds", 3), ("logit_cap", 20.0), ("rope_base", 5e4), ("segment", 2),
     ("crystals.per_segment", 3), ("router.window", 4), ("peek.horizon", 3), ("heads", 2), ("vocab_size", 100)],
)  # fmt: skip
def test_readmes_way_of_loading_loses_no_choice_that_has_no_parameter(tmp_path, field, value):
    """`torch.load(path)["model"]` into a model with another value: all keys match, and the result would be nonsense."""
    trained = build("complete", **{field: value} | ({"head_dim": 16, "kv_heads": 1} if field == "heads" else {}))
    path, fresh = saved(trained, tmp_path / "checkpoint.pt"), build("complete", seed=1)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(InputError, match=rf"{re.escape(field)}={value!r}.*from_checkpoint"):
        fresh.load_state_dict(torch.load(path)["model"])
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    Lepton(trained.config).load_state_dict(torch.load(path)["model"])
    assert Lepton.from_checkpoint(path).config.flat_dict()[field] == value
    if field not in ("heads", "vocab_size"):
        fresh.load_state_dict(dict(torch.load(path)["model"]))  # as with --init_from and --override
        assert torch.equal(fresh.embed.weight.double(), trained.embed.weight)


def test_a_file_that_torch_wrote_and_one_from_before(tmp_path):
    model, other = build("complete", eos_id=5), build("complete", seed=1)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"eos_id=5, this one has eos_id=0.*create_lepton_nano\(eos_id=5\)"):
        other.load_state_dict(torch.load(tmp_path / "w.pt"))
    torch.save(dict(model.state_dict()), tmp_path / "w.pt")
    assert str(other.load_state_dict(torch.load(tmp_path / "w.pt"))) == "<All keys matched successfully>"


def test_a_state_dict_holds_tensors_alone_and_copies_know_the_configuration():
    model = build("complete", eos_id=5)
    assert all(isinstance(value, torch.Tensor) for value in model.state_dict().values())
    for weights in (copy.deepcopy(model.state_dict()), copy.deepcopy(model).state_dict()):
        with pytest.raises(InputError, match="eos_id"):
            build("complete").load_state_dict(weights)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("embed.weight", lambda value: value[:, :-1], r"'embed\.weight' has shape"),
        ("embed.weight", lambda value: value.long(), r"'embed\.weight' holds torch\.int64"),
        ("embed.weight", lambda value: value * float("nan"), r"'embed\.weight' holds NaN or infinity"),
        ("router.quantiles", lambda value: value / 0, r"'router\.quantiles' holds NaN or infinity"),
        ("drafter.ids", lambda value: value + 90, r"'drafter\.ids' holds ids outside 0\.\.vocab_size-1=96"),
        ("drafter.ids", lambda value: value - 1, r"'drafter\.ids' holds ids outside"),
        ("drafter.ids", lambda value: value.float(), r"'drafter\.ids' holds torch\.float32"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_nothing_is_taken_over(name, change, message):
    model, weights = build("complete"), build("complete", seed=1).state_dict()
    before = copy.deepcopy(model.state_dict())
    weights[name] = change(weights[name])
    for strict in (True, False):
        with pytest.raises(InputError, match=message) as caught:
            model.load_state_dict(weights, strict=strict)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_some_of_the_weights_where_that_is_asked_for():
    model, weights = build("complete"), build("complete", seed=1).state_dict()
    result = model.load_state_dict({"embed.weight": weights["embed.weight"], "more": torch.ones(1)}, strict=False)
    assert result.unexpected_keys == ["more"]
    assert "memory.conv" in result.missing_keys
    assert torch.equal(model.embed.weight, weights["embed.weight"])
    with pytest.raises(InputError, match="Unexpected key 'more'"):
        model.load_state_dict({**weights, "more": torch.ones(1)})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"width": 10**6}, "width=1000000: must be at most"),
        ({"layers": 10**9}, "layers=1000000000: must be at most"),
        ({"vocab_size": 10**12}, "vocab_size=1000000000000: must be at most"),
        ({"width": 1 << 15, "ffn": 1 << 18, "layers": 40}, "Missing key"),
        ({"vocab_size": 1 << 21}, r"'embed\.weight' has shape .* needs \(2097152, 32\)"),
        ({"widht": 3}, "did you mean 'width'"),
    ],
)
def test_a_checkpoints_configuration_takes_no_memory_before_the_weights_fit(tmp_path, monkeypatch, config, message):
    def draw(*_args, **_options):
        raise AssertionError("initial values are only drawn where there is memory for them")

    path = saved(build("complete"), tmp_path / "x.pt", **config)
    monkeypatch.setattr("torch.Tensor.normal_", draw)
    with pytest.raises(InputError, match=rf"x\.pt: .*{message}"):
        Lepton.from_checkpoint(path)


def test_a_checkpoint_without_a_field_that_has_no_default(tmp_path):
    checkpoint.save(tmp_path / "x.pt", {"model": {}, "config": {"width": 8}, "step": 0})
    with pytest.raises(InputError, match=r"x\.pt: the configuration lacks 'layers'"):
        Lepton.from_checkpoint(tmp_path / "x.pt")


def test_a_fingerprint_is_that_of_the_weights_in_any_precision():
    model = build("complete", dtype=torch.float32)
    expected = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == fingerprint(copy.deepcopy(model).bfloat16()) == expected
    assert fingerprint(build("complete", seed=1)) != expected
    changed = copy.deepcopy(model)
    changed.memory.conv.data[0, 0] += 0.1
    assert fingerprint(changed) != expected
    with torch.device("meta"):
        assert fingerprint(Lepton(model.config)) is None


def test_an_origin_knows_when_its_weights_have_changed():
    model = build("complete")
    origin = Origin(model)
    assert origin.fingerprint() == fingerprint(model)
    assert copy.deepcopy(origin).fingerprint() is pickle.loads(pickle.dumps(origin)).fingerprint() is None
    with torch.no_grad():
        model.embed.weight += 1
    assert origin.fingerprint() is None
    origin = Origin(model)
    del model
    assert origin.fingerprint() is None
