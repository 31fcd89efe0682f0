"""Choosing tokens: the kept tokens, frequencies, and that all forms choose the same token.

The kernel runs on a GPU, or on a CPU in Triton's interpreter, ``TRITON_INTERPRET=1 pytest``.
"""

import pytest
import torch

from lepton.generate.sampling import probabilities
from lepton.ops import choose as module
from lepton.ops.choose import (
    CHOOSE,
    Noise,
    Sampling,
    choose,
    cpu_choose,
    kept_columns,
    kept_in_rank,
    naive_choose,
    sampling_of,
    stream_words,
)
from lepton.ops.cross_entropy import soft_cap
from tests.ops.choosing import assert_frequencies, in_one_stream, noise_of
from tests.ops.devices import DEVICES, GPU, force

SETTINGS = [
    (0.0, 1.0, None),
    (1.0, 1.0, None),
    (0.8, 0.9, None),
    (1.0, 1.0, 5),
    (0.7, 0.8, 20),
    (1.3, 0.5, 7),
    (3.0, 0.99, 300),
    (0.2, 0.31, None),
    (1.0, 1.0, 1),
    (1.0, 0.95, 1000),
]
KINDS = ["random", "tied", "all tied", "one-hot", "flat", "excluded", "far"]


def logits_of(kind, rows, columns):
    if kind == "all tied":
        return torch.full((rows, columns), -2.5)
    logits = 3 * torch.randn(rows, columns)
    if kind == "tied":
        logits = (logits / 2).round()
    elif kind == "one-hot":
        logits = torch.full_like(logits, -1e4).scatter(1, torch.randint(0, columns, (rows, 1)), 20.0)
    elif kind == "flat":
        logits = 1e-3 * logits
    elif kind == "excluded":
        logits[:, torch.randperm(columns)[: columns // 2]] = -torch.inf
    elif kind == "far":
        logits = 1e4 * logits
    return logits


# The kept tokens.


def assert_kept(kept, logits, setting):
    """As in fp64, except for a token at whose border the mass is `top_p` up to rounding."""
    temperature, top_p, top_k = setting
    p = probabilities(logits, temperature=temperature, top_p=top_p, top_k=top_k)
    everything = probabilities(logits, temperature=temperature, top_k=top_k)
    order = logits.sort(descending=True, stable=True).indices
    before = torch.empty_like(p)
    before[order] = everything[order].cumsum(0) - everything[order]
    wrong = kept != (p > 0)
    wrong &= everything > 1e-30  # what fp32 takes for 0 is never chosen
    assert not (wrong & ((before - top_p).abs() > 1e-6)).any()
    assert wrong.sum() <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [53, 3000])
def test_the_kept_tokens_are_those_of_the_reference(kind, columns):
    settings = [each for each in SETTINGS if each[0] > 0]
    logits = logits_of(kind, len(settings), columns)
    temperature, top_p, top_k = sampling_of(settings)
    ranked, order = logits.sort(dim=1, descending=True, stable=True)
    in_rank = kept_in_rank(((ranked - ranked[:, :1]) / temperature[:, None]).exp(), top_p[:, None], top_k[:, None])
    for row, setting in enumerate(settings):
        assert_kept(torch.zeros(columns, dtype=torch.bool).scatter(0, order[row], in_rank[row]), logits[row], setting)
        weights = ((logits[row] - logits[row].max()) / temperature[row]).exp()
        found = kept_columns(logits[row], weights, float(top_p[row]), int(top_k[row]))
        kept = torch.ones(columns, dtype=torch.bool)
        if found is not None:
            kept = torch.zeros(columns, dtype=torch.bool).index_fill(0, found, True)
            assert len(found) == kept.sum()
        assert_kept(kept, logits[row], setting)


KERNELS = {"registers": {}, "parts": {"RESIDENT": 128, "PART": 128, "KEEPING_ROWS": 15}}
"""The forms of the kernel. With parts, all passes read two blocks of a row, the last one cut off."""


def on_devices():
    for each in DEVICES:
        for kernel in KERNELS:
            yield pytest.param((*each.values, kernel), marks=each.marks, id=f"{each.values[0]}-{kernel}")


@pytest.fixture(params=["choose", "naive", *on_devices()])
def form(request, monkeypatch):
    """A form of `choose` for tensors on a CPU."""
    if request.param == "choose":
        return choose
    if request.param == "naive":
        return naive_choose
    from lepton.ops.triton import choose as kernel

    device, kind = request.param
    force(monkeypatch, CHOOSE)
    for name, value in KERNELS[kind].items():
        monkeypatch.setattr(kernel, name, value)

    def on_device(logits, noise, sampling, ids=None, cap=None):
        noise, sampling = (kind(*(each.to(device) for each in part)) for kind, part in parts(noise, sampling))
        return choose(logits.to(device), noise, sampling, None if ids is None else ids.to(device), cap).cpu()

    return on_device


def parts(noise, sampling):
    return (Noise, noise), (Sampling, sampling)


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_chooses_the_same(form, kind):
    """Rows of mixed parameters, at a stride that is not their length."""
    rows = 2 * len(SETTINGS)
    logits = logits_of(kind, rows, 250)[:, :201]
    noise, sampling = noise_of(rows), sampling_of(2 * SETTINGS)
    for ids in (None, torch.randperm(5000)[:201]):
        assert torch.equal(form(logits, noise, sampling, ids), naive_choose(logits, noise, sampling, ids))
    half = logits.bfloat16()
    assert torch.equal(form(half, noise, sampling), naive_choose(half.float(), noise, sampling))


def test_a_cap_is_that_of_the_logits(form):
    if form is naive_choose:
        pytest.skip("it takes capped logits")
    rows = 2 * len(SETTINGS)
    logits = 8 * torch.randn(rows, 201)
    noise, sampling = noise_of(rows), sampling_of(2 * SETTINGS)
    expected = naive_choose(soft_cap(logits, 5.0), noise, sampling)
    assert torch.equal(form(logits, noise, sampling, None, 5.0), expected)
    assert not torch.equal(expected, naive_choose(logits, noise, sampling))


def test_only_kept_tokens_are_chosen(form):
    """With several settings in one batch, in rows that stand in any order."""
    rows = 6 * len(SETTINGS)
    logits = (2 * torch.randn(rows, 201)).round(decimals=1)
    chosen = form(logits, noise_of(rows), sampling_of(6 * SETTINGS))
    for row, (temperature, top_p, top_k) in enumerate(6 * SETTINGS):
        p = probabilities(logits[row], temperature=temperature, top_p=top_p, top_k=top_k)
        assert p[chosen[row]] > 0


@pytest.mark.parametrize(("top_p", "kept"), [(0.45, {0}), (0.75, {0, 1}), (0.79, {0, 1}), (0.81, {0, 1, 2})])
def test_top_p_is_a_share_of_the_top_k(form, top_p, kept):
    """Of 0.5, 0.3, 0.2. The third token is in the nucleus of the whole distribution, of which they hold two thirds."""
    p = torch.tensor([0.5, 0.3, 0.2] + [0.5 / 198] * 198)
    chosen = form(p.log().expand(40, -1), noise_of(40), sampling_of([(1.0, top_p, 3)] * 40))
    assert set(chosen.tolist()) == kept


def test_frequencies_are_those_of_the_reference():
    """Several settings in one batch, for logits of different entropy."""
    draws = 4000
    settings = [each for each in SETTINGS if each[0] > 0 and each[2] != 1]
    for scale in (0.1, 1.5, 6.0):
        logits = scale * torch.randn(53)
        sampling = sampling_of(settings * draws)
        index = torch.arange(draws).repeat_interleave(len(settings))
        noise = Noise(torch.tensor([stream_words(5, 0)]).expand(len(index), 2), index)
        chosen = naive_choose(logits.expand(len(index), -1), noise, sampling).view(draws, -1)
        for column, (temperature, top_p, top_k) in enumerate(settings):
            p = probabilities(logits, temperature=temperature, top_p=top_p, top_k=top_k)
            assert_frequencies(chosen[:, column].bincount(minlength=53), p)


def test_frequencies_in_a_large_vocabulary():
    logits = torch.randn(5000) * 2
    index = torch.arange(3000)
    noise = Noise(torch.tensor([stream_words(1, 2)]).expand(3000, 2), index)
    chosen = torch.cat(
        [
            choose(
                logits.expand(500, -1),
                Noise(*(each[i : i + 500] for each in noise)),
                sampling_of([(0.9, 1.0, None)] * 500),
            )
            for i in range(0, 3000, 500)
        ]
    )
    assert_frequencies(chosen.bincount(minlength=5000), torch.softmax(logits.double() / 0.9, 0))


def test_a_row_depends_on_no_other(form):
    rows = len(SETTINGS)
    logits, noise, sampling = 2 * torch.randn(rows, 201), noise_of(rows), sampling_of(SETTINGS)
    together = form(logits, noise, sampling)
    for order in (torch.randperm(rows), torch.tensor([3]), torch.tensor([4, 4, 0])):
        picked = [kind(*(each[order] for each in part)) for kind, part in parts(noise, sampling)]
        assert torch.equal(form(logits[order], *picked), together[order])


def test_noise_belongs_to_the_id(form):
    """A subset of the ids, in any order, gets the noise that they have in the whole vocabulary."""
    settings = [(1.0, 1.0, None), (0.8, 0.9, None)] * 5
    logits, noise, sampling = torch.randn(10, 201), noise_of(10), sampling_of(settings)
    ids = torch.randperm(201)[:90]
    everywhere = torch.full_like(logits, -torch.inf).index_copy(1, ids, logits[:, ids])
    chosen = form(logits[:, ids], noise, sampling, ids)
    assert torch.equal(ids[chosen], form(everywhere, noise, sampling))
    assert not torch.equal(chosen, form(logits[:, ids], noise, sampling))


def test_shared_noise_couples_choices():
    """Two distributions at total variation d agree with a probability of at least (1 - d) / (1 + d)."""
    count = 2000
    logits = 2 * torch.randn(60)
    other = logits + 0.7 * torch.randn(60)
    noise, sampling = in_one_stream(count), sampling_of([(1.0, 1.0, None)] * count)
    pairs = [naive_choose(each.expand(count, -1), noise, sampling) for each in (logits, other)]
    p, q = (torch.softmax(each.double(), 0) for each in (logits, other))
    distance = float((p - q).abs().sum() / 2)
    assert 0.15 < distance < 0.5
    assert (pairs[0] == pairs[1]).double().mean() > (1 - distance) / (1 + distance)


# Borders.


def test_greedy_takes_the_first_of_equals(form):
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [-torch.inf, -2.0, -1.0, -1.0], [5.0, 5.0, 5.0, 5.0]])
    assert form(logits, noise_of(3), sampling_of([(0.0, 0.5, 2)] * 3)).tolist() == [1, 2, 0]
    wide = logits_of("tied", 6, 200)
    first = [row.tolist().index(row.max()) for row in wide]
    assert form(wide, noise_of(6), sampling_of([(0.0, 1.0, None)] * 6)).tolist() == first


