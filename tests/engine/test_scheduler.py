"""The scheduler: places, passes, and the phases that a token may have, against a device that is only numbers."""

import random
from collections import deque
from itertools import product
from typing import NamedTuple

import pytest
import torch

from lepton.engine.options import GenerationOptions
from lepton.engine.scheduler import PATIENCE, Launch, Prefill, Scheduler, phase_after_prompt, phases_after
from lepton.engine.sequence import Sequence
from lepton.model.timeline import Timeline

EOS = 0


class Plan(NamedTuple):
    """A cycle in which the prompts are read and the sequences of these prompts take part in the same cycle."""

    prefill: Prefill
    launches: list[Launch]


def schedule(scheduler):
    return Plan(scheduler.admit(), scheduler.launches())


def sequence_of(prompt=(5, 6), most=9, *, stops=(), past_phase=0, **fields):
    options = GenerationOptions(max_new_tokens=most, **fields)
    return Sequence(list(prompt), options, stops=[[EOS], *stops], stream=(1, 2), past_phase=past_phase)


@pytest.mark.parametrize("segment", [1, 2, 5, 8])
def test_possible_phases_are_those_of_every_outcome(segment):
    """Every way in which passes may come out, one token after another."""
    seen = 0
    for start, passes in product(range(segment), product(range(1, 4), repeat=4)):
        found, outcomes = 1 << start, {start}
        for tokens in passes:
            reached = set()
            for phase in outcomes:
                for _ in range(tokens):
                    phase = (phase + 1) % segment
                    reached.add(phase)
                    if phase == 0:  # the next token opens a segment, so it begins a pass
                        break
            outcomes = reached
            found = phases_after(found, tokens, segment)
            assert {phase for phase in range(segment + 1) if found >> phase & 1} == outcomes
            seen += 0 in outcomes
    assert seen


@pytest.mark.parametrize("prompt", [[3], [EOS], [3, 4], [3, EOS], [EOS, 3], [EOS, EOS], [3, 4, 5, 6, 7]])
@pytest.mark.parametrize("past_phase", [0, 1, 3])
def test_the_phase_after_a_prompt_is_that_of_the_model(prompt, past_phase):
    opens = torch.zeros(1, len(prompt), dtype=torch.bool)
    opens[0, -1] = len(prompt) > 1
    start, phase = torch.tensor([2]), torch.tensor([past_phase])
    timeline = Timeline.read(torch.tensor([prompt]), start, phase, eos_id=EOS, segment=4, opens_BT=opens)
    expected = timeline.phase_after(torch.tensor([len(prompt)])).item()
    assert phase_after_prompt(sequence_of(prompt, past_phase=past_phase), 4) == expected


def test_the_first_that_waits_get_the_free_places():
    scheduler, sequences = Scheduler(2, 8), [sequence_of(most=1) for _ in range(5)]
    for sequence in sequences:
        scheduler.add(sequence)
    plan = schedule(scheduler)
    assert (plan.prefill.sequences, plan.prefill.places, plan.launches) == (sequences[:2], [0, 1], [])
    assert [each.status for each in sequences] == ["running"] * 2 + ["waiting"] * 3
    assert schedule(scheduler).prefill.sequences == [], "a place is free when its passes have been read"
    assert scheduler.finish(plan.prefill.sequences, [[3], [4]]) == [[3], [4]]
    assert (scheduler.waiting, scheduler.running) == (3, 0)
    assert schedule(scheduler).prefill.sequences == sequences[2:4]


def test_depths_below_1_share_a_pass():
    fields = [{}, {"depth": 0.5}, {"depth": 1}, {"think": 7}, {"depth": 0, "think": 0}]
    sequences = [sequence_of(**each) for each in fields]
    scheduler = Scheduler(8, 8, rounds=2, drafts=lambda rows, routed: 10 * rows + routed)
    for sequence in sequences:
        scheduler.add(sequence)
    full, some = schedule(scheduler).launches
    assert (full.sequences, full.routed, full.rounds, full.drafts) == ([sequences[i] for i in (0, 2, 3)], False, 7, 30)
    assert (some.sequences, some.routed, some.rounds, some.drafts) == ([sequences[i] for i in (1, 4)], True, 2, 21)
    assert full.places == [0, 2, 3]
    for sequence in (sequences[0], sequences[3]):
        scheduler.cancel(sequence)
    scheduler.cancel(sequences[1])
    assert {launch.routed: launch.rounds for launch in schedule(scheduler).launches} == {False: 2, True: 0}


