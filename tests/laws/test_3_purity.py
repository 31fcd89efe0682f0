"""Law 3: `forward` and `generate` change nothing, and a row does not depend on its neighbours."""

import pytest
import torch

from lepton.model.state import flatten
from tests.laws.lab import EOS, VARIANTS, assert_outputs, assert_states, build, cut, text, views

ROWS = slice(None)


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_using_the_model_changes_no_parameter_no_buffer_and_no_state(variant):
    model, tokens = build(variant), text(1)
    state = model(tokens[:, :30]).state
    kept = {name: value.clone() for name, value in flatten(state).items()}
    parameters, random_state = snapshot(model), torch.get_rng_state()
    first, again = model(tokens[:, 30:], state), model(tokens[:, 30:], state)
    model.loss(tokens)
    model.generate([3, 4, 5], max_new_tokens=12, seed=1)
    model.generate([3, 4, 5], max_new_tokens=12)
    assert all(torch.equal(first_value, views(again)[name]) for name, first_value in views(first).items())
    assert_states(first.state, again.state, "the same chunk twice")
    assert all(torch.equal(value, flatten(state)[name]) for name, value in kept.items())
    assert all(torch.equal(value, parameters[name]) for name, value in snapshot(model).items())
    assert torch.equal(random_state, torch.get_rng_state())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_does_not_depend_on_its_neighbours(variant):
    model, tokens = build(variant), text(2, rows=5)
    together = model(tokens)
    for row in range(5):
        alone = model(tokens[row : row + 1])
        assert_outputs(views(alone), cut(views(together), slice(row, row + 1), slice(None)), f"row {row}")
        assert_states(alone.state, together.state.rows(torch.tensor([row])), f"row {row}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_packed_document_equals_the_document_alone(variant):
    model = build(variant)
    tokens = text(3, rows=1, documents=False)
    tokens[:, [28, 30, 31, 70]] = EOS
    packed = model(tokens)
    for first, last in ((0, 29), (29, 31), (31, 32), (32, 71), (71, 100)):
        alone = model(tokens[:, first:last])
        assert_outputs(views(alone), cut(views(packed), ROWS, slice(first, last)), f"document {first}:{last}")
        assert_states(alone.state, packed.commit(torch.tensor([last])), f"document {first}:{last}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_and_evaluation_are_the_same_function(variant):
    model, tokens = build(variant), text(4)
    assert_outputs(views(model.train()(tokens)), views(model.eval()(tokens)), "train and eval")
