"""The engine as callers use it: prompts and options in, tokens out."""

from collections.abc import Iterator
from typing import Any

from lepton.errors import InputError
from lepton.generate.generation import Generation, Options
from lepton.generate.prompts import Prompt, read_prompts
from lepton.generate.stats import Stats
from lepton.model import Lepton


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
) -> Any:
    """Continue `prompt_ids` and return prompt and new tokens.

    A flat list, or a tensor of shape [T] or [1, T], gives a flat list. A list of lists, whose lengths may differ, or a
    tensor [B, T] gives a list of lists; each row is what it would be alone.

    Generation ends after `max_new_tokens`, after the model's end-of-document id, or after one of `stop` has been
    produced (an id, a list of ids, or a list of id sequences); what ended it is kept. `temperature=0` is greedy.
    `seed` makes sampling repeatable: row r draws from the stream (seed, r). `depth` (0..1) and `think` (rounds) are the
    model's own knobs.

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
    tokens, _, _ = _complete(model, prompt_ids, options)
    return tokens


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
) -> Iterator[int]:
    """Return an iterator over the new tokens of one prompt, each as soon as it is known.

    The arguments are those of `generate`, and so are the tokens. Bad values raise at the call, those of `depth` and
    `think` with the first token. It may be left early.
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
    prompts, flat = read_prompts(prompt_ids, model.config.vocab_size)
    if not flat:
        raise InputError(f"generate_stream follows one prompt, not a list of {len(prompts)}; use generate for a batch")
    generation = Generation(model, prompts, options)
    return (token for (news,) in generation for token in news.tokens)


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
    tokens, uncertainties, _ = _complete(model, prompt_ids, options)
    return tokens, uncertainties


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
    tokens, _, stats = _complete(model, prompt_ids, options)
    return tokens, stats


def _complete(model: Lepton, prompt_ids: Prompt, options: Options) -> tuple[Any, Any, Stats]:
    """Generate to the end; return prompts with new tokens, uncertainties and figures."""
    prompts, flat = read_prompts(prompt_ids, model.config.vocab_size)
    generation = Generation(model, prompts, options)
    tokens = [list(prompt) for prompt in prompts]
    uncertainties: list[list[float]] = [[] for _ in prompts]
    for cycle in generation:
        for news in cycle:
            tokens[news.row] += news.tokens
            uncertainties[news.row] += news.uncertainties
    if flat:
        return tokens[0], uncertainties[0], generation.stats
    return tokens, uncertainties, generation.stats
