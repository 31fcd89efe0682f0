"""Dataclasses of tensors as pytrees: torch's `tree_map` and its like then see the tensors inside."""

import dataclasses
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

_CONTAINERS = (dict, list, tuple)


def as_pytree(kind: type) -> type:
    """Register the dataclass `kind`, and whatever dataclasses its values hold when they are first looked at."""
    if kind not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(kind, _split, _joined(kind))
    return kind


def _split(value: Any) -> tuple[list[Any], Any]:
    """Return the fields that hold tensors, at whatever depth, and everything else with the fields' names."""
    fields = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    inner = {name: each for name, each in fields.items() if _is_tree(each)}
    return [*inner.values()], (tuple(inner), tuple((name, each) for name, each in fields.items() if name not in inner))


def _joined(kind: type) -> Any:
    def join(values: Any, context: Any) -> Any:
        names, plain = context
        return kind(**dict(zip(names, values, strict=True)), **dict(plain))

    return join


def _is_tree(value: Any) -> bool:
    if dataclasses.is_dataclass(value):
        as_pytree(type(value))
        return True
    if isinstance(value, _CONTAINERS):
        for each in value.values() if isinstance(value, dict) else value:
            _is_tree(each)
        return True
    return isinstance(value, Tensor)
