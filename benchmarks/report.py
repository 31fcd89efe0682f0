"""docs/report.md: what each idea gives and what it costs, in the newest figures of benchmarks/results.

    python -m benchmarks.report

writes the page and the README's table of ideas. No figure is written here: `benchmarks/claims.py` finds each in the
newest results file that has it, and the page links to the file. Rows whose figure nobody has measured say so. A test
compares what is committed with what this makes.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import claims
from benchmarks.claims import Found, joined

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "report.md", ROOT / "README.md"
MARKS = "<!-- ideas:start -->\n", "<!-- ideas:end -->"
"""What stands before and after the table of the README."""
Rows = list[tuple[str, Found]]
"""What was measured, and the figure."""
NOT_YET = Found(claims.NONE)
STEP = "training step of TINY, 64 x 512, on an H200"


def on_text(label: str, name: str, ablation: str) -> Rows:
    """Return the rows of an idea that can change the loss, by its names in runs and in ablations."""
    return [
        (f"{label}: loss without it, MICRO trained anew, 5 seeds", claims.anew("micro", name)),
        (f"{label}: loss without it, TINY trained anew, 3 seeds", claims.anew("tiny", name)),
        (f"{label}: loss without it, TINY, switched off after training, 3 seeds", claims.ablated(ablation)),
        (f"{label}: {STEP}", claims.step_ms(name)),
    ]


def whole() -> Rows:
    """Return the rows of the whole model."""
    return [
        ("held-out loss of TINY, nats per token, 3 seeds", claims.our_loss()),
        ("the same, dense model of equal parameters, 3 seeds", claims.dense_loss()),
        ("the same, nanochat d10, 114 M parameters", claims.nanochat_loss("nanochat_d10")),
        ("the same, nanochat d12, 162 M parameters", claims.nanochat_loss("nanochat_d12")),
        ("training of TINY, 64 x 512, one H100: tokens/s", claims.trained("lepton")),
        ("the same, dense model", claims.trained("dense")),
        ("training of TINY on two GPUs: times the speed of one, one micro-batch", claims.two_gpus(1)),
        ("the same, four micro-batches", claims.two_gpus(4)),
        ("training of NANO on two CPU cores, bf16: times the speed of a Llama of equal size", claims.on_cpu("bf16")),
        ("the same, fp32", claims.on_cpu("fp32")),
        ("generation of one text, TINY, one H200, bf16: tokens/s", claims.case("1x512/plain/0", "tokens_per_s")),
        ("the same, one H100: Llama of equal size in `transformers`, static cache", claims.llama()),
        ("loss that int8 weights add to a MICRO (target 0.01)", claims.rounded_nats()),
    ]


def thoughts() -> Rows:
    """Return the rows of thought tokens."""
    asked = "a place for an answer after each of 32 letters"
    return [
        *on_text("thoughts", "thoughts", "thoughts"),
        ("chains of 16 steps, test model with 16 rounds over all tokens: right", claims.chain("loop16", 16)),
        ("the same with 20 different blocks", claims.chain("deep20", 16)),
        ("16 rounds, but training asks at every 32nd position only", claims.chain("loop16-sup32", 16)),
        ("16 rounds, but training does not begin with short chains", claims.chain("loop16-nocurr", 16)),
        ("chains of 6 steps, small LEPTON with `over_tokens`: right", claims.small("hops", asked, "right_by_hops")),
        (
            "16 hops, LEPTON with 16 rounds over all tokens, 2 + 2 blocks: right (target 95%)",
            claims.task("hops", "thoughts"),
        ),
        ("the same without thoughts (target at most 40%)", claims.task_at("hops", "no_thoughts", 16)),
        ("the same with pauses in place of thoughts (target at most 40%)", claims.task_at("hops", "pauses", 16)),
        ("chains of 8 operations without thoughts (target at most 50%)", claims.task_at("chains", "no_thoughts", 8)),
        ("the same with thoughts, trained to the end", NOT_YET),
        ("loss of TINY with a thinking block over all tokens in place of a deep block", claims.over_tokens()),
    ]


def memory() -> Rows:
    """Return the rows of working memory and crystals."""
    one = "one step, feeds at {} rate, 500 steps"
    return [
        *on_text("working memory", "memory", "working memory"),
        *on_text("crystals", "crystals", "crystals"),
        ("state of a stream of TINY, bf16, whatever its length", claims.state_mb()),
        ("recall of 16 pairs, small model, feeds at the full rate: right", small_recall(one.format("the full"))),
        ("the same, feeds at a tenth of the rate", small_recall(one.format("a tenth of the"))),
        ("recall of 8 chains of two steps, small model, deep blocks read again: right", claims.two_steps("deep")),
        ("the same, both reads before the deep blocks", claims.two_steps("in place")),
        (
            "recall of 256 pairs, LEPTON with a window of 64: right (target 95%)",
            claims.task("recall, one step", "memory"),
        ),
        ("the same without a memory (target at most 5%)", claims.task("recall, one step", "window_only")),
        (
            "the same in two steps, 16 heads, deep blocks read again (target 90%)",
            claims.task("recall, two steps", "memory"),
        ),
        (
            "one needle in 64,000 tokens of prose, small model: right (target 90%)",
            claims.task_at("needle", "memory", 20),
        ),
        ("the same in 64,000 tokens of noise (target 99%)", claims.task_at("needle", "memory", 4)),
        ("bAbI, task 1, behind 16,000 tokens, small model: right (chance 17%, target 95%)", babi(49)),
        ("the same, task 15 (chance 25%, target 95%)", babi(63)),
        ("first text of turn 20 of a conversation, MICRO, one CPU thread", claims.turn_20()),
    ]


def babi(level: int) -> Found:
    """Return the share of right answers in bAbI at a level: a task, and the tokens between story and question."""
    return claims.task_at("babi", "complete", level)


def small_recall(setting: str) -> Found:
    """Return the % of right answers of a small model's recall at all distances."""
    return claims.small("recall", setting, "right_by_windows_1_2_4_8_all")


