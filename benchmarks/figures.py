"""The figures of docs/ideas, drawn from the rows in benchmarks/results.

    python -m benchmarks.figures

writes one SVG an idea, and one that compares what text loses without each. A test compares them with what is committed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bars import Bar, bar_chart
from benchmarks.curves import Line, Panel, line_chart
from benchmarks.dots import Row, dot_chart

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "ideas"
ON_TEXT = {"thoughts": "thoughts", "memory": "working memory", "crystals": "crystals", "peek": "peek"}
"""Ideas that can change the loss: their names in runs that are without one, and in tables of what is off."""


def results(name: str) -> dict[str, Any]:
    """Return the content of a results file."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def tiny_runs() -> list[dict[str, Any]]:
    """Return the three runs of a complete TINY on the trunk before 2026-11-27, with what was measured after each."""
    return results("2026-11-26-padded-keys")["calls"]["M"]["runs"]


def trained_anew(size: str, without: str) -> list[float]:
    """Return the nats that a model trained without an idea (`dense`: without all) lost, seed by seed."""
    name = without if without == "dense" else f"no_{without}"
    return results("2026-11-26-final-h100")["without_less_complete_nats"][f"{size} {name}"]["by_seed"]


def switched_off(name: str) -> list[float]:
    """Return the nats that a trained TINY lost with an idea switched off, by its name in `lepton eval --ablate`."""
    return [run["ablation"][name][1] for run in tiny_runs()]


def mean(values: list[float]) -> float:
    """Return the mean of some values, at least one."""
    return sum(values) / len(values)


def effects() -> str:
    """Draw what text loses without each idea."""
    names = {**ON_TEXT, "dense": "all (dense)"}
    anew = {size: [Row(names[name], trained_anew(size, name)) for name in names] for size in ("micro", "tiny")}
    return dot_chart(
        "Nats per token lost without an idea; a dot is a seed",
        [
            ("MICRO trained without it: nats per token lost, five seeds", anew["micro"]),
            ("TINY trained without it: nats per token lost, three seeds", anew["tiny"]),
            ("TINY, switched off after training, three seeds", [Row(x, switched_off(x)) for x in ON_TEXT.values()]),
        ],
    )


def thoughts() -> str:
    """Draw which chains of hops rounds of thinking learn, and how that depends on what training asks."""
    short = {"loop16": "16 rounds", "deep20": "20 blocks", "loop16-sup32": "few asked", "loop16-nocurr": "no growth"}
    large = [
        Line(short[run["name"]], [(float(hops.partition("@")[0]), share) for hops, share in run["acc"].items()])
        for run in results("2026-11-27-hops-by-rounds")["runs"]
    ]
    asked = {
        "a place for an answer after each of 32 letters": "all",
        "mark and answer at every 8th token": "each 8th",
        "mark and answer at every 8th token of the second half": "8th, half",
        "mark and answer at every 4th token": "each 4th",
    }
    small = results("2026-11-28-proving-ground-small")["hops"]
    last = {label: small[setting][-1]["right_by_hops"] for setting, label in asked.items()}
    lines = [Line(label, [(i + 1.0, right / 100) for i, right in enumerate(of)]) for label, of in last.items()]
    return line_chart(
        "Share of right answers by the number of hops",
        [Panel("Laboratory: right answers by hops", large), Panel("LEPTON, small: right answers by hops", lines)],
    )


def memory() -> str:
    """Draw how recall is learnt, and what reads of a memory find by its number of heads."""
    found = results("2026-11-28-proving-ground-small")
    settings = {
        "one step, feeds at a tenth of the rate, 500 steps": "rate 0.1",
        "one step, feeds at the full rate, 500 steps": "rate 1",
        "two steps, feeds at the full rate, 1200 steps": "two steps",
    }
    lines = [
        Line(label, [(row["step"], row["right_by_windows_1_2_4_8_all"][-1]) for row in found["recall"][setting]])
        for setting, label in settings.items()
    ]
    rows = found["capacity"]["right_after_one_read_and_two"]
    right = [(heads, rows[f"({heads}, 64, 128)"]["0.05"]) for heads in (4, 8, 16)]
    reads = [Line(label, [(heads, 100 * both[i]) for heads, both in right]) for i, label in enumerate(("one", "two"))]
    return line_chart(
        "What the working memory recalls",
        [Panel("Recall: % right by training steps", lines), Panel("Arithmetic: % right by heads, reads", reads)],
    )


