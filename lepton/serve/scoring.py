"""What the model thought of a prompt: the log-probabilities of its own tokens, each given those before it."""

from dataclasses import dataclass, field

import torch

from lepton.engine.options import GenerationOptions
from lepton.engine.runner import TokenLogprobs
from lepton.model import Network

CHUNK = 256
"""Tokens of a prompt that are scored at once: each has logits for the whole vocabulary."""


@dataclass
class PromptScores:
    """Of each token of a prompt from the second on: nothing predicts the first one."""

    logprobs: list[TokenLogprobs] = field(default_factory=list)
    uncertainties: list[float] = field(default_factory=list)
    """Empty for a model without an uncertainty head."""
    depths: list[int] = field(default_factory=list)
    """Blocks that were passed where each token was predicted."""


class Scoring:
    """The wish for the scores of a prompt; all its answers share them."""

    def __init__(self, prompt: list[int], options: GenerationOptions, probable: int) -> None:
        """Wish for the scores of `prompt` with `probable` alternatives each, at the options' depth and thinking."""
        self._prompt, self._options, self._probable = prompt, options, probable
        self._found: PromptScores | None = None

    def scores(self, model: Network) -> PromptScores:
        """Return the scores; they are computed once."""
        if self._found is None:
            self._found = prompt_scores(model, self._prompt, self._options, self._probable)
        return self._found


@torch.no_grad()
def prompt_scores(model: Network, prompt: list[int], options: GenerationOptions, probable: int) -> PromptScores:
    """Return the scores of a prompt of at least one token, computed `CHUNK` tokens at a time."""
    found, state = PromptScores(), None
    unsure = model.idea("uncertainty")
    for start in range(0, len(prompt) - 1, CHUNK):
        read = prompt[start : min(start + CHUNK, len(prompt) - 1)]
        following_T = torch.tensor(prompt[start + 1 : start + 1 + len(read)], device=model.device)
        tokens_BT = torch.tensor([read], device=model.device)
        out = model.trunk(tokens_BT, state, depth=options.depth, think=options.think)
        state = out.state
        logits_BTV = model.head(out.hidden)
        log_p_TV = logits_BTV[0].log_softmax(-1)
        own = log_p_TV.gather(1, following_T[:, None])[:, 0].tolist()
        best = log_p_TV.topk(probable, -1)
        pairs = zip(own, best.indices.tolist(), best.values.tolist(), strict=True)
        found.logprobs += [TokenLogprobs(each, dict(zip(ids, scores, strict=True))) for each, ids, scores in pairs]
        found.depths += out.depth[0].tolist()
        if unsure is not None:
            found.uncertainties += unsure(out.hidden, logits_BTV, out.signals)[0].tolist()
    return found
