"""The model card, README.md of an exported folder."""

from lepton import __version__
from lepton.config import LeptonConfig

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- lepton
---

# {title}

A language model of {params:.1f} M parameters, trained with LEPTON {version}{steps}.
Ideas: {ideas}.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))
```

`trust_remote_code=True` runs the Python files of this folder, a copy of LEPTON's model. It is not needed after
`import lepton.hf`, where LEPTON is installed: `pip install ".[hf]"` in the folder of a clone of its repository. LEPTON
itself also drafts tokens, and generates faster.

## What to know

- {reach}
- A document ends with id {eos}. The token after it starts anew, also within a row.
- Batches are padded on the left. Positions follow from the text: there are no `position_ids`.
- `model(...).uncertainty` is the chance that the most likely next token is wrong, if the model has that head.
- What it was trained on, and what it must not be used for, only its author can say: add it here.
"""


def card(config: LeptonConfig, params: int, *, size: str | None, step: int) -> str:
    """Return the text of a card: what a reader needs to load the model, and what only the file knows."""
    names = ", ".join(idea.name for idea in config.ideas) or "none, a plain transformer"
    window = "It attends to the whole document, so that memory grows with the text."
    if config.window is not None:
        window = f"It attends to the last {config.window} tokens and keeps a state of constant size for earlier text."
    return CARD.format(
        title=f"LEPTON {size.upper()}" if size else "LEPTON",
        params=params / 1e6,
        version=__version__,
        steps=f" for {step:,} steps" if step else "",
        ideas=names,
        reach=window,
        eos=config.eos_id,
    )
