"""What a generation returns: tokens, and on request uncertainties, counts, and the state to continue from."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, Unpack, cast

from lepton.engine.options import GenerationOptions, OptionFields, resolved
from lepton.engine.runner import TokenLogprobs
from lepton.engine.stats import Stats
from lepton.errors import InputError, nearest, shown
from lepton.generate.abstention import Abstentions
from lepton.generate.generation import Generation, Wanted
from lepton.generate.prompts import Prompt, Tokens, Uncertainties
from lepton.model import Memory, Network, State
from lepton.values import whole


class TokensAndUncertainties(NamedTuple):
    """Result of `Lepton.generate_with_uncertainty`."""

    tokens: Tokens
    uncertainties: Uncertainties


class TokensAndState(NamedTuple):
    """Result of `Lepton.generate_with_state`."""

    tokens: Tokens
    state: State


class TokensAndLogprobs(NamedTuple):
    """Result of `Lepton.generate_with_logprobs`."""

    tokens: Tokens
    logprobs: list[TokenLogprobs] | list[list[TokenLogprobs]]
    """Of each new token."""


class TokensAndStats(NamedTuple):
    """Result of `Lepton.generate_with_stats`."""

    tokens: Tokens
    stats: Stats


@dataclass(frozen=True)
class Completion:
    """Everything that a generation has to give."""

    rows: list[list[int]]
    """Prompt and new tokens of each row."""
    row_uncertainties: list[list[float]]
    """For each new token of each row; empty unless they were asked for."""
    row_logprobs: list[list[TokenLogprobs]]
    """Likewise."""
    row_abstained: list[list[bool]]
    """Likewise: whether the model abstains from it."""
    generation: Generation

    @property
    def tokens(self) -> Tokens:
        """The rows; for one flat prompt its only one."""
        return self.rows[0] if self.generation.flat else self.rows

    @property
    def uncertainties(self) -> Uncertainties:
        """The uncertainties in the same form."""
        return self.row_uncertainties[0] if self.generation.flat else self.row_uncertainties

    @property
    def abstained(self) -> Abstentions:
        """The abstentions in the same form."""
        return self.row_abstained[0] if self.generation.flat else self.row_abstained

    @property
    def logprobs(self) -> list[TokenLogprobs] | list[list[TokenLogprobs]]:
        """The log-probabilities in the same form."""
        return self.row_logprobs[0] if self.generation.flat else self.row_logprobs

    @property
    def stats(self) -> Stats:
        """Steps, accepted drafts, passes through the model, depth."""
        return self.generation.stats

    @property
    def state(self) -> State:
        """What the model has read, with a row for each prompt: all but the last new token; see `Generation.state`."""
        return self.generation.state


class Arguments(OptionFields, total=False):
    """What every function that generates takes beside the prompt and `max_new_tokens`."""

    options: GenerationOptions | None
    """Options to begin with; those given by name replace its fields."""
    state: State | None
    """A state to continue from, with a row for each prompt, such as `generate_with_state` returns."""
    memory: Memory | str | Path | None
    """What a new text remembers of earlier ones: `state.memory`, or a file that its `save` wrote."""


Method = TypeVar("Method", bound=Callable[..., Any])


def takes_arguments(method: Method) -> Method:
    """Let a method that ends in `**arguments` show what these are, with defaults, and refuse any other name."""
    own = inspect.signature(method)
    fields = {field.name: field for field in dataclasses.fields(GenerationOptions) if field.name != "max_new_tokens"}
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for name, field in fields.items()
    ]
    others = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in Arguments.__annotations__.items()
        if name not in fields
    ]
    named = [each for each in own.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    public = own.replace(parameters=[*named, *options, *others])

    @functools.wraps(method)
    def checked(*positional: Any, **arguments: Any) -> Any:
        for name in arguments:
            if name not in public.parameters:
                known = [each for each in public.parameters if each != "self"]
                raise TypeError(f"{method.__name__}() has no argument {name!r}{nearest(name, known)}")
        if len(positional) > 3:
            raise TypeError(f"{method.__name__}() takes a prompt and max_new_tokens by position: name the rest")
        return method(*positional, **arguments)

    checked.__signature__ = public  # type: ignore[attr-defined]
    return cast(Method, checked)


def started(
    model: Network,
    prompt_ids: Prompt,
    max_new_tokens: int | None = None,
    /,
    *,
    options: GenerationOptions | None = None,
    state: State | None = None,
    memory: Memory | str | Path | None = None,
    wanted: Wanted | None = None,
    **fields: Unpack[OptionFields],
) -> Generation:
    """Return a generation that has computed nothing yet; all arguments are checked."""
    wanted = wanted or {}
    if (logprobs := wanted.get("logprobs")) is not None:
        whole("logprobs", logprobs, 0, model.config.vocab_size, " most probable tokens")
    if not isinstance(uncertainty := wanted.get("uncertainty", False), bool):
        raise InputError(f"uncertainty={shown(uncertainty)}: must be True or False")
    checked_options = resolved(options, max_new_tokens, **fields)
    return Generation(model, prompt_ids, checked_options, state=state, memory=memory, **wanted)


def complete(
    model: Network,
    prompt_ids: Prompt,
    max_new_tokens: int | None = None,
    /,
    *,
    uncertainty: bool = False,
    logprobs: int | None = None,
    always_draft: bool = False,
    abstain_at: float | None = None,
    **arguments: Unpack[Arguments],
) -> Completion:
    """Generate to the end; `lepton.Lepton.generate` and `Generation` describe the arguments."""
    wanted: Wanted = {
        "uncertainty": uncertainty,
        "logprobs": logprobs,
        "always_draft": always_draft,
        "abstain_at": abstain_at,
    }
    generation = started(model, prompt_ids, max_new_tokens, wanted=wanted, **arguments)
    rows = [list(prompt) for prompt in generation.prompts]
    uncertainties: list[list[float]] = [[] for _ in rows]
    scores: list[list[TokenLogprobs]] = [[] for _ in rows]
    abstained: list[list[bool]] = [[] for _ in rows]
    for outputs in generation:
        for output in outputs:
            rows[output.row] += output.tokens
            uncertainties[output.row] += output.uncertainties
            scores[output.row] += output.logprobs
            abstained[output.row] += output.abstained
    return Completion(rows, uncertainties, scores, abstained, generation)
