"""Every idea is alive on a trained model: a NANO of 5 blocks, after 100 steps on source of the standard library.

Its vocabulary is small: with that of the shipped tokenizer the head takes most of the time.
"""

import pytest
import torch

from lepton.api import create_lepton_nano
from lepton.data.prepare import prepare
from lepton.data.shards import ShardedDataset
from lepton.data.stdlib import stdlib_files
from lepton.data.tokenizer import train_tokenizer
from lepton.evals.ablation import switched_off
from lepton.evals.calibration import calibrate
from lepton.evals.positions import calibration_batches
from lepton.train.assembly import token_counts
from lepton.train.batch_plan import plan_batch
from lepton.train.optimizer import Optimizers

STEPS, ROWS, LENGTH = 100, 4, 96
VOCAB, LAYERS = 4096, 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The model, its parameters before training, held-out tokens [2, 384], and how often ids occur in training."""
    folder, files = tmp_path_factory.mktemp("alive"), stdlib_files()[::8]
    tokenizer = train_tokenizer(files, folder / "tokenizer.json", VOCAB)
    prepare(files, folder / "data", tokenizer, val_fraction=0.02)
    torch.manual_seed(0)
    model = create_lepton_nano(layers=LAYERS, window=32, segment=16, vocab_size=VOCAB)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    common = {"seed": 0, "vocab_size": model.config.vocab_size}
    data = ShardedDataset(folder / "data", split="train", seq_len=LENGTH, **common)
    counts = token_counts(data, VOCAB)
    model.drafter.learn_frequencies(lambda: counts)
    optimizers = Optimizers(model, kind="muon", lr=6e-4, muon_lr=0.02, weight_decay=0.1)
    for step in range(STEPS):
        batch = data.batch(step, batch_size=ROWS)
        think, _ = plan_batch(model, batch.tokens, 0, step, 0)
        model.loss(batch.tokens, lengths=batch.lengths, think=think).loss.backward()
        optimizers.step(min(1.0, (step + 1) / 10, (STEPS - step) / 40), 1.0)
    held_out = ShardedDataset(folder / "data", split="val", seq_len=384, **common)
    calibrate(model, calibration_batches(held_out, 4, 2048))
    return model.eval(), before, next(held_out.batches(2, 1)).tokens[:, :384], counts


def test_it_has_learned(trained):
    """More than how often tokens occur, by more than a nat."""
    model, _, tokens, counts = trained
    frequency = (counts + 1) / (counts + 1).sum()
    with torch.no_grad():
        assert model.loss(tokens).parts["ce"] < 5.5
        assert model.loss(tokens).parts["ce"] < -frequency.log()[tokens].mean() - 1


def test_every_parameter_moved(trained):
    model, before, *_ = trained
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - before[name]).abs()
        assert moved.max() > 1e-4, f"{name} stands still"


@pytest.mark.parametrize("idea", ["thoughts", "working memory", "crystals", "peek"])
@torch.no_grad()
def test_every_idea_changes_the_predictions(trained, idea):
    model, _, tokens, _ = trained
    on = model(tokens).logits
    with switched_off(model, idea) as options:
        off = model(tokens, **options).logits
    assert (on - off).abs().mean() > 1e-3, f"{idea} is inert"


@torch.no_grad()
def test_more_thinking_is_other_thinking(trained):
    model, _, tokens, _ = trained
    logits = [model(tokens, think=rounds).logits for rounds in (1, 2, 4)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    assert (logits[1] - logits[2]).abs().max() > 1e-3


@torch.no_grad()
def test_a_token_far_beyond_every_window_is_remembered(trained):
    """5 blocks of window 32 see 5 x 31 tokens back; the first token is 383 before the last."""
    model, _, tokens, _ = trained
    changed = tokens.clone()
    changed[:, :8] = changed[:, :8].flip(1)

    def difference() -> float:
        return (model(tokens).logits - model(changed).logits)[:, -1].abs().max().item()

    assert difference() > 1e-5
    with switched_off(model, "working memory"), switched_off(model, "crystals"):
        assert difference() == 0


@torch.no_grad()
def test_depth_is_a_knob(trained):
    model, _, tokens, _ = trained
    shallow, half, full = (model(tokens, depth=depth) for depth in (0.0, 0.5, 1.0))
    assert (shallow.depth == 2).all()
    assert (full.depth == LAYERS).all()
    assert (shallow.logits - full.logits).abs().mean() > 1e-2
    assert 0.2 < (half.depth == LAYERS).float().mean() < 0.7
    # It chooses by its scores; what they are worth is measured against a random choice (lepton eval --ablate).
    benefit = full.flow.contributions["router"].signal_BT
    assert benefit[half.depth == LAYERS].mean() > benefit[half.depth == 2].mean()


@torch.no_grad()
def test_the_uncertainty_is_more_than_the_largest_probability(trained):
    model, _, tokens, _ = trained
    out = model(tokens)
    uncertainty, likely = out.uncertainty.flatten(), out.logits.softmax(-1).amax(-1).flatten()
    assert uncertainty.std() > 0.02
    assert ((uncertainty >= 0) & (uncertainty <= 1)).all()
    # Among tokens of nearly the same largest probability it still differs: it is no function of it.
    order = likely.argsort()
    neighbours = uncertainty[order].unfold(0, 32, 32)
    assert neighbours.std(1).mean() > 0.1 * uncertainty.std()


@torch.no_grad()
def test_drafts_are_sometimes_right(trained):
    model, _, tokens, _ = trained
    prompts = tokens.reshape(-1, 64)[:8].tolist()
    _, stats = model.generate_with_stats(prompts, max_new_tokens=48, temperature=0.0)
    assert stats.tokens_per_step > 1.2
    assert stats.forward_calls < 48
