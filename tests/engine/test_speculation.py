"""The number of drafts, on devices and texts that are only numbers: what the choices cost against the best ones."""

import json
import math
import random
from collections import deque
from functools import lru_cache

import pytest

from lepton.engine.speculation import BOUND, CREDIT, PASSES, ROWS, Cost, Gain, Speculation, bucket_of

CHOICES = (0, 2, 4)


@lru_cache
def acceptance(gain):
    """The chance of a draft for which four drafts give `gain` tokens a pass."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**i for i in range(5)) < gain else (low, middle)
    return low


def tokens_of(stream, chance, drafts):
    """The tokens of a row in a pass: each draft is accepted by chance, up to the first that is not."""
    count = 1
    while count <= drafts and stream.random() < chance:
        count += 1
    return count


class Decoding:
    """Decodes with what a `Speculation` chooses; it learns of each pass one pass late.

    A plain pass takes 1 second and one of four drafts `ratio` seconds, give or take `noise`; one in a hundred takes 20
    times as long. The first of each choice takes 100 times as long. Times are counted without these accidents.
    """

    def __init__(self, choices=CHOICES, *, seed=0, noise=0.05):
        self.speculation, self.choices = Speculation(choices), choices
        self.stream, self.noise = random.Random(seed), noise
        self.unread, self.known = deque(), set()
        self.chosen, self.time, self.plain_time, self.best_time = [], 0.0, 0.0, 0.0

    def run(self, passes, *, rows, ratio, gain):
        """`ratio` and `gain` (tokens that four drafts give a row in a pass) are numbers or functions of the pass."""
        for i in range(passes):
            ratio_now, gain_now = (each(i) if callable(each) else each for each in (ratio, gain))
            chance, bucket = acceptance(round(gain_now, 3)), bucket_of(rows)
            drafts = self.speculation.choose(bucket)
            seconds = {choice: 1 + (ratio_now - 1) * choice / 4 for choice in self.choices}
            tokens = sum(tokens_of(self.stream, chance, drafts) for _ in range(rows))
            each = {choice: seconds[choice] / sum(chance**j for j in range(choice + 1)) for choice in self.choices}
            self.chosen.append(drafts)
            self.time += seconds[drafts]
            self.plain_time += tokens / rows
            self.best_time += min(each.values()) * tokens / rows
            measured = seconds[drafts] * max(0.5, self.stream.gauss(1, self.noise))
            if (bucket, drafts) not in self.known:
                measured *= 100
            elif self.stream.random() < 0.01:
                measured *= 20
            self.known.add((bucket, drafts))
            self.unread.append((bucket, drafts, measured, tokens, rows))
            if len(self.unread) > 1:
                self.speculation.record(*self.unread.popleft())
        return self

    @property
    def lost(self):
        """Share of time lost against plain decoding; negative if it won."""
        return self.time / self.plain_time - 1

    @property
    def missed(self):
        """Share of time lost against the best choice at each moment."""
        return self.time / self.best_time - 1


@pytest.mark.parametrize("rows", [1, 6, 64])
@pytest.mark.parametrize(("ratio", "gain"), [(1.5, 1.0), (1.5, 1.2), (1.05, 1.0), (3, 1.8), (5, 2)])
def test_where_drafting_does_not_pay_it_costs_little(rows, ratio, gain):
    run = Decoding(seed=rows).run(1500, rows=rows, ratio=ratio, gain=gain)  # its first passes are no part of what lasts
    early = run.time, run.plain_time
    passes = 12_000 if rows < 64 else 1500
    run.run(passes, rows=rows, ratio=ratio, gain=gain)
    assert (run.time - early[0]) / (run.plain_time - early[1]) < 1.02
    assert early[0] - early[1] < BOUND * early[0] + CREDIT + 4 * ratio
    drafted = [drafts > 0 for drafts in run.chosen[-passes:]]
    assert any(drafted), "a text may become easier: drafting is tried again"


@pytest.mark.parametrize("rows", [1, 6, 64])
@pytest.mark.parametrize(("ratio", "gain"), [(1.2, 1.8), (1.5, 1.8), (1.5, 2.8), (3, 4.5)])
def test_where_drafting_pays_it_takes_nearly_the_best(rows, ratio, gain):
    run = Decoding(seed=rows).run(4000 if rows < 64 else 800, rows=rows, ratio=ratio, gain=gain)
    assert run.missed < 0.04


@pytest.mark.parametrize("rows", [1, 16])
def test_the_time_lost_holds_what_was_compiled(rows):
    """Two choices that were compiled for nothing, at a hundred passes each, and all later probes."""
    run = Decoding(seed=1).run(20_000, rows=rows, ratio=1.5, gain=1.1)
    compiled = 100 * (1.25 + 1.5)
    assert (run.time + compiled) / run.plain_time < 1.03


@pytest.mark.parametrize("rows", [1, 2, 16, 256])
@pytest.mark.parametrize("choices", [(0, 4), (0, 2, 4)])
def test_drafting_that_pays_is_found_within_a_few_passes(rows, choices):
    found = []
    for seed in range(20 if rows < 256 else 3):
        run = Decoding(choices, seed=seed).run(80, rows=rows, ratio=1.2, gain=2.4)
        found.append(sum(drafts == 0 for drafts in run.chosen))
        assert run.chosen[0] == 0, "plain decoding is measured first"
    assert sorted(found)[len(found) // 2] <= 16, "passes that were plain"


def test_every_choice_is_measured_at_first():
    run = Decoding().run(3 * (PASSES + 1), rows=64, ratio=1.2, gain=2.4)
    assert run.chosen == [0] * (PASSES + 1) + [2] * (PASSES + 1) + [4] * (PASSES + 1)


def test_a_probe_of_few_rows_is_longer():
    run = Decoding((0, 4)).run(PASSES + 1 + ROWS + 1, rows=1, ratio=1.5, gain=1.0)
    assert run.chosen == [0] * (PASSES + 1) + [4] * (ROWS + 1)


@pytest.mark.parametrize("rows", [1, 32])
def test_it_follows_the_text(rows):
    """Hard and easy text by turns: drafting loses on one half and wins much on the other."""
    turn = 4000 if rows == 1 else 500
    run = Decoding(seed=2).run(4 * turn, rows=rows, ratio=1.5, gain=lambda i: 2.8 if i // turn % 2 else 1.1)
    assert run.lost < -0.15
    assert run.missed < 0.05
    hard = run.chosen[2 * turn + turn // 2 : 3 * turn]
    assert hard.count(0) > 0.8 * len(hard)


@pytest.mark.parametrize("rows", [1, 64])
def test_one_probe_finds_that_a_text_has_become_easy(rows):
    """Though many passes had shown a hard one."""
    speculation, chosen = Speculation((0, 4)), []
    for i in range(8000):
        drafts = speculation.choose(rows)
        chosen.append(drafts)
        tokens = 3 if drafts and i >= 6000 else 1
        speculation.record(rows, drafts, 1.5 if drafts else 1.0, rows * tokens, rows)
    assert 5 * ROWS < chosen[:6000].count(4) < 600
    first = chosen.index(4, 6000 + ROWS)  # a probe may have begun before
    assert chosen[first : first + 100].count(0) <= PASSES, "plain decoding may be probed"


def test_probes_are_rare_even_where_they_lose_nothing():
    run = Decoding((0, 4), noise=0).run(3000, rows=1, ratio=1.2, gain=1.2)
    assert run.speculation.figures()["buckets"][1]["probes"] < 3000 * 0.01 * 1.2 / (PASSES * 0.1)


@pytest.mark.parametrize("rows", [1, 32])
def test_it_follows_the_device(rows):
    """A pass of drafts becomes slower and faster again."""
    passes = 12_000 if rows == 1 else 3000
    slow = [1.1 + 1.1 * (1 - math.cos(2 * math.pi * i / passes * 2)) for i in range(passes)]
    run = Decoding(seed=3).run(passes, rows=rows, ratio=slow.__getitem__, gain=1.8)
    assert run.missed < 0.05
    assert run.lost < -0.05


class Lure:
    """A text that is the worst for what follows it: easy for some passes with drafts, then hard until it is left."""

    def __init__(self, easy):
        self.easy, self.drafted, self.plain = easy, 0, 0

    def tokens(self, drafts):
        if drafts:
            self.drafted, self.plain = self.drafted + 1, 0
            return 1 + drafts if self.drafted <= self.easy else 1
        self.plain += 1
        if self.plain > 20:
            self.drafted = 0
        return 1


@pytest.mark.parametrize("easy", [0, 1, 3, 9, 30, 100, 300])
@pytest.mark.parametrize("rows", [1, 32])
def test_no_text_makes_it_lose_more_than_the_bound(rows, easy):
    """In no stretch of time, wherever it begins, whatever was gained before."""
    speculation, lure, ratio = Speculation((0, 4)), Lure(easy), 3.0
    unread, excess = deque(), 0.0
    # The first pass of drafts is not measured, and two may be under way when the debt passes its limit.
    once = CREDIT + 4 * (ratio - 1)
    for _ in range(8000):
        drafts = speculation.choose(rows)
        seconds, tokens = ratio if drafts else 1.0, rows * lure.tokens(drafts)
        excess = max(0.0, excess + seconds - tokens / rows - BOUND * seconds)
        assert excess <= once
        unread.append((rows, drafts, seconds, tokens, rows))
        if len(unread) > 1:
            speculation.record(*unread.popleft())


def test_what_drafting_gained_is_no_licence_to_lose_it():
    run = Decoding((0, 4), noise=0).run(3000, rows=1, ratio=1.5, gain=4.9)
    before = run.time, run.plain_time
    run.run(2000, rows=1, ratio=1.5, gain=1.0)
    lost = (run.time - before[0]) - (run.plain_time - before[1])
    assert lost < BOUND * (run.time - before[0]) + CREDIT + 2


def test_what_is_known_of_the_text_holds_for_other_numbers_of_rows():
    run = Decoding((0, 4)).run(200, rows=16, ratio=1.2, gain=2.4)
    begun = len(run.chosen)
    run.run(2 * (PASSES + 1) + 20, rows=1, ratio=1.2, gain=2.4)
    assert run.chosen[begun : begun + PASSES + 1] == [0] * (PASSES + 1), "its passes are not known"
    assert run.chosen[-20:].count(4) >= 15


def test_one_choice_is_no_choice():
    speculation = Speculation((0,))
    for _ in range(50):
        assert speculation.choose(4) == 0
        speculation.record(4, 0, 0.1, 4, 4)
    assert speculation.figures()["buckets"][4]["best"] == 0


@pytest.mark.parametrize("choices", [(2, 4), (0, 4, 2), (0, 0)])
def test_choices_begin_with_none_and_rise(choices):
    with pytest.raises(AssertionError):
        Speculation(choices)


def test_rows_that_have_all_ended_give_no_tokens():
    speculation = Speculation((0, 2))
    for drafts in (0, 0, 2, 2):
        speculation.record(1, drafts, 1.0, 1 + drafts, 1)
    before = speculation.figures()["tokens"]
    speculation.record(1, 2, 1.0, 0, 0)
    assert speculation.figures()["tokens"] == before == {0: 1.0, 2: 3.0}


def test_the_time_of_a_pass_withstands_outliers():
    cost = Cost()
    for seconds in (500.0, 2.0, 1.0, 900.0, 3.0, 2.5):
        cost.add(seconds)
    assert (cost.passes, cost.seconds) == (6, 2.5)
    cost.fade()
    for seconds in (9.0, 8.0, 9.0):
        cost.add(seconds)
    assert cost.seconds == 8.0, "a probe outvotes the passes before it"


def test_tokens_are_a_mean_that_follows_the_text():
    gain = Gain()
    for tokens in (2, 4, 3):
        gain.add(tokens, 1)
    assert gain.mean == pytest.approx(3, abs=0.02)
    for _ in range(400):
        gain.add(10, 2)
    assert gain.mean == pytest.approx(5, abs=1e-3)
    assert gain.weight == pytest.approx(64, abs=0.01)
    gain.fade()
    gain.add(2 * ROWS, 2 * ROWS)
    assert 2 < gain.mean < 3.5, "a probe counts more than what was known before"


def test_figures():
    run = Decoding((0, 4)).run(3000, rows=3, ratio=1.5, gain=2.4)
    figures = run.speculation.figures()
    assert figures["tokens"][0] == 1
    assert figures["tokens"][4] == pytest.approx(2.4, abs=0.4)
    assert list(figures["buckets"]) == [4]
    bucket = figures["buckets"][4]
    assert bucket["seconds"] == {0: pytest.approx(1, abs=0.1), 4: pytest.approx(1.5, abs=0.15)}
    assert bucket["passes"] == {0: run.chosen.count(0), 4: run.chosen[:-1].count(4)}
    assert bucket["best"] == 4
    assert bucket["probes"] > 0
    json.dumps(figures)


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (1000, 1024)])
def test_rows_are_rounded_up_to_a_power_of_two(rows, bucket):
    assert bucket_of(rows) == bucket
