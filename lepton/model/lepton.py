"""The model. `trunk` reads like the diagram in docs/architecture.md; everything it needs of the past is an argument."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from lepton import checkpoint
from lepton.config import IDEAS, LeptonConfig
from lepton.errors import naming
from lepton.model.attention import Rotary, Slots
from lepton.model.block import Block
from lepton.model.checks import whole
from lepton.model.entry import MAX_ROWS, checked, checked_for_loss, fresh_state, with_memory
from lepton.model.flops import flops_per_token
from lepton.model.ideas.idea import Call, ChunkInputs, Flow, Idea
from lepton.model.kv_cache import KeysValues, KVCache, entries_after
from lepton.model.layers import Linear, norm
from lepton.model.objective import Loss, objective
from lepton.model.output import Chunk, Output
from lepton.model.parameters import EMBEDDING, EMBEDDING_MATRIX, initialise
from lepton.model.saved import read_part
from lepton.model.state import Memory, State, flatten
from lepton.model.timeline import Timeline
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
    Each idea of `config.ideas` is an attribute of its name; a registered idea that the model is without is None.
    """

    declares = {
        "embed.weight": EMBEDDING,
        "embed_up.weight": EMBEDDING_MATRIX,
        "head_down.weight": EMBEDDING_MATRIX,
    }

    def __init__(self, config: LeptonConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.checkpoint_activations = False
        self._tokenizer_json: str | None = None
        self._left_out: str | None = None
        for name in IDEAS:
            setattr(self, name, None)
        rank = config.embed_rank or config.width
        self.embed = nn.Embedding(config.padded_vocab_size, rank)
        self.embed_up = Linear(rank, config.width) if config.embed_rank else nn.Identity()
        self.stem = nn.ModuleList(Block(config) for _ in range(config.stem_layers))
        self._build(reads_top=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers - config.stem_layers))
        self.head_down = Linear(config.width, rank) if config.embed_rank else nn.Identity()
        self._build(reads_top=True)
        initialise(self)
        self.register_state_dict_post_hook(note_config)

    def _build(self, *, reads_top: bool) -> None:
        for idea in self.config.ideas:
            if idea.reads_top is reads_top:
                setattr(self, idea.name, idea.build(self.config))

    @property
    def ideas(self) -> dict[str, Idea]:
        """The ideas by name, in the order of the flow."""
        names = [idea.name for idea in self.config.ideas if idea.name != self._left_out]
        return {name: self._modules[name] for name in names}  # type: ignore[misc]

    def idea(self, name: str) -> Any:
        """Return the idea called `name`; None: the model is without it."""
        return self.ideas.get(name)

    @contextmanager
    def without(self, name: str) -> Iterator[dict[str, Any]]:
        """Leave an idea out inside the block, as in a model that is built without it. No state may cross its border."""
        before, self._left_out = self._left_out, name
        try:
            yield {}
        finally:
            self._left_out = before

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

    @cached_property
    def tokenizer(self) -> "Tokenizer | None":
        """The tokenizer that the checkpoint carries; None for a model that comes from none, or from one without."""
        from lepton.data.tokenizer import Tokenizer

        return None if self._tokenizer_json is None else Tokenizer.from_json(self._tokenizer_json)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch, once names, shapes, dtypes, finiteness and the configuration fit: nothing is taken over before.

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
        depth: float | None = None,
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
            depth: share of the tokens allowed past the stem, in 0..1; None is 1, all of them.
            think: rounds of thinking, 0 to 256; None is the number that the configuration says.
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
        doubt = self.idea("uncertainty")
        uncertainty = doubt(out.hidden, logits, out.signals) if doubt else None
        return dataclasses.replace(out, logits=logits, uncertainty=uncertainty)

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
        tokens, past, lengths, call = checked(self, tokens, state, lengths, depth, think, opens)
        place = self._place(tokens, past, call, opens, groups)
        x_BTD = norm(self.embed_up(place.embedded_BTE))
        h_BTD, stem = self._run(self.stem, x_BTD, past.stem, place.rotary, place.causal.plan())
        flow = Flow.after_stem(place, h_BTD)
        updates: dict[str, Any] = {}
        for name, idea in self._in_flow():  # thoughts, memory, crystals, peek, router
            given = idea.contribute(flow, past.part(name))
            flow = flow.plus(name, given)
            updates |= {} if given.update is None else {name: given.update}
        x_BTD, deep = self._run(self.blocks, flow.x_BTD, past.deep, flow.rotary, flow.plan, flow.slots)
        for _, idea in self._in_flow():
            x_BTD = idea.after_blocks(x_BTD, flow.deep_BT, call)
        chunk = Chunk(past, flow.timeline, stem, deep, updates, self.config.window, Origin(self))
        blocks_BT = torch.where(flow.deep_BT, self.config.layers, self.config.stem_layers)
        return Output(norm(x_BTD), None, None, blocks_BT, flow.without_slots(), lengths, chunk)

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
            lengths: integers [B], valid tokens of each row; None: all.
            think: rounds of thinking, for all or for each row (int [B], see `Thoughts`).
            groups: bound of the segments that open in a row, for static shapes; None counts them.
            auxiliary: whether the losses of the ideas are computed; validation does without.

        Returns:
            `Loss` with the scalar `loss` to differentiate and its `parts`.
        """
        tokens, lengths, groups = checked_for_loss(self, tokens, lengths, groups, auxiliary)
        out = self.trunk(tokens[:, :-1], think=think, groups=groups)
        hidden, flow = out.hidden, out.flow
        del out  # and with it the keys and values that a state would be made of
        return objective(self, hidden, flow, tokens, lengths, auxiliary=auxiliary)

    def _place(self, tokens: Tensor, past: State, call: Call, opens: Tensor | None, groups: int | None) -> ChunkInputs:
        """Say where the tokens of a chunk stand and what they see, and embed them."""
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
            past=past.stem.entries,
            window=config.window,
            dtype=self.dtype,
            head_dim=config.head_dim,
            routed=call.depth < 1,
        )
        rotary = Rotary.at(timeline.position_BT, config.head_dim, config.rope_base, self.dtype)
        return ChunkInputs(call, tokens, self.embed(tokens).to(self.dtype), timeline, rotary, near)

    def _run(
        self,
        blocks: nn.ModuleList,
        x_BTD: Tensor,
        past: KVCache,
        rotary: Rotary,
        plan: AttentionPlan,
        slots: Slots | None = None,
    ) -> tuple[Tensor, list[KeysValues]]:
        """Run some blocks; return the stream behind them, and the chunk's keys and values in each."""
        keys_values = []
        for layer, block in enumerate(blocks):
            arguments = (x_BTD, past.layer(layer), rotary, plan, slots)
            if self.checkpoint_activations and torch.is_grad_enabled():
                # Nothing in a block is random, and to ask a GPU for its generator's state would end a recording.
                x_BTD, k_BTKH, v_BTKH = recomputed(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD, k_BTKH, v_BTKH = block(*arguments)
            keys_values.append((k_BTKH, v_BTKH))
        return x_BTD, keys_values

    def _in_flow(self) -> Iterator[tuple[str, Idea]]:
        """Yield the ideas between stem and deep blocks, in the order of the flow."""
        top = {idea.name for idea in self.config.ideas if idea.reads_top}
        return ((name, idea) for name, idea in self.ideas.items() if name not in top)

    def new_state(
        self, batch_size: int, *, memory: Memory | str | Path | None = None, any_weights: bool = False
    ) -> State:
        """Return the state of `batch_size` sequences that have read nothing.

        `memory` is that of another state, or a file that `state.memory.save` wrote: the new sequences remember what
        those before did, its positions shifted behind the window. Its rows must be `batch_size`, or one, which all then
        share.
        """
        state = fresh_state(self, whole("batch_size", batch_size, 1, MAX_ROWS, " sequences"))
        return state if memory is None else with_memory(self, state, memory, any_weights=any_weights)

    def load_state(self, path: str | Path, *, any_weights: bool = False) -> State:
        """Read what `state.save` wrote: a stream goes on in another process with identical output.

        Raises:
            InputError: the file is missing or torn, or the state is of a model of another shape.
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
        """Floating-point operations of `forward` per token; see `lepton.model.flops`."""
        return flops_per_token(self, length, depth=depth, think=think)

    @property
    def fresh_shapes(self) -> dict[str, Tensor]:
        """The tensors of a fresh state of one sequence by their names, as shapes alone (on the meta device)."""
        left_out = (f"{self._left_out}.", f"memory.{self._left_out}.")
        return {name: value for name, value in self._shapes.items() if not name.startswith(left_out)}

    @cached_property
    def _shapes(self) -> dict[str, Tensor]:
        with torch.device("meta"):
            return flatten(fresh_state(Lepton(self.config), 1))

    def state_bytes(self, length: int) -> int:
        """Bytes of the state of one sequence after `length` tokens; constant unless the model is dense."""
        with torch.device("meta"):
            state = fresh_state(Lepton(self.config).to(self.dtype), 1)
        caches = [value for name, value in flatten(state).items() if name.endswith("_BLRKH")]
        entries = entries_after(self.config.window, length)
        grown = sum(
            (entries - each.shape[2]) * each.shape[1] * each.shape[3:].numel() * each.itemsize for each in caches
        )
        return state.nbytes + grown
