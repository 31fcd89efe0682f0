"""The model card of the weights that LEPTON ships, from what benchmarks/shipped_weights.sh measured.

    python -m benchmarks.model_card shipped-weights --results benchmarks/results/2026-11-28-shipped-weights.json
    python -m benchmarks.model_card --results benchmarks/results/2026-11-28-shipped-weights.json  # the card again

The first reads the folder that the script wrote, keeps all its figures in the results file, and writes the card,
lepton/weights/README.md. The second makes the card from the results file alone.
"""

import argparse
import datetime
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lepton.weight_files import about
from lepton.weights import CARD, FILES, FOLDER, packaged

PLACES = {"checkpoint", "out", "data_dir", "checkpoint_dir"}
"""Keys that name files and folders of the machine, which are left out."""
SAME_TEXT = Path(__file__).parents[1] / "lepton" / "data" / "TOKENIZER.md"
"""The tokenizer was trained on the same text."""
STEPS = ("run", "train", "tune", "calibrate", "export")
"""JSON files that each run of the script writes."""

USE = """\
```
python -m lepton generate --prompt "It was late in the evening when"
python -m lepton chat
python -m lepton serve
```

In Python: `model = lepton.Lepton.from_checkpoint()`. None of this needs a GPU or a network.
"""

LIMITS = """\
- **It makes things up.** A model of this size knows the look of its texts and few of their facts. Names, numbers,
  quotations and code that it writes are often wrong. Use none of it unchecked.
- **It is no chat model.** It has learnt to continue texts, not to answer or to follow instructions. `chat` and the
  server's chat let you talk with it all the same; expect a continuation. `docs/own_data.md` says how to fine-tune it.
- It has read English, Python, and documentation of C++, PowerShell and Rust; nothing else can be expected of it.
- Its books are mostly older than a hundred years, and their views of people are of their time. It has not been taught
  to leave out what offends, and nothing filters what it writes. Do not put it in front of others unwatched.
- It may repeat passages of what it has read.
- What is promised below (chance of error, share of errors, cost) holds on text like that of the calibration. Of other
  text, and of what people do with the output, nothing is promised.
"""

HELD_OUT = """\
The held-out text is of other documents of the same sources, and for books of other authors. Of its 13-grams, none of
books and code stand in the training text as well; 2.2 % of documentation do, 2.4 % of textbooks, and 9 % of the World
Factbook, whose entries have one form.
"""

LICENCE = """\
MIT, as all of LEPTON. The texts that it was trained on keep their own licences; they are not part of the weights.
"""


def gather(folder: Path) -> dict[str, Any]:
    """Return what benchmarks/shipped_weights.sh left in `folder`, without paths of the machine.

    Raises:
        OSError: a step of the script has left no file.
    """
    first = packaged(folder)
    found: dict[str, Any] = {"date": datetime.date.today().isoformat()}
    found |= {name: read_json(folder / f"{name}.json") for name in STEPS}
    for name in ("risks", "costs"):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        found[name] = [without_places(json.loads(line)) for line in lines]
    found["eval"] = {
        name: read_json(folder / f"eval-{kind}.json") for name, kind in (("exact", "pt"), ("shipped", "safetensors"))
    }
    sources = sorted(folder.glob("source-*.json"))
    found["sources"] = {path.stem.removeprefix("source-"): read_json(path) for path in sources}
    found["model"] = about(first)
    found["files"] = files_in(folder)
    return found


def files_in(folder: Path) -> list[dict[str, Any]]:
    """Return name, size and hash of each file of the weights in `folder`."""
    return [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.glob(FILES))
    ]


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file, without paths of the machine; None for the empty file of a refused step."""
    text = path.read_text(encoding="utf-8")
    return without_places(json.loads(text)) if text else None


def without_places(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report without the names of files that it was made of."""
    return {name: value for name, value in report.items() if name not in PLACES}


def card(found: dict[str, Any]) -> str:
    """Return the model card, as Markdown, of what `gather` returns."""
    size = str(found["model"]["size"]).upper()
    parts = [
        f"# {size}, the model that comes with LEPTON\n",
        summary(found),
        USE,
        "## What to expect\n",
        LIMITS,
        "## What it was trained on\n",
        corpus(),
        HELD_OUT,
        "## Licence\n",
        LICENCE,
        "## How well it predicts\n",
        losses(found),
        "## How sure it is\n",
        sureness(found),
        "## How it was made\n",
        making(found),
    ]
    return "\n".join(parts)


def summary(found: dict[str, Any]) -> str:
    """Return the first paragraph: what the model is."""
    seen, corpus = tokens_read(found), found["run"]["corpus_tokens"]
    size = sum(file["bytes"] for file in found["files"]) / 1e6
    speed = "; ".join(
        f"{row['tokens_per_step']:.2f} at temperature {row['temperature']:g}"
        for row in found["eval"]["shipped"].get("speculation", ())
    )
    return (
        f"A language model of {found['export']['params'] / 1e6:.1f} M parameters, made on {found['date']}. It has read "
        f"{seen / 1e6:,.0f} M tokens: a corpus of\n{corpus / 1e6:,.0f} M tokens, {seen / corpus:.1f} times. Its "
        f"weights take {size:.1f} MB: matrices in int8 with a scale for each row.\n"
        + (f"Tokens per pass of the model when it drafts: {speed}.\n" if speed else "")
    )


