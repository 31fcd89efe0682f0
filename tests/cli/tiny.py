"""A tiny trained-looking checkpoint and a small tokenizer, for the commands that need one."""

import contextlib
import io
import json
import sys

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from lepton import checkpoint
from lepton.api import Lepton
from lepton.cli.main import main
from lepton.config import LeptonConfig
from lepton.data.tokenizer import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. Ein süßer Käse, and 東京 too.\n" * 3


def small_bpe(vocab_size=300):
    """A byte-level BPE in the public form, as the `tokenizers` library writes it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|pad|>", "<|unk|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    return backend


def tiny_model():
    """A small model with random weights everywhere, so that its output depends on its input."""
    torch.manual_seed(1)
    model = Lepton(
        LeptonConfig.from_dict(
            {
                "width": 32,
                "layers": 3,
                "heads": 2,
                "kv_heads": 1,
                "head_dim": 16,
                "ffn": 48,
                "window": 16,
                "vocab_size": 320,
                "segment": 8,
                "thoughts": 2,
                "thought_ffn": 32,
                "memory_heads": 2,
                "key_dim": 8,
                "value_dim": 8,
                "slots": 5,
                "crystals": 2,
                "hint": 8,
                "peek": 4,
                "exit_width": 16,
                "capacity_window": 8,
                "draft_width": 16,
                "draft_vocab": 200,
            }
        )
    )
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    return model


def save_tiny(path, **changes):
    """Write a checkpoint of `tiny_model` to `path`; return the model and its tokenizer."""
    model, tokenizer = tiny_model(), Tokenizer.from_json(small_bpe().to_str())
    payload = {
        "model": model.state_dict(),
        "config": model.config.to_dict(),
        "size": None,
        "tokenizer": tokenizer.to_json(),
        "step": 7,
    }
    checkpoint.save(path, payload | changes)
    return model.eval(), tokenizer


def run(*words, stdin=b"", screen=io.StringIO):
    """Run the command line in this process; return its exit code, stdout and stderr, both made by `screen`."""
    out, err = screen(), screen()
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(word) for word in words])
    finally:
        sys.stdin = before
    return code, out.getvalue(), err.getvalue()


def run_json(*words):
    code, out, err = run(*words, "--json")
    assert code == 0, err
    return json.loads(out)


def command_of(path):
    """Run in fp32, as the comparisons do, also where the hardware has bf16."""
    return "generate", "--checkpoint", path, "--dtype", "fp32"


def expected(saved, prompt, **options):
    _, model, tokenizer = saved
    ids = tokenizer.encode(prompt)
    return tokenizer.decode(model.generate(ids, **options)[len(ids) :])