def test_drafts_are_only_for_those_who_want_some():
    scheduler = Scheduler(2, 8, drafts=lambda *_: 4)
    scheduler.add(sequence_of(use_speculative=False))
    assert schedule(scheduler).launches[0].drafts == 0
    scheduler.add(sequence_of())
    assert schedule(scheduler).launches[0].drafts == 4


@pytest.mark.parametrize("most", [0, 1, 2, 7])
def test_no_pass_runs_beyond_the_last_token_wanted(most):
    scheduler, launched = Scheduler(1, 8), 0
    scheduler.add(sequence := sequence_of(most=most))
    unread = deque()
    while not sequence.ended:
        plan = schedule(scheduler)
        unread.append(plan)
        launched += len(plan.launches)
        if len(unread) == 2:
            finish(scheduler, unread.popleft(), lambda _sequence: [3])
    assert launched == max(0, most - 1)
    assert len(sequence.new) == most


def finish(scheduler, plan, ids_of):
    """Give the outcome of a plan, work by work."""
    for work in (plan.prefill, *plan.launches):
        scheduler.finish(work.sequences, [ids_of(each) for each in work.sequences])


def test_cancelling():
    scheduler, (running, waiting, other) = Scheduler(1, 8), [sequence_of() for _ in range(3)]
    for sequence in (running, waiting, other):
        scheduler.add(sequence)
    plan = schedule(scheduler)
    scheduler.cancel(waiting)
    scheduler.cancel(running)
    scheduler.cancel(running)
    assert (waiting.status, running.status, scheduler.waiting) == ("cancelled", "cancelled", 1)
    assert running.place == 0, "passes that it is in have not been read"
    assert schedule(scheduler).launches == []
    finish(scheduler, plan, lambda _sequence: [3])
    assert (running.place, running.new) == (None, [])
    plan = schedule(scheduler)
    assert plan.prefill.sequences == [other]
    for _ in range(2):
        finish(scheduler, plan, lambda _sequence: [3])
        if not plan.launches:
            break
        plan = schedule(scheduler)
    scheduler.cancel(other)
    assert other.new, "what it has stays"


def test_one_that_is_in_no_pass_gives_its_place_back_at_once():
    scheduler = Scheduler(1, 8)
    scheduler.add(sequence := sequence_of())
    finish(scheduler, schedule(scheduler), lambda _sequence: [3])
    scheduler.cancel(sequence)
    assert sequence.place is None
    assert scheduler.running == 0


class Device:
    """What a model would do: texts that go on without end, of which a pass gives as many tokens as it likes."""

    def __init__(self, seed, segment):
        self.random, self.segment = random.Random(seed), segment
        self.text, self.given, self.phase, self.owner = {}, {}, {}, {}

    def prefill(self, sequence, place):
        text = random.Random(sequence.stream[0])
        self.text[sequence] = [text.choices((EOS, 1, 2, 3), (1, 10, 10, 10))[0] for _ in range(300)]
        self.given[sequence], self.phase[sequence] = 1, phase_after_prompt(sequence, self.segment)
        self.owner[place] = sequence
        return self.text[sequence][:1]

    def run(self, sequence, place, launch):
        """Return the new tokens of a row. Half of those whose text ended compute nothing."""
        assert self.owner[place] is sequence, "a place that others have now"
        phase, given = self.phase[sequence], self.given[sequence]
        if EOS in self.text[sequence][:given] and sequence.stream[0] % 2:
            return []
        assert launch.opening or phase, "a pass that opens no segment"
        count = self.random.randint(1, min(1 + launch.drafts, self.segment - phase))
        self.given[sequence], self.phase[sequence] = given + count, (phase + count) % self.segment
        return self.text[sequence][given : given + count]


def wanted(sequence, text):
    """The new tokens that a sequence asks for, of a text that it would have."""
    fresh = Sequence([5], sequence.options, stops=sequence.stops, stream=(0, 0))
    return fresh.take(text), fresh.reason


