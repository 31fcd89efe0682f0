"""The model. `trunk` reads like the diagram in docs/architecture.md; everything it needs of the past is an argument.

The words that `trunk` uses. A *chunk* is the tokens of one pass. The *stem* is the first few blocks, which every token
goes through; the *deep blocks* are the others, which depth routing may skip. An *idea* is a module between stem and
deep blocks that may have state. The *flow* is what ideas read: the chunk after the stem, with the *contributions*, the
results of the ideas that have run before. *Slots* are extra keys and values for the deep blocks that belong to no token
of the window. An *update* is how a chunk changes the state of an idea; nothing changes before `Output.commit`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from lepton.config import LeptonConfig
from lepton.model import ideas as _ideas  # noqa: F401  (registers them)
from lepton.model.arguments import checked, checked_for_loss
from lepton.model.attention import Rotary
from lepton.model.block import Served
from lepton.model.flops import flops_per_token
from lepton.model.fresh_state import MAX_ROWS, fresh_state, state_bytes, with_memory
from lepton.model.ideas.idea import Call, ChunkInputs, Flow, Idea
from lepton.model.kv_cache import KeysValues, KVCache
from lepton.model.kv_ring import KVRing, LayerCache, RingWindow
from lepton.model.layers import norm
from lepton.model.modules import Modules
from lepton.model.objective import WHOLE, Loss, Step, objective
from lepton.model.output import Chunk, Output
from lepton.model.saved import read_part
from lepton.model.state import Memory, State
from lepton.model.timeline import Timeline
from lepton.model.weights import Origin, check_weights, note_config
from lepton.ops.attention_plan import AttentionPlan, CausalWindow
from lepton.values import Least, whole

View: TypeAlias = tuple[LayerCache, AttentionPlan]
"""What a block sees of the tokens: those before the chunk, and a mask over all."""


class Network(Modules):
    """A causal language model over a stream of documents: tokens and a state in, predictions and a state out.

    `lepton.Lepton` is this network with files and generation.
    """

    def __init__(self, config: LeptonConfig) -> None:
        super().__init__(config)
        self.register_state_dict_post_hook(note_config)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch, after a check that names, shapes, dtypes, finiteness and the configuration fit.

        Raises:
            InputError: the weights are of another model; also a RuntimeError, as in torch.
        """
        check_weights(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict, assign)

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        depth: float | Least | None = None,
        think: int | None = None,
        opens: Tensor | None = None,
    ) -> Output:
        """Predict the token after each token of a chunk.

        Args:
            tokens: integers [B, T], T >= 1, on the model's device. A document ends at `config.eos_id`; the next token
                starts anew.
            state: the past, from `new_state`, `out.state` or `out.commit`; None starts fresh. It is not changed.
            lengths: integers [B], valid tokens of each row in 0..T; the rest is right padding, which `out.state` leaves
                out and whose own outputs mean nothing. None: all.
            depth: share of the tokens allowed past the stem, in 0..1, or the `Least` saving in nats that the router
                must predict for one; None is 1, all of them.
            think: rounds of thinking, 0 to 256; None is the number that the configuration says.
            opens: bool [B, T], tokens at which a new segment opens, with thoughts of its own; None: segments open only
                at document starts and every `config.segment` tokens.

        Returns:
            `Output` with `logits` [B, T, vocab_size] in fp32 (fp64 for an fp64 model), `uncertainty`, `depth`, `commit`
            and `state`.

        Raises:
            InputError: a shape, dtype or value that cannot be used.
        """
        out = self.trunk(tokens, state, lengths=lengths, depth=depth, think=think, opens=opens)
        logits = self.head(out.hidden)
        doubt = self.idea("uncertainty")
        uncertainty = doubt(out.hidden, logits, out.signals) if doubt else None
        return dataclasses.replace(out, logits=logits, uncertainty=uncertainty)

    def trunk(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        depth: float | Least | None = None,
        think: int | Tensor | None = None,
        opens: Tensor | None = None,
        groups: int | None = None,
        served: Tensor | None = None,
    ) -> Output:
        """`forward` without the head: the result holds hidden vectors, and can compute the next `State`.

        `served`, bool [B, T], are tokens that give the deep blocks keys and values of their state before these blocks,
        as if they had skipped them, while their own stream runs on.
        """
        tokens, past, lengths, call = checked(self, tokens, state, lengths, depth, think, opens, served)
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

        def window_of(cache: KVCache | KVRing, window: int | None) -> CausalWindow:
            return CausalWindow.of(
                timeline.position_BT,
                past=cache.entries,
                window=window,
                dtype=self.dtype,
                head_dim=config.head_dim,
                routed=call.routed,
            )

        return self.through(self.chunk_inputs(call, tokens, timeline, past, window_of), past, lengths)

    def decode(self, tokens_BT: Tensor, past: State, call: Call, *, opening: bool) -> Output:
        """`trunk` for a few tokens of one document each, with shapes that depend on nothing but the arguments' shapes.

        The caches of `past` are rings (`KVRing`), which the pass writes to. Only the first token may open a segment,
        and only if `opening`. Nothing is checked.
        """
        config = self.config
        length = tokens_BT.shape[1]
        timeline = Timeline.within_document(
            past.position_B, past.phase_B, length, segment=config.segment, opening=opening
        )

        def window_of(cache: KVCache | KVRing, window: int | None) -> CausalWindow:
            return RingWindow.over(timeline.position_BT, columns=cache.entries, window=window, dtype=self.dtype)

        lengths_B = torch.full_like(past.position_B, length)
        return self.through(self.chunk_inputs(call, tokens_BT, timeline, past, window_of), past, lengths_B)

    def through(self, inputs: ChunkInputs, past: State, lengths: Tensor) -> Output:
        """Pass a chunk through stem, ideas and deep blocks: the diagram of docs/architecture.md.

        `lengths` are the tokens [B] of each row that are not padding.
        """
        x_BTD = self.token_shifted(inputs, past.last_token_B)
        h_BTD, _, stem = self._run(self.stem, x_BTD, _views(past.stem, inputs.causal.plan()), inputs.rotary)
        flow = Flow.after_stem(inputs, h_BTD)
        updates: dict[str, Any] = {}
        for idea in self._in_flow():  # thoughts, memory, crystals, peek, router
            contribution = idea.contribute(flow, past.part(idea.name))
            flow = flow.plus(idea.name, contribution)
            if contribution.update is not None:
                updates[idea.name] = contribution.update
        x_BTD, middle_BTD, deep = self._run(self.blocks, flow.x_BTD, self._deep_views(flow, past), flow.rotary, flow)
        x_BTD = self.backed_out(x_BTD, middle_BTD, flow)
        for idea in self._in_flow():
            x_BTD = idea.after_blocks(x_BTD, flow.deep_BT, inputs.call)
        tokens_BT = None if self.shift_D is None else flow.tokens_BT
        narrow, wide = self._split(deep)
        remembered = self.config.remembered, self.config.remembered_wide
        chunk = Chunk(past, flow.timeline, stem, narrow, wide, tokens_BT, updates, *remembered, Origin(self))
        blocks_BT = torch.where(flow.deep_BT, self.config.layers, self.config.stem_layers)
        return Output(
            hidden=norm(x_BTD),
            logits=None,
            uncertainty=None,
            depth=blocks_BT,
            flow=flow.without_inputs(),
            lengths=lengths,
            chunk=chunk,
        )

    def seen_by_drafter(self, out: Output) -> Tensor:
        """Return what drafts after each token are made from [B, T, F]; without a drafter the hidden states."""
        drafter = self.idea("drafter")
        return out.hidden if drafter is None else drafter.seen(out.hidden, out.flow)

    def loss(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        targets: Tensor | None = None,
        think: int | Tensor | None = None,
        groups: int | None = None,
        opens: Tensor | None = None,
        auxiliary: bool = True,
        step: Step = WHOLE,
    ) -> Loss:
        """Mean loss of predicting each token from those before it, and the small losses of the ideas.

        Args:
            tokens: int [B, T], T >= 2; row b predicts tokens 1 .. lengths[b] - 1.
            lengths: integers [B], valid tokens of each row; None: all.
            targets: bool [B, T - 1], the predictions that count, such as the answers of a task; None: all. What the
                model reads does not depend on it.
            think: rounds of thinking, for all or for each row (int [B], see `Thoughts`).
            groups: bound of the segments that open in a row, for static shapes; None counts them.
            opens: bool [B, T - 1], tokens at which a segment opens in addition, as in `forward`; None: none.
            auxiliary: whether the losses of the ideas are computed; validation does without.
            step: what belongs to a step of training, for `router.into_stem` and `router.served`.

        Returns:
            `Loss` with the scalar `loss` to differentiate and its `parts`.
        """
        tokens, lengths, groups = checked_for_loss(self, tokens, lengths, targets, groups, auxiliary)
        out = self.trunk(tokens[:, :-1], think=think, groups=groups, opens=opens, served=step.served_BT)
        hidden, flow = out.hidden, out.flow
        del out  # and with it the keys and values that a state would be made of
        return objective(self, hidden, flow, tokens, lengths, targets, auxiliary=auxiliary, rate=step.rate)

    def chunk_inputs(
        self,
        call: Call,
        tokens: Tensor,
        timeline: Timeline,
        past: State,
        window_of: Callable[[KVCache | KVRing, int | None], CausalWindow],
    ) -> ChunkInputs:
        """Embed the tokens of a chunk, and compute their rotary angles and attention masks.

        `window_of` returns the mask of blocks with a kv cache and a window.
        """
        config = self.config
        rotary = Rotary.at(timeline.position_BT, config.head_dim, config.rope_base, self.dtype)
        causal = window_of(past.stem, config.window)
        wide = None if past.wide is None else window_of(past.wide, config.wide_window)
        return ChunkInputs(call, tokens, self.embed(tokens).to(self.dtype), timeline, rotary, causal, wide)

    def token_shifted(self, inputs: ChunkInputs, last_token_B: Tensor | None) -> Tensor:
        """Return what the first block reads [B, T, D]: the normed embeddings, each with that of the token before it.

        A token that starts a document has none before it. `last_token_B` is the token before the chunk.
        """
        x_BTD = norm(self.embed_up(inputs.embedded_BTE))
        if self.shift_D is None:
            return x_BTD
        if last_token_B is None:
            first_B1D = torch.zeros_like(x_BTD[:, :1])
        else:
            first_B1D = norm(self.embed_up(F.embedding(last_token_B[:, None], self.embed.weight).to(self.dtype)))
        before_BTD = torch.cat([first_B1D, x_BTD[:, :-1]], 1)
        starts_BT1 = (inputs.timeline.position_BT == 0)[..., None]
        return x_BTD + self.shift_D.to(x_BTD.dtype) * before_BTD.masked_fill(starts_BT1, 0)

    def backed_out(self, x_BTD: Tensor, middle_BTD: Tensor, flow: Flow) -> Tensor:
        """Return the stream after the deep blocks less a share of that after the middle block.

        Tokens that skipped the deep blocks stay as they are.
        """
        if self.backout is None:
            return x_BTD
        share = self.backout.to(x_BTD.dtype)
        return x_BTD - (share * flow.deep_BT[..., None] if flow.call.routed else share) * middle_BTD

    def _run(
        self,
        blocks: nn.ModuleList,
        x_BTD: Tensor,
        views: Iterable[View],
        rotary: Rotary,
        flow: Flow | None = None,
    ) -> tuple[Tensor, Tensor, list[KeysValues]]:
        """Run the stem or, with a `flow`, the deep blocks. `views` has what each remembers and its attention mask.

        Returns:
            The residual stream after them, that after the middle block (or before the first one, if they are above
            it), and the chunk's keys and values in each.
        """
        first = 0 if flow is None else self.config.stem_layers
        slots, served = (None, None) if flow is None else (flow.slots, _served(flow))
        middle_BTD, keys_values = x_BTD, []
        for layer, (block, (past, plan)) in enumerate(zip(blocks, views, strict=True)):
            if flow is not None:
                x_BTD = self._before_block(layer, x_BTD, flow)
            arguments = (x_BTD, past, rotary, plan, slots, served)
            if self.checkpoint_activations and torch.is_grad_enabled():
                # Nothing in a block is random, and reading the GPU's RNG state would abort a CUDA graph capture.
                x_BTD, k_BTKH, v_BTKH = recomputed(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD, k_BTKH, v_BTKH = block(*arguments)
            keys_values.append((k_BTKH, v_BTKH))
            if first + layer == self.config.middle:
                middle_BTD = x_BTD
        return x_BTD, middle_BTD, keys_values

    def _before_block(self, block: int, x_BTD: Tensor, flow: Flow) -> Tensor:
        """Return the stream with what ideas add before a deep block to the tokens that go through it."""
        for idea in self._in_flow():
            added_BTD = idea.before_block(block, x_BTD, flow)
            if added_BTD is not None:
                x_BTD = x_BTD + (added_BTD * flow.deep_BT[..., None] if flow.call.routed else added_BTD)
        return x_BTD

    def _deep_views(self, flow: Flow, past: State) -> Iterator[View]:
        """Yield the views of the deep blocks; wide ones have a kv cache and a mask of their own."""
        narrow = iter(_views(past.deep, flow.plan))
        wide = iter(_views(past.wide, flow.wide_plan) if past.wide and flow.wide_plan else ())
        return (next(wide if is_wide else narrow) for is_wide in self.config.wide_layers)

    def _split(self, deep: list[KeysValues]) -> tuple[list[KeysValues], list[KeysValues]]:
        """Return the keys and values of the deep blocks that are not wide, and those of the wide ones."""
        narrow: list[KeysValues] = []
        wide: list[KeysValues] = []
        for keys_values, is_wide in zip(deep, self.config.wide_layers, strict=True):
            (wide if is_wide else narrow).append(keys_values)
        return narrow, wide

    def _in_flow(self) -> Iterator[Idea]:
        """Yield the ideas between stem and deep blocks, in the order of the flow."""
        top = {idea.name for idea in self.config.ideas if idea.reads_top}
        return (idea for name, idea in self.ideas.items() if name not in top)

    def lasting_slots(self, state: State) -> tuple[Tensor, Tensor] | None:
        """Return normed states [B, C, D] and biases [B, C] of the slots that stay the same until a segment opens.

        None: there are none, or an idea does not promise it; see `Idea.lasting_slots`.
        """
        found = []
        for idea in self._in_flow():
            slots = idea.lasting_slots(state.part(idea.name))
            if slots is None and idea.slots_of(0):
                return None
            found += [slots] if slots is not None else []
        if not found:
            return None
        states, biases = zip(*reversed(found), strict=True)  # as `Flow.slots` joins them
        return torch.cat(states, 1), torch.cat(biases, 1)

    def new_state(
        self, batch_size: int, *, memory: Memory | str | Path | None = None, any_weights: bool = False
    ) -> State:
        """Return the state of `batch_size` sequences that have read nothing.

        `memory` is that of another state, or a file that `state.memory.save` wrote: the new sequences remember what
        those before did, with positions shifted so that all are outside the window. Its rows must be `batch_size`, or
        one, which all then share.
        """
        state = fresh_state(self, whole("batch_size", batch_size, 1, MAX_ROWS, " sequences"))
        return state if memory is None else with_memory(self, state, memory, any_weights=any_weights)

    def load_state(self, path: str | Path, *, any_weights: bool = False) -> State:
        """Read what `state.save` wrote: a stream continues in another process with identical output.

        Raises:
            InputError: the file is missing or torn, or the state is of a model of another shape.
        """
        return read_part(self, path, self.new_state(1), any_weights=any_weights)

    def flops_per_token(self, length: int, *, depth: float | None = None, think: int | None = None) -> float:
        """Floating-point operations of `forward` per token; see `lepton.model.flops`."""
        return flops_per_token(self, length, depth=depth, think=think)

    def state_bytes(self, length: int) -> int:
        """Bytes of the state of one sequence after `length` tokens; constant unless the model is dense."""
        return state_bytes(self, length)


def _views(past: KVCache | KVRing, plan: AttentionPlan) -> list[View]:
    """Return the views of blocks that share a kv cache and a mask."""
    return [(past.layer(index), plan) for index in range(past.layers)]


def _served(flow: Flow) -> Served | None:
    """Return the tokens that serve the deep blocks keys and values of the state before these blocks, and that state."""
    served_BT = flow.call.served_BT
    return None if served_BT is None else Served(norm(flow.x_BTD), served_BT)
