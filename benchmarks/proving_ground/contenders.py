"""Who takes part where tasks are alike: those about remembering, and those about thinking."""

from typing import Any

from benchmarks.proving_ground.runner import Contender, dense

MEMORY: dict[str, Any] = {"heads": 4, "key_dim": 64, "value_dim": 128, "tied_decay": True}
"""Working memory of the tasks that are about remembering."""
FEEDS_RATE = 1.0
"""Share of the rate at which what the memory adds to the stream learns in these tasks. The usual tenth is for text,
where the window does most of the work: with it a small model found 15 % of 16 pairs, and 92 % with the full rate."""


def remembering(**more: Contender) -> dict[str, Contender]:
    """Return the contenders of a task about what lies beyond the window, and `more` of its own before `complete`.

    The controls come first: full attention of 4 layers, and of 8 layers, should find all that lies in a row of the
    length of training, and is not tested on longer ones. `fading` forgets at each token, whether it writes or not.
    """
    return {
        "dense": Contender(changes=dense(), longer=False),
        "deep": Contender(changes=dense(layers=8), equal=False, longer=False),
        "window_only": Contender(changes={"ideas": ()}),
        "crystals": Contender(changes={"memory": None}),
        "memory": Contender(changes={"crystals": None}),
        "fading": Contender(changes={"crystals": None, "memory.tied_decay": False}),
        **more,
        "complete": Contender(),
    }


def thinking(
    layers: int, pauses: dict[str, Any] | None = None, slots_alone: dict[str, Any] | None = None
) -> dict[str, Contender]:
    """Return the contenders of a task about steps in series.

    The control comes first: so many layers should learn it. With slots alone the tokens do not think. Pauses are tokens
    in the row: the configuration cannot say thoughts of one round with a constant start.

    Args:
        layers: of the control.
        pauses: fields of the task with pauses; by default 8 of them.
        slots_alone: further changes that give slots their best chance.
    """
    return {
        "deep": Contender(changes=dense(layers=layers), equal=False),
        "dense": Contender(changes=dense()),
        "no_thoughts": Contender(changes={"thoughts": None}),
        "pauses": Contender(changes={"thoughts": None}, data=pauses or {"pauses": 8}),
        "slots_alone": Contender(changes={"thoughts.over_tokens": False, **(slots_alone or {})}),
        "thoughts": Contender(),
    }
