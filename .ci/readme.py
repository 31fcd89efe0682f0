"""Run the shell commands of the README as printed, in a scratch folder: python .ci/readme.py

Training is cut short by flags at the end, and the files that the commands name are made first.
"""

import gzip
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHORTER = {
    "python train.py": " --max_steps 2 --batch_size 1 --grad_accum 1 --seq_len 64 --eval_batches 1 --sample_tokens 8",
    "python -m lepton generate": " --max_new_tokens 16",
    "python -m lepton chat": f" --max_new_tokens 8 < {os.devnull}",
    "python -m lepton eval": " --max_tokens 512",
}
TEXT = "The area of a circle is pi times the square of its radius.\n" * 400


def commands(readme):
    """Return the commands of the README's shell blocks, those that take long shortened, in an order that works."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("/path/to/data", "data/mine").replace("/path/to/", "").splitlines()
    lines = [line.partition("  #")[0] for line in lines]
    # The README trains on a folder of data before it says how to make one.
    lines.sort(key=lambda line: (not line.startswith("pip "), " prepare " not in line))
    return [line + next((flags for start, flags in SHORTER.items() if line.startswith(start)), "") for line in lines]


def needs_weights(command):
    """Whether a command takes the model that comes with LEPTON."""
    return command.startswith("python -m lepton ") and " prepare " not in command and "--checkpoint" not in command


def main():
    shipped = any((ROOT / "lepton" / "weights").glob("model*.safetensors"))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in ("lepton", "train.py", "requirements.txt"):
            (work / name).symlink_to(ROOT / name)
        (work / "notes").mkdir()
        (work / "notes" / "one.md").write_text(TEXT)
        (work / "book.txt").write_text(TEXT)
        with gzip.open(work / "stories.jsonl.gz", "wt") as file:
            file.write('{"text": "Once upon a time."}\n' * 50)
        for command in commands((ROOT / "README.md").read_text(encoding="utf-8")):
            if needs_weights(command) and not shipped:
                print(f"left out, for this copy comes without weights: {command}", flush=True)
                continue
            print(f"$ {command}", flush=True)
            if subprocess.run(command, shell=True, cwd=work).returncode:
                sys.exit(f"the README's command failed: {command}")


if __name__ == "__main__":
    main()
