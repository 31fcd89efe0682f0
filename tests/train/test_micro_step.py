from dataclasses import is_dataclass

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._functorch import config as autograd_config

from lepton.api import Lepton
from lepton.config import LeptonConfig
from lepton.model.objective import Step
from lepton.ops.attention_kernel import ATTENTION
from lepton.ops.cross_entropy import CROSS_ENTROPY
from lepton.train.batch_plan import draw_served, plan_batch
from lepton.train.micro_step import CACHE_ALL, MicroStep, compiled_parts
from lepton.train.optimizer import Optimizers
from tests.ops.devices import force
from tests.train.small import ROUTED, SHAPE

TOKENS = torch.arange(1, 37).view(4, 9)
LENGTHS = torch.tensor([9, 9, 5, 9])
THINK = torch.tensor([0, 1, 2, 4])
THINKING = {"thoughts.over_tokens": True, "thoughts.most_rounds": 5}
# Longer than the window, so that there are crystals; for gradients.
LONG = torch.randint(1, 300, (4, 41), generator=torch.Generator().manual_seed(0))
LONG_LENGTHS = torch.tensor([41, 41, 25, 41])


@pytest.fixture(autouse=True)
def _every_program_is_compiled():
    """Beyond a number of programs a process the compiler goes on without, in silence."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Lepton(LeptonConfig.from_dict(SHAPE))


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def at_work(model):
    """Give all matrices something to do: some start at zero, behind which a gradient that is lost does not show."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    # Else the router's error, and with it its gradient, is about as small as what half precision rounds off.
    torch.nn.init.constant_(model.router.benefit.bias, 1.0)
    return model


def strictly(line):
    """Take what a `MicroStep` says: a test of what is fast means nothing where it goes on without."""
    assert "cannot" not in line, line


def assert_same_gradients(model, expected, tolerance):
    """Compare each parameter's gradient by its norm, so that what is small and lost stands out too.

    In half precision single numbers, which are sums that nearly cancel, are 4 % off by rounding alone.
    """
    for (name, parameter), wanted in zip(model.named_parameters(), expected, strict=True):
        off = (parameter.grad - wanted).norm()
        assert wanted.norm() > 0, f"{name}: nothing to compare"
        assert off <= tolerance * wanted.norm(), f"{name}: off by {off:.3g} of {wanted.norm():.3g}"


def test_micro_batches_add_up_by_their_shares(model):
    loss = model.loss(TOKENS, lengths=LENGTHS, think=THINK)
    loss.loss.backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=False)
    micro_step = MicroStep(model, compiled=False)
    for share in (0.25, 0.75):
        micro_step(TOKENS, LENGTHS, THINK, None, share)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-5, atol=1e-7)
    figures = micro_step.take_figures()
    assert figures.keys() == {"loss", "z", "exit", "router", "uncertainty", "draft", "peek"}
    torch.testing.assert_close(figures["loss"], loss.parts["ce"])
    micro_step(TOKENS, LENGTHS, THINK, None, 0.5)
    torch.testing.assert_close(micro_step.take_figures()["loss"], loss.parts["ce"] / 2)


def test_targets_are_those_of_the_loss(model):
    """Also where a batch of the same shape has none."""
    targets = torch.arange(32).view(4, 8) % 5 == 0
    model.loss(TOKENS, lengths=LENGTHS, targets=targets, think=THINK).loss.backward()
    expected = gradients(model)
    micro_step = MicroStep(model, compiled=False)
    micro_step(TOKENS, LENGTHS, THINK, None, 1.0)
    assert any(not torch.equal(got, wanted) for got, wanted in zip(gradients(model), expected, strict=True))
    model.zero_grad(set_to_none=False)
    micro_step(TOKENS, LENGTHS, THINK, None, 1.0, targets)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-5, atol=1e-7)


def test_the_share_of_the_peak_rate_is_that_of_the_loss():
    torch.manual_seed(0)
    model, found = at_work(Lepton(LeptonConfig.from_dict(SHAPE | ROUTED))), []
    for rate in (1.0, 0.25):
        model.zero_grad()
        model.loss(TOKENS, lengths=LENGTHS, think=THINK, step=Step(rate)).loss.backward()
        expected = gradients(model)
        model.zero_grad(set_to_none=False)
        MicroStep(model, compiled=False)(TOKENS, LENGTHS, THINK, None, 1.0, step=Step(rate))
        torch.testing.assert_close(gradients(model), expected, rtol=1e-5, atol=1e-7)
        found.append(expected)
    assert any(not torch.equal(first, second) for first, second in zip(*found, strict=True))


