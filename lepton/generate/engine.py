"""The engine as callers use it: prompts and options in, tokens out."""

from pathlib import Path
from typing import Any

from lepton.errors import InputError
from lepton.generate.generation import Generation, Options
from lepton.generate.prompts import Prompt
from lepton.generate.stats import Stats
from lepton.generate.stream import Stream
from lepton.model import Lepton, Memory, State


def generate(
    model: Lepton,
    prompt_ids: Prompt,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.9,
    top_k: int | None = None,
    use_speculative: bool = True,
    seed: int | None = None,
    stop: Any = None,
    depth: float | None = None,
    think: int | None = None,
    state: State | None = None,
    memory: Memory | str | Path | None = None,
) -> Any:
    """Continue `prompt_ids` and return prompt and new tokens.

    A flat list, or a tensor of shape [T] or [1, T], gives a flat list. A list of lists or of tensors [T], whose lengths
    may differ, or a tensor [B, T] gives a list of lists; each row is what it would be alone. The end-of-document id
    alone, `[model.config.eos_id]`, gives a text from its beginning.

    Generation ends after `max_new_tokens`, after the model's end-of-document id, or after one of `stop` has been
    produced (an id, a list of ids, or a list of id sequences); what ended it is kept. `temperature=0` is greedy.
    `seed` (any of 64 bits) makes sampling repeatable: row r draws from the stream (seed, r), and asking for more tokens
    changes none of the first ones. `depth` (0..1) and `think` (rounds, 0 to 256) are the model's own knobs.

    `state` is a past to go on from, with a row for each prompt: `generate_with_state` returns one. `memory` is what a
    new text remembers of earlier ones: `state.memory`, or a file that its `save` wrote.

    `use_speculative` drafts several tokens and verifies them in one pass, where the model has a drafter: fewer passes
    for the same text. Greedy tokens are the same with and without it; sampled ones have the same distribution, but a
    seed draws other ones from it.

    No parameter, buffer, mode or global random state changes. Bad values raise InputError.
    """
    options = Options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        use_speculative=use_speculative,
        seed=seed,
        stop=stop,
        depth=depth,
        think=think,
    )
    return _complete(Generation(model, prompt_ids, options, state=state, memory=memory))[0]


def generate_stream(
    model: Lepton,
    prompt_ids: Prompt,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.9,
    top_k: int | None = None,
    use_speculative: bool = True,
    seed: int | None = None,
    stop: Any = None,
    depth: float | None = None,
    think: int | None = None,
    state: State | None = None,
    memory: Memory | str | Path | None = None,
) -> Stream:
    """Return an iterator over the new tokens of one prompt, each as soon as it is known.

    The arguments are those of `generate`, and so are the tokens. Bad values raise at the call. It may be left early;
    its `state` is that of the tokens taken, as `generate_with_state` describes it.
    """
    options = Options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        use_speculative=use_speculative,
        seed=seed,
        stop=stop,
        depth=depth,
        think=think,
    )
    generation = Generation(model, prompt_ids, options, state=state, memory=memory)
    if not generation.flat:
        rows = len(generation.prompts)
        raise InputError(f"generate_stream follows one prompt, not a list of {rows}; use generate for a batch")
    return Stream(generation)


def generate_with_uncertainty(
    model: Lepton,
    prompt_ids: Prompt,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.9,
    top_k: int | None = None,
    use_speculative: bool = True,
    seed: int | None = None,
    stop: Any = None,
    depth: float | None = None,
    think: int | None = None,
    state: State | None = None,
    memory: Memory | str | Path | None = None,
) -> tuple[Any, Any]:
    """Return what `generate` returns, and for each new token a number in 0..1: how unsure the model was there.

    The number is what the model's uncertainty head says where the token was predicted: the chance that the most likely
    token, which greedy decoding takes, is wrong. For a list of prompts both are lists of lists. Raises InputError for
    a model without that head, such as the dense baseline.
    """
    options = Options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        use_speculative=use_speculative,
        seed=seed,
        stop=stop,
        depth=depth,
        think=think,
        uncertainty=True,
    )
    return _complete(Generation(model, prompt_ids, options, state=state, memory=memory))


def generate_with_stats(
    model: Lepton,
    prompt_ids: Prompt,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.9,
    top_k: int | None = None,
    use_speculative: bool = True,
    seed: int | None = None,
    stop: Any = None,
    depth: float | None = None,
    think: int | None = None,
    state: State | None = None,
    memory: Memory | str | Path | None = None,
) -> tuple[Any, Stats]:
    """Return what `generate` returns, and `Stats`: tokens a cycle, accepted drafts, passes, mean depth."""
    options = Options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        use_speculative=use_speculative,
        seed=seed,
        stop=stop,
        depth=depth,
        think=think,
    )
    generation = Generation(model, prompt_ids, options, state=state, memory=memory)
    return _complete(generation)[0], generation.stats


def generate_with_state(
    model: Lepton,
    prompt_ids: Prompt,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.9,
    top_k: int | None = None,
    use_speculative: bool = True,
    seed: int | None = None,
    stop: Any = None,
    depth: float | None = None,
    think: int | None = None,
    state: State | None = None,
    memory: Memory | str | Path | None = None,
) -> tuple[Any, State]:
    """Return what `generate` returns, and the state to go on from, with a row for each prompt.

    It has read what came before, the prompt and all new tokens but the last, which was drawn and not yet read. So the
    next prompt of a conversation begins with that token, `[tokens[-1], *next_ids]`, and that token alone goes on with
    the same text as if nothing had been cut.
    """
    options = Options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        use_speculative=use_speculative,
        seed=seed,
        stop=stop,
        depth=depth,
        think=think,
    )
    generation = Generation(model, prompt_ids, options, state=state, memory=memory)
    return _complete(generation)[0], generation.state


def _complete(generation: Generation) -> tuple[Any, Any]:
    """Generate to the end; return prompts with new tokens, and uncertainties."""
    tokens = [list(prompt) for prompt in generation.prompts]
    uncertainties: list[list[float]] = [[] for _ in tokens]
    for cycle in generation:
        for given in cycle:
            tokens[given.row] += given.tokens
            uncertainties[given.row] += given.uncertainties
    return (tokens[0], uncertainties[0]) if generation.flat else (tokens, uncertainties)
