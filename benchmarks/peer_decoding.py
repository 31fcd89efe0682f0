"""The peer decoding: `generate` of `transformers`, greedy, with its growing cache or its static one.

A static cache is what that library compiles for on a GPU, by its own choice of mode, CUDA graphs included. The weights
are random: greedy decoding takes the same time with any.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle as repeated
from itertools import islice, pairwise
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from benchmarks.decoding import Found, Round, nbytes
from benchmarks.peer import load_transformers, peer_shape
from lepton.errors import InputError
from lepton.runtime.device import pick_dtype, synchronize

CACHES = {"static": "its static cache, compiled on a GPU", "dynamic": "its growing cache"}
WARM_UPS = {"static": 2, "dynamic": 1}


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block once so many seconds have passed; between two instructions of Python, that is.

    Only the main thread can, and Windows cannot: there the block has no limit.
    """
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class PeerDecoding:
    """The Llama of a size, `rows` rows at a time."""

    def __init__(
        self, size: str | None, cache: str, prompts: list[list[int]], rows: int, device: torch.device, seconds: float
    ) -> None:
        """Build it; all of it together may take `seconds`.

        Raises:
            InputError: no `transformers`, or no size.
        """
        if size is None:
            raise InputError("a model without the name of a size has no peer")
        self.cache, self.rows, self.device, self._left = cache, rows, device, seconds
        self._library = load_transformers()
        self.shape = peer_shape(size, "peer")
        self._prompts = repeated(prompts)
        self._context = len(prompts[0])
        config = self._library.LlamaConfig(
            **self.shape,
            tie_word_embeddings=True,
            max_position_embeddings=1 << 16,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        dtype = pick_dtype("auto", device)
        model = self._library.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
        self.model: Any = model.to(device).eval()

    def warm_up(self, tokens: int) -> None:
        """Run what is timed later, so that everything is compiled and captured. Each length has graphs of its own."""
        for _ in range(WARM_UPS[self.cache]):
            self.round(tokens)

    def round(self, tokens: int) -> Round:
        """Read a prompt in each row, and decode `tokens` more tokens than the first."""
        begun = time.perf_counter()
        tokens_BT = torch.tensor(list(islice(self._prompts, self.rows)), device=self.device)
        synchronize(self.device)
        stamps: list[float] = []

        def stamp(ids_BT: Tensor, _scores: object, **_: object) -> Tensor:
            if not stamps:
                synchronize(self.device)  # the prompt has been read; later the library itself waits in each cycle
            stamps.append(time.perf_counter())
            return torch.zeros(len(ids_BT), dtype=torch.bool, device=self.device)

        start = time.perf_counter()
        try:
            with limited(self._left), torch.inference_mode():
                self.model.generate(
                    input_ids=tokens_BT,
                    attention_mask=torch.ones_like(tokens_BT),
                    generation_config=self._options(tokens + 1),
                    stopping_criteria=self._library.StoppingCriteriaList([stamp]),
                )
                synchronize(self.device)
        finally:
            self._left -= time.perf_counter() - begun
        stamps[-1] = time.perf_counter()
        cycles = [after - before for before, after in pairwise(stamps)]
        return Round(stamps[0] - start, cycles, self.rows * len(cycles))

    def counted(self, _top: int) -> Found:
        """Nothing is counted of a peer."""
        return {}

    def figures(self, rounds: list[Round]) -> Found:
        """What a cycle reads at least, in the middle of a round, and what a row keeps."""
        cache = 2 * self.shape["num_hidden_layers"] * self.shape["num_key_value_heads"] * self.shape["head_dim"]
        tokens = self._context + sum(len(each.cycles) for each in rounds) / len(rounds) / 2
        row = round(cache * tokens * next(self.model.parameters()).itemsize)
        return {"state_bytes": row, "floor_bytes": nbytes(self.model) + self.rows * row}

    def close(self) -> None:
        """Nothing runs between rounds."""

    def _options(self, tokens: int) -> Any:
        return self._library.GenerationConfig(
            max_new_tokens=tokens,
            do_sample=False,
            cache_implementation=self.cache,
            eos_token_id=None,
            bos_token_id=None,
            pad_token_id=0,
        )
