"""What a request may ask for, and how a request that cannot be served is refused."""

from dataclasses import dataclass, field
from typing import Any

from lepton.values import MAX_ROUNDS, whole


def _flag(text: str) -> dict[str, Any]:
    """Return how the command line presents a field."""
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that one request, or all of them, may take. Each field is a flag of `python -m lepton serve`."""

    max_body: int = field(default=1 << 20, metadata=_flag("bytes of a request"))
    max_prompt: int = field(default=1 << 13, metadata=_flag("tokens of a prompt"))
    max_tokens: int = field(default=1 << 12, metadata=_flag("new tokens of an answer"))
    max_choices: int = field(default=32, metadata=_flag("answers to one request: prompts times n"))
    max_request: int = field(default=1 << 16, metadata=_flag("tokens of a request, prompts and answers together"))
    max_think: int = field(default=16, metadata=_flag("rounds of thinking"))
    max_streams: int = field(default=1024, metadata=_flag("answers that run or wait, of all requests"))
    max_conversations: int = field(default=1000, metadata=_flag("conversations that are kept for a key"))
    max_seconds: int = field(default=600, metadata=_flag("seconds that a request may take"))

    def __post_init__(self) -> None:
        for name, least in dict.fromkeys(self.__dataclass_fields__, 1).items():
            whole(name, getattr(self, name), 0 if name == "max_think" else least, _MOST.get(name))


_MOST = {"max_think": MAX_ROUNDS, "max_seconds": 1 << 20}

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """A request that is not served; over HTTP an error in OpenAI's form."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        """`message` names the value and says what to do; `param` is the field of the request that is wrong."""
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status

    def to_dict(self) -> dict[str, Any]:
        """Return the body of the reply."""
        kind = "server_error" if self.status >= 500 else TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
