"""A request: its JSON becomes prompts and options, or a refusal that names the field and says what to do."""

import re
import secrets
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lepton.data.chat import ChatTemplate
from lepton.data.tokenizer import Tokenizer
from lepton.engine.options import GenerationOptions
from lepton.engine.sequence import Sequence
from lepton.errors import InputError, shown
from lepton.generate.abstention import largest_kept, promise_of
from lepton.generate.budgets import budgeted
from lepton.generate.prompts import read_prompts
from lepton.model import Network, State
from lepton.model.arguments import checked_call
from lepton.ops.choose import stream_words
from lepton.serve.answer import Answer
from lepton.serve.dialogue import MESSAGES, Form, read_messages
from lepton.serve.fields import FINITE, Fields, Schema, clean, parse_body, schema_of
from lepton.serve.limits import Limits, Refusal
from lepton.serve.scoring import Scoring
from lepton.values import SEEDS

MOST_STOPS, LONGEST_STOP = 16, 256
"""Stop texts of a request, and characters of each."""
MOST_PROBABLE = 20
"""Alternatives whose log-probabilities may be asked for."""
NEW_TOKENS, CHAT_TOKENS = 100, 512
"""New tokens where the request gives no number: as `Lepton.generate`, and for an answer in a conversation."""
CONVERSATION = re.compile("[A-Za-z0-9_-]{1,64}")
"""What ids of conversations are."""
NAMED: Schema = {"type": "string", "pattern": f"^{CONVERSATION.pattern}$"}
NEUTRAL: dict[str, Items[Any]] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Fields of OpenAI's that are not supported, and the values that ask for nothing."""
NOTES = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Who asks, and what they note about it: that changes no answer."""


@dataclass(frozen=True)
class Reader:
    """What requests are read against."""

    model: Network
    tokenizer: Tokenizer
    name: str
    """The id of the model, which a request may name."""
    limits: Limits
    template: ChatTemplate | None = None
    """What the model was trained on conversations in; None: it was not."""

    @cached_property
    def form(self) -> Form:
        """How conversations become tokens."""
        return Form(self.tokenizer, self.template)

    @property
    def risks(self) -> list[float]:
        """The risks at which the model may abstain, those that were calibrated; the smallest first."""
        head = self.model.idea("uncertainty")
        return [] if head is None else sorted(each.risk for each in head.promises)

    @property
    def costs(self) -> list[float]:
        """The costs, in nats a token, for which the model may skip blocks; likewise."""
        router = self.model.idea("router")
        return [] if router is None else sorted(each.max_cost for each in router.budgets)

    def task(self, body: bytes, *, chat: bool) -> "Task":
        """Return what a request to `/v1/completions`, or with `chat` to `/v1/chat/completions`, asks for.

        Raises:
            Refusal: it cannot be served.
        """
        task = self._read(Fields(parse_body(body)), chat=chat)
        self._check_size(task.prompts, task.n, task.options.max_new_tokens)
        return task

    def schema(self, *, chat: bool) -> Schema:
        """Return what the body of a request may be."""
        sample: dict[str, Any] = {"messages": [{"role": "user", "content": ""}]} if chat else {"prompt": ""}
        return schema_of(lambda fields: self._read(fields, chat=chat), sample)

    def _read(self, fields: Fields, *, chat: bool) -> "Task":
        """Return what a request asks for, whatever its size."""
        name = fields.take("model", self.name, {"enum": [self.name]})
        if name != self.name:
            text = f"model={shown(name)}: there is no such model here; choose {self.name!r}"
            raise Refusal(text, param="model", code="model_not_found", status=404)
        opens: list[int] = []
        if chat:
            ids, opens = self.form.prompt(read_messages(fields.take("messages", schema=MESSAGES)))
            prompts, texts = [ids], [self.tokenizer.decode(ids)]
        else:
            prompts, texts = self._prompts(fields)
        echo = not chat and fields.flag("echo")
        logprobs = _chat_logprobs(fields) if chat else fields.whole("logprobs", None, 0, MOST_PROBABLE)
        n = fields.whole("n", 1, 1, self.limits.max_choices)
        options, kept = self._options(fields, CHAT_TOKENS if chat else NEW_TOKENS, chat)
        conversation = _conversation(fields, n, options.max_new_tokens) if chat else None
        stops = _stops(fields)
        stream = fields.flag("stream")
        include_usage = _include_usage(fields, stream)
        for note in NOTES:
            fields.take(note)
        fields.allow(NEUTRAL)
        fields.finish()
        stops = [*stops, *self.form.stops] if chat else stops
        form = stream, include_usage, logprobs, echo
        return Task(self, chat, prompts, texts, options, n, stops, *form, kept, opens, conversation)

    @property
    def _prompt_schema(self) -> Schema:
        text, id_ = {"type": "string"}, {"type": "integer", "minimum": 0, "maximum": self.model.config.vocab_size - 1}
        ids = {"type": "array", "items": id_, "minItems": 1, "maxItems": self.limits.max_prompt}
        several = {"type": "array", "minItems": 1, "maxItems": self.limits.max_choices}
        return {"anyOf": [text, several | {"items": text}, ids, several | {"items": ids}]}

    def _prompts(self, fields: Fields) -> tuple[list[list[int]], list[str]]:
        """Return the prompts as ids and as texts."""
        prompt = fields.take("prompt", schema=self._prompt_schema)
        if isinstance(prompt, str):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt:
            fields.refuse("prompt", prompt, "give a string, a list of strings, token ids, or a list of their lists")
        if all(isinstance(each, str) for each in prompt):
            self._check_count(len(prompt))
            texts = [clean(each) for each in prompt]
            return [self.tokenizer.encode(text) or [self.model.config.eos_id] for text in texts], texts
        if isinstance(prompt[0], list):
            self._check_count(len(prompt))
        try:
            rows, _ = read_prompts(prompt, self.model.config.vocab_size)
        except InputError as error:
            raise Refusal(str(error), param="prompt") from None
        return rows, [self.tokenizer.decode(row) for row in rows]

    def _options(self, fields: Fields, new_tokens: int, chat: bool) -> tuple[GenerationOptions, float | None]:
        """Return how to generate, and the largest uncertainty that is kept, if the model is to abstain.

        What is left out is as in `GenerationOptions`, and a seed is drawn.
        """
        most, default = self.limits.max_tokens, GenerationOptions()
        count = fields.whole("max_tokens", None, 0, most)
        if chat and (newer := fields.whole("max_completion_tokens", None, 0, most)) is not None:
            if count not in (None, newer):
                fields.refuse("max_completion_tokens", newer, f"max_tokens is {count}; give one of them")
            count = newer
        seed = fields.whole("seed", None, *SEEDS)
        try:
            options = GenerationOptions(
                max_new_tokens=min(new_tokens, most) if count is None else count,
                temperature=fields.real("temperature", default.temperature, 0, FINITE),
                top_p=fields.real("top_p", default.top_p, 0, 1, above=True),
                top_k=fields.whole("top_k", None, 1, self.model.config.vocab_size),
                seed=secrets.randbits(53) if seed is None else seed,
                depth=fields.real("depth", None, 0, 1),
                max_cost=fields.real("max_cost", None, 0, FINITE, above=True, known=self.costs),
                think=fields.whole("think", None, 0, self.limits.max_think),
                use_speculative=fields.flag("use_speculative", True),
            )
            risk = fields.real("abstain_at", None, 0, 1, above=True, known=self.risks)
            kept = None if risk is None else largest_kept(self.model, promise_of(self.model, risk, options))
            options = budgeted(self.model, options)
            checked_call(self.model, 1, options.depth, options.think)
        except InputError as error:
            raise Refusal(str(error), param=str(error).partition("=")[0]) from None
        return options, kept

    def _check_count(self, count: int) -> None:
        if count > self.limits.max_choices:
            text = f"{count} answers are asked for, prompts times n: at most {self.limits.max_choices} are given"
            raise Refusal(f"{text}; send several requests", param="n")

    def _check_size(self, prompts: list[list[int]], n: int, new_tokens: int) -> None:
        """Refuse what would take too much work."""
        self._check_count(len(prompts) * n)
        longest = max(map(len, prompts))
        if longest > self.limits.max_prompt:
            text = f"the prompt has {longest:,} tokens: at most {self.limits.max_prompt:,} are taken; shorten it"
            raise Refusal(text, code="context_length_exceeded")
        total = n * (sum(map(len, prompts)) + len(prompts) * new_tokens)
        if total > self.limits.max_request:
            text = (
                f"prompts and answers may have {total:,} tokens together: at most {self.limits.max_request:,} are taken"
            )
            raise Refusal(f"{text}; ask for fewer answers or tokens", code="context_length_exceeded")


@dataclass(frozen=True)
class Task:
    """What a request asks for, checked. Answers are numbered prompt by prompt: prompt 0's `n` first."""

    reader: Reader
    chat: bool
    prompts: list[list[int]]
    texts: list[str]
    """The prompts as texts."""
    options: GenerationOptions
    n: int
    """Answers to each prompt."""
    stops: list[str]
    stream: bool
    include_usage: bool
    """Whether a stream ends with the usage."""
    logprobs: int | None
    """Alternatives whose log-probabilities are wanted; None: nothing is wanted of single tokens."""
    echo: bool
    """Whether each text begins with its prompt."""
    largest_kept: float | None = None
    """From a token of a larger uncertainty the model abstains; None: it is not to abstain."""
    opens: list[int] = field(default_factory=list)
    """Indices of the tokens of a chat's prompt that opened earlier answers."""
    conversation: str | None = None
    """The id of the conversation that a chat goes on with."""

    @property
    def scores_prompts(self) -> bool:
        """Whether the tokens of the prompts are to have log-probabilities, too."""
        return self.echo and self.logprobs is not None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(map(len, self.prompts))

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest prompt and its answer, at most."""
        return max(map(len, self.prompts)) + self.options.max_new_tokens

    def answers(self, past: State | None = None) -> list[Answer]:
        """Return the answers to compute; none if no token is new and none of a prompt has to be scored.

        `past` is what the model has read of the conversation, one row. The answer then brings the state up to date.

        Answer i is row i of `Lepton.generate` for the prompts, each `n` times. Whoever asks for log-probabilities gets
        them from passes of one kind: a GPU captures passes of each kind.
        """
        if not self.options.max_new_tokens and not self.scores_prompts:
            return []
        model, tokenizer = self.reader.model, self.reader.tokenizer
        details = self.logprobs is not None or self.largest_kept is not None
        uncertainty = details and model.idea("uncertainty") is not None
        probable = min(MOST_PROBABLE, model.config.vocab_size) if details else None
        assert self.options.seed is not None
        scorings = [Scoring(prompt, self.options, probable or 0) for prompt in self.prompts]
        form = self.reader.form if self.chat else None
        ends = [[model.config.eos_id], *([] if form is None else form.ends)]
        found = []
        for i in range(self.n * len(self.prompts)):
            sequence = Sequence(
                self.prompts[i // self.n],
                self.options,
                stops=ends,
                stream=stream_words(self.options.seed, i),
                uncertainty=uncertainty,
                logprobs=probable,
                past=None if past is None else (past, 0),
                past_phase=0 if past is None else int(past.phase_B[0]),
            )
            sequence.opens = self.opens
            scoring = scorings[i // self.n] if self.scores_prompts else None
            closing = form.answer if form is not None and self.conversation is not None else None
            found.append(Answer(sequence, tokenizer, self.stops, scoring, closing))
        return found


def _stops(fields: Fields) -> list[str]:
    one = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}
    stop = fields.take("stop", [], {"anyOf": [one, {"type": "array", "items": one, "maxItems": MOST_STOPS}]})
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        fields.refuse("stop", stop, f"give a string, or a list of at most {MOST_STOPS}")
    for each in stops:
        if not isinstance(each, str) or not 0 < len(each) <= LONGEST_STOP:
            fields.refuse("stop", each, f"give strings of 1 to {LONGEST_STOP} characters")
    return [clean(each) for each in stops]


def _conversation(fields: Fields, n: int, new_tokens: int) -> str | None:
    name = fields.take("conversation", schema=NAMED)
    if name is None:
        return None
    if not isinstance(name, str) or not CONVERSATION.fullmatch(name):
        fields.refuse("conversation", name, "give an id of 1 to 64 letters, digits, _ and -")
    if n != 1 or not new_tokens:
        wrong, value = ("n", n) if n != 1 else ("max_tokens", new_tokens)
        fields.refuse(wrong, value, "a conversation goes on with one answer of at least one token")
    return name


def _chat_logprobs(fields: Fields) -> int | None:
    wanted = fields.flag("logprobs")
    count = fields.whole("top_logprobs", None, 0, MOST_PROBABLE)
    if count is not None and not wanted:
        fields.refuse("top_logprobs", count, "needs logprobs=true")
    return (count or 0) if wanted else None


def _include_usage(fields: Fields, stream: bool) -> bool:
    given = fields.take("stream_options", schema=STREAM_OPTIONS)
    if given is None:
        return False
    if not stream or not isinstance(given, dict):
        fields.refuse("stream_options", given, "must be an object, and needs stream=true")
    return _read_stream_options(fields.inside("stream_options", given))


def _read_stream_options(fields: Fields) -> bool:
    found = fields.flag("include_usage")
    fields.allow({"include_obfuscation": (False,)})  # random padding
    fields.finish()
    return found


STREAM_OPTIONS: Schema = schema_of(_read_stream_options, {})
"""What the options of a stream may be."""
