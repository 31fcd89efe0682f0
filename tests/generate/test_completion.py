"""What a generation returns, for one prompt and for several."""

from lepton.generate.completion import complete, started
from tests.laws.lab import build

PROMPT = [5, 9, 14, 3]


def test_rows_tokens_and_uncertainties():
    model = build("complete")
    flat, batch = complete(model, PROMPT, 4, seed=1, uncertainty=True), complete(model, [PROMPT, [7]], 4, seed=1)
    assert flat.rows == [flat.tokens]
    assert flat.tokens[: len(PROMPT)] == PROMPT
    assert [flat.uncertainties] == flat.row_uncertainties
    assert len(flat.uncertainties) == flat.stats.new_tokens == len(flat.tokens) - len(PROMPT)
    assert batch.tokens == batch.rows
    assert batch.rows[0] == flat.tokens
    assert batch.uncertainties == [[], []], "they were not asked for"
    assert (flat.state.batch_size, batch.state.batch_size) == (1, 2)


def test_a_start_checks_and_computes_nothing():
    model = build("complete")
    calls = []
    model.trunk = lambda *given, **named: calls.append(given)
    assert started(model, [PROMPT, [7]], 4).prompts == [PROMPT, [7]]
    assert calls == []
