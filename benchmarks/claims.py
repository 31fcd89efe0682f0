"""Figures of the results files: each function finds one in the newest file that has it."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

RESULTS = Path(__file__).parent / "results"
NONE = "not measured"
BEFORE = "2026-11-27"
"""Date of the present trunk. Figures of models before it are marked."""


@dataclass(frozen=True)
class Found:
    """A figure as text, and the results files that it is from; no files: it has not been measured."""

    text: str
    files: tuple[str, ...] = ()
    old: bool = False

    def __str__(self) -> str:
        return f"{self.text}†" if self.old else self.text


def newest(name: str, find: Callable[[Any], str], *, old: bool = False, folder: Path = RESULTS) -> Found:
    """Return what `find` gives for the newest file called DATE-`name`.json or DATE-`name`-N.json.

    A file in which it is not found (LookupError) is passed over. `old` says that a model of the trunk before was
    measured; from files that are older than the present trunk it always was.
    """
    pattern = re.compile(rf"(\d{{4}}-\d\d-\d\d)-{re.escape(name)}(?:-(\d+))?")
    matches = [match for path in folder.glob("*.json") if (match := pattern.fullmatch(path.stem))]
    for match in sorted(matches, key=lambda match: (match[1], int(match[2] or 1)), reverse=True):
        content = json.loads((folder / f"{match[0]}.json").read_text(encoding="utf-8"))
        try:
            return Found(find(content), (match[0],), old or match[1] < BEFORE)
        except LookupError:
            continue
    return Found(NONE)


def joined(text: str, *parts: Found) -> Found:
    """Return `text` with the parts' figures in its braces, each with its mark, or that one has not been measured."""
    if not all(part.files for part in parts):
        return Found(NONE)
    files = dict.fromkeys(file for part in parts for file in part.files)
    return Found(text.format(*parts), tuple(files))


def the(rows: Iterable[Any], **fields: Any) -> Any:
    """Return the last of some rows that has these fields, or raise LookupError."""
    found = [row for row in rows if all(row.get(name) == value for name, value in fields.items())]
    return found[-1]


def anew(size: str, idea: str) -> Found:
    """Return the nats per token that a model trained without an idea lost, with its standard error."""

    def find(content: Any) -> str:
        row = content["without_less_complete_nats"][f"{size} no_{idea}"]
        return f"{row['mean']:+.3f} ± {row['standard_error']:.3f}"

    return newest("final-h100", find)


def ablated(name: str) -> Found:
    """Return the nats per token that a trained TINY lost with something switched off, mean of the seeds."""

    def find(content: Any) -> str:
        return f"{fmean(run['ablation'][name][1] for run in content['calls']['M']['runs']):+.3f}"

    return newest("padded-keys", find)


def step_ms(*ideas: str) -> Found:
    """Return the milliseconds of a training step of TINY that some ideas take together, and those of the step.

    An idea's share is the step of the complete model that was measured last before the one without it, less that one.
    """

    def find(content: Any) -> str:
        saved, complete = 0.0, {}
        for idea in ideas:
            less = the(content["rows"], case=f"tiny/no_{idea}/64x512")
            complete = the(content["rows"][: content["rows"].index(less)], case="tiny/complete/64x512")
            saved += complete["step_ms"] - less["step_ms"]
        return f"{saved:.1f} of {complete['step_ms']:.1f} ms"

    return newest("train-speed", find)


def our_loss() -> Found:
    """Return the loss of TINY in nats per token, mean of three seeds."""

    def find(content: Any) -> str:
        names = ("wide37", "complete_s1", "complete_s2")
        return f"{fmean(the(content['runs'], run=name)['val_loss'] for name in names):.3f}"

    return newest("wide-blocks", find)


def dense_loss() -> Found:
    """Return the same for the dense model of equal parameters, whose seeds are of two files."""
    seeds = [
        newest("nanochat", lambda content: str(runner(content, "dense")["loss"])),
        newest("nanochat", lambda content: str(the(content["ideas"], variant="dense")["val_loss"])),
        newest("wide-blocks", lambda content: str(the(content["runs"], run="dense_s2")["val_loss"])),
    ]
    if not all(each.files for each in seeds):
        return Found(NONE)
    return joined(f"{fmean(float(each.text) for each in seeds):.3f}", *seeds)


def nanochat_loss(name: str) -> Found:
    """Return the loss of a model of nanochat in nats per token."""
    return newest("nanochat", lambda content: f"{runner(content, name)['loss']:.3f}")


def trained(name: str) -> Found:
    """Return the tokens per second of training TINY or what stands beside it, on one H100."""
    return newest("nanochat", lambda content: f"{runner(content, name)['tokens_per_s']:,}")


def runner(content: Any, name: str) -> Any:
    """Return the row of a model in a comparison of loss and time."""
    return the([row for part in content["time_to_loss"] for row in part["runners"]], name=name)


def over_tokens() -> Found:
    """Return the loss of TINY with a thinking block over all tokens in place of a deep block."""
    return newest("wide-blocks", lambda content: f"{the(content['runs'], run='ot7')['val_loss']:.3f}")


