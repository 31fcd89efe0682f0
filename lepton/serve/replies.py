"""The JSON of replies and of streamed chunks, in OpenAI's form with fields of our own beside."""

import secrets
import time
from collections.abc import Sequence as Items
from typing import Any

from lepton import __version__
from lepton.data.tokenizer import EOS, Tokenizer
from lepton.serve.answer import Answer, EndedBy, Piece, Token
from lepton.serve.requests import Task

LEAST = -9999.0
"""Stands for a log-probability of minus infinity, which JSON cannot say."""
FINISHED = {"length": "length", "stop": "stop", "end_of_document": "stop"}
"""What OpenAI calls the ends of an answer."""


class Replies:
    """Makes the reply to one task: as a whole, or chunk by chunk."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._tokenizer = task.reader.tokenizer
        kind = ("chat.completion.chunk" if task.stream else "chat.completion") if task.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if task.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": task.reader.name,
            "system_fingerprint": f"lepton-{__version__}",
            "seed": task.options.seed,
        }
        if task.conversation is not None:
            self._head["conversation"] = task.conversation

    def whole(self, answers: Items[Answer], pieces: Items[Items[Piece]]) -> dict[str, Any]:
        """Return the reply that is not streamed, from the pieces of each answer."""
        choices = []
        for i, parts in enumerate(pieces):
            text = "".join(piece.text for piece in parts)
            tokens = [token for piece in parts for token in piece.tokens]
            choices.append(self._choice(i, text, tokens, parts[-1].ended_by if parts else "length"))
        return self._head | {"choices": choices, "usage": self.usage(answers)}

    def begin(self, index: int) -> dict[str, Any] | None:
        """Return the chunk with which an answer begins, if it has one: its role, or the echo of its prompt."""
        if self._task.chat:
            choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            return self._chunk([choice | {"logprobs": None}])
        return self._chunk([self._choice(index, self._echo(index), [], None, echo=False)]) if self._task.echo else None

    def chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """Return the chunk of a piece of answer `index`; None if there is nothing to see in it."""
        seen = (self._task.logprobs is not None or self._task.largest_kept is not None) and piece.tokens
        if not piece.text and not seen and piece.ended_by is None:
            return None
        return self._chunk([self._choice(index, piece.text, piece.tokens, piece.ended_by, echo=False)])

    def last(self, answers: Items[Answer]) -> dict[str, Any]:
        """Return the chunk with the usage."""
        return self._head | {"choices": [], "usage": self.usage(answers)}

    def usage(self, answers: Items[Answer]) -> dict[str, Any]:
        """Return the tokens that were read and generated, and how many of them were drafts that proved right."""
        new = sum(answer.taken for answer in answers)
        return {
            "prompt_tokens": self._task.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._task.prompt_tokens + new,
            "drafted_tokens": sum(answer.drafted for answer in answers),
            "accepted_tokens": sum(answer.accepted for answer in answers),
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"choices": choices} | ({"usage": None} if self._task.include_usage else {})

    def _echo(self, index: int) -> str:
        return self._task.texts[index // self._task.n]

    def _choice(
        self, index: int, text: str, tokens: list[Token], ended_by: EndedBy | None, *, echo: bool = True
    ) -> dict[str, Any]:
        """Return one choice of a reply, or of a chunk."""
        task = self._task
        logprobs = None
        if task.logprobs is not None and (tokens or not task.stream):
            begin = len(self._echo(index)) if task.echo else 0
            logprobs = self._chat_logprobs(tokens) if task.chat else self._logprobs(tokens, begin)
        said: dict[str, Any] = {"finish_reason": FINISHED[ended_by] if ended_by else None, "logprobs": logprobs}
        if task.largest_kept is not None:
            before = len(self._echo(index)) if task.echo else 0
            doubtful = [token for token in tokens if self._own(token)["abstained"] and not token.of_prompt]
            said["abstained"] = [[before + token.offset, before + token.end] for token in doubtful]
        if ended_by or not task.stream:
            said["ended_by"] = ended_by
        if task.chat and task.stream:
            return {"index": index, "delta": {"content": text} if text else {}} | said
        if task.chat:
            return {"index": index, "message": {"role": "assistant", "content": text, "refusal": None}} | said
        return {"index": index, "text": self._echo(index) + text if echo and task.echo else text} | said

    def _chat_logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        content = []
        for token in tokens:
            scores = token.logprobs
            assert scores is not None, "they were asked for"
            best = [self._scored(i, score) for i, score in self._most_probable(token)]
            own = {"top_logprobs": best, "text_offset": token.offset} | self._own(token)
            content.append(self._scored(token.id, scores.chosen) | own)
        return {"content": content, "refusal": None}

    def _scored(self, token: int, score: float) -> dict[str, Any]:
        text = self._tokenizer.bytes_of(token)
        named = name_of(self._tokenizer, token)
        return {"token": named, "logprob": max(score, LEAST), "bytes": list(text), "token_id": token}

    def _logprobs(self, tokens: list[Token], begin: int) -> dict[str, Any]:
        """Return lists with an entry a token, as completions have them; `begin` is where the new text begins."""
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        own: dict[str, list[Any]] = {"token_id": [], "uncertainty": [], "depth": [], "drafted": []}
        if self._task.largest_kept is not None:
            own["abstained"] = []
        for token in tokens:
            best: dict[str, float] = {}
            for i, score in self._most_probable(token):
                best.setdefault(self._plain(i), max(score, LEAST))
            scores = token.logprobs  # nothing predicts the first token of a text
            found["tokens"].append(self._plain(token.id))
            found["token_logprobs"].append(None if scores is None else max(scores.chosen, LEAST))
            found["top_logprobs"].append(None if scores is None else best)
            found["text_offset"].append(token.offset + (0 if token.of_prompt else begin))
            for name, value in ({"token_id": token.id} | self._own(token)).items():
                own[name].append(value)
        return found | own

    def _most_probable(self, token: Token) -> list[tuple[int, float]]:
        scores = {} if token.logprobs is None else token.logprobs.most_probable
        return [*scores.items()][: self._task.logprobs]

    def _own(self, token: Token) -> dict[str, Any]:
        """Return what only this server says of a token."""
        found = {"uncertainty": token.uncertainty, "depth": token.depth, "drafted": token.drafted}
        limit, unsure = self._task.largest_kept, token.uncertainty  # nothing predicts the first token of a text
        return found if limit is None else found | {"abstained": None if unsure is None else unsure > limit}

    def _plain(self, token: int) -> str:
        """Return a token as a text that tells it from others: the bytes of a part of a character are written out."""
        name = name_of(self._tokenizer, token)
        if "\ufffd" not in name:
            return name
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._tokenizer.bytes_of(token))


def name_of(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a token, a torn character as U+FFFD; the id that ends a document is called by its name."""
    return EOS if token == tokenizer.eos_id else tokenizer.bytes_of(token).decode("utf-8", "replace")