def depth() -> Rows:
    """Return the rows of depth routing."""
    stem = "`router.into_stem="
    return [
        (
            "loss added at full depth by `router.into_stem=0.3`, TINY, 2 seeds (target at most 0.005)",
            claims.routed_less_unrouted(),
        ),
        *(
            (
                f"loss added at depth {depth:g}, TINY, 2 seeds, {stem}{weight:g}`{target}",
                claims.routed(depth, rule, weight),
            )
            for weight in (0, 0.3)
            for depth, rule, target in (
                (0.75, "router", " (target 0.02)"),
                (0.5, "router", " (target 0.05)"),
                (0.25, "router", ""),
                (0, "exit", ""),
            )
        ),
        *(
            (f"the same at depth {depth:g}, if the last block takes all tokens, one seed", claims.last_block(depth))
            for depth in (0.75, 0.5)
        ),
        (f"the same at depth 0.5, {stem}0.3`, if chance chooses the tokens", claims.routed(0.5, "lot", 0.3)),
        ("the same if the tokens that gain most are known", claims.routed(0.5, "oracle", 0.3)),
        ("time of a token at depth 0.5, TINY, random weights, H100; 1 is no router", claims.time_at_half("tiny")),
        ("the same, MEDIUM", claims.time_at_half("medium")),
        (STEP, claims.step_ms("router")),
        *(
            (f"loss added at depth {depth:g}, MICRO, {stem}0.3`", claims.shallow("change", depth, "router", 0.3))
            for depth in (0.75, 0.5)
        ),
    ]


def peek() -> Rows:
    """Return the rows of peek."""
    planned = claims.task("path-star", "complete")
    return [*on_text("peek", "peek", "peek"), ("path-star, 5 arms: first step right (chance 20%, target 95%)", planned)]


