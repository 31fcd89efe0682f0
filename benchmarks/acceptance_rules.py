"""Tokens a cycle of three rules that accept drafts, on the same drafts of the same texts.

- shared noise, the engine's rule: drafts and the model's own choices are drawn with the same noise, and a draft is
  accepted if both are the same token (Daliri et al. 2024). A seed gives the same text whatever is drafted.
- token by token (Leviathan et al. 2023): a draft is accepted with chance min(1, p / q).
- by blocks (Sun et al. 2024, algorithm 2): the longest accepted prefix is drawn at once; never shorter on average.

With the other two rules the text of a seed depends on how many tokens are drafted, which depends on measured times.

The text advances by shared noise. For each cycle the number of accepted drafts is counted for this rule; for the others
it is the expectation given the drafts, which are drawn from q under all three rules.

    python -m benchmarks.acceptance_rules --checkpoint checkpoints/final.pt --prompts 64 --new_tokens 64

Shapes: B rows, K drafts, T = K + 1 tokens of a chunk, V vocabulary, Z tokens that can be drafted.
"""

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lepton.api import Lepton
from lepton.data.shards import ShardedDataset
from lepton.data.stdlib import default_corpus
from lepton.engine.prefill import Prefilled, read_prompts
from lepton.errors import InputError
from lepton.generate.sampling import probabilities
from lepton.ops.choose import Noise, Sampling, choose, sampling_of, stream_words
from lepton.ops.cross_entropy import soft_cap

PROMPT_TOKENS = 64
SETTINGS = ((1.0, 1.0), (0.8, 1.0), (0.8, 0.9))
"""(temperature, top_p)."""
ROWS = 8
"""Rows whose fp64 probabilities are in memory at once."""


class Acceptance(NamedTuple):
    """How many drafts of each row are accepted, and the token after them."""

    accepted_B: Tensor
    next_B: Tensor


class Chances(NamedTuple):
    """What both lossless rules need to know of the drafts."""

    ratio_BK: Tensor
    """p / q of each draft."""
    joint_BT: Tensor
    """Chance that the first i drafts are kept, cut at 1 on the way."""
    rest_BTV: Tensor
    """What is left of p after i drafts, not normalised."""
    keep_BT: Tensor
    """Chance that a block ends after i drafts, given that no longer one does."""


def chances(p_BTV: Tensor, q_BKV: Tensor, drafts_BK: Tensor) -> Chances:
    """Return the chances of `Chances`; p and q are fp64 distributions, and each draft has a chance under q."""
    rows, count = drafts_BK.shape
    p_BK = p_BTV[:, :-1].gather(-1, drafts_BK[..., None])[..., 0]
    ratio_BK = p_BK / q_BKV.gather(-1, drafts_BK[..., None])[..., 0]
    joint = [p_BTV.new_ones(rows)]
    for i in range(count):
        joint.append((joint[-1] * ratio_BK[:, i]).clamp(max=1))
    joint_BT = torch.stack(joint, 1)
    rest_BTV = (joint_BT[..., None] * p_BTV - F.pad(q_BKV, (0, 0, 0, 1))).clamp(min=0)
    mass_BT = rest_BTV.sum(-1)
    keep_BT = torch.cat([(mass_BT / (mass_BT + 1 - joint_BT))[:, :-1], joint_BT[:, -1:]], 1)
    return Chances(ratio_BK, joint_BT, rest_BTV, keep_BT.nan_to_num(1.0))