def two_gpus(micro: int) -> Found:
    """Return the speed of training TINY on two GPUs as a multiple of one, with so many micro-batches a step."""

    def find(content: Any) -> str:
        rows = [row for row in content["rows"] if row["call"] == 2 and "note" not in row]
        one, two = (the(rows, case="tiny/64x512", micro=micro, processes=n)["tokens_per_s"] for n in (1, 2))
        return f"{two / one:.2f}"

    return newest("scaling", find)


def on_cpu(dtype: str) -> Found:
    """Return the speed of training NANO on a CPU as a multiple of a Llama's."""
    return newest(
        "train-speed-cpu", lambda content: f"{the(content[dtype]['cases'], case='nano/complete/4x512')['ratio']:.2f}"
    )


def llama() -> Found:
    """Return the tokens per second of the Llama of `transformers` of TINY's size."""

    def find(content: Any) -> str:
        return f"{the(content['call 5: the peer']['cases'], case='tiny/1x512/static/0')['tokens_per_s']:,.0f}"

    return newest("drafts-and-depth", find)


def chain(run: str, hops: int) -> Found:
    """Return the share of right answers after so many steps of a test model on an H100."""
    return newest("hops-by-rounds", lambda content: f"{the(content['runs'], name=run)['acc'][f'{hops}@16']:.0%}")


def small(task: str, setting: str, column: str) -> Found:
    """Return the % of right answers of a small model on a CPU, in its last column."""
    return newest("proving-ground-small", lambda content: f"{content[task][setting][-1][column][-1]}%")


def task(name: str, model: str, form: str = "{right:.1%}") -> Found:
    """Return the share of right answers of a model in a task of the proving ground, on a GPU."""
    return newest("tasks", lambda content: form.format(**the(content["found"][name]["rows_of_table"], name=model)))


def task_at(name: str, model: str, level: int, form: str = "{:.1%}") -> Found:
    """Return the share of right answers of a model at one level of a task of the proving ground, on a GPU."""

    def find(content: Any) -> str:
        row = the(content["found"][name]["rows_of_table"], name=model)
        return form.format(row["right_at_level"][str(level)])

    return newest("tasks", find)


def two_steps(reads: str) -> Found:
    """Return the % of right answers of a small model's two-step recall, by where its second read is."""

    def find(content: Any) -> str:
        return f"{the(content['runs'], reads=reads, heads=4)['right_by_windows_1_2_4_8_all'][-1]}%"

    return newest("two-steps-small", find)


def shallow(key: str, depth: float, rule: str, into_stem: float, served: float = 0) -> Found:
    """Return a figure of a MICRO whose exit's loss trains the stem, at a depth under a rule."""

    def find(content: Any) -> str:
        run = the(content["runs"], into_stem=into_stem, served=served)
        return f"{the(run['depths'], depth=depth, rule=rule)[key]:+.3f}"

    return newest("depth", find)


def routed(depth: float, rule: str, into_stem: float) -> Found:
    """Return the nats that a TINY loses at a depth under a rule, mean of the seeds."""

    def find(content: Any) -> str:
        runs = [run for run in content["runs"] if run["into_stem"] == into_stem]
        return f"{fmean(the(run['tables'][0]['depths'], depth=depth, rule=rule)['change'] for run in runs):+.3f}"

    return newest("routes", find)


def last_block(depth: float) -> Found:
    """Return the nats that a TINY loses at a depth whose last block takes all tokens."""
    return newest(
        "last-block-tiny", lambda content: f"{the(content['depths'], depth=depth, rule='router')['change']:+.3f}"
    )


def routed_less_unrouted() -> Found:
    """Return the nats at full depth that a stem which learns for the exit adds, with the error of the seeds' mean."""

    def find(content: Any) -> str:
        seeds = sorted({run["seed"] for run in content["runs"]})
        with_, without = (
            [the(content["runs"], seed=seed, into_stem=weight)["tables"][0]["loss"] for seed in seeds]
            for weight in (0.3, 0)
        )
        more = [one - other for one, other in zip(with_, without, strict=True)]
        return f"{fmean(more):+.3f} ± {stdev(more) / len(more) ** 0.5:.3f}"

    return newest("routes", find)


def drafter(name: str, temperature: int) -> Found:
    """Return the tokens per pass of a TINY whose drafter has not learnt own text."""

    def find(content: Any) -> str:
        return f"{content['training'][name]['speculation'][f'T={temperature}']['tokens_per_step']:.2f}"

    return newest("drafters", find)


def drafter_bytes(width: int) -> Found:
    """Return the bytes that 4 drafts read as a share of those of a verification, for a width of the drafter."""
    return newest("drafters", lambda content: f"{the(content['bytes']['rows'], width=width, vocab=8192)['share']:.0%}")


def many(texts: int, key: str, way: str = "plain", form: str = "{:,.0f}") -> Found:
    """Return a figure of decoding so many texts at once, for a TINY on an H200."""

    def find(content: Any) -> str:
        cases = [row for call in content["calls"] for row in call["cases"]]
        return form.format(the(cases, case=f"tiny/{texts}x512/{way}/0")[key])

    return newest("generate-many", find)