def test_greedy_compares_in_the_precision_of_the_logits():
    logits = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert choose(logits, noise_of(1), sampling_of([(0.0, 1.0, None)])).tolist() == [1]


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")  # to minus infinity, on purpose
@pytest.mark.parametrize(
    ("setting", "possible"),
    [
        ((1e-310, 1.0, None), {3}),
        ((1e-30, 0.9, 5), {3}),
        ((1.0, 1e-300, None), {3}),
        ((1.0, 1.0, 10**30), set(range(100))),
        ((2.0**64, 1.0, None), set(range(100))),
        ((1e300, 0.5, None), set(range(51))),
        ((1.0, 0.999999, 1), {3}),
    ],
)
def test_settings_far_out(form, setting, possible):
    logits = torch.linspace(1, 1 + 1e-5, 100).flip(0).repeat(20, 1)
    logits[:, 3] = 30.0 if possible == {3} else 1.0
    chosen = form(logits, noise_of(20), sampling_of([setting] * 20))
    assert set(chosen.tolist()) <= possible
    assert len(set(chosen.tolist())) > 1 or len(possible) == 1


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", [slice(None), slice(5, 6), slice(0, 100)])
def test_logits_that_are_not_finite_give_a_valid_column(form, value, part):
    logits = torch.randn(len(SETTINGS), 201)
    logits[:, part] = value
    chosen = form(logits, noise_of(len(SETTINGS)), sampling_of(SETTINGS))
    assert ((chosen >= 0) & (chosen < 201)).all()


