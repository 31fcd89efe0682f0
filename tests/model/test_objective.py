"""The auxiliary losses teach the ideas and move nothing else."""

import pytest
import torch

from lepton.model.ideas import drafter as drafting
from lepton.model.ideas.idea import picks
from lepton.model.ideas.peek import FADE, ROW_STRIDE
from lepton.model.layers import norm
from lepton.ops.cross_entropy import soft_cap
from tests.laws.lab import EOS, build, text

OWN = ("peek.", "router.", "drafter.", "uncertainty.")


def gradients(model, tokens) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    model.loss(tokens).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_the_trunk_never_pays_for_an_auxiliary_loss(monkeypatch):
    """Law 6: without them its gradients are the same, and so is the forward pass, which they are no part of."""
    model, tokens = build("complete"), text(1, rows=3)
    together = gradients(model, tokens)
    for idea in model.ideas.values():
        monkeypatch.setattr(idea, "loss_weights", dict.fromkeys(idea.loss_weights, 0.0))
    alone = gradients(model, tokens)
    for name, gradient in together.items():
        if not name.startswith(OWN):
            torch.testing.assert_close(gradient, alone[name], rtol=0, atol=1e-12, msg=name)


def test_every_auxiliary_loss_reaches_its_own_parameters():
    model = build("complete")
    found = gradients(model, text(1, rows=3))
    for name, gradient in found.items():
        assert gradient is not None, name
        assert gradient.any(), name


def slow_parts(model, tokens, lengths, targets):
    """The small losses in single positions, as the modules describe them."""
    inputs = tokens[:, :-1]
    out = model.trunk(inputs)
    flow = out.flow
    documents = (inputs == EOS).cumsum(1) - (inputs == EOS).long()
    following = tokens[:, 1:].masked_fill(torch.arange(1, tokens.shape[1]) >= lengths[:, None], -100)
    following = following.masked_fill(~targets, -100)
    flat = [divmod(pick, inputs.shape[1]) for pick in range(inputs.numel())]

    def nats(hidden, target):
        return torch.nn.functional.cross_entropy(model.head(hidden.detach()), target)

    exits, routes = [], []
    for pick in picks(following, model.config.idea("router").exit_stride).tolist():
        row, t = flat[pick]
        target = following[row, t]
        if target >= 0:
            left = model.router.exit(flow.x_BTD[row, t])
            logits = norm(left)
            if hasattr(model.head_down, "weight"):
                logits = logits @ model.head_down.weight.detach().T
            logits = logits @ model.embed.weight.detach()[: model.config.vocab_size].T
            logits = model.config.logit_cap * torch.tanh(logits / model.config.logit_cap)
            exits.append(torch.nn.functional.cross_entropy(logits, target))
            saved = (exits[-1] - nats(out.hidden[row, t], target)).detach().clamp(-5, 5)
            routes.append((flow.contributions["router"].signal_BT[row, t] - saved) ** 2)

    drafter = model.drafter
    proposals, drafts = drafter.ids.tolist(), [[] for _ in range(drafter.count)]
    for pick in picks(following, drafter.stride).tolist():
        row, t = flat[pick]
        state = drafter.begin(out.hidden[row, t])
        for i in range(drafter.count):
            place = t + i + 1
            if (
                following[row, t] < 0
                or place >= inputs.shape[1]
                or documents[row, place] != documents[row, t]
                or following[row, place] < 0
            ):
                break
            state = drafter.step(state, model.embed.weight[inputs[row, place]])
            logits = soft_cap(drafter.leave(state) @ drafter.rows(model.embed).T, drafter.cap)
            if drafter.distil:
                judged = model.head(out.hidden[row, place].detach())[drafter.ids].log_softmax(0)
                drafts[i].append((judged.exp() * (judged - logits.log_softmax(0))).sum())
            elif following[row, place] in drafter.ids:
                target = torch.tensor(proposals.index(following[row, place]))
                drafts[i].append(torch.nn.functional.cross_entropy(logits, target))
    weights = [drafting.FADE**i for i in range(drafter.count)]
    draft = sum(w * torch.stack(losses).mean() for w, losses in zip(weights, drafts, strict=True)) / sum(weights)

    hints = []
    for row in picks(following[:, 0], ROW_STRIDE).tolist():
        for t in range(int(lengths[row])):
            ahead = [
                FADE ** (i - 2) * norm(flow.embedded_BTE[row, t + i].detach())
                for i in range(2, model.peek.horizon + 1)
                if t + i < min(inputs.shape[1], int(lengths[row])) and documents[row, t + i] == documents[row, t]
            ]
            if ahead and t < inputs.shape[1]:
                said = model.peek.summary(model.peek.hint(flow.contributions["peek"].inputs_BTI[row, t].detach()))
                hints.append(1 - torch.nn.functional.cosine_similarity(said, sum(ahead), dim=-1))
    return {
        "exit": torch.stack(exits).mean(),
        "router": torch.stack(routes).mean(),
        "draft": draft,
        "peek": torch.stack(hints).mean(),
    }


