"""Speculation: tokens per pass of the model when drafting, on held-out prompts.

Greedy text of a small model loops and is easy to draft, so temperature 1 is measured beside temperature 0.
"""

from collections.abc import Iterable, Sequence
from itertools import islice

from lepton.data.shards import Batch
from lepton.engine.options import GenerationOptions
from lepton.engine.stats import Stats
from lepton.errors import InputError
from lepton.generate.completion import complete
from lepton.model import Network

PROMPT_TOKENS = 64
NEW_TOKENS = 64
TEMPERATURES = (0.0, 1.0)


def prompts_of(batches: Iterable[Batch], count: int, length: int = PROMPT_TOKENS) -> list[list[int]]:
    """Return the beginnings of the first `count` rows of `batches`, at most `length` tokens each.

    Raises:
        InputError: there are no rows.
    """
    rows = (tokens[: min(length, size)] for batch in batches for tokens, size in zip(*batch[:2], strict=True))
    prompts = [row.tolist() for row in islice(rows, count)]
    if not prompts:
        raise InputError("the text is too short for a prompt: give a longer one")
    return prompts


def measure_speculation(
    model: Network,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = NEW_TOKENS,
    depth: float | None = None,
    think: int | None = None,
    seed: int = 0,
) -> dict[float, Stats]:
    """Continue `prompts` at each of TEMPERATURES, without top-p and top-k, and return the counts by temperature."""
    found = {}
    for temperature in TEMPERATURES:
        options = GenerationOptions(temperature=temperature, top_p=1.0, seed=seed, depth=depth, think=think)
        # The measure must not depend on what the machine else does: every cycle drafts.
        found[temperature] = complete(model, prompts, max_new_tokens, options=options, always_draft=True).stats
    return found
