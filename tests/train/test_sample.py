from lepton.train.sample import sample_text
from tests.train.small import opened


def test_a_sample_continues_the_prompt_or_the_data(data, model):
    held_out, tokenizer = opened(data)
    options = {"max_new_tokens": 5, "seed": 0}
    text = sample_text(model, held_out, tokenizer, prompt="The lazy", **options)
    assert text.startswith("The lazy")
    assert text == sample_text(model, held_out, tokenizer, prompt="The lazy", **options)
    first = next(held_out.batches(1)).tokens[0, :16].tolist()
    assert sample_text(model, held_out, tokenizer, prompt=None, **options).startswith(tokenizer.decode(first))
