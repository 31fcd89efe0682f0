"""LEPTON in lm-evaluation-harness: its tasks, measured by LEPTON's own passes. Needs the extra `harness`."""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from lepton.data.tokenizer import Tokenizer
from lepton.engine.options import GenerationOptions
from lepton.errors import InputError, shown
from lepton.evals.answers import Question, answers
from lepton.evals.continuations import likelihoods
from lepton.model import Network

MAX_NEW_TOKENS = 256
"""Tokens of an answer where a task gives no number."""
IGNORED = ("until", "max_gen_toks", "do_sample")
"""Arguments of a task's generation that are read apart from the others."""
OPTIONS = ("temperature", "top_p", "top_k", "seed", "depth", "think")
"""Those that are fields of `GenerationOptions`."""


class LeptonLM(TemplateLM):
    """A model as the harness asks it. Give it to `lm_eval.simple_evaluate(model=...)`.

    There is no largest length: contexts are never cut, and a rolling likelihood is that of the whole text.
    """

    def __init__(
        self,
        model: Network,
        tokenizer: Tokenizer,
        batch_size: int = 8,
        *,
        depth: float | None = None,
        think: int | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: in eval mode, on its device.
            tokenizer: that of the model.
            batch_size: rows at once.
            depth: share of the tokens that go past the stem, None for all.
            think: rounds of thinking, None for the model's own number.
        """
        super().__init__()
        self.model, self._tokenizer, self.batch_size = model, tokenizer, batch_size
        self.depth, self.think = depth, think

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document. It is also the context of a text that has none."""
        return self._tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        """What tells tokenizers apart, for the harness's cache of requests."""
        return f"lepton-{self._tokenizer.hash[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text. No special ids are added."""
        return self._tokenizer.encode(string)

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        """Raise InputError: the model has no chat template."""
        raise InputError("the model has no chat template: evaluate without --apply_chat_template")

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return ln p of each text from its beginning, its end not included."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        pairs = [([self.prefix_token_id], text) for text in texts]
        return [each for each, _ in self._measured(pairs, disable_tqdm)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the answers to (context, options) pairs; each ends before the first of its texts `until`.

        Raises:
            InputError: a task asks for an option that the model does not have.
        """
        questions = []
        for request in requests:
            context, wanted = request.args
            prompt = self.tok_encode(context) or [self.prefix_token_id]
            questions.append(Question(prompt, *self._options(wanted)))
        with self._progress(len(questions), disable_tqdm) as bar:
            return answers(self.model, self._tokenizer, questions, self.batch_size, done=bar.update)

    def _options(self, wanted: Mapping[str, Any]) -> tuple[GenerationOptions, list[str]]:
        """Return the options of a task's generation, and the texts that end an answer."""
        found = normalize_gen_kwargs(dict(wanted), MAX_NEW_TOKENS)
        until = found.get("until") or []
        fields = {name: value for name, value in found.items() if name not in IGNORED}
        if unknown := [name for name, value in fields.items() if name not in OPTIONS and value is not None]:
            raise InputError(
                f"the task sets {unknown[0]}={shown(fields[unknown[0]])} for generation, which LEPTON does not have: "
                f"leave it out of generation_kwargs; {', '.join(OPTIONS)} can be set"
            )
        usual: dict[str, Any] = {"temperature": 1.0 if found.get("do_sample") else 0.0, "top_p": 1.0}
        usual |= {"depth": self.depth, "think": self.think}
        fields = {**usual, **{name: value for name, value in fields.items() if value is not None}}
        options = GenerationOptions(max_new_tokens=found["max_gen_toks"], **fields)
        return options, [until] if isinstance(until, str) else list(until)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        return self._measured([(context, text) for _, context, text in requests], disable_tqdm)

    def _measured(self, pairs: Sequence[tuple[list[int], list[int]]], quiet: bool) -> list[tuple[float, bool]]:
        with self._progress(len(pairs), quiet) as bar:
            options = {"depth": self.depth, "think": self.think, "done": bar.update}
            found = likelihoods(self.model, pairs, self.batch_size, **options)
        return [(each.logprob, each.greedy) for each in found]

    @staticmethod
    def _progress(total: int, quiet: bool) -> Any:
        return tqdm(total=total, disable=quiet or None, leave=False)  # None: only on a terminal