def corpus() -> str:
    """Return the table of texts with their licences, and the attribution, which the tokenizer's own page has."""
    text = SAME_TEXT.read_text(encoding="utf-8")
    return text[text.index("| text | bytes |") :]


def tokens_read(found: dict[str, Any]) -> int:
    """Return the tokens of all steps of the training, those of repeated text included."""
    settings = found["run"]["training"]
    rows = settings["batch_size"] * settings["grad_accum"]
    return int(found["model"]["step"] * rows * settings["seq_len"])


def losses(found: dict[str, Any]) -> str:
    """Return the table of held-out losses: in all, and of each source."""
    shipped, exact = found["eval"]["shipped"], found["eval"]["exact"]
    named = [("**all**", shipped), *found["sources"].items()]
    cells = [
        (name, f"{row['tokens']:,}", f"{row['nats_per_token']:.3f}", f"{row['bits_per_byte']:.3f}")
        for name, row in named
    ]
    cost = shipped["nats_per_token"] - exact["nats_per_token"]
    return "\n".join(
        [
            "On held-out text on which nothing was chosen. A token has about four bytes.\n",
            *table(("Text", "Tokens", "Nats per token", "Bits per byte"), cells),
            f"\nBefore the rounding to int8 it was {exact['nats_per_token']:.4f} nats; rounding costs {cost:+.4f}.\n",
        ]
    )


def sureness(found: dict[str, Any]) -> str:
    """Return what is known of its uncertainty, and what is promised."""
    uncertainty = found["eval"]["shipped"]["uncertainty"]
    scores = uncertainty["scores"]["uncertainty"]
    said = (
        f"On {uncertainty['tokens']:,} tokens of that text its most likely token was wrong {uncertainty['wrong']:.1%} "
        f"of the time. The chance of error that it\nstates is off by {scores['ece']:.2%} on average (ECE), and tells "
        f"wrong tokens from right ones with an AUROC of {scores['auroc']:.3f}.\n"
    )
    risks = [(report, each) for report in found["risks"] for each in report["promises"]]
    costs = [(report, each) for report in found["costs"] for each in report["budgets"]]
    kept = [
        (
            f"`--abstain_at {each['risk']:g}`",
            f"of the tokens that are not marked at most {each['risk']:.0%} are wrong",
            "none is left" if each["measured_risk"] is None else f"{each['measured_risk']:.2%} wrong",
            f"{1 - each['kept']:.1%} marked",
        )
        for report, each in risks
        if report["written"]
    ]
    kept += [
        (
            f"`--max_cost {each['max_cost']:g}`",
            f"skipping blocks costs at most {each['max_cost']:g} nats a token",
            f"{each['measured_cost']:.4f} nats",
            f"{each['measured_share']:.1%} go deep",
        )
        for report, each in costs
        if report["written"]
    ]
    broken = [f"`--abstain_at {each['risk']:g}`" for report, each in risks if not report["written"]]
    broken += [f"`--max_cost {each['max_cost']:g}`" for report, each in costs if not report["written"]]
    parts = [said, "What is promised was calibrated on one half of the validation text and measured on the other:\n"]
    parts += [*table(("Flag", "Promise", "Measured", "Effect"), kept), ""] if kept else ["Nothing can be promised.\n"]
    if broken:
        parts.append(f"Not promised, for the other half broke it: {', '.join(broken)}.\n")
    return "\n".join(parts)


def making(found: dict[str, Any]) -> str:
    """Return how the weights were made: command, settings, hardware, files."""
    run = found["run"]
    given = ", ".join(f"{name} {value:g}" for name, value in run["training"].items() if isinstance(value, int | float))
    flags = [("tune", run["tune_flags"]), ("eval", run["eval_flags"])]
    also = "".join(f" {name} had `{words}`." for name, words in flags if words not in ("", "no"))
    also += " The drafter was not tuned." if found["tune"] is None else ""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    files = [(file["name"], f"{file['bytes']:,}", f"`{file['sha256']}`") for file in found["files"]]
    return "\n".join(
        [
            f"```\n{run['command']}\n```\n",
            f"Training took {run['seconds'] / 60:.0f} minutes on {run['hardware']} ({versions}).{also}\n",
            f"Settings of the training: {given}.\n",
            *table(("File", "Bytes", "SHA-256"), files),
            f"\nAll figures: `benchmarks/results/` of {found['date']}, shipped-weights. Made by "
            "`python -m benchmarks.model_card`.\n",
        ]
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table, a line each."""
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def main(argv: Sequence[str]) -> None:
    """Write the results file, if a folder is given, and the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="what benchmarks/shipped_weights.sh wrote")
    parser.add_argument("--results", required=True, type=Path, metavar="FILE", help="JSON file of all figures")
    parser.add_argument("--out", type=Path, default=FOLDER / CARD, metavar="FILE", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.folder is not None:
        args.results.write_text(json.dumps(gather(args.folder), indent=1) + "\n", encoding="utf-8")
    args.out.write_text(card(json.loads(args.results.read_text(encoding="utf-8"))), encoding="utf-8")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