@pytest.mark.parametrize(("places", "ahead", "segment"), [(1, 1, 8), (3, 1, 8), (5, 2, 4), (7, 0, 64), (4, 3, 1)])
def test_a_thousand_requests_with_cancels(places, ahead, segment):
    stream = random.Random(places)
    scheduler = Scheduler(places, segment, rounds=2, drafts=lambda *_: stream.choice((0, 2, 4)))
    device, unread = Device(places, segment), deque()
    sequences = [
        Sequence(
            [stream.choice((EOS, 1, 2)) for _ in range(stream.randint(1, 3))],
            GenerationOptions(max_new_tokens=stream.randint(0, 25), depth=stream.choice((None, 1, 0.5))),
            stops=[[EOS], [1, 1, 2]],
            stream=(i, places),
            past_phase=stream.randrange(segment),
        )
        for i in range(1000)
    ]
    arriving, admitted = deque(sequences), []
    while arriving or scheduler.waiting or scheduler.running:
        for _ in range(min(len(arriving), stream.randint(0, 2 * places))):
            scheduler.add(arriving.popleft())
        added = sequences[: 1000 - len(arriving)]
        running = {each for each in added if each.place is not None}
        if running and stream.random() < 0.1:
            scheduler.cancel(stream.choice(stream.choice((added, [each for each in added if each in running]))))
            running = {each for each in running if each.place is not None}
        plan = schedule(scheduler)
        admitted += plan.prefill.sequences
        running.update(plan.prefill.sequences)
        assert len(running) <= places
        assert scheduler.waiting == 0 or len(running) == places, "a free place admits"
        in_passes = [each for launch in plan.launches for each in launch.sequences]
        assert len(in_passes) == len(set(in_passes)), "one pass a cycle"
        assert {each for each in running if not each.exhausted} <= set(in_passes), "all that run are in every cycle"
        outcomes = [[device.prefill(*pair) for pair in zip(plan.prefill.sequences, plan.prefill.places, strict=True)]]
        for launch in plan.launches:
            rows = zip(launch.sequences, launch.places, strict=True)
            outcomes.append([device.run(*row, launch) for row in rows])
        unread.append((plan, outcomes))
        if len(unread) > ahead:
            plan, outcomes = unread.popleft()
            for work, ids in zip((plan.prefill, *plan.launches), outcomes, strict=True):
                scheduler.finish(work.sequences, ids)
    assert admitted == [each for each in sequences if each in device.text], "first come, first served"
    for sequence in sequences:
        assert sequence.ended
        assert sequence.place is None
        if sequence.status == "done":
            assert (sequence.new, sequence.reason) == wanted(sequence, device.text[sequence])
        else:
            assert sequence.new == device.text.get(sequence, [])[: len(sequence.new)]
    reached = {(each.reason, each in device.text) for each in sequences}
    ways = {(reason, True) for reason in ("length", "stop", "end_of_document", "cancelled")}
    assert reached == {*ways, ("cancelled", False)}, "every way to end occurred"
    for _ in range(places + 1):
        scheduler.add(sequence_of())
    assert schedule(scheduler).prefill.places == list(range(places)), "each place was freed once"


def test_a_pass_says_that_it_may_open_a_segment_only_if_it_may():
    """Of one sequence, with one pass ahead: exactly if some outcome of that pass leads to an opening."""
    for segment, drafts, start in product((4, 8), range(4), range(8)):
        scheduler = Scheduler(1, segment, drafts=lambda *_, drafts=drafts: drafts)
        scheduler.add(sequence_of([3], most=99, past_phase=start % segment))
        first = schedule(scheduler)
        phase = (start + 1) % segment
        second = schedule(scheduler)
        assert first.launches[0].opening == (phase == 0)
        assert second.launches[0].opening == (phase + 1 + drafts >= segment)
        finish(scheduler, first, lambda _sequence: [3])
        third = schedule(scheduler)
        phase = (phase + 1) % segment
        assert third.launches[0].opening == (phase + 1 + drafts >= segment)


def test_many_open_segments_apart():
    """Those that may open one wait for others, but not for long, and the rest never waits."""
    segment, rows = 32, 40
    scheduler = Scheduler(rows, segment, together=4)
    sequences = [sequence_of([5], most=100, past_phase=5 * i % segment) for i in range(rows)]
    for sequence in sequences:
        scheduler.add(sequence)
    prefill = scheduler.admit()
    scheduler.finish(prefill.sequences, [[9]] * rows)
    waited, longest, apart = dict.fromkeys(sequences, 0), 0, 0
    while scheduler.running:
        launches = scheduler.launches()
        taken = [each for launch in launches for each in launch.sequences]
        assert len(taken) == len({*taken})
        for launch in launches:
            opens = [each.phase == 0 for each in launch.sequences]
            if scheduler.running > 4:
                assert all(opens) if launch.opening else not any(opens)
            apart += launch.opening
        for sequence in scheduler.sequences:
            waited[sequence] = 0 if sequence in taken else waited[sequence] + 1
            assert not waited[sequence] or sequence.phase == 0
            longest = max(longest, waited[sequence])
        for launch in launches:
            scheduler.finish(launch.sequences, [[9]] * len(launch.sequences))
    assert 0 < longest <= PATIENCE
    assert apart < rows * 100 / segment / 2, "several open together"
    assert all(len(each.new) == 100 for each in sequences)