def expected_lengths(p_BTV: Tensor, q_BKV: Tensor, drafts_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many drafts are accepted in expectation, token by token [B] and by blocks [B]."""
    found = chances(p_BTV, q_BKV, drafts_BK)
    ends_BK = 1 - found.keep_BT[:, 1:]
    no_longer_BK = ends_BK.flip(1).cumprod(1).flip(1)
    return found.ratio_BK.clamp(max=1).cumprod(1).sum(1), (1 - no_longer_BK).sum(1)


def accept_blocks(p_BTV: Tensor, q_BKV: Tensor, drafts_BK: Tensor, generator: torch.Generator) -> Acceptance:
    """Accept drafts by blocks; what is accepted and the next token have the distribution p."""
    found, count = chances(p_BTV, q_BKV, drafts_BK), drafts_BK.shape[1]
    trial_BK = torch.rand(drafts_BK.shape, generator=generator, dtype=torch.float64)
    stands_BK = trial_BK < found.keep_BT[:, 1:]
    accepted_B = (stands_BK * torch.arange(1, count + 1)).amax(1)
    at = torch.arange(len(drafts_BK)), accepted_B
    rest_BV = torch.where((accepted_B < count)[:, None], found.rest_BTV[at], p_BTV[at])
    return Acceptance(accepted_B, torch.multinomial(rest_BV, 1, generator=generator)[:, 0])


def prompts_of(data: ShardedDataset, count: int) -> list[list[int]]:
    """Return `count` stretches of PROMPT_TOKENS tokens, spread over the windows of a split."""
    windows = [
        tokens[:size] for batch in data.batches(ROWS) for tokens, size in zip(batch.tokens, batch.lengths, strict=True)
    ]
    stretches = [part.tolist() for window in windows for part in window.split(PROMPT_TOKENS)]
    whole = [part for part in stretches if len(part) == PROMPT_TOKENS]
    if len(whole) < count:
        raise InputError(f"--prompts {count}: the text has {len(whole)} of {PROMPT_TOKENS} tokens")
    return [whole[i * len(whole) // count] for i in range(count)]


@torch.no_grad()
def accepted_drafts(
    model: Lepton, prefilled: Prefilled, *, temperature: float, top_p: float, new_tokens: int, seed: int = 0
) -> Iterator[Tensor]:
    """Yield, for each cycle, the accepted drafts of the rows that still run: [3, rows], in the order of the docstring.

    Args:
        model: in fp32 on a CPU, with a drafter.
        prefilled: what the prompts led to.
        temperature: above 0.
        top_p: share of the mass that is kept, of p and of q.
        new_tokens: tokens of each row.
        seed: of the noise.
    """
    drafter = model.idea("drafter")
    cell, count = drafter.prepared(model.embed, torch.float32, model.config.eos_id), drafter.count
    twice_Z = (cell.ids_Z[:, None] == cell.ids_Z).tril(-1).any(1)  # the stand-in for the id that is never drafted
    rows = len(prefilled.hidden_BD)
    sampling = sampling_of([(temperature, top_p, None)] * rows)
    stream_B2 = torch.tensor([stream_words(seed, row) for row in range(rows)])
    state, hidden_BD, index_B = prefilled.state, prefilled.hidden_BD, torch.zeros(rows, dtype=torch.int64)
    token_B = choose(model.head(hidden_BD[:, None])[:, 0], Noise(stream_B2, index_B), sampling)
    index_B = index_B + 1
    while (running_B := index_B < new_tokens).any():
        drafts, logits = [], []
        cell_BW = cell.begin(hidden_BD, F.embedding(token_B, model.embed.weight))
        for i in range(count):
            if i:
                cell_BW = cell.step(cell_BW, drafts[-1])
            capped_BZ = soft_cap(cell.logits(cell_BW), model.config.logit_cap).masked_fill(twice_Z, float("-inf"))
            logits.append(capped_BZ)
            drafts.append(choose(capped_BZ, Noise(stream_B2, index_B + i), sampling, cell.ids_Z))
        drafts_BK = cell.ids_Z[torch.stack(drafts, 1)]
        out = model.trunk(torch.cat([token_B[:, None], drafts_BK], 1), state)
        logits_BTV = model.head(out.hidden)
        chosen_BT = _choices(logits_BTV, stream_B2, index_B, sampling)
        agrees_B = (chosen_BT[:, :-1] == drafts_BK).long().cumprod(1).sum(1)
        lengths = []
        for part in torch.arange(rows).split(ROWS):
            p_BTV = probabilities(logits_BTV[part], temperature=temperature, top_p=top_p)
            q_BKZ = probabilities(torch.stack(logits, 1)[part], temperature=temperature, top_p=top_p)
            q_BKV = torch.zeros_like(p_BTV[:, 1:]).index_add(2, cell.ids_Z, q_BKZ)
            lengths.append(torch.stack(expected_lengths(p_BTV, q_BKV, drafts_BK[part])))
        yield torch.cat([agrees_B[None].double(), torch.cat(lengths, 1)])[:, running_B]
        state, at = out.commit(1 + agrees_B), (torch.arange(rows), agrees_B)
        token_B, hidden_BD, index_B = chosen_BT[at], out.hidden[at], index_B + 1 + agrees_B


def measure(model: Lepton, prefilled: Prefilled, **options: Any) -> dict[str, Any]:
    """Return the mean tokens a cycle of each rule, with standard errors; `options` are those of `accepted_drafts`."""
    start = time.perf_counter()
    accepted = torch.cat(list(accepted_drafts(model, prefilled, **options)), 1)
    means, errors = 1 + accepted.mean(1), accepted.std(1) / accepted.shape[1] ** 0.5
    gains = (accepted[2] - accepted[:2]) / means[:2, None]
    names = ("shared noise", "token by token", "by blocks")
    return {
        **options,
        "cycles": accepted.shape[1],
        "tokens_per_cycle": {name: round(each.item(), 4) for name, each in zip(names, means, strict=True)},
        "standard_error": {name: round(each.item(), 4) for name, each in zip(names, errors, strict=True)},
        "gain_of_blocks": {name: round(each.mean().item(), 4) for name, each in zip(names[:2], gains, strict=True)},
        "gain_standard_error": {
            name: round(each.std().item() / accepted.shape[1] ** 0.5, 4)
            for name, each in zip(names[:2], gains, strict=True)
        },
        "seconds": round(time.perf_counter() - start, 1),
    }


def _choices(logits_BTV: Tensor, stream_B2: Tensor, index_B: Tensor, sampling: Sampling) -> Tensor:
    """Return the model's own choices [B, T], with the noise of their places."""
    rows, length = logits_BTV.shape[:2]
    noise = Noise(stream_B2.repeat_interleave(length, 0), (index_B[:, None] + torch.arange(length)).flatten())
    repeated = Sampling(*(each.repeat_interleave(length) for each in sampling))
    return choose(logits_BTV.flatten(0, 1), noise, repeated).view(rows, length)


def main() -> None:
    """Print a row for each setting, and JSON at the end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data_dir", help="folder of shards (default: the Python standard library's source)")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    args = parser.parse_args()
    model = Lepton.from_checkpoint(args.checkpoint).float()
    if model.idea("drafter") is None or model.tokenizer is None:
        raise InputError(f"{args.checkpoint} has no drafter, or no tokenizer")
    folder = args.data_dir or default_corpus(model.tokenizer)
    known = {"vocab_size": model.config.vocab_size, "eos_id": model.config.eos_id}
    data = ShardedDataset(folder, seq_len=1024, seed=0, split="val", **known)
    prefilled = read_prompts(model, prompts_of(data, args.prompts), None, depth=1.0, think=None)
    rows = []
    for temperature, top_p in SETTINGS:
        row = measure(model, prefilled, temperature=temperature, top_p=top_p, new_tokens=args.new_tokens)
        rows.append(row)
        print(f"T {temperature}, top-p {top_p}: {row['tokens_per_cycle']}, {row['cycles']} cycles", flush=True)
    print(json.dumps({"checkpoint": args.checkpoint, "data": data.describe(), "prompts": args.prompts, "rows": rows}))


if __name__ == "__main__":
    main()