def drafted(drafter: str, temperature: int) -> Found:
    """Return the tokens per pass of a TINY before it learnt its own text and after."""

    def find(content: Any) -> str:
        run = content["training"][drafter]
        before, after = (run[f"speculation{when}"][f"T={temperature}"]["tokens_per_step"] for when in ("_before", ""))
        return f"{before:.2f} -> {after:.2f}"

    return newest("drafts", find)


def faster(drafter: str, temperature: str) -> Found:
    """Return the speed with drafts of a TINY that learnt its own text, as a multiple of that without."""

    def find(content: Any) -> str:
        return (
            f"{the(content['generation'][drafter]['cases'], case=f'tiny/1x512/drafts/{temperature}')['vs_plain']:.2f}"
        )

    return newest("drafts", find)


def rounded_nats() -> Found:
    """Return what int8 adds to the loss of a MICRO."""

    def find(content: Any) -> str:
        whole, rounded = (content["eval"][name]["nats_per_token"] for name in ("fp32", "int8"))
        return f"{rounded - whole:+.4f}"

    return newest("micro-int8", find)


def state_mb() -> Found:
    """Return the size of the state of a stream of TINY in bf16."""
    return newest("generation", lambda content: f"{content['batch_1']['cases'][0]['state_bytes'] / 1e6:.1f} MB")


def turn_20() -> Found:
    """Return the time to the first text of a conversation's 20th turn, with its state kept and without."""

    def find(content: Any) -> str:
        turn = content["turns"][19]
        return f"{1000 * turn['first_kept']:.0f} ms; all messages read again: {1000 * turn['first_whole']:,.0f} ms"

    return newest("serve-turns-cpu", find)


def time_at_half(size: str) -> Found:
    """Return the time of a token at depth 0.5 as a share of that of full depth."""

    def find(content: Any) -> str:
        rows = content["call 4: depth, random weights, batch 1, us of a cycle"]
        half, whole = (the(rows, size=size, what=what)["us"] for what in ("half", "not routed"))
        return f"{half / whole:.2f}"

    return newest("drafts-and-depth", find, old=True)


def case(name: str, key: str, form: str = "{:,.0f}") -> Found:
    """Return a figure of a case of generation of one text, for TINY in bf16."""
    return newest("generation", lambda content: form.format(the(content["batch_1"]["cases"], case=f"tiny/{name}")[key]))


def ratio(key: str, name: str, part: str = "batch_1") -> Found:
    """Return a figure with drafts as a multiple of that without; `name` has braces for the two ways."""

    def find(content: Any) -> str:
        cases = content[part]["cases"]
        drafts, plain = (the(cases, case=f"tiny/{name.format(way)}")[key] for way in ("drafts", "plain"))
        return f"{drafts / plain:.2f}"

    return newest("generation", find)


def accepted() -> Found:
    """Return the acceptance rates of the four drafts at temperature 0."""

    def find(content: Any) -> str:
        rates = the(content["batch_1"]["cases"], case="tiny/1x512/drafts/0")["acceptance"]
        return ", ".join(f"{rate:.0%}" for rate in rates)

    return newest("generation", find)


def rule(name: str) -> Found:
    """Return the tokens per pass of an acceptance rule at temperature 0.8, without `top_p`."""

    def find(content: Any) -> str:
        return f"{the(content['result']['rows'], temperature=0.8, top_p=1.0)['tokens_per_cycle'][name]:.2f}"

    return newest("acceptance-rules", find)


def tuned(temperature: int) -> Found:
    """Return the tokens per pass before `lepton tune` and after."""

    def find(content: Any) -> str:
        found = the(content["rows"], run="command")["tokens_per_pass"]
        before, after = (found[when][f"temperature {temperature}"] for when in ("before", "after"))
        return f"{before:.2f} -> {after:.2f}"

    return newest("own-text-cpu", find)


def score(head: str, name: str, form: str) -> Found:
    """Return a score of a trained TINY's uncertainty, mean of three seeds."""

    def find(content: Any) -> str:
        runs = content["calls"]["M"]["runs"]
        return form.format(fmean(run["reliability"]["scores"][head][name] for run in runs))

    return newest("padded-keys", find)


def broken(key: str) -> Found:
    """Return how many of the guarantees at risks 0.5 and 0.4 were broken, in 100 splits each."""

    def find(content: Any) -> str:
        rows = content["windows of as many files (b)"]["rows"]
        return f"{sum(the(rows, risk=risk)[key] for risk in (0.5, 0.4))} of 200"

    return newest("abstain-at", find)


def windows(risk: float) -> Found:
    """Return how many windows of text a guarantee needs, mean of the estimates."""

    def find(content: Any) -> str:
        return f"{fmean(the(content['windows of as many files (b)']['rows'], risk=risk)['windows_wanted']):,.0f}"

    return newest("abstain-at", find)


def known(head: str) -> Found:
    """Return how well a score tells what a model knows in the made-up world, as AUROC."""
    return newest("knowledge-cpu", lambda content: f"{the(content['runs'], run='G')['table'][head]['auroc_known']:.2f}")
