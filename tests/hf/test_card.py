from lepton.hf.card import card
from tests.cli.tiny import tiny_model


def test_it_says_what_the_file_knows():
    model = tiny_model()
    text = card(model.config, 24_900_000, size="micro", step=1234)
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "# LEPTON MICRO\n" in text
    assert "24.9 M parameters" in text
    assert "for 1,234 steps." in text
    assert "Ideas: thoughts, memory, crystals, peek, router, drafter, uncertainty.\n" in text
    assert "attends to the last 16 tokens" in text
    assert max(map(len, text.splitlines())) <= 120


def test_it_leaves_out_what_the_file_does_not_know():
    config = tiny_model().config.replace(ideas=(), window=None)
    text = card(config, 10**6, size=None, step=0)
    assert "# LEPTON\n" in text
    assert "steps" not in text
    assert "none, a plain transformer" in text
    assert "attends to the whole document" in text