def test_served_tokens_are_those_of_the_loss():
    """With blocks that are computed again, too."""
    torch.manual_seed(0)
    model = at_work(Lepton(LeptonConfig.from_dict(SHAPE | ROUTED)))
    served = draw_served(model, TOKENS, seed=0, step=4, micro=0)
    for again in (False, True):
        model.checkpoint_activations = again
        model.zero_grad()
        model.loss(TOKENS, lengths=LENGTHS, think=THINK, step=Step(served_BT=served)).loss.backward()
        expected = gradients(model)
        micro_step = MicroStep(model, compiled=False)
        model.zero_grad(set_to_none=False)
        micro_step(TOKENS, LENGTHS, THINK, None, 1.0)
        assert any(not torch.equal(got, wanted) for got, wanted in zip(gradients(model), expected, strict=True))
        model.zero_grad(set_to_none=False)
        micro_step(TOKENS, LENGTHS, THINK, None, 1.0, step=Step(served_BT=served))
        torch.testing.assert_close(gradients(model), expected, rtol=1e-5, atol=1e-7)


def test_in_half_precision_gradients_go_to_the_weights_that_are_trained(model):
    """Twice, with other weights the second time, which the copies must follow."""
    at_work(model).compute_dtype = torch.bfloat16
    micro_step = MicroStep(model, compiled=False)
    masters = dict(model.named_parameters())
    for _ in range(2):
        model.zero_grad()
        model.loss(LONG, lengths=LONG_LENGTHS, think=THINK).loss.backward()
        expected = gradients(model)
        model.zero_grad(set_to_none=False)
        for share in (0.25, 0.75):
            micro_step(LONG, LONG_LENGTHS, THINK, None, share)
        assert_same_gradients(model, expected, 0.1)
        after = dict(model.named_parameters())
        assert all(after[name] is masters[name] and after[name].dtype == torch.float32 for name in masters)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data.mul_(1.5)
    model.blocks[0].forward = None
    with pytest.raises(TypeError):
        micro_step(LONG, LONG_LENGTHS, THINK, None, 1.0)
    assert dict(model.named_parameters()) == masters


def test_parts_run_compiled_within_a_step_alone(model, monkeypatch):
    ran = []

    def compile(forward, *, dynamic):
        assert not dynamic
        return lambda *args: ran.append(forward.__self__) or forward(*args)

    monkeypatch.setattr("torch.compile", compile)
    micro_step = MicroStep(model, compiled=True, say=(said := []).append)
    micro_step.prepare(2, 8)
    losses = [model.uncertainty, model.drafter, model.peek]
    assert ran == [*model.stem, model.thoughts, model.memory, *model.blocks, *losses]
    assert len(said) == 1
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    ran.clear()
    model(TOKENS)
    assert ran == []
    micro_step(TOKENS, LENGTHS, THINK, None, 1.0)
    assert len(ran) == len(compiled_parts(model))


