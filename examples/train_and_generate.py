"""Train a NANO, then continue a text with it.

    python -m examples.train_and_generate --steps 100

100 steps take some minutes on a laptop. The other examples use the checkpoint that this one writes.
"""

import argparse

from lepton import Lepton
from lepton.train.settings import TrainSettings
from lepton.train.trainer import train

parser = argparse.ArgumentParser(description="Train a NANO, then continue a text with it.")
parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: 100)")
parser.add_argument("--seq_len", type=int, default=512, help="tokens of a training row (default: 512)")
parser.add_argument("--data_dir", help="data that `lepton prepare` made (default: the standard library's source)")
parser.add_argument("--checkpoint_dir", default="checkpoints", help="folder to write to (default: checkpoints)")
parser.add_argument("--prompt", default="def main():", help="text to continue (default: %(default)r)")
parser.add_argument("--tokens", type=int, default=60, help="new tokens (default: 60)")
args = parser.parse_args()

# `TrainSettings` has a field for each flag of `python train.py`. Without `data_dir` the model trains on the source of
# Python's standard library, which is on every machine.
settings = TrainSettings(
    model_size="nano",
    max_steps=args.steps,
    seq_len=args.seq_len,
    data_dir=args.data_dir,
    checkpoint_dir=args.checkpoint_dir,
    eval_batches=4,  # a quick validation: there is one before the first step and one after the last
    sample_tokens=args.tokens,  # the text that the trainer shows at the end
)
checkpoint = train(settings)

# A checkpoint holds the weights, the configuration and the tokenizer, so its path is all that is needed.
model = Lepton.from_checkpoint(checkpoint)
prompt = model.tokenizer.encode(args.prompt)

# Models take and return token ids. With a seed the same text is drawn each time.
tokens = model.generate(prompt, max_new_tokens=args.tokens, temperature=0.8, seed=1)
print(model.tokenizer.decode(tokens))