def speculation() -> Rows:
    """Return the rows of speculative decoding."""
    rows: Rows = []
    for heat in ("0", "0.8"):
        of = f"one text, temperature {heat}"
        rows += [
            (f"{of}: tokens/s without drafts", claims.case(f"1x512/plain/{heat}", "tokens_per_s")),
            (f"{of}: tokens/s with 4 drafts", claims.case(f"1x512/drafts/{heat}", "tokens_per_s")),
            (f"{of}: times the speed without drafts (target 1.5)", claims.ratio("tokens_per_s", f"1x512/{{}}/{heat}")),
            (f"{of}: tokens per pass", claims.case(f"1x512/drafts/{heat}", "tokens_a_cycle", "{:.2f}")),
        ]
    rule = "tokens per pass, NANO, temperature 0.8 without `top_p`: "
    return [
        *rows,
        ("one text, temperature 0: times the length of a pass without drafts", claims.ratio("cycle_ms", "1x512/{}/0")),
        ("one text, temperature 0: acceptance rates of drafts 1 to 4", claims.accepted()),
        (
            "64 texts, temperature 0: times the speed without drafts",
            claims.ratio("tokens_per_s", "64x512/{}/0", "larger"),
        ),
        *(
            (f"{texts:,} texts, TINY, H200, without drafts: tokens/s{target}", claims.many(texts, "tokens_per_s"))
            for texts, target in (
                (64, " (target on an H100: 60,000)"),
                (256, " (target on an H100: 120,000)"),
                (1024, " (target on an H100: 200,000)"),
            )
        ),
        (f"{rule}LEPTON's rule", claims.rule("shared noise")),
        (f"{rule}rejection sampling", claims.rule("token by token")),
        (f"{rule}block verification", claims.rule("by blocks")),
        ("tokens per pass before and after `lepton tune`, NANO, temperature 0", claims.tuned(0)),
        ("the same, temperature 1", claims.tuned(1)),
        (STEP, claims.step_ms("drafts")),
        *(
            (
                f"{what}, TINY, {'`drafter.distil`' if name == 'distil' else 'the larger drafter'}, temperature {heat}",
                given,
            )
            for name in ("distil", "distil, reads_stem, vocab 8192")
            for what, heat, given in (
                ("tokens per pass before and after own text", 0, claims.drafted(name, 0)),
                ("tokens per pass before and after own text", 1, claims.drafted(name, 1)),
                ("times the speed without drafts", 0, claims.faster(name, "0")),
                ("times the speed without drafts", 0.8, claims.faster(name, "0.8")),
            )
        ),
        *(
            (f"tokens per pass, TINY, the larger drafter {what}, temperature {heat} (target 2.4)", given)
            for name, what in (
                ("no_distil", "without `distil`"),
                ("stride_1", "that learns from every token"),
                ("width_512", "of width 512"),
                ("width_1024", "of width 1,024"),
            )
            for heat, given in ((heat, claims.drafter(name, heat)) for heat in (0, 1))
        ),
        *(
            (
                f"what 4 drafts read, of a verification's bytes, width {width:,} (target 10%)",
                claims.drafter_bytes(width),
            )
            for width in (256, 512, 1024)
        ),
    ]


def uncertainty() -> Rows:
    """Return the rows of uncertainty."""
    unknown = "AUROC for what a small model does not know, made-up world: "
    return [
        ("calibration error, TINY, 3 seeds: uncertainty head", claims.score("uncertainty", "ece", "{:.2%}")),
        ("the same, one minus the largest probability", claims.score("max-probability", "ece", "{:.2%}")),
        ("AUROC for finding errors, TINY, 3 seeds: uncertainty head", claims.score("uncertainty", "auroc", "{:.3f}")),
        ("the same, one minus the largest probability", claims.score("max-probability", "auroc", "{:.3f}")),
        ("guarantees broken at risks 0.5 and 0.4, NANO, text of the same kind", claims.broken("broken")),
        ("the same thresholds on books", claims.broken("books_broken")),
        ("windows of 192 tokens that a guarantee needs, NANO, risk 0.5", claims.windows(0.5)),
        ("the same, risk 0.1", claims.windows(0.1)),
        (f"{unknown}`uncertainty.pairs`", claims.known("head of pairs, training")),
        (f"{unknown}largest probability", claims.known("max-probability")),
        (STEP, claims.step_ms("uncertainty")),
    ]


SECTIONS: dict[str, Callable[[], Rows]] = {
    "The whole model": whole,
    "Thought tokens": thoughts,
    "Memory crystallization": memory,
    "Sparse depth routing": depth,
    "Future peek": peek,
    "Speculative decoding": speculation,
    "Uncertainty": uncertainty,
}
WHAT = {
    "thoughts": ("Thought tokens", "latent tokens think for `think=N` rounds before the text goes on"),
    "memory": ("Memory crystallization", "endless streams in constant memory; list, clear, save, reuse it"),
    "depth": ("Sparse depth routing", "easy tokens stop after 2 blocks; `depth=0..1` is the share that may go on"),
    "peek": ("Future peek", "the model predicts a hint about the next tokens and uses it"),
    "speculation": ("Speculative decoding", "4 tokens are drafted, then verified in one pass; the text stays the same"),
    "uncertainty": ("Uncertainty", "each token's chance that the best guess is wrong; `abstain_at=` marks risky ones"),
}  # fmt: skip
"""Name of each idea, and what it does, by its page in docs/ideas."""