@pytest.mark.parametrize(
    ("dtype", "tolerance", "changes"),
    [(torch.float32, 1e-5, ROUTED), (torch.float32, 1e-5, THINKING), (torch.bfloat16, 0.1, {})],
    ids=["routed", "thinking", "default"],
)
def test_compiled_parts_have_the_gradients_of_the_plain_pass(dtype, tolerance, changes, monkeypatch):
    """A compiler has lost one before: PyTorch 2.11's that of what a function of ours had changed in place."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    real = torch.compile
    monkeypatch.setattr("torch.compile", lambda f, *, dynamic: real(f, dynamic=dynamic, backend=backend))
    torch.manual_seed(0)
    model = at_work(Lepton(LeptonConfig.from_dict(SHAPE | changes)))
    model.compute_dtype = dtype
    served = draw_served(model, LONG, seed=0, step=0, micro=0)
    assert (served is not None and served.any()) == (changes is ROUTED)
    model.loss(LONG, lengths=LONG_LENGTHS, think=THINK, step=Step(served_BT=served)).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    MicroStep(model, compiled=True, say=strictly)(LONG, LONG_LENGTHS, THINK, None, 1.0, step=Step(served_BT=served))
    assert len(compiled) >= len({type(part).__name__ for part, _ in compiled_parts(model)})
    assert_same_gradients(model, expected, tolerance)


def test_compiled_blocks_are_computed_again_without_compiling_again(monkeypatch):
    model = Lepton(LeptonConfig.from_dict(SHAPE | {"dense": True, "window": None}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    real = torch.compile
    monkeypatch.setattr("torch.compile", lambda forward, *, dynamic: real(forward, dynamic=dynamic, backend=backend))
    results = []
    for checkpointing in (False, True):
        torch._dynamo.reset()
        compiled.clear()
        model.zero_grad()
        model.checkpoint_activations = checkpointing
        micro_step = MicroStep(model, compiled=True, say=[].append)
        for _ in range(2):
            micro_step(TOKENS, LENGTHS, None, None, 0.5)
        results.append((len(compiled), gradients(model)))
    (programs, expected), (programs_again, found) = results
    assert programs_again == programs > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_time_of_a_micro_batch_is_taken_without_a_trace(model):
    micro_step = MicroStep(model, compiled=False)
    micro_step(TOKENS, LENGTHS, THINK, None, 1.0)
    assert micro_step.seconds(4, 8) > 0
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert not any(figure for figure in micro_step.take_figures().values())


def test_what_is_traced_of_functions_with_own_gradients_is_kept_on_disk(model, monkeypatch):
    """Only while the parts run: the option belongs to whoever else compiles in this process."""
    seen = []

    def compile(forward, *, dynamic):
        return lambda *args: seen.append(getattr(autograd_config, CACHE_ALL)) or forward(*args)

    monkeypatch.setattr("torch.compile", compile)
    assert not getattr(autograd_config, CACHE_ALL)
    MicroStep(model, compiled=True, say=[].append).prepare(2, 8)
    assert set(seen) == {True}
    assert not getattr(autograd_config, CACHE_ALL)


def test_without_a_compiler_it_says_so_and_goes_on(model, monkeypatch):
    def failing(*_):
        raise RuntimeError("no C++ compiler found\nand a long trace")

    monkeypatch.setattr("torch.compile", lambda forward, *, dynamic: failing)
    micro_step = MicroStep(model, compiled=True, say=(said := []).append)
    micro_step.prepare(2, 8)
    assert said[1] == "cannot compile here (no C++ compiler found): going on without, which runs slower"
    micro_step(TOKENS, LENGTHS, THINK, None, 1.0)
    assert micro_step.take_figures()["loss"] > 0


def test_a_full_gpu_is_no_missing_compiler(model, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("torch.compile", lambda forward, *, dynamic: full)
    with pytest.raises(torch.OutOfMemoryError):
        MicroStep(model, compiled=True, say=[].append).prepare(2, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [40, 201])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_compiled_part_equals_itself_as_it_is(model, dtype, tolerance, length):
    """Outputs and gradients, for the same inputs: in whole passes rounding would change some choices of crystals."""
    at_work(model).cuda().compute_dtype = dtype
    calls = []

    def kept(module, function):
        return lambda *given: calls.append((module, function, given)) or function(*given)

    for module, name in compiled_parts(model):
        setattr(module, name, kept(module, getattr(module, name)))
    tokens = torch.randint(1, 300, (4, length + 1), generator=torch.Generator().manual_seed(0))
    _, groups = plan_batch(model, tokens, 0, 0, 0)
    lengths = torch.full((4,), length + 1, device="cuda")
    model.loss(tokens.cuda(), lengths=lengths, think=THINK.cuda(), groups=groups)
    assert len(calls) == len(compiled_parts(model))
    for module, function, given in calls:
        expected = results(function, module, given)
        found = results(torch.compile(function, dynamic=False), module, given)
        assert len(found) == len(expected) > 1
        for one, other in zip(found, expected, strict=True):
            off, size = (one.double() - other.double()).norm(), other.double().norm()
            name = f"{type(module).__name__}'s {tuple(other.shape)}"
            assert off <= tolerance * size, f"{name}: off by {off:.3g} of {size:.3g}"


def results(function, module, given):
    """What a part returns, and gradients of states and parameters."""
    given = [each.detach().requires_grad_() if is_state(each) else each for each in given]
    outputs = [output for output in states(function(*given)) if output.requires_grad]
    torch.manual_seed(0)
    output_gradients = [torch.randn_like(output) for output in outputs]
    wanted = [each for each in given if is_state(each)] + list(module.parameters())
    gradients = torch.autograd.grad(outputs, wanted, output_gradients, retain_graph=True, allow_unused=True)
    return outputs + [gradient for gradient in gradients if gradient is not None]


def is_state(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def states(value):
    """All tensors of floating point in what a part returns."""
    if is_state(value):
        return [value]
    if is_dataclass(value):
        value = tuple(vars(value).values())
    return [state for part in value for state in states(part)] if isinstance(value, tuple | list) else []


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_a_recording_equals_what_it_records(model, dtype, tolerance, compiled, checkpointing):
    """A micro-batch of other values than the recorded one, twice, and gradients that were there before."""
    at_work(model).cuda().compute_dtype = dtype
    _, groups = plan_batch(model, LONG, 0, 0, 0)
    plain = MicroStep(model, compiled=compiled, captured=False, say=strictly)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for share in (0.25, 0.75):
        plain(LONG, LONG_LENGTHS, THINK, groups, share)
    expected, figures = [gradient - 1 for gradient in gradients(model)], plain.take_figures()
    model.checkpoint_activations = checkpointing
    recorded = MicroStep(model, compiled=compiled, say=strictly)
    recorded.prepare(4, 40)
    assert not any(parameter.grad.any() for parameter in model.parameters())
    for parameter in model.parameters():
        parameter.grad.fill_(1)
    for share in (0.25, 0.75):
        recorded(LONG, LONG_LENGTHS, THINK, groups, share)
    for parameter in model.parameters():
        parameter.grad -= 1
    assert_same_gradients(model, expected, tolerance)
    torch.testing.assert_close(recorded.take_figures(), figures, rtol=tolerance / 10, atol=tolerance / 10)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_recording_takes_the_rate_and_the_served_tokens_of_each_micro_batch(compiled):
    torch.manual_seed(0)
    model = at_work(Lepton(LeptonConfig.from_dict(SHAPE | ROUTED))).cuda()
    _, groups = plan_batch(model, LONG, 0, 0, 0)
    found = []
    for captured in (False, True):
        micro_step = MicroStep(model, compiled=compiled, captured=captured, say=strictly)
        if captured:
            micro_step.prepare(4, 40)
            model.zero_grad(set_to_none=False)
        for micro, rate in enumerate((1.0, 0.25)):
            served = draw_served(model, LONG, 0, 4, micro)
            micro_step(LONG, LONG_LENGTHS, THINK, groups, 0.5, step=Step(rate, served))
        found.append((gradients(model), micro_step.take_figures()))
        model.zero_grad(set_to_none=False)
    (expected, figures), (recorded, recorded_figures) = found
    for ours, theirs in zip(recorded, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    torch.testing.assert_close(recorded_figures, figures, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_another_shape_works_in_the_memory_of_the_first(model):
    """Recordings are dropped before a shape runs for the first time; those that come back are recorded again."""
    model.cuda()
    tokens = torch.randint(1, 300, (128, 201), generator=torch.Generator().manual_seed(0))
    lengths = torch.full((128,), 201)
    think, groups = plan_batch(model, tokens, 0, 0, 0)
    shapes = [4 * groups, groups, 2 * groups, 4 * groups, groups]
    plain = MicroStep(model, compiled=False, captured=False)
    for each in shapes:
        plain(tokens, lengths, think, each, 0.2)
    expected, figures = gradients(model), plain.take_figures()
    model.zero_grad(set_to_none=False)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    micro_step = MicroStep(model, compiled=False)
    for index, each in enumerate(shapes):
        micro_step(tokens, lengths, think, each, 0.2)
        if index == 0:
            of_the_largest = torch.cuda.memory_reserved() - before
            torch.cuda.reset_peak_memory_stats()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(micro_step.take_figures(), figures, rtol=1e-5, atol=1e-5)
    assert torch.cuda.max_memory_reserved() - before < 1.3 * of_the_largest


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
def test_twenty_steps_with_all_that_is_fast_are_those_of_the_plain_way(dtype, tolerance, monkeypatch):
    """Kernels, compiled and captured parts, and plain PyTorch agree on the loss of a whole run, relative to it."""
    curves = []
    for fast in (False, True):
        if not fast:
            for kernel in (ATTENTION, CROSS_ENTROPY):
                force(monkeypatch, kernel, answer=False)
        else:
            monkeypatch.undo()
        torch.manual_seed(0)
        model = Lepton(LeptonConfig.from_dict(SHAPE)).cuda().train()
        model.compute_dtype = dtype
        model.drafter.ids.copy_(torch.arange(len(model.drafter.ids)))
        optimizers = Optimizers(model, kind="muon", lr=6e-4, muon_lr=0.02, weight_decay=0.1, captured=fast)
        micro_step = MicroStep(model, compiled=fast, captured=fast, say=strictly)
        micro_step.prepare(8, 200)
        curves.append([])
        for step in range(20):
            tokens = torch.randint(1, 300, (8, 201), generator=torch.Generator().manual_seed(step))
            think, groups = plan_batch(model, tokens, 0, step, 0)
            micro_step(tokens, torch.full((8,), 201), think, groups, 1.0)
            curves[-1].append(micro_step.take_figures()["loss"].item())
            optimizers.step(1.0, 1.0, micro_step.graphs)
        assert (fast and optimizers._asked in micro_step.graphs) == fast
    torch.testing.assert_close(curves[1], curves[0], rtol=tolerance, atol=0)
