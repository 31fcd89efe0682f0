"""Outputs and states as pytrees: every tensor inside is a leaf, and what is put together again works."""

import dataclasses
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

from lepton.model.state import flatten
from lepton.model.trees import as_pytree
from tests.laws.lab import VARIANTS, build

TOKENS = torch.tensor([[5, 6, 7, 1, 9, 10, 11, 12]])


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_output_goes_through_a_pytree_and_through_pickle(variant):
    model = build(variant)
    with torch.no_grad():
        out = model(TOKENS, model.new_state(1))
    count_B = torch.tensor([3])
    expected = flatten(out.commit(count_B))
    leaves = {id(leaf) for leaf in pytree.tree_leaves(out)}
    assert {id(out.logits), id(out.hidden), id(out.flow.x_BTD), id(out.chunk.deep[0][0])} <= leaves
    for other in (pytree.tree_map_only(torch.Tensor, torch.clone, out), pickle.loads(pickle.dumps(out))):
        found = flatten(other.commit(count_B))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert torch.equal(other.logits, out.logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_leaves_of_a_state_are_its_tensors(variant):
    state = build(variant)(TOKENS).state
    leaves = {id(leaf) for leaf in pytree.tree_leaves(state)}
    assert leaves == {id(value) for value in flatten(state).values()}
    doubled = pytree.tree_map(lambda value: torch.cat([value, value]), state)
    assert doubled.batch_size == 2


def test_dataclasses_inside_are_found_when_they_are_met():
    @dataclasses.dataclass(frozen=True)
    class Inner:
        value: torch.Tensor
        name: str = "x"

    @as_pytree
    @dataclasses.dataclass(frozen=True)
    class Outer:
        inner: Inner
        many: dict

    outer = Outer(Inner(torch.ones(2)), {"a": [Inner(torch.zeros(1), "y")], "b": []})
    leaves, spec = pytree.tree_flatten(outer)
    assert [leaf.tolist() for leaf in leaves] == [[1.0, 1.0], [0.0]]
    again = pytree.tree_unflatten([leaf + 1 for leaf in leaves], spec)
    assert (again.inner.value.tolist(), again.many["a"][0].name, again.many["b"]) == ([2.0, 2.0], "y", [])


def test_two_passes_have_one_structure_until_the_weights_change():
    model = build("complete")
    first, second = model(TOKENS), model(TOKENS)
    assert pytree.tree_structure(first) == pytree.tree_structure(second)
    difference = pytree.tree_map(lambda a, b: a.double() - b.double(), first.state, second.state)
    assert not any(value.any() for value in flatten(difference).values())
    with torch.no_grad():
        model.embed.weight.add_(1)
    assert pytree.tree_structure(first.state) != pytree.tree_structure(model(TOKENS).state)
