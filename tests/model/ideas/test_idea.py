"""A seventh idea, made here alone: what it declares is all that the package has to know of it.

`Echo` keeps a fading mean of the stem states of its document and adds a matrix of it to the stream. It has state, a
loss, matrices of two groups, FLOPs, activations and a switch.
"""

import signal
from dataclasses import dataclass, replace

import pytest
import torch

from lepton import checkpoint
from lepton import config as configuration
from lepton.api import Lepton
from lepton.config import IdeaConfig, LeptonConfig
from lepton.errors import InputError
from lepton.evals.ablation import ablate, switched_off
from lepton.model.flops import flops_per_token
from lepton.model.ideas.idea import Contribution, Idea, matrices, picks
from lepton.model.layers import Linear
from lepton.model.parameters import FEED, MATRIX, declared
from lepton.model.size_config import size_config
from lepton.train.cost import training_flops_per_token
from lepton.train.memory_forecast import predicted_bytes
from lepton.train.micro_step import compiled_parts
from lepton.train.optimizer import split_parameters
from lepton.train.stop_request import Interrupted
from lepton.train.trainer import train
from tests.generate.models import always_drafting
from tests.laws import lab
from tests.laws import test_1_causality as law_1
from tests.laws import test_2_one_path as law_2
from tests.laws import test_3_purity as law_3
from tests.laws import test_4_losslessness as law_4
from tests.laws import test_7_exact_resume as law_7
from tests.laws import test_9_bounded_state as law_9
from tests.laws.lab import build, text
from tests.streams import Watched
from tests.train.small import metrics_of, small_run, small_settings, write_data


@dataclass(frozen=True, kw_only=True)
class EchoConfig(IdeaConfig):
    """The fading mean."""

    fade: float = 0.5
    """Share of the mean that a token leaves of it."""

    name = "echo"

    def build(self, config):
        return Echo(config, self)


@dataclass(frozen=True)
class EchoState:
    mean_BD: torch.Tensor


@dataclass(frozen=True)
class EchoRecord:
    means_BXD: torch.Tensor
    """On entry, and after each token."""

    def after(self, count_B, timeline):
        mean_BD = self.means_BXD[torch.arange(len(count_B), device=count_B.device), count_B]
        return EchoState(mean_BD * ~timeline.ended(count_B)[:, None])


class Echo(Idea):
    name = "echo"
    loss_weights = {"echo": 0.1}
    compiled = ("guess",)
    declares = {"out.weight": FEED, "ahead.weight": MATRIX.but(auxiliary=True)}

    def __init__(self, config, own):
        super().__init__()
        self.fade = own.fade
        self.out = Linear(config.width, config.width)
        self.ahead = Linear(config.width, config.width)

    def fresh(self, rows, dtype, device, *, allocate):
        return EchoState(torch.zeros(rows, self.out.in_features, dtype=dtype, device=device))

    def contribute(self, flow, past):
        mean_BD, means = past.mean_BD, [past.mean_BD]
        for t in range(flow.u_BTD.shape[1]):
            mean_BD = mean_BD * (flow.timeline.position_BT[:, t] > 0)[:, None]
            mean_BD = self.fade * mean_BD + (1 - self.fade) * flow.u_BTD[:, t]
            means.append(mean_BD)
        means_BXD = torch.stack(means, 1)
        added_BTD = self.out(means_BXD[:, 1:])
        return Contribution(added_BTD, feature_BTF=means_BXD[:, 1:], update=EchoRecord(means_BXD))

    def guess(self, mean_MD):
        return self.ahead(mean_MD)

    def losses(self, outcome):
        feature_BTD = outcome.flow.contributions[self.name].feature_BTF.detach()
        index_M = picks(outcome.following_BT[:, 1:], 4)
        guess_MD = self.guess(feature_BTD[:, :-1].flatten(0, 1)[index_M])
        return {"echo": (guess_MD - feature_BTD[:, 1:].flatten(0, 1)[index_M]).square().mean()}

    def flops(self, work):
        return work.length * matrices(self.out)

    def extra_training_flops(self, work, head):
        return 2 * 2 * matrices(self.ahead) / 4

    def kept_bytes(self, work):
        return 2 * work.itemsize * work.length * self.out.in_features


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """From here on sizes have it, and the complete model of the laws."""
    monkeypatch.setitem(configuration.IDEAS, "echo", EchoConfig)
    monkeypatch.setitem(lab.IDEAS, "echo", True)


