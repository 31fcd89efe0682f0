"""States and memories in files: what is damaged, out of range or made by other weights is refused."""

import copy
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from lepton.errors import InputError
from lepton.model.ideas.crystals import EMPTY
from tests.laws.lab import assert_close, assert_states, build, text


@pytest.fixture(scope="module")
def model():
    return build("complete", dtype=torch.float32)


@pytest.fixture
def path(model, tmp_path):
    with torch.no_grad():
        model(text(1)).state.save(tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def changed(path, name, change):
    """The file as versions without hashes wrote it, with `change` made to one tensor."""
    tensors = load_file(path)
    save_file(tensors | {name: change(tensors[name].clone()).contiguous()}, path)
    return path


def test_no_flipped_bit_is_loaded(model, path):
    whole, chance = path.read_bytes(), random.Random(0)
    for place in chance.sample(range(len(whole)), 100):
        content = bytearray(whole)
        content[place] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"damaged|not a whole"):
            model.load_state(path)


def set_to(value):
    return lambda tensor: tensor.index_fill(0, torch.tensor([1]), value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("phase_B", set_to(-1), "'phase_B' holds -1: must lie in 0..3"),
        ("phase_B", set_to(4), "'phase_B' holds 4"),
        ("last_token_B", set_to(-1), "'last_token_B' holds -1: must lie in 0..96"),
        ("last_token_B", set_to(97), "'last_token_B' holds 97"),
        ("position_B", set_to(-(2**63)), "'position_B' holds -9223372036854775808"),
        ("position_B", set_to(2**31), "'position_B' holds 2147483648"),
        ("router.taken_B", set_to(9), r"taken_B' holds 9: must lie in 0\.\.8"),
        ("memory.crystals.ids_BR", set_to(97), r"ids_BR' holds 97: must lie in -1\.\.96"),
        ("memory.crystals.kept.ids_BCX", set_to(-2), "ids_BCX' holds -2"),
        ("memory.crystals.kept.position_BC", set_to(EMPTY - 1), "position_BC' holds"),
        ("memory.crystals.pending.log_score_BC", set_to(0.5), "log_score_BC' holds 0.5"),
        ("thoughts.group.change_B", set_to(-1.0), "change_B' holds -1"),
        ("thoughts.group.active_B", lambda value: (value.view(torch.uint8) + 1).view(torch.bool), "active_B' holds 2"),
        ("deep.keys_BLRKH", set_to(float("nan")), "keys_BLRKH' holds NaN or infinity"),
        ("memory.memory.matrix_BNHU", set_to(float("inf")), "matrix_BNHU' holds NaN or infinity"),
        ("position_B", lambda value: value[:1], "has shape"),
        ("thoughts.group.states_BSD", lambda value: value[:1], r"states_BSD' has shape \(1, "),
        ("position_B", lambda value: value.int(), r"'position_B' holds torch\.int32"),
        ("deep.keys_BLRKH", lambda value: value.long(), r"keys_BLRKH' holds torch\.int64"),
    ],
)
def test_what_no_stream_leads_to_is_named(model, path, name, change, message):
    with pytest.raises(InputError, match=message):
        model.load_state(changed(path, name, change))


def test_files_from_before_there_were_hashes_load(model, path):
    expected = model.load_state(path)
    assert_states(expected, model.load_state(changed(path, "phase_B", lambda value: value)), "as it was")


def test_shape_letters_at_the_end_of_names_do_not_matter(model, path):
    expected, tensors = model.load_state(path), load_file(path)
    save_file({f"{name.rpartition('_')[0]}_{'X' * value.dim()}": value for name, value in tensors.items()}, path)
    assert_states(expected, model.load_state(path), "with other letters")


@pytest.mark.parametrize("variant", ["no router", "dense"])
def test_older_states_had_the_routers_count_without_a_router(variant, tmp_path):
    model, path = build(variant, dtype=torch.float32), tmp_path / "s.safetensors"
    with torch.no_grad():
        state = model(text(1)).state
    state.save(path)
    save_file(load_file(path) | {"taken_B": torch.zeros(1, dtype=torch.int64)}, path)
    assert_states(state, model.load_state(path), variant)


@pytest.mark.parametrize("kind", ["state", "memory"])
@torch.no_grad()
def test_other_weights_are_refused_unless_asked_for(model, tmp_path, kind):
    state, path, other = (
        model(text(1)).state,
        tmp_path / "x.safetensors",
        build("complete", seed=1, dtype=torch.float32),
    )
    (state if kind == "state" else state.memory).save(path)

    def load(which, **options):
        return which.load_state(path, **options) if kind == "state" else which.new_state(2, memory=path, **options)

    load(copy.deepcopy(model).bfloat16())
    with pytest.raises(InputError, match=r"x\.safetensors: made by other weights .* any_weights=True"):
        load(other)
    forced = load(other, any_weights=True)
    taken, kept = (each.part("memory").matrix_BNHU for each in (load(model), forced))
    assert_close(taken, kept, "taken as it is")
    forced.save(path)
    if kind == "state":
        assert load(other).batch_size == 2, "from here on it is the other model's"


@torch.no_grad()
def test_weights_that_changed_since_are_not_claimed(tmp_path):
    model = build("complete", dtype=torch.float32)
    state = model(text(1)).state
    model.embed.weight += 0.1
    state.save(tmp_path / "s.safetensors")
    model.load_state(tmp_path / "s.safetensors")
    build("complete", seed=1).load_state(tmp_path / "s.safetensors")


@torch.no_grad()
def test_a_dense_state_holds_a_column_for_every_token(tmp_path):
    model, path = build("dense"), tmp_path / "s.safetensors"
    model(text(1, documents=False)).state.save(path)
    with pytest.raises(InputError, match=r"'deep\.keys_BLRKH' holds 100 entries for 101 tokens"):
        model.load_state(changed(path, "position_B", set_to(101)))


def test_a_state_is_written_whole_or_not_at_all(model, path, tmp_path, monkeypatch):
    before, state = path.read_bytes(), model.new_state(1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match=r"could not be written .*No space left"):
        state.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(InputError, match="is a folder"):
        state.save(tmp_path)