LEARNS = {"exit": "router.exit_", "router": "router.benefit", "draft": "drafter.", "peek": "peek.summary"}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("padding", "share", "distil"), [(EOS, 1, False), (7, 1, True), (7, 0.9, False)])
def test_the_small_losses_equal_single_positions(padding, share, distil, seed):
    """Values, and the gradients of the parameters that see no other loss, whatever rows are padded with, and where only
    a share of the predictions counts."""
    model, tokens = build("complete", **{"router.exit_stride": 3, "drafter.distil": distil}), text(seed, rows=9)
    lengths = torch.tensor([tokens.shape[1], 30, 2, 99, 64, 71, 17, 50, 88])
    tokens = tokens.masked_fill(torch.arange(tokens.shape[1]) >= lengths[:, None], padding)
    targets = torch.rand(9, tokens.shape[1] - 1, generator=torch.Generator().manual_seed(seed)) < share
    loss = model.loss(tokens, lengths=lengths, targets=targets)
    expected = slow_parts(model, tokens, lengths, targets)
    for part, begins in LEARNS.items():
        tolerance = 1e-6 if part == "peek" else 1e-9  # whose summary is of fp32
        torch.testing.assert_close(
            loss.parts[part], expected[part].detach().to(loss.parts[part]), rtol=0, atol=tolerance
        )
        own = [parameter for name, parameter in model.named_parameters() if name.startswith(begins)]
        got = torch.autograd.grad(loss.loss, own, retain_graph=True)
        wanted = torch.autograd.grad(0.1 * expected[part], own, retain_graph=True)
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


def test_only_the_targets_count():
    """The loss is the mean over them, and all of them is the loss without the argument."""
    model, tokens, lengths = build("complete"), text(1), torch.tensor([100, 57])
    targets = torch.zeros(2, 99, dtype=torch.bool)
    targets[0, 40], targets[1, [3, 55, 80]] = True, True  # the last one lies in the padding
    logits = model(tokens[:, :-1]).logits
    nats = [
        torch.nn.functional.cross_entropy(logits[row, t], tokens[row, t + 1]) for row, t in ((0, 40), (1, 3), (1, 55))
    ]
    got = model.loss(tokens, lengths=lengths, targets=targets).parts["ce"]
    torch.testing.assert_close(got, torch.stack(nats).mean().detach(), rtol=0, atol=1e-9)
    plain, every = (model.loss(tokens, lengths=lengths, targets=given) for given in (None, torch.ones_like(targets)))
    assert plain.loss == every.loss
    assert model.loss(tokens, targets=torch.zeros_like(targets)).parts["ce"] == 0


def test_the_parts_are_reported():
    model = build("complete")
    parts = model.loss(text(1)).parts
    assert set(parts) == {"ce", "z", "exit", "router", "uncertainty", "draft", "peek"}
    assert all(torch.isfinite(part) for part in parts.values())


@pytest.mark.parametrize("shape", [(1, 2), (2, 3), (1, 40)])
def test_short_batches_work(shape):
    model = build("complete")
    loss = model.loss(text(1, rows=shape[0], length=shape[1]))
    loss.loss.backward()
    assert torch.isfinite(loss.loss)


def test_a_bound_on_the_groups_changes_nothing():
    model, tokens = build("complete"), text(3)
    exact, padded = model.trunk(tokens), model.trunk(tokens, groups=60)
    torch.testing.assert_close(exact.hidden, padded.hidden, rtol=0, atol=1e-9)
    torch.testing.assert_close(exact.state.deep.keys_BLRKH, padded.state.deep.keys_BLRKH, rtol=0, atol=1e-9)
