"""The model. `trunk` reads like the diagram in docs/architecture.md; everything it needs of the past is an argument."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from lepton import checkpoint
from lepton.config import LeptonConfig
from lepton.errors import naming
from lepton.model.accounting import flops_per_token
from lepton.model.attention import Rotary, Slots
from lepton.model.block import Block
from lepton.model.checks import whole
from lepton.model.crystals import CrystalRun, Crystals
from lepton.model.draft import Drafter
from lepton.model.entry import MAX_ROWS, checked, checked_for_loss, fresh_state, with_memory
from lepton.model.initialise import initialise
from lepton.model.layers import Linear, norm
from lepton.model.memory import MemoryRun, WorkingMemory
from lepton.model.objective import Loss, objective
from lepton.model.output import Output, Traces
from lepton.model.peek import Peek
from lepton.model.router import Router, taken_after
from lepton.model.saved import read_part
from lepton.model.state import Memory, State, advance
from lepton.model.thoughts import ThoughtRun, Thoughts
from lepton.model.timeline import Timeline
from lepton.model.uncertainty import Uncertainty
from lepton.model.weights import Origin, check_weights, note_config, without_memory
from lepton.ops.attention_plan import AttentionPlan, CausalWindow
from lepton.ops.cross_entropy import soft_cap

if TYPE_CHECKING:
    from lepton.data.tokenizer import Tokenizer
    from lepton.generate import Stream


class Lepton(nn.Module):
    """A causal language model over a stream of documents.

    `compute_dtype` is the dtype that activations run in; None means the parameters' own. Training in bf16 keeps
    fp32 parameters and sets it to ``torch.bfloat16``; softmax, losses, memory and logits are fp32 whatever it is.
    `checkpoint_activations` keeps of each block its inputs alone and computes the block again in the backward pass.
    """

    def __init__(self, config: LeptonConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.checkpoint_activations = False
        self._tokenizer_json: str | None = None
        rank = config.embed_rank or config.width
        reads = config.memory_heads * config.value_dim
        thoughts = config.width if config.thoughts else 0
        self.embed = nn.Embedding(config.padded_vocab_size, rank)
        self.embed_up = Linear(rank, config.width) if config.embed_rank else nn.Identity()
        self.stem = nn.ModuleList(Block(config) for _ in range(config.stem_layers))
        self.thoughts = Thoughts(config) if config.thoughts else None
        self.memory = WorkingMemory(config) if config.memory_heads else None
        self.crystals = Crystals(config) if config.slots else None
        self.peek = Peek(config, config.width + reads + thoughts, rank) if config.hint else None
        self.router = Router(config) if config.router else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers - config.stem_layers))
        self.head_down = Linear(config.width, rank) if config.embed_rank else nn.Identity()
        self.drafter = Drafter(config, rank) if config.drafts else None
        self.uncertainty = Uncertainty(config) if config.uncertainty else None
        initialise(self)
        self.register_state_dict_post_hook(note_config)

    @staticmethod
    def from_checkpoint(path: str | Path) -> "Lepton":
        """Build the model that the checkpoint `path` holds, on the CPU, in eval mode, in the precision of the file.

        Raises:
            InputError: the file is missing, torn, or no checkpoint.
        """
        return Lepton.restored(checkpoint.load(path), path)

    @staticmethod
    def restored(content: dict[str, Any], path: str | Path) -> "Lepton":
        """Build the model of a checkpoint from its `content`, whose tensors become the parameters; `path` names it.

        No memory is taken before the weights are known to fit the configuration.
        """
        with naming(path):
            with without_memory():
                model = Lepton(LeptonConfig.from_dict(content["config"]))
            model.load_state_dict(content["model"], assign=True)
        model._tokenizer_json = content.get("tokenizer")
        return model.eval()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch, once names, shapes, dtypes, finiteness and the configuration fit: nothing is taken over before.

        Raises:
            InputError: the weights are of another model; also a RuntimeError, as in torch.
        """
        check_weights(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict, assign)

    @cached_property
    def tokenizer(self) -> "Tokenizer | None":
        """The tokenizer that the checkpoint carries; None for a model that comes from none, or from one without."""
        from lepton.data.tokenizer import Tokenizer

        return None if self._tokenizer_json is None else Tokenizer.from_json(self._tokenizer_json)

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        depth: float | None = None,
        think: int | None = None,
        opens: Tensor | None = None,
    ) -> Output:
        """Predict the token after each token of a chunk.

        Args:
            tokens: integers [B, T], T >= 1, on the model's device. A document ends at `config.eos_id`; the next token
                starts anew.
            state: the past, from `new_state`, `out.state` or `out.commit`; None starts fresh. It is not changed.
            lengths: int [B], valid tokens of each row in 0..T; the rest is right padding, which `out.state` leaves out
                and whose own outputs mean nothing. None: all.
            depth: share of the tokens allowed past the stem, in 0..1; None is 1, all of them.
            think: rounds of thinking, 0 to 256; None is `config.rounds`.
            opens: bool [B, T], tokens at which a new segment opens, with thoughts of its own; None: only the regular
                ones.

        Returns:
            `Output` with `logits` [B, T, vocab_size] in fp32 (fp64 for an fp64 model), `uncertainty`, `depth`, `commit`
            and `state`.

        Raises:
            InputError: a shape, dtype or value that cannot be used.
        """
        out = self.trunk(tokens, state, lengths=lengths, depth=depth, think=think, opens=opens)
        logits = self.head(out.hidden)
        uncertainty = None
        if self.uncertainty is not None:
            uncertainty = self.uncertainty(out.hidden, logits, out.traces.signals_BT3)
        return Output(out.hidden, logits, uncertainty, out.depth, out.traces, out.lengths, out._commit)

    def trunk(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        depth: float | None = None,
        think: int | Tensor | None = None,
        opens: Tensor | None = None,
        groups: int | None = None,
    ) -> Output:
        """`forward` without the head: the states that predictions are read from, and the state to go on with."""
        tokens, past, lengths, depth, think = checked(self, tokens, state, lengths, depth, think, opens)
        config = self.config
        timeline = Timeline.read(
            tokens,
            past.position_B,
            past.phase_B,
            eos_id=config.eos_id,
            segment=config.segment,
            opens_BT=opens,
            groups=groups,
        )
        near = CausalWindow.of(
            timeline.position_BT,
            past=past.keys_BLRKH.shape[2],
            window=config.window,
            dtype=self.dtype,
            head_dim=config.head_dim,
            routed=depth < 1,
        )
        rotary = Rotary.at(timeline.position_BT, config.head_dim, config.rope_base, self.dtype)
        columns: list[tuple[Tensor, Tensor]] = []

        embedded_BTE = self.embed(tokens).to(self.dtype)
        h_BTD = norm(self.embed_up(embedded_BTE))
        h_BTD = self._blocks(self.stem, h_BTD, past, rotary, near.plan(), None, columns)
        u_BTD = norm(h_BTD)
        thoughts = self._think(u_BTD, past, rotary, timeline, near, think, columns)
        read_BTM, strength_BT, memory = self._remember(u_BTD, past, timeline)
        seen, crystals = self._crystallise(h_BTD, u_BTD, tokens, past, timeline)
        x_BTD, traces = self._peek(h_BTD, u_BTD, embedded_BTE, thoughts, read_BTM, strength_BT, timeline)
        deep_BT, taken_BT = self._route(traces.benefit_BT, depth, past, timeline)
        slots = Slots.join(seen, thoughts.slots() if thoughts else None)
        plan = near.plan(slots.mask_BTC if slots else None, deep_BT if depth < 1 else None)
        x_BTD = self._blocks(self.blocks, x_BTD, past, rotary, plan, slots, columns)
        hidden_BTD = norm(self._leave(x_BTD, deep_BT, depth))

        def commit(count_B: Tensor) -> State:
            position_B, taken_B = timeline.position_after(count_B), past.taken_B
            if taken_BT is not None:
                taken_B = taken_after(taken_BT, count_B, taken_B, timeline, config.capacity_window)
            keep = self._columns(int(position_B.max()) if config.window is None else 0)
            keys, values = (torch.stack(each, 1) for each in zip(*columns, strict=True))
            tail_BXC, matrix_BHKV = memory.after(count_B, timeline) if memory else (None, None)
            return State(
                position_B,
                timeline.phase_after(count_B),
                advance(past.keys_BLRKH, keys, count_B, position_B, keep),
                advance(past.values_BLRKH, values, count_B, position_B, keep),
                taken_B,
                thoughts.after(count_B) if thoughts else None,
                Memory(matrix_BHKV, tail_BXC, crystals.after(count_B) if crystals else None, Origin(self)),
            )

        blocks_BT = torch.where(deep_BT, config.layers, config.stem_layers)
        return Output(hidden_BTD, None, None, blocks_BT, traces, lengths, commit)

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., vocab_size] of states that `trunk` returned, in fp32 or better."""
        x = self.head_down(hidden)
        # The padded product is the fast one: a row of it is a whole number of 16 bytes.
        logits = (x @ self.embed.weight.to(x.dtype).T)[..., : self.config.vocab_size]
        return soft_cap(logits.to(torch.promote_types(x.dtype, torch.float32)), self.config.logit_cap)

    def loss(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        think: int | Tensor | None = None,
        groups: int | None = None,
        auxiliary: bool = True,
    ) -> Loss:
        """Mean loss of predicting each token from those before it, and the small losses of the ideas.

        Args:
            tokens: int [B, T], T >= 2; row b predicts tokens 1 .. lengths[b] - 1.
            lengths: int [B], valid tokens of each row; None: all.
            think: rounds of thinking, for all or for each row (int [B], see `Thoughts`).
            groups: bound of the segments that open in a row, for static shapes; None counts them.
            auxiliary: whether the losses of the ideas are computed; validation does without.

        Returns:
            `Loss` with the scalar `loss` to differentiate and its `parts`.
        """
        tokens, lengths, groups = checked_for_loss(self, tokens, lengths, groups, auxiliary)
        out = self.trunk(tokens[:, :-1], think=think, groups=groups)
        hidden, traces = out.hidden, out.traces
        del out  # and with it the keys and values that a state would be made of
        return objective(self, hidden, traces, tokens, lengths, auxiliary=auxiliary)

    def new_state(
        self, batch_size: int, *, memory: Memory | str | Path | None = None, any_weights: bool = False
    ) -> State:
        """Return the state of `batch_size` sequences that have read nothing.

        `memory` is that of another state, or a file that `state.memory.save` wrote: the new sequences remember what
        those before did, its positions shifted behind the window. Its rows must be `batch_size`, or one, which all then
        share. `any_weights` takes one that other weights made, such as those of an earlier checkpoint.
        """
        state = fresh_state(self, whole("batch_size", batch_size, 1, MAX_ROWS, " sequences"))
        return state if memory is None else with_memory(self, state, memory, any_weights=any_weights)

    def load_state(self, path: str | Path, *, any_weights: bool = False) -> State:
        """Read what `state.save` wrote: a stream goes on in another process with identical output.

        Raises:
            InputError: the file is missing, torn or damaged, or the state is of a model of another shape or, unless
                `any_weights`, of other weights.
        """
        return read_part(self, path, self.new_state(1), any_weights=any_weights)

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
        state: State | None = None,
        memory: Memory | str | Path | None = None,
    ) -> list[int] | list[list[int]]:
        """Continue a prompt; see `lepton.generate.generate`."""
        from lepton.generate import generate

        knobs = (top_p, top_k, use_speculative, seed, stop, depth, think, state, memory)
        return generate(self, prompt_ids, max_new_tokens, temperature, *knobs)

    def generate_stream(self, prompt_ids: Tensor | Sequence[int], *args: Any, **options: Any) -> "Stream":
        """Return an iterator over the new ids of one prompt; see `lepton.generate.generate_stream`."""
        from lepton.generate import generate_stream

        return generate_stream(self, prompt_ids, *args, **options)

    def generate_with_state(self, prompt_ids: Tensor | Sequence[int], *args: Any, **options: Any) -> tuple[Any, State]:
        """Return (tokens, the state to go on from); see `lepton.generate.generate_with_state`."""
        from lepton.generate import generate_with_state

        return generate_with_state(self, prompt_ids, *args, **options)

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

    def flops_per_token(self, length: int, *, depth: float | None = None, think: int | None = None) -> float:
        """Floating-point operations of `forward` per token; see `lepton.model.accounting`."""
        return flops_per_token(self, length, depth=depth, think=think)

    def state_bytes(self, length: int) -> int:
        """Bytes of the state of one sequence after `length` tokens; constant unless the model is dense."""
        with torch.device("meta"):
            fixed = Lepton(self.config).to(self.dtype).new_state(1).nbytes
        config = self.config
        growing = 2 * config.layers * self._columns(length) * config.kv_heads * config.head_dim * self.dtype.itemsize
        return fixed + growing if config.window is None else fixed

    def _columns(self, position: int) -> int:
        """Past columns that a state holds: all but one of a window, or `position` without one."""
        return position if self.config.window is None else self.config.window - 1

    def _blocks(
        self,
        blocks: nn.ModuleList,
        x_BTD: Tensor,
        past: State,
        rotary: Rotary,
        plan: AttentionPlan,
        slots: Slots | None,
        columns: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Run some blocks; their keys and values join `columns`, in the order in which the state keeps them."""
        for block in blocks:
            before = (past.keys_BLRKH[:, len(columns)], past.values_BLRKH[:, len(columns)])
            arguments = (x_BTD, before, rotary, plan, slots)
            if self.checkpoint_activations and torch.is_grad_enabled():
                # Nothing in a block is random, and to ask a GPU for its generator's state would end a recording.
                x_BTD, k_BTKH, v_BTKH = recomputed(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD, k_BTKH, v_BTKH = block(*arguments)
            columns.append((k_BTKH, v_BTKH))
        return x_BTD

    def _think(
        self,
        u_BTD: Tensor,
        past: State,
        rotary: Rotary,
        timeline: Timeline,
        near: CausalWindow,
        rounds: int | Tensor,
        columns: list[tuple[Tensor, Tensor]],
    ) -> ThoughtRun | None:
        if self.thoughts is None:
            return None
        assert past.group is not None
        k_BTKH, v_BTKH = self.thoughts.block.attention.key_value(u_BTD, rotary)
        k_BJKH = torch.cat([past.keys_BLRKH[:, len(columns)], k_BTKH], 1)
        v_BJKH = torch.cat([past.values_BLRKH[:, len(columns)], v_BTKH], 1)
        columns.append((k_BTKH, v_BTKH))
        return self.thoughts(u_BTD, k_BJKH, v_BJKH, past.group, rotary, timeline, near, rounds)

    def _remember(
        self, u_BTD: Tensor, past: State, timeline: Timeline
    ) -> tuple[Tensor | None, Tensor | None, MemoryRun | None]:
        if self.memory is None:
            return None, None, None
        return self.memory(u_BTD, past.memory.tail_BXC, past.memory.matrix_BHKV, timeline)

    def _crystallise(
        self, h_BTD: Tensor, u_BTD: Tensor, tokens: Tensor, past: State, timeline: Timeline
    ) -> tuple[Slots | None, CrystalRun | None]:
        if self.crystals is None:
            return None, None
        return self.crystals(h_BTD, u_BTD, tokens, past.memory.store, timeline)

    def _peek(
        self,
        h_BTD: Tensor,
        u_BTD: Tensor,
        embedded_BTE: Tensor,
        thoughts: ThoughtRun | None,
        read_BTM: Tensor | None,
        strength_BT: Tensor | None,
        timeline: Timeline,
    ) -> tuple[Tensor, Traces]:
        """Add what memory and hint say to the stem's states; gather what losses and features read."""
        thought_BTD, change_BT = thoughts.read() if thoughts else (None, None)
        x_BTD, inputs_BTX, hint_BTP = h_BTD, None, None
        if self.memory is not None and read_BTM is not None:
            x_BTD = x_BTD + self.memory.out(read_BTM)
        if self.peek is not None:
            inputs_BTX = torch.cat([part for part in (u_BTD, read_BTM, thought_BTD) if part is not None], -1)
            hint_BTP = self.peek.hint(inputs_BTX)
            x_BTD = x_BTD + self.peek.back(hint_BTP)
        benefit_BT = self.router.score(u_BTD) if self.router else None
        nothing_BT = torch.zeros_like(u_BTD[..., 0], dtype=torch.promote_types(u_BTD.dtype, torch.float32))
        signals = [
            nothing_BT if signal is None else signal.to(nothing_BT) for signal in (benefit_BT, change_BT, strength_BT)
        ]
        traces = Traces(
            timeline=timeline,
            embedded_BTE=embedded_BTE,
            early_BTD=x_BTD,
            hint_inputs_BTX=inputs_BTX,
            hint_BTP=hint_BTP,
            read_BTM=read_BTM,
            thought_BTD=thought_BTD,
            benefit_BT=benefit_BT,
            signals_BT3=torch.stack(signals, -1).detach(),
        )
        return x_BTD, traces

    def _route(
        self, benefit_BT: Tensor | None, depth: float, past: State, timeline: Timeline
    ) -> tuple[Tensor, Tensor | None]:
        """Choose the tokens that go deep; return them and the running count of each."""
        if self.router is None or benefit_BT is None:
            return torch.ones_like(timeline.ends_BT), None
        return self.router.choose(benefit_BT, depth, past.taken_B, timeline)

    def _leave(self, x_BTD: Tensor, deep_BT: Tensor, depth: float) -> Tensor:
        """Send the tokens that stopped after the stem through the exit."""
        if depth >= 1 or self.router is None:
            return x_BTD
        index_M = (~deep_BT).flatten().nonzero()[:, 0]
        easy_MD = self.router.exit(x_BTD.flatten(0, 1)[index_M])
        return x_BTD.flatten(0, 1).index_copy(0, index_M, easy_MD).view_as(x_BTD)
