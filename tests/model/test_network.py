"""The public surface of the model: shapes, dtypes, counts, checks."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lepton.api import create_lepton_nano
from lepton.errors import InputError
from lepton.model.layers import norm
from lepton.model.parameters import declared
from lepton.model.state import flatten
from tests.laws.lab import EOS, VARIANTS, VOCAB, assert_outputs, assert_states, build, text, views


def test_the_logits_leave_out_the_padding_of_the_vocabulary():
    model = create_lepton_nano(layers=2)
    assert model.embed.weight.shape[0] == 50304
    logits = model(torch.tensor([[1, 2, 50256]])).logits
    assert logits.shape == (1, 3, 50257)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_is_the_cross_entropy_of_the_logits(variant):
    model, tokens = build(variant), text(1, rows=3)
    lengths = torch.tensor([100, 2, 57])
    logits = model(tokens[:, :-1]).logits
    target = tokens[:, 1:].masked_fill(torch.arange(1, 100) >= lengths[:, None], -100)
    expected = F.cross_entropy(logits.transpose(1, 2), target)
    loss = model.loss(tokens, lengths=lengths)
    torch.testing.assert_close(loss.parts["ce"], expected)
    small = [part for name, part in loss.parts.items() if name not in ("ce", "z")]
    torch.testing.assert_close(loss.loss, expected + 1e-4 * loss.parts["z"] + 0.1 * sum(small))


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_computed_again_give_the_same_gradients(variant):
    model, tokens = build(variant), text(1, rows=2)
    kept, gradients = [], []
    for checkpointing in (False, True):
        model.checkpoint_activations = checkpointing
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept[-1].append(x.nbytes) or x, lambda x: x):
            kept.append([])
            loss = model.loss(tokens).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-13, atol=1e-15)
    assert sum(kept[1]) < 0.8 * sum(kept[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_reaches_every_parameter(variant):
    model, tokens = build(variant), text(1, rows=3)
    tokens[1, :50] = tokens[0, :50]  # a pair of answers is where two rows are equal so far
    model.loss(tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_bf16_computes_in_bf16_and_keeps_fp32_parameters():
    model = build("complete", dtype=torch.float32)
    exact = model(text(1)).logits
    model.compute_dtype = torch.bfloat16
    out = model(text(1))
    assert out.hidden.dtype == out.state.deep.keys_BLRKH.dtype == torch.bfloat16
    assert out.logits.dtype == torch.float32
    assert 1e-4 < (out.logits - exact).abs().mean() < 0.1
    model.loss(text(1)).loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert model.to(torch.bfloat16)(text(1)).logits.isfinite().all()


@pytest.mark.parametrize("length", [64, 700])
@pytest.mark.parametrize("overrides", [{}, {"window": 16}, {"window": 32, "segment": 5}, {"dense": True}])
@torch.no_grad()
def test_flops_per_token_agrees_with_torchs_counter(length, overrides):
    model = create_lepton_nano(layers=3, **overrides)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.ones(2, length, dtype=torch.int64))
    assert counter.get_total_flops() / (2 * length) == pytest.approx(model.flops_per_token(length), rel=1e-6)


def test_the_weights_start_as_the_table_says_and_each_block_as_the_identity():
    model = create_lepton_nano()
    for name, parameter in model.named_parameters():
        if parameter.numel() < 1000 or name == "memory.conv":
            continue
        expected = 0.02 if name == "embed.weight" else parameter.shape[1] ** -0.5
        if declared(model)[name].initial is torch.nn.init.zeros_:
            expected = 0.0
        assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
    out = model(torch.arange(1, 40)[None])
    torch.testing.assert_close(out.hidden, norm(norm(model.embed_up(out.flow.embedded_BTE))))


def test_building_under_the_meta_device_allocates_nothing():
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in create_lepton_nano().parameters())


def test_loading_is_strict():
    model = build("complete")
    weights = model.state_dict()
    build("complete", seed=1).load_state_dict(weights)
    with pytest.raises(RuntimeError, match=r"Missing key 'embed\.weight'"):
        model.load_state_dict({name: value for name, value in weights.items() if name != "embed.weight"})


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_carries_a_graph_only_if_asked(variant):
    """A stream in the README's way kept the activations of all its chunks."""
    model, tokens = build(variant), text(1)
    out = model(tokens[:, :40])
    for state in (out.state, out.commit(out.lengths), out.commit(torch.tensor([3, 40]))):
        assert not any(value.requires_grad for value in flatten(state).values())
    kept = out.commit(out.lengths, keep_graph=True)
    assert_states(out.state, kept, "with and without a graph")
    second = model(tokens[:, 40:], kept)
    (gradient,) = torch.autograd.grad(second.logits.square().sum(), out.flow.embedded_BTE)
    assert gradient[:, -1].any(), "gradients reach the chunk before"
    assert not any(value.requires_grad for value in flatten(second.state).values()), "the next one is plain again"