def gains() -> dict[str, tuple[Found, Found]]:
    """Return what each idea gives and what it costs, by its page in docs/ideas."""

    def lower(name: str) -> tuple[Found, Found]:
        return claims.anew("micro", name), claims.anew("tiny", name)

    def ms(*names: str) -> Found:
        return joined("{} of a training step", claims.step_ms(*names))

    text = "gain on text {} (MICRO), {} (TINY)"
    drafted = claims.case("1x512/drafts/0", "tokens_a_cycle", "{:.2f}"), claims.ratio("tokens_per_s", "1x512/{}/0")
    trusted = claims.score("uncertainty", "ece", "{:.2%}"), claims.broken("broken")
    return {
        "thoughts": (
            joined(
                f"{text}; small model: {{}} right in 16 hops, {{}} without",
                *lower("thoughts"),
                claims.task_at("hops", "thoughts", 16, "{:.0%}"),
                claims.task_at("hops", "no_thoughts", 16, "{:.0%}"),
            ),
            ms("thoughts"),
        ),
        "memory": (
            joined(
                f"{text}; small model: {{}} of 256 pairs found, {{}} of 128 in two steps; a stream of TINY takes {{}}",
                *lower("memory"),
                claims.task("recall, one step", "memory", "{right:.0%}"),
                claims.task("recall, two steps", "memory", "{right:.0%}"),
                claims.state_mb(),
            ),
            ms("memory", "crystals"),
        ),
        "depth": (
            joined("{} of the time at half depth (MEDIUM)", claims.time_at_half("medium")),
            joined("loss {} at half depth (TINY)", claims.routed(0.5, "router", 0.3)),
        ),
        "peek": (joined(text, *lower("peek")), ms("peek")),
        "speculation": (
            joined("at temperature 0, one text: {} tokens per pass, {} times as fast", *drafted),
            ms("drafts"),
        ),
        "uncertainty": (joined("calibration error {}; {} risk guarantees broken", *trusted), ms("uncertainty")),
    }


def table_of_ideas(docs: str, results: str | None) -> str:
    """Return the table of ideas; `docs` and `results` are the ways to these folders (None: without results files)."""
    more = ("", "") if results is None else (" Results |", "---|")
    lines = [f"| Idea | What it does | What it gives | What it costs |{more[0]}", f"|---|---|---|---|{more[1]}"]
    for page, (gives, costs) in gains().items():
        name, does = WHAT[page]
        line = f"| [{name}]({docs}ideas/{page}.md) | {does} | {gives} | {costs} |"
        files = dict.fromkeys([*gives.files, *costs.files])
        lines.append(line if results is None else f"{line} {links(files, results)} |")
    return "\n".join(lines) + "\n"


def links(files: Iterable[str], results: str) -> str:
    """Return links to results files, each by its name without the year."""
    return ", ".join(f"[{file[5:]}]({results}{file}.json)" for file in files)


INTRODUCTION = """\
# Report

After this page you know what each of the six ideas gives and what it costs. All figures are drawn from the newest
files in `benchmarks/results/` by `python -m benchmarks.report`; none is typed. "Not measured" means that there is no
file. Conclusions and comparisons are in the [results](results.md); how each figure was measured is in the
[log](log.md); the terms are in the [glossary](glossary.md).

- Losses are in nats per token, on books, textbooks, documentation and code, after 49 million tokens of training.
- *Gain on text*, *loss without it*: how much higher the loss is when an idea is left out, with its standard error.
  Positive means that the idea helps.
- † marks models of the trunk before 2026-11-27 (TINY with 12 layers).
- A *test model* or *small model* is trained on one task only, and is smaller than NANO.

## The six ideas
"""


def page() -> str:
    """Return docs/report.md."""
    parts = [INTRODUCTION, table_of_ideas("", "../benchmarks/results/")]
    for title, rows in SECTIONS.items():
        lines = [f"## {title}\n", "| Measured | Figure | File |", "|---|--:|---|"]
        for what, found in rows():
            lines.append(f"| {what} | {found} | {links(found.files, '../benchmarks/results/') or '-'} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def readme() -> str:
    """Return the README with the present table of ideas."""
    before, rest = README.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    return before + MARKS[0] + table_of_ideas("docs/", None) + MARKS[1] + after


def main() -> None:
    """Write the page and the README's table."""
    PAGE.write_text(page(), encoding="utf-8", newline="\n")
    README.write_text(readme(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