@pytest.mark.parametrize(("rows", "columns"), [(0, 50), (1, 1), (3, 1)])
def test_smallest_sizes(form, rows, columns):
    chosen = form(torch.zeros(rows, columns), noise_of(rows), sampling_of([(1.0, 0.9, 5)] * rows))
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == [0] * rows


# On a device.


@pytest.mark.parametrize("device", DEVICES)
def test_the_operator_keeps_its_word_to_the_compiler(device):
    noise, sampling = noise_of(4, device=device), sampling_of(SETTINGS[:4], device)
    logits = torch.randn(4, 64, device=device)
    for ids in (None, torch.arange(64, device=device)):
        torch.library.opcheck(module._choose, (logits, *noise, *sampling, ids, 5.0))


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize(
    ("dtype", "columns"), [(torch.float32, 50_257), (torch.bfloat16, 2**17), (torch.float32, 4096)]
)
def test_on_a_gpu_at_the_sizes_of_generation(device, dtype, columns):
    """Near a tie of two scores, or at the border of a nucleus, rounding may choose another token, but rarely."""
    rows = 64 * len(SETTINGS)
    logits = (2.5 * torch.randn(rows, columns, device=device)).to(dtype)
    noise, sampling = noise_of(rows, device=device), sampling_of(64 * SETTINGS, device)
    assert CHOOSE.works(logits.device, dtype)
    differ = choose(logits, noise, sampling) != naive_choose(logits, noise, sampling)
    assert differ.sum() <= 2


@pytest.mark.parametrize("device", GPU)
def test_a_cuda_graph_replays_it(device):
    noise, sampling = noise_of(len(SETTINGS), device=device), sampling_of(SETTINGS, device)
    logits = torch.randn(len(SETTINGS), 5000, device=device)
    choose(logits, noise, sampling)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = choose(logits, noise, sampling)
    for _ in range(3):
        logits.copy_(3 * torch.randn_like(logits))
        noise.index_A.add_(1)
        graph.replay()
        assert torch.equal(replayed, choose(logits, noise, sampling))


def test_a_cpu_takes_its_own_form():
    logits, noise, sampling = torch.randn(10, 97), noise_of(10), sampling_of(SETTINGS)
    assert torch.equal(choose(logits, noise, sampling), cpu_choose(logits, noise, sampling))
    assert torch.equal(cpu_choose(logits, noise, sampling), naive_choose(logits, noise, sampling))
