"""Save what a model has read, and use it in another process.

python -m examples.remember --checkpoint checkpoints/final.pt --read README.md  # reads, then writes two files
python -m examples.remember --checkpoint checkpoints/final.pt                   # goes on from them
"""

import argparse
from pathlib import Path

import torch

from lepton import Lepton

parser = argparse.ArgumentParser(description="Save what a model has read, and use it in another process.")
parser.add_argument("--checkpoint", metavar="FILE", help="(default: the model that comes with LEPTON)")
parser.add_argument("--read", metavar="FILE", help="text file to read and save; without it, go on from what was saved")
parser.add_argument("--folder", default=".", help="folder of the two files (default: this one)")
parser.add_argument("--prompt", default="The model", help="beginning of the new texts")
parser.add_argument("--tokens", type=int, default=30, help="new tokens of a text (default: 30)")
args = parser.parse_args()

model = Lepton.from_checkpoint(args.checkpoint)
encode, decode = model.tokenizer.encode, model.tokenizer.decode
state_file, memory_file = Path(args.folder, "state.safetensors"), Path(args.folder, "memory.safetensors")
if not args.read and not state_file.exists():
    parser.error(f"there is no {state_file} yet: run it with --read FILE first")

if args.read:
    # Each pass takes a chunk and the state before it, and returns the state after it. Any text fits: the state has the
    # same size after ten tokens and after a million.
    ids = torch.tensor([encode(Path(args.read).read_text(encoding="utf-8"))])
    state = model.new_state(1)
    with torch.no_grad():
        for chunk in ids.split(512, dim=1):
            state = model(chunk, state).state
    state.save(state_file)  # all of it: the text goes on as if the process had never ended
    state.memory.save(memory_file)  # working memory and crystals alone, for other texts
    print(f"read {ids.shape[1]:,} tokens into a state of {state.nbytes:,} bytes")
else:
    prompt = encode(args.prompt)
    options = {"max_new_tokens": args.tokens, "temperature": 0}  # greedy: the most likely token each time

    # A stream yields tokens as soon as they are known, and counts what speculative decoding saved.
    stream = model.generate_stream(prompt, **options, state=model.load_state(state_file))
    print("the same text goes on:", repr(decode(list(stream))))
    stats = stream.stats
    print(f"{stats.new_tokens} tokens in {stats.forward_calls} passes through the model")
    print("drafts accepted, by position:", " ".join(f"{share:.0%}" for share in stats.acceptance))

    # A new text begins at position 0. A memory brings along what the old text left in it. (A model with little training
    # makes little of it and may write the same twice.)
    for name, memory in (("without memory", None), ("with memory", memory_file)):
        tokens = model.generate(prompt, **options, memory=memory)
        print(f"a new text {name}:", repr(decode(tokens[len(prompt) :])))
