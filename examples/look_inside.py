"""Look inside a model while it reads a text: uncertainty and depth of each token, and what it remembers.

    python -m examples.look_inside --checkpoint checkpoints/final.pt --text my_notes.txt --depth 0.5

Without --text it reads its own source, and without --checkpoint it looks into the model that comes with LEPTON.
"""

import argparse
from pathlib import Path

import torch

from lepton import Lepton

parser = argparse.ArgumentParser(description="Show what a model does with each token of a text.")
parser.add_argument("--checkpoint", metavar="FILE", help="(default: the model that comes with LEPTON)")
parser.add_argument("--text", default=__file__, help="text file to read (default: this script)")
parser.add_argument("--depth", type=float, default=0.5, help="share of tokens that may pass all blocks (default: 0.5)")
parser.add_argument("--tokens", type=int, default=16, help="tokens to show (default: 16)")
args = parser.parse_args()

model = Lepton.from_checkpoint(args.checkpoint)
ids = model.tokenizer.encode(Path(args.text).read_text(encoding="utf-8"))[:1024]

# One pass over the text predicts the next token at each position. Without `no_grad` the output keeps its graph.
with torch.no_grad():
    out = model(torch.tensor([ids]), depth=args.depth)

# All results have the shape [batch, position]. `out.uncertainty` is the chance that the most likely next token is
# wrong; `out.depth` is the number of blocks that the token went through: easy tokens leave after the first two.
print("token          blocks  most likely next  chance that it is wrong")
for i in range(min(args.tokens, len(ids))):
    guess = out.logits[0, i].argmax().item()
    shown = repr(model.tokenizer.decode([ids[i]]))
    shown_guess = repr(model.tokenizer.decode([guess]))
    print(f"{shown:14} {out.depth[0, i].item():6}  {shown_guess:16}  {out.uncertainty[0, i].item():4.0%}")

print(f"\nmean depth: {out.depth.float().mean():.2f} of {model.config.layers} blocks")

# `out.state` is all that the model keeps of the text. Its memory lists the crystals: tokens that a learned score chose
# to keep after they have left the attention window. Each one shows the token and the text before it.
crystals = sorted(out.state.memory, key=lambda crystal: crystal.score, reverse=True)
print(f"{len(crystals)} crystals in a state of {out.state.nbytes:,} bytes, for {len(ids):,} tokens read")
for crystal in crystals[:5]:
    print(f"position {crystal.position:5}  score {crystal.score:.2f}  {model.tokenizer.decode(crystal.tokens)!r}")