def depth() -> str:
    """Draw what depths below 1 cost in nats, and the time that they save."""
    added: dict[float, dict[float, list[float]]] = {0: {}, 0.3: {}}
    for run in results("2026-11-28-routes")["runs"]:
        for row in run["tables"][0]["depths"]:
            if row["rule"] in ("router", "exit"):
                added[run["into_stem"]].setdefault(row["depth"], []).append(row["change"])
    nats = [
        Line(label, [*sorted((each, mean(seeds)) for each, seeds in added[weight].items()), (1.0, 0.0)])
        for weight, label in ((0, "before"), (0.3, "now"))
    ]
    cases = results("2026-11-27-drafts-and-depth")["call 4: depth, random weights, batch 1, us of a cycle"]
    us = {(row["size"], row["what"]): row["us"] for row in cases if "size" in row}
    shares = {"all easy": 0.0, "half": 0.5, "quarter easy": 0.75, "all deep": 1.0}
    times = [
        Line(size.upper(), [(share, us[size, what] / us[size, "not routed"]) for what, share in shares.items()])
        for size in ("tiny", "medium")
    ]
    return line_chart(
        "What a depth below 1 costs and saves",
        [Panel("TINY: nats per token added, by depth", nats), Panel("Time, by depth", times)],
    )


def peek() -> str:
    """Draw what text loses without the hint."""
    rows = [Row(f"{size.upper()}, trained anew", trained_anew(size, "peek")) for size in ("micro", "tiny")]
    return dot_chart(
        "Nats per token lost without peek; a dot is a seed",
        [("Nats per token lost without peek", [*rows, Row("TINY, switched off", switched_off("peek"))])],
    )


def speculation() -> str:
    """Draw speeds with drafts and without, and how many drafts are accepted."""
    found = results("2026-11-28-generation-2")
    cases = {row["case"].removeprefix("tiny/"): row for part in ("batch_1", "larger") for row in found[part]["cases"]}
    names = {
        "1x512/plain/0": "plain, T = 0",
        "1x512/drafts/0": "4 drafts, T = 0",
        "1x512/plain/0.8": "plain, T = 0.8",
        "1x512/drafts/0.8": "4 drafts, T = 0.8",
    }
    many = {"64x512/plain/0": "plain, T = 0", "64x512/drafts/0": "4 drafts, T = 0"}

    def speeds(labels: dict[str, str]) -> list[Bar]:
        return [Bar(label, cases[name]["tokens_per_s"], "drafts" in name) for name, label in labels.items()]

    tokens = [Bar(names[name], cases[name]["tokens_a_cycle"], True, 2) for name in names if "drafts" in name]
    accepted = enumerate(cases["1x512/drafts/0"]["acceptance"], 1)
    shares = [Bar(f"draft {i}", 100 * share, True) for i, share in accepted]
    return bar_chart(
        "Generation of TINY with drafts and without, one H200, bf16",
        [
            ("Tokens per second, one text", speeds(names)),
            ("Tokens per second, 64 texts at once (median of three rounds)", speeds(many)),
            ("Tokens per model pass, one text", tokens),
            ("Drafts accepted at T = 0, % of the passes", shares),
        ],
    )


def uncertainty() -> str:
    """Draw how well the head is calibrated, and what promises were worth."""
    scores = [run["reliability"]["scores"] for run in tiny_runs()]
    heads = {"uncertainty": "uncertainty head", "max-probability": "largest probability"}

    def bars(score: str, factor: float) -> list[Bar]:
        each = {name: factor * mean([of[name][score] for of in scores]) for name in heads}
        return [Bar(heads[name], value, name == "uncertainty", 2) for name, value in each.items()]

    panels = [
        ("Calibration error, % (TINY, older trunk; mean of three seeds)", bars("ece", 100)),
        ("AUROC for finding errors (the same)", bars("auroc", 1)),
    ]
    rows = results("2026-11-28-abstain-at")["windows of as many files (b)"]["rows"]
    for row in rows:
        if "measured" in row:
            kept = [Bar("promised: at most", 100 * row["risk"], False, 1)]
            kept.append(Bar("other Python files", 100 * row["measured"], True, 1))
            kept.append(Bar("books", 100 * row["books_measured"], True, 1))
            panels.append((f"Wrong of the tokens kept at risk {row['risk']}, % (NANO)", kept))
    return bar_chart("How far the uncertainty can be trusted", panels)


FIGURES: dict[str, Callable[[], str]] = {
    draw.__name__: draw for draw in (effects, thoughts, memory, depth, peek, speculation, uncertainty)
}
"""Each figure by the name of its file."""


def main() -> None:
    """Write all figures."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
