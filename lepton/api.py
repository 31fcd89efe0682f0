"""The public face: `Lepton` is the network with files and generation, and a constructor for each of the eight sizes."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, Unpack, overload

from torch import Tensor

from lepton import checkpoint
from lepton.config import LeptonConfig
from lepton.data.tokenizer import Tokenizer
from lepton.engine.options import GenerationOptions
from lepton.engine.runners import Lease
from lepton.engine.stats import Stats
from lepton.errors import InputError, naming
from lepton.generate.abstention import TextAndAbstentions, TokensAndAbstentions, pieces_of
from lepton.generate.completion import (
    Arguments,
    Tokens,
    TokensAndLogprobs,
    TokensAndState,
    TokensAndStats,
    TokensAndUncertainties,
    complete,
    started,
    takes_arguments,
)
from lepton.generate.generation import MOST_AT_ONCE, Wanted
from lepton.generate.prompts import Prompt, Prompts
from lepton.generate.stream import Stream
from lepton.model import Memory, Network, Output, State
from lepton.model.arguments import checked_call
from lepton.model.budget import Budget
from lepton.model.promise import Promise
from lepton.model.size_config import size_config
from lepton.model.weights import on_meta_device
from lepton.values import whole
from lepton.weights import packaged

__all__ = [
    "GenerationOptions",
    "Lepton",
    "Memory",
    "Output",
    "State",
    "Stats",
    "Stream",
    "Tokenizer",
    "create_lepton",
    "create_lepton_large",
    "create_lepton_medium",
    "create_lepton_micro",
    "create_lepton_nano",
    "create_lepton_small",
    "create_lepton_tiny",
    "create_lepton_xl",
    "create_lepton_xxl",
]


class Lepton(Network):
    """A language model that is loaded from checkpoints and generates."""

    _tokenizer_json: str | None = None

    @classmethod
    def from_checkpoint(cls, path: str | Path | None = None) -> Self:
        """Build the model that the checkpoint `path` holds, on the CPU, in eval mode, in the precision of the file.

        Without a path it is the model that comes with LEPTON.

        Raises:
            InputError: the file is missing, torn, or no checkpoint; or no model comes with this copy of LEPTON.
        """
        path = packaged() if path is None else path
        return cls.restored(checkpoint.load(path), path)

    @classmethod
    def restored(cls, content: dict[str, Any], path: str | Path) -> Self:
        """Build the model of a checkpoint from its `content`, whose tensors become the parameters; `path` names it.

        No memory is taken before the weights are known to fit the configuration.
        """
        with naming(path):
            with on_meta_device():
                model = cls(LeptonConfig.from_dict(content["config"]))
            model.load_state_dict(content["model"], assign=True)
            if (router := model.idea("router")) is not None:
                router.budgets = tuple(map(Budget.from_dict, content.get("budgets", ())))
            if (head := model.idea("uncertainty")) is not None:
                head.promises = tuple(map(Promise.from_dict, content.get("promises", ())))
        model._tokenizer_json = content.get("tokenizer")
        return model.eval()

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that the checkpoint carries; None for a model that comes from none, or from one without."""
        return None if self._tokenizer_json is None else Tokenizer.from_json(self._tokenizer_json)

    @overload
    def generate(self, prompt_ids: str, max_new_tokens: int | None = None, **arguments: Unpack[Arguments]) -> str: ...

    @overload
    def generate(
        self, prompt_ids: Sequence[int], max_new_tokens: int | None = None, **arguments: Unpack[Arguments]
    ) -> list[int]: ...

    @overload
    def generate(
        self, prompt_ids: Prompts, max_new_tokens: int | None = None, **arguments: Unpack[Arguments]
    ) -> list[list[int]]: ...

    @overload
    def generate(
        self, prompt_ids: Tensor, max_new_tokens: int | None = None, **arguments: Unpack[Arguments]
    ) -> Any: ...

    @overload
    def generate(
        self, prompt_ids: str, max_new_tokens: int | None = None, *, abstain_at: float, **arguments: Unpack[Arguments]
    ) -> TextAndAbstentions: ...

    @overload
    def generate(
        self,
        prompt_ids: Prompt,
        max_new_tokens: int | None = None,
        *,
        abstain_at: float,
        **arguments: Unpack[Arguments],
    ) -> TokensAndAbstentions: ...

    @takes_arguments
    def generate(
        self,
        prompt_ids: Prompt | str,
        max_new_tokens: int | None = None,
        *,
        abstain_at: float | None = None,
        **arguments: Unpack[Arguments],
    ) -> Tokens | str | TokensAndAbstentions | TextAndAbstentions:
        """Continue `prompt_ids` and return prompt and new tokens.

        A flat list, or a tensor [T] or [1, T], gives a flat list. A list of lists or of tensors [T], whose lengths may
        differ, or a tensor [B, T] gives a list of lists; each row is what it would be by itself. The end-of-document
        id by itself, `[model.config.eos_id]`, gives a text from its beginning. A text gives a text, if the checkpoint
        carries a tokenizer.

        No parameter, buffer, mode or global random state changes.

        Args:
            prompt_ids: token ids; `tokenizer.encode` makes them.
            max_new_tokens: tokens to generate at most; None is the options' own number, 100.
            abstain_at: a risk between 0 and 1 that `python -m lepton calibrate --risk` was run for. The new tokens are
                the same, and the result is (tokens, abstained, uncertainties), for a text (text, pieces): it says from
                which of them the model abstains. Where it does not, at most this share of its most likely tokens is
                wrong, on text like that of the calibration (`docs/ideas/uncertainty.md` says what holds elsewhere).
            arguments: the fields of `GenerationOptions` by name (`help(lepton.GenerationOptions)` explains each), or
                such an object as `options`; `state`, a past to continue from with a row for each prompt; or `memory`,
                what a new text remembers of earlier ones (`state.memory`, or a file that its `save` wrote).

        Raises:
            InputError: a prompt or an option that cannot be used; or `abstain_at` was not calibrated.
        """
        if not isinstance(prompt_ids, str):
            found = complete(self, prompt_ids, max_new_tokens, abstain_at=abstain_at, **arguments)
            if abstain_at is None:
                return found.tokens
            return TokensAndAbstentions(found.tokens, found.abstained, found.uncertainties)
        if self.tokenizer is None:
            raise InputError(
                "the prompt is text, and this model has no tokenizer: load a checkpoint that carries one, or encode it "
                "with the tokenizer first"
            )
        ids = self.tokenizer.encode(prompt_ids) or [self.config.eos_id]
        found = complete(self, ids, max_new_tokens, abstain_at=abstain_at, **arguments)
        new = found.rows[0][len(ids) :]
        text = prompt_ids + self.tokenizer.decode(new)
        if abstain_at is None:
            return text
        return TextAndAbstentions(text, pieces_of(self.tokenizer.stream_decoder(), new, found.row_abstained[0]))

    def warm_up(
        self,
        batch_size: int = 1,
        *,
        speculative: bool = True,
        depth: float | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Compile what generates for `batch_size` prompts at once, so that it runs at full speed from then on.

        Without it, generation needs no compiler and is several times slower. It takes a few minutes the first time.
        What was compiled is kept in the folder `cycles` of your cache folder; $LEPTON_CACHE names another. A later
        process loads it in seconds, with the same model size, device and versions. To load it runs what the folder
        holds. `say` (such as `print`) gets progress. All depths below 1 share what is compiled for one of them.
        It is lost when the weights are replaced, not when they change in place, and of no use to a model without a
        window. Hooks that are added later are not called. On a CPU it needs a C++ compiler, such as g++, and serves
        depth 1; a later process is fast only while Inductor's own cache (TORCHINDUCTOR_CACHE_DIR) is there, too. If
        other programs keep the cores busy, set OMP_WAIT_POLICY=passive. The compiler leaves a million objects. At
        these Python's garbage collector looks now and then, for up to seconds. A process that only generates can stop
        that with `lepton.runtime.device.freeze_objects()`, as the server does.
        """
        routed, drafts = checked_call(self, 1, depth, None).routed, None if speculative else [0]
        with Lease(self, whole("batch_size", batch_size, 1, MOST_AT_ONCE, " prompts"), 0) as lease:
            lease.runner.warm_up(batch_size, drafts=drafts, routed=routed, say=say)

    @takes_arguments
    def generate_stream(
        self,
        prompt_ids: Tensor | Sequence[int],
        max_new_tokens: int | None = None,
        *,
        uncertainty: bool = False,
        abstain_at: float | None = None,
        **arguments: Unpack[Arguments],
    ) -> Stream:
        """Return an iterator over the new tokens of one prompt, each as soon as it is known.

        Arguments and tokens are those of `generate`; with `uncertainty`, `Stream.uncertainty` is that of the last token
        taken, and with `abstain_at`, `Stream.abstained` says whether the model abstains from it. Bad values raise at
        the call. It may be left early; its `state` is that of the tokens taken, as `generate_with_state` describes it.
        """
        wanted: Wanted = {"uncertainty": uncertainty, "abstain_at": abstain_at}
        return Stream(started(self, prompt_ids, max_new_tokens, wanted=wanted, **arguments))

    @takes_arguments
    def generate_with_uncertainty(
        self, prompt_ids: Prompt, max_new_tokens: int | None = None, **arguments: Unpack[Arguments]
    ) -> TokensAndUncertainties:
        """Return (what `generate` returns, a number in 0..1 for each new token: how unsure the model was there).

        The number is what the uncertainty head predicts where the token was predicted: the chance that the most likely
        token, which greedy decoding takes, is wrong. For a list of prompts both are lists of lists.

        Raises:
            InputError: as `generate`; or the model has no uncertainty head, such as the dense baseline.
        """
        found = complete(self, prompt_ids, max_new_tokens, uncertainty=True, **arguments)
        return TokensAndUncertainties(found.tokens, found.uncertainties)

    @takes_arguments
    def generate_with_logprobs(
        self,
        prompt_ids: Prompt,
        max_new_tokens: int | None = None,
        *,
        logprobs: int = 0,
        **arguments: Unpack[Arguments],
    ) -> TokensAndLogprobs:
        """Return (what `generate` returns, log-probabilities for each new token).

        They are the token's own and those of the `logprobs` most probable tokens: the model's, before temperature,
        `top_p` and `top_k`. For a list of prompts both are lists of lists.
        """
        found = complete(self, prompt_ids, max_new_tokens, logprobs=logprobs, **arguments)
        return TokensAndLogprobs(found.tokens, found.logprobs)

    @takes_arguments
    def generate_with_state(
        self, prompt_ids: Prompt, max_new_tokens: int | None = None, **arguments: Unpack[Arguments]
    ) -> TokensAndState:
        """Return (what `generate` returns, the state to continue from, with a row for each prompt).

        The state has read what came before, the prompt and all new tokens but the last, which was drawn and not yet
        read. So the next prompt of a conversation begins with that token, `[tokens[-1], *next_ids]`. That token as the
        only one of a prompt continues the same text as if nothing had been cut. With
        `max_new_tokens=0` it has read the whole prompt.
        """
        found = complete(self, prompt_ids, max_new_tokens, **arguments)
        return TokensAndState(found.tokens, found.state)

    @takes_arguments
    def generate_with_stats(
        self, prompt_ids: Prompt, max_new_tokens: int | None = None, **arguments: Unpack[Arguments]
    ) -> TokensAndStats:
        """Return (what `generate` returns, `Stats`: tokens per step, accepted drafts, passes, mean depth)."""
        found = complete(self, prompt_ids, max_new_tokens, **arguments)
        return TokensAndStats(found.tokens, found.stats)


def create_lepton(size: str, **overrides: Any) -> Lepton:
    """Build the model of a size; `overrides` are fields of `LeptonConfig`, e.g. ``create_lepton("nano", window=16)``.

    Raises:
        InputError: see `size_config`.
    """
    return Lepton(size_config(size, **overrides))


def create_lepton_nano(**overrides: Any) -> Lepton:
    """NANO, 10 M parameters, for debugging."""
    return create_lepton("nano", **overrides)


def create_lepton_micro(**overrides: Any) -> Lepton:
    """MICRO, 25 M parameters, for quick experiments."""
    return create_lepton("micro", **overrides)


def create_lepton_tiny(**overrides: Any) -> Lepton:
    """TINY, 112 M parameters, for development."""
    return create_lepton("tiny", **overrides)


def create_lepton_small(**overrides: Any) -> Lepton:
    """SMALL, 160 M parameters, for overnight runs."""
    return create_lepton("small", **overrides)


def create_lepton_medium(**overrides: Any) -> Lepton:
    """MEDIUM, 350 M parameters, for real training."""
    return create_lepton("medium", **overrides)


def create_lepton_large(**overrides: Any) -> Lepton:
    """LARGE, 760 M parameters, full scale."""
    return create_lepton("large", **overrides)


def create_lepton_xl(**overrides: Any) -> Lepton:
    """XL, 1.5 B parameters, for a big GPU."""
    return create_lepton("xl", **overrides)


def create_lepton_xxl(**overrides: Any) -> Lepton:
    """XXL, 3 B parameters: go big or go home."""
    return create_lepton("xxl", **overrides)