def nano(**changes):
    with torch.device("meta"):
        return Lepton(size_config("nano", **changes))


def test_it_is_alive():
    model = build("complete")
    assert [*model.ideas][-1] == "echo"
    with switched_off(model, "echo"):
        bare = model(text(1)).logits
    assert (model(text(1)).logits - bare).abs().max() > 1e-3


def test_it_obeys_the_laws(monkeypatch):
    law_1.test_changing_the_future_changes_no_past_output("complete")
    law_1.test_the_gradient_reaches_no_future_embedding("complete")
    law_2.test_any_chunking_equals_the_full_forward("complete")
    law_2.test_rollback_restores_the_state_that_never_saw_the_drafts("complete")
    law_2.test_padding_and_idle_rows_are_the_same_function("complete")
    law_3.test_using_the_model_changes_no_parameter_no_buffer_and_no_state("complete")
    law_3.test_a_row_does_not_depend_on_its_neighbours("complete")
    law_3.test_a_packed_document_equals_the_document_alone("complete")
    law_3.test_training_and_evaluation_are_the_same_function("complete")
    law_9.test_the_state_never_grows("complete")
    monkeypatch.setattr(
        law_4, "model_of", lambda variant, dtype=torch.float64, **more: build(variant, 0, dtype, **more)
    )
    with always_drafting():
        law_4.test_the_state_is_that_of_a_model_that_never_drafted("complete")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A data set, and the folder of a run of 8 steps on it, with the idea."""
    folder = tmp_path_factory.mktemp("resume")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configuration.IDEAS, "echo", EchoConfig)
        small_run(write_data(folder / "data"), folder / "out", log_every=1)
    return folder / "data", folder / "out"


class Killed(BaseException):
    """Nothing catches it, so that nothing is saved."""


def kill():
    raise Killed


def ask():
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(("end", "raised"), [(ask, Interrupted), (kill, Killed)])
def test_a_run_resumes_exactly(undisturbed, tmp_path, end, raised):
    """Law 7, whose own test runs the command: the trainer knows the idea in this process alone."""
    data, out = undisturbed
    with pytest.raises(raised):
        train(small_settings(data, tmp_path, log_every=1), stream=Watched("step 6/8", end))
    (*_, (_, saved)) = checkpoint.steps_in(tmp_path)
    assert saved.name == ("step_4.pt" if raised is Killed else "step_6.pt")
    small_run(data, tmp_path, resume="auto")
    law_7.assert_same_run(tmp_path, out, 8)
    assert all("echo" in entry for entry in metrics_of(tmp_path) if "loss" in entry)
    before, after = checkpoint.load(tmp_path / "step_4.pt"), checkpoint.load(tmp_path / "final.pt")
    names = ["echo.out.weight", "echo.ahead.weight"]
    assert not any(torch.equal(before["model"][name], after["model"][name]) for name in names), "it learns"
    muon, _ = split_parameters(Lepton(LeptonConfig.from_dict(after["config"])))
    assert {name for name, *_ in muon} >= set(names)
    assert len(after["optimizer"]["states"]["muon"]) == len(muon)


def test_it_trains_by_the_groups_it_names():
    model = build("complete", dtype=torch.float32)
    muon, _ = split_parameters(model)
    entries = {name: entry for name, _, entry in muon}
    assert entries["echo.out.weight"].rate == 0.1
    assert entries["echo.ahead.weight"].auxiliary
    loss = model.loss(text(1))
    assert "echo" in loss.parts
    loss.loss.backward()
    assert model.echo.ahead.weight.grad.any()
    assert model.echo.out.weight.grad.any()
    fresh = Lepton(model.config)
    assert not fresh.echo.out.weight.any(), "it starts by adding nothing"
    assert (fresh.echo, "guess") in compiled_parts(fresh)


def test_it_is_counted():
    with_it, without_it = nano(), nano(echo=None)
    square = with_it.config.width**2
    assert with_it.num_params() - without_it.num_params() == 2 * square
    assert flops_per_token(with_it, 100) - flops_per_token(without_it, 100) == pytest.approx(2 * square)
    training = training_flops_per_token(with_it, 8, 100) - training_flops_per_token(without_it, 8, 100)
    assert training == pytest.approx(6 * square + square)
    assert predicted_bytes(with_it, 8, 100, False) > predicted_bytes(without_it, 8, 100, False) + 4 * 2 * square


def test_it_stands_in_the_ablation():
    model, tokens = build("complete"), text(1)

    def nats(**options):
        return torch.nn.functional.cross_entropy(
            model(tokens[:, :-1], **options).logits.flatten(0, 1), tokens[:, 1:].flatten()
        ).item()

    found = {row.off: row.change for row in ablate(model, nats)}
    assert found["echo"] != 0


def test_a_checkpoint_and_a_state_hold_it(tmp_path):
    model = build("complete", dtype=torch.float32)
    assert LeptonConfig.from_dict(model.config.to_dict()) == model.config
    assert model.config.replace(**{"echo.fade": 0.25}).idea("echo").fade == 0.25
    with torch.no_grad():
        state = model(text(1)).state
    state.save(tmp_path / "s.safetensors")
    assert torch.equal(model.load_state(tmp_path / "s.safetensors").part("echo").mean_BD, state.part("echo").mean_BD)


def test_dense_has_no_idea_by_construction():
    model = nano(dense=True)
    assert not model.ideas
    assert not any(isinstance(module, Idea) for module in model.modules())


def test_every_parameter_is_claimed_exactly_once():
    model = build("complete")
    model.echo.more = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match=r"echo\.more.*declared 0 times"):
        declared(model)
    twice = build("complete")
    twice.echo.declares = {**Echo.declares, "out.*": MATRIX}
    with pytest.raises(TypeError, match=r"echo\.out\.weight.*declared 2 times"):
        declared(twice)


def test_a_flat_configuration_of_before_does_not_have_it():
    """So a checkpoint from before the idea loads as it did."""
    flat = {**lab.SHAPE, **lab.IDEAS}
    assert LeptonConfig.from_dict(flat).idea("echo") == EchoConfig()
    del flat["echo"]
    config = LeptonConfig.from_dict(flat)
    assert config.idea("echo") is None
    assert len(config.ideas) == 7


def test_names_that_are_taken_are_refused(monkeypatch):
    monkeypatch.setattr(EchoConfig, "name", "stem")
    with pytest.raises(AssertionError, match="the name of the idea 'stem' is taken"):
        Lepton(build("dense").config.replace(ideas=(EchoConfig(),)))
    monkeypatch.undo()
    monkeypatch.setattr(Echo, "loss_weights", {"peek": 0.1})
    monkeypatch.setitem(configuration.IDEAS, "echo", EchoConfig)
    with pytest.raises(AssertionError, match="two losses have one name"):
        build("complete", echo=True)


def test_a_configuration_can_leave_it_out():
    config = build("complete").config
    assert config.replace(echo=False).idea("echo") is None
    assert replace(config, ideas=()).dense
    for ideas in (5, "tiny", ["echo"], (EchoConfig(), 5)):
        with pytest.raises(InputError, match=r"ideas=.*must be a tuple"):
            config.replace(ideas=ideas)