def test_the_token_before_a_chunk_counts_within_its_document():
    """Row 0 goes on with a document, row 1 starts one: the token before it ended the last one."""
    model, tokens = build("complete"), text(5, length=9, documents=False)
    tokens[1, 3] = EOS
    state = model(tokens[:, :4]).state
    assert torch.equal(state.last_token_B, tokens[:, 3])
    other = dataclasses.replace(state, last_token_B=(state.last_token_B + 1) % VOCAB)
    before, after = (model(tokens[:, 4:], each).logits for each in (state, other))
    assert (before[0, 0] - after[0, 0]).abs().max() > 1e-3
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.uint64]
)
def test_token_ids_of_every_integer_dtype(dtype):
    model, tokens, lengths = build("complete"), text(1), torch.tensor([100, 57])
    given = tokens.to(dtype)
    with torch.no_grad():
        found = model(given, lengths=lengths.to(dtype))
        assert_outputs(views(model(tokens, lengths=lengths)), views(found), dtype)
        assert_states(model(tokens, lengths=lengths).state, found.commit(lengths.to(dtype)), dtype)
        assert model.loss(given, lengths=lengths.to(dtype)).loss == model.loss(tokens, lengths=lengths).loss


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model(torch.tensor([1, 2])), r"tokens must be integers .* give tokens\[None\] for one row"),
        (lambda model: model([[1, 2]]), r"tokens of type list: give a tensor \[rows, tokens\]"),
        (lambda model: model(np.array([[1, 2]])), "tokens of type ndarray"),
        (lambda model: model(None), "tokens of type NoneType"),
        (lambda model: model(torch.zeros(0, 3, dtype=torch.int64)), "tokens must be integers"),
        (lambda model: model(torch.ones(1, 3, dtype=torch.bool)), "not torch.bool"),
        (
            lambda model: model(torch.ones(1, 3, dtype=torch.int64, device="meta")),
            r"on meta, .* give tokens.to\('cpu'\)",
        ),
        (lambda model: model(text(1), state="x"), "state='x': give what new_state"),
        (lambda model: model(text(1), model.new_state(1).memory), "give what new_state"),
        (lambda model: model(text(1), lengths=[1, 2]), "lengths must hold one value .*, not list"),
        (
            lambda model: model(text(1), lengths=torch.tensor([1.0, 2.0])),
            "lengths must hold one value .* torch.float32",
        ),
        (lambda model: model(text(1), lengths=torch.tensor([True, True])), "torch.bool"),
        (lambda model: model(text(1), lengths=torch.ones(2, dtype=torch.int64, device="meta")), "lengths: on meta"),
        (lambda model: model(text(1), opens=text(1)), "opens must have the shape .* torch.int64"),
        (lambda model: model(text(1), opens=[True]), "opens must have the shape .* list"),
        (lambda model: model(text(1), opens=torch.ones(2, 100, dtype=torch.bool, device="meta")), "opens: on meta"),
        (lambda model: model(text(1), depth="half"), "depth='half'"),
        (lambda model: model(text(1), depth=float("nan")), "depth=nan"),
        (lambda model: model(text(1), think=10**6), "think=1000000"),
        (lambda model: model(text(1), think=True), "think=True"),
        (lambda model: model(text(1), think="two"), "think='two'"),
        (lambda model: model(text(1), think=torch.tensor(2)), "think must hold one number"),
        (lambda model: model(text(1)).commit([1, 2]), "a count for each of 2 rows"),
        (lambda model: model(text(1)).commit(torch.tensor([1.0, 2.0])), "a count for each of 2 rows"),
        (lambda model: model.loss([[1, 2]]), "tokens of type list"),
        (lambda model: model.loss(text(1).double()), "at least 2"),
        (lambda model: model.loss(torch.tensor([[1, 2, VOCAB]])), f"token id {VOCAB}"),
        (lambda model: model.loss(text(1), lengths=torch.tensor([3])), "lengths must hold one value"),
        (lambda model: model.loss(text(1), lengths=torch.tensor([3, 101])), "length 101"),
        (
            lambda model: model.loss(text(1), targets=text(1)[:, 1:]),
            r"targets must have .* bool \[2, 99\], not torch.int64",
        ),
        (lambda model: model.loss(text(1), targets=text(1) > 5), r"a flag a prediction, .*, not torch.bool \[2, 100\]"),
        (lambda model: model.loss(text(1), targets=[True]), "not list"),
        (lambda model: model.loss(text(1), groups=10**6), "groups=1000000: must be a whole number, in 0..164"),
        (lambda model: model.loss(text(1), auxiliary=torch.ones(3)), "auxiliary=tensor"),
        (lambda model: model.loss(text(1), groups="2"), "groups='2'"),
        (lambda model: model.new_state(0), "batch_size=0"),
        (lambda model: model.new_state(True), "batch_size=True"),
        (lambda model: model.new_state("2"), "batch_size='2'"),
        (lambda model: model.new_state(10**9), "batch_size=1000000000: must be a whole number, in 1..65536"),
        (lambda model: model(torch.zeros(1, 0, dtype=torch.int64)), "tokens must be integers"),
        (lambda model: model(torch.zeros(1, 3)), "not torch.float32"),
        (lambda model: model(text(1), model.new_state(3)), "the state holds 3 rows and the tokens 2"),
        (lambda model: model(text(1), lengths=torch.tensor([1, 2, 3])), "lengths must hold one value"),
        (lambda model: model(text(1)).commit(torch.tensor([1])), "a count for each of 2 rows"),
        (lambda model: model(text(1), depth=1.5), "depth=1.5"),
        (lambda model: model(text(1), think=-1), "think=-1"),
        (lambda model: model(text(1), think=1.5), "think=1.5"),
        (lambda model: model(text(1) + VOCAB), "token id"),
        (lambda model: model(text(1) - VOCAB), "token id"),
        (lambda model: model(text(1), lengths=torch.tensor([101, 3])), "length 101"),
        (lambda model: model(text(1)).commit(torch.tensor([-1, 3])), "counts must lie in 0..100"),
        (lambda model: model(text(1), opens=text(1)[:, :5] > 5), "opens must have the shape"),
        (lambda _: build("no router")(text(1), depth=0.5), "no router"),
        (lambda _: build("no thoughts")(text(1), think=2), "no thought tokens"),
        (lambda model: model.loss(text(1)[:, :1]), "at least 2"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call(build("complete"))


def test_too_few_groups_and_rows_that_there_are_not_are_refused():
    model = build("complete")
    with pytest.raises(InputError, match="more segments than `groups` allows"):
        model.loss(text(1), groups=0)
    state = model(text(1, rows=1)).state
    with pytest.raises(InputError, match="rows of a state of 1"):
        state.rows(torch.tensor([1]))


@torch.no_grad()
def test_a_model_may_have_no_deep_blocks():
    model, tokens = build("complete", layers=2), text(1)
    whole = model(tokens)
    first = model(tokens[:, :60])
    rest = model(tokens[:, 60:], first.state)
    torch.testing.assert_close(rest.logits, whole.logits[:, 60:], rtol=0, atol=1e-9)
    prompt = tokens[0, :20].tolist()
    assert model.generate(prompt, 10, seed=0) == model.generate(prompt, 10, seed=0, use_speculative=False)
