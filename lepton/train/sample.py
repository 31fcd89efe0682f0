"""A sample of the text that a model writes."""

from lepton.data.shards import ShardedDataset
from lepton.data.tokenizer import Tokenizer
from lepton.generate.completion import complete
from lepton.model import Network

PROMPT_TOKENS = 16


def sample_text(
    model: Network, data: ShardedDataset, tokenizer: Tokenizer, *, prompt: str | None, max_new_tokens: int, seed: int
) -> str:
    """Return a prompt and its continuation by `model`; the default prompt is the beginning of `data`."""
    ids = beginning(data) if prompt is None else tokenizer.encode(prompt)
    training = model.training
    model.eval()
    # Whether drafts pay is not searched: a GPU would record more cycles, for a text that is the same.
    (ids,) = complete(model, [ids], max_new_tokens, seed=seed, always_draft=True).rows
    model.train(training)
    return tokenizer.decode(ids)


def beginning(data: ShardedDataset) -> list[int]:
    """Return the first tokens of `data`, at most PROMPT_TOKENS; of conversations all before the first answer."""
    tokens, lengths, targets = next(data.batches(1))
    size = min(PROMPT_TOKENS, int(lengths[0]))
    if targets is not None and targets[0].any():
        size = 1 + int(targets[0].nonzero()[0])
    ids: list[int] = tokens[0, :size].tolist()
    return ids
