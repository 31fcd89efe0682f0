"""The model. `trunk` reads like the diagram in docs/architecture.md; everything it needs of the past is an argument."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lepton import checkpoint
from lepton.config import LeptonConfig
from lepton.errors import InputError
from lepton.model.attention import Linear, Rotary, norm
from lepton.model.block import Block
from lepton.model.loss import IGNORE, Loss, linear_cross_entropy, soft_cap
from lepton.model.output import Output
from lepton.model.state import State, advance
from lepton.model.timeline import Timeline, band_edges, bands


class Lepton(nn.Module):
    """A causal language model over a stream of documents.

    `compute_dtype` is the dtype that activations run in; None means the parameters' own. Training in bf16 keeps
    fp32 parameters and sets it to ``torch.bfloat16``; softmax, losses and logits are fp32 whatever it is.
    """

    def __init__(self, config: LeptonConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        rank = config.embed_rank or config.width
        self.embed = nn.Embedding(config.padded_vocab_size, rank)
        self.embed_up = Linear(rank, config.width) if config.embed_rank else nn.Identity()
        self.stem = nn.ModuleList(Block(config) for _ in range(config.stem_layers))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers - config.stem_layers))
        self.head_down = Linear(config.width, rank) if config.embed_rank else nn.Identity()
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise every parameter, from torch's global generator.

        | parameter                        | distribution               | why                                    |
        |----------------------------------|----------------------------|----------------------------------------|
        | embed                            | normal, std 0.02           | tied: logits start small; input normed |
        | attention.out, mlp.down          | zero                       | each block starts as the identity      |
        | every other matrix               | normal, std 1/sqrt(inputs) | unit scale in, unit scale out          |
        """
        for name, parameter in self.named_parameters():
            if name == "embed.weight":
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith(("attention.out.weight", "mlp.down.weight")):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    @staticmethod
    def from_checkpoint(path: str | Path) -> "Lepton":
        """Build the model that the checkpoint `path` holds, on the CPU, in eval mode.

        Raises:
            InputError: the file is missing, torn, or no checkpoint.
        """
        content = checkpoint.load(path)
        model = Lepton(LeptonConfig.from_dict(content["config"]))
        model.load_state_dict(content["model"])
        return model.eval()

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        depth: float | None = None,
        think: int | None = None,
    ) -> Output:
        """Predict the token after each token of a chunk.

        Args:
            tokens: int [B, T], T >= 1. A document ends at `config.eos_id`; the next token starts anew.
            state: the past, from `new_state`, `out.state` or `out.commit`; None starts fresh. It is not changed.
            lengths: int [B], valid tokens of each row in 0..T; the rest is right padding, which `out.state` leaves out
                and whose own outputs mean nothing. None: all.
            depth: share of the tokens allowed past the stem, in 0..1; None is the model's default.
            think: rounds of thinking; None is the model's default.

        Returns:
            `Output` with `logits` [B, T, vocab_size] in fp32 (fp64 for an fp64 model), `commit` and `state`.

        Raises:
            InputError: a shape, dtype or value that cannot be used.
        """
        out = self.trunk(tokens, state, lengths=lengths, depth=depth, think=think)
        return Output(out.hidden_BTD, self.head(out.hidden_BTD), out.lengths_B, out._commit)

    def trunk(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        depth: float | None = None,
        think: int | None = None,
    ) -> Output:
        """`forward` without the head: the states that predictions are read from, and the state to go on with."""
        past, lengths_B = self._check(tokens, state, lengths, depth, think)
        timeline = Timeline.read(tokens, past.position_B, self.config.eos_id)
        columns = past.keys_BLRKH.shape[2]
        sight = bands(timeline, columns, self.config.window)
        rotary = Rotary(timeline.position_BT, self.config.head_dim, self.config.rope_base, self.dtype)
        chunk_keys, chunk_values = [], []

        x_BTD = norm(self.embed_up(self.embed(tokens).to(self.dtype)))
        for layer, block in enumerate([*self.stem, *self.blocks]):
            block_past = (past.keys_BLRKH[:, layer], past.values_BLRKH[:, layer])
            x_BTD, k_BTKH, v_BTKH = block(x_BTD, block_past, rotary, sight)
            chunk_keys.append(k_BTKH)
            chunk_values.append(v_BTKH)
        hidden_BTD = norm(x_BTD)

        def commit(count_B: Tensor) -> State:
            position_B = timeline.position_after(count_B)
            keep = self._columns(int(position_B.max()) if self.config.window is None else 0)
            keys_BLTKH, values_BLTKH = torch.stack(chunk_keys, 1), torch.stack(chunk_values, 1)
            return State(
                position_B,
                advance(past.keys_BLRKH, keys_BLTKH, count_B, position_B, keep),
                advance(past.values_BLRKH, values_BLTKH, count_B, position_B, keep),
            )

        return Output(hidden_BTD, None, lengths_B, commit)

    def head(self, hidden_BTD: Tensor) -> Tensor:
        """Return the logits [..., vocab_size] of states that `trunk` returned, in fp32 or better."""
        x = self.head_down(hidden_BTD)
        logits = x @ self.embed.weight[: self.config.vocab_size].to(x.dtype).T
        return soft_cap(logits.to(torch.promote_types(x.dtype, torch.float32)), self.config.logit_cap)

    def loss(self, tokens: Tensor, *, lengths: Tensor | None = None) -> Loss:
        """Mean loss of predicting each token from those before it.

        Args:
            tokens: int [B, T], T >= 2; row b predicts tokens 1 .. lengths[b] - 1.
            lengths: int [B], valid tokens of each row; None: all.

        Returns:
            `Loss` with the scalar `loss` to differentiate and its `parts`.
        """
        if tokens.dim() != 2 or tokens.shape[1] < 2:
            raise InputError(f"loss needs tokens [rows, at least 2], not {tuple(tokens.shape)}")
        hidden_BTD = self.trunk(tokens[:, :-1]).hidden_BTD
        target_BT = tokens[:, 1:].long()
        if lengths is not None:
            index_T = torch.arange(1, tokens.shape[1], device=tokens.device)
            target_BT = target_BT.masked_fill(index_T >= lengths[:, None], IGNORE)
        loss, ce, z = linear_cross_entropy(
            self.head_down(hidden_BTD).flatten(0, 1),
            self.embed.weight,
            target_BT.flatten(),
            vocab_size=self.config.vocab_size,
            cap=self.config.logit_cap,
        )
        return Loss(loss, {"ce": ce, "z": z})

    def new_state(self, batch_size: int) -> State:
        """Return the state of `batch_size` sequences that have read nothing."""
        config = self.config
        shape = (batch_size, config.layers, self._columns(0), config.kv_heads, config.head_dim)
        device = self.embed.weight.device
        return State(
            torch.zeros(batch_size, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=self.dtype, device=device),
            torch.zeros(shape, dtype=self.dtype, device=device),
        )

    def generate(
        self,
        prompt_ids: Tensor | Sequence[int] | Sequence[Sequence[int]],
        max_new_tokens: int = 100,
        temperature: float = 0.8,
        top_p: float = 0.9,
        top_k: int | None = None,
        use_speculative: bool = True,
        seed: int | None = None,
        stop: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
        depth: float | None = None,
        think: int | None = None,
    ) -> list[int] | list[list[int]]:
        """Continue a prompt; see `lepton.generate.generate`."""
        from lepton.generate import generate

        return generate(
            self, prompt_ids, max_new_tokens, temperature, top_p, top_k, use_speculative, seed, stop, depth, think
        )

    def generate_stream(self, prompt_ids: Tensor | Sequence[int], *args: Any, **options: Any) -> Iterator[int]:
        """Yield the new ids of one prompt as they are known; see `lepton.generate.generate_stream`."""
        from lepton.generate import generate_stream

        return generate_stream(self, prompt_ids, *args, **options)

    def generate_with_uncertainty(self, prompt_ids: Tensor | Sequence[int], *args: Any, **options: Any) -> Any:
        """Return (tokens, an uncertainty for each new token); see `lepton.generate.generate_with_uncertainty`."""
        from lepton.generate import generate_with_uncertainty

        return generate_with_uncertainty(self, prompt_ids, *args, **options)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations and of the state."""
        return self.compute_dtype or self.embed.weight.dtype

    def num_params(self) -> int:
        """Trainable parameters; the tied embedding counts once."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of `forward` per token, over a fresh sequence of `length` tokens.

        A multiply-add counts as two. Attention counts every column that is computed, masked or not, as torch's FLOP
        counter does with the math backend. A training step costs three times this.
        """
        config = self.config
        matrices = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        head = config.vocab_size * self.embed.embedding_dim
        pairs = sum((last - first) * (right - left) for first, last, left, right in self._band_edges(length))
        attention = 2 * config.layers * config.heads * config.head_dim * pairs / length
        return 2 * (matrices + head + attention)

    def state_bytes(self, length: int) -> int:
        """Bytes of the state of one sequence after `length` tokens; constant unless the model is dense."""
        config = self.config
        entries = 2 * config.layers * self._columns(length) * config.kv_heads * config.head_dim
        return entries * self.dtype.itemsize + torch.int64.itemsize

    def _columns(self, position: int) -> int:
        """Past columns that a state holds: all but one of a window, or `position` without one."""
        return position if self.config.window is None else self.config.window - 1

    def _band_edges(self, length: int) -> list[tuple[int, int, int, int]]:
        return band_edges(length, 0, self.config.window)

    def _check(
        self, tokens: Tensor, state: State | None, lengths: Tensor | None, depth: float | None, think: int | None
    ) -> tuple[State, Tensor]:
        """Validate the arguments of `forward`; return its past and the valid lengths [B]."""
        if tokens.dim() != 2 or tokens.shape[1] < 1 or tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
            raise InputError(f"tokens must be integers [rows, at least 1], not {tokens.dtype} {tuple(tokens.shape)}")
        if depth is not None and depth != 1:
            raise InputError(f"depth={depth}: this model has no router and always runs all blocks; leave depth at 1")
        if think:
            raise InputError(f"think={think}: this model has no thought tokens; leave think at 0")
        rows, length = tokens.shape
        if state is None:
            # A fresh past has no columns to look at: the same function, without computing on masked zeros.
            state = self.new_state(rows)
            state = State(state.position_B, state.keys_BLRKH[:, :, :0], state.values_BLRKH[:, :, :0])
        elif state.batch_size != rows:
            raise InputError(f"the state holds {state.batch_size} rows and the tokens {rows}; they must agree")
        if lengths is None:
            lengths = torch.full((rows,), length, device=tokens.device)
        elif lengths.shape != (rows,):
            raise InputError(f"lengths must hold one value for each of {rows} rows, not {tuple(lengths.shape)}")
        return state, lengths
