"""Which rollout is in which row, and which prompt in which slot: plain Python, without a model."""
import math
import random

import pytest

from sample import BUSY_SHARE, Schedule, cache_size

STOP = 9


def draw(schedule, rows, tokens):
    """Record these tokens for these rows, each with the log-prob -1."""
    seen = []
    schedule.record(rows, tokens, [-1.0] * len(tokens), lambda drawn, ended: seen.append((drawn, ended)))
    return seen[0]


def test_rows_take_rollouts_in_order_longest_prompt_first_and_slots_are_filled_at_once():
    schedule = Schedule([[1], [1, 2, 3], [1, 2]], n=2, B=3, S=2, stop_ids=[STOP], max_new_tokens=5)
    rows, placed = schedule.admit()
    assert rows == [0, 1, 2] and schedule.owner == [(1, 0), (1, 1), (2, 0)]
    assert placed == {1: 1, 2: 0} and schedule.slots() == [1, 1, 0]
    assert schedule.admit() == ([], {})  # no row is idle


def test_a_row_is_idle_when_its_rollout_stops_and_takes_the_next_one():
    schedule = Schedule([[1], [1, 2]], n=2, B=2, S=2, stop_ids=[STOP], max_new_tokens=3)
    schedule.admit()
    assert draw(schedule, [0, 1], [5, STOP]) == ([(1, 0, 5), (1, 1, STOP)], 1)
    assert schedule.owner == [(1, 0), None] and schedule.slots()[1] == -1
    assert schedule.rollouts[1][1].finished and schedule.rollouts[1][1].tokens == [STOP]
    assert schedule.wants_refill()
    assert schedule.admit() == ([1], {}) and schedule.owner == [(1, 0), (0, 0)]  # its slot was ready


def test_tokens_behind_the_end_of_a_rollout_are_ignored():
    schedule = Schedule([[1]], n=2, B=2, S=1, stop_ids=[STOP], max_new_tokens=2)
    schedule.admit()
    draw(schedule, [0, 1], [STOP, 3])
    assert draw(schedule, [0, 1], [4, 5]) == ([(0, 1, 5)], 2)
    assert [rollout.tokens for rollout in schedule.rollouts[0]] == [[STOP], [3, 5]]
    assert [rollout.finished for rollout in schedule.rollouts[0]] == [True, False] and schedule.is_done()


def test_a_slot_is_free_after_the_last_rollout_of_its_prompt_and_not_before():
    schedule = Schedule([[1, 2], [1]], n=2, B=2, S=1, stop_ids=[STOP], max_new_tokens=9)
    schedule.admit()
    draw(schedule, [0, 1], [STOP, 3])
    assert schedule.admit() == ([], {})       # prompt 1 waits for the slot
    draw(schedule, [1], [STOP])
    assert schedule.admit() == ([0, 1], {1: 0}) and schedule.owner == [(1, 0), (1, 1)]


def test_a_logit_that_is_not_finite_names_the_prompt():
    schedule = Schedule([[7, 8]], n=1, B=1, S=1, stop_ids=[STOP], max_new_tokens=9)
    schedule.admit()
    draw(schedule, [0], [3])
    with pytest.raises(ValueError, match=r"infinite\) 1 tokens after prompt 0 \(\[7, 8\]"):
        schedule.record([0], [4], [math.nan])


def test_idle_rows_are_dropped_once_nothing_waits_and_too_many_are_idle():
    schedule = Schedule([[1]], n=8, B=8, S=1, stop_ids=[STOP], max_new_tokens=9)
    schedule.admit()
    draw(schedule, range(2), [STOP] * 2)
    assert not schedule.wants_fewer_rows(0.75)    # 6 of 8 are busy
    draw(schedule, [5], [STOP])
    assert schedule.wants_fewer_rows(0.75)
    assert schedule.drop_idle_rows() == [2, 3, 4, 6, 7]
    assert schedule.owner == [(0, 2), (0, 3), (0, 4), (0, 6), (0, 7)]


@pytest.mark.parametrize("seed", range(20))
def test_every_rollout_is_sampled_once_to_its_end_and_no_slot_holds_two_prompts(seed):
    rng = random.Random(seed)
    N, n, B, S = rng.randint(1, 9), rng.randint(1, 6), rng.randint(1, 12), rng.randint(1, 5)
    prompts = [[1] * rng.randint(1, 9) for _ in range(N)]
    # What each rollout will say: digits and a stop, or six digits and no stop.
    script = {(i, s): [rng.randrange(9) for _ in range(rng.randint(0, 6))] + [STOP]
              for i in range(N) for s in range(n)}
    schedule = Schedule(prompts, n, B, S, [STOP], max_new_tokens=6)
    said, computed = {}, []

    def speak(rows):
        tokens = []
        for row in rows:
            owner = schedule.owner[row]
            tokens.append(script[owner][len(said.setdefault(owner, []))] if owner else 0)
            if owner:
                said[owner].append(tokens[-1])
        draw(schedule, rows, tokens)

    for _ in range(10_000):
        if schedule.is_done():
            break
        while schedule.wants_refill():
            rows, placed = schedule.admit()
            computed += placed
            assert len(set(schedule.slot_of.values())) == len(schedule.slot_of) <= S
            if not rows:
                break
            speak(rows)
        if schedule.wants_fewer_rows(0.75) and schedule.busy_rows():
            schedule.drop_idle_rows()
        speak(range(len(schedule.owner)))
        busy = [owner for owner in schedule.owner if owner]
        assert len(set(busy)) == len(busy)
        assert all(slot >= 0 for owner, slot in zip(schedule.owner, schedule.slots()) if owner)
    assert schedule.is_done() and schedule.ended == N * n and sorted(computed) == list(range(N))
    for (i, s), tokens in script.items():
        assert schedule.rollouts[i][s].tokens == tokens[:6]
        assert schedule.rollouts[i][s].finished == (len(tokens) <= 6)


def count_graphs(share):
    """Of 2,048 rollouts of 400 tokens in the mean, in 256 rows, 16 steps at a time: graphs, steps."""
    rng, prompts = random.Random(0), [[1]] * 256
    B, S = cache_size(256, 8, 1, 2048, 1, max_rows=256, budget=1e9)
    schedule = Schedule(prompts, 8, B, S, [STOP], 2048)
    length = {}
    graphs, steps = 1, 0
    while not schedule.is_done():
        while schedule.wants_refill() and schedule.admit()[0]:
            pass
        if schedule.wants_fewer_rows(share):
            schedule.drop_idle_rows()
            graphs += 1
        for _ in range(16):
            tokens = []
            for owner in schedule.owner:
                left = length.setdefault(owner, 1 + int(rng.expovariate(1 / 400)))
                done = owner and len(schedule.rollouts[owner[0]][owner[1]].tokens) + 1 >= left
                tokens.append(STOP if done else 1)
            schedule.record(range(len(tokens)), tokens, [-1.0] * len(tokens))
        steps += 16
    return graphs, steps


def test_a_gpu_captures_half_as_many_graphs_for_as_many_steps():
    many, few = count_graphs(BUSY_SHARE["cpu"]), count_graphs(BUSY_SHARE["cuda"])
    assert few[0] <= 7 and many[0] >= 2 * few[0] and abs(few[1] - many[1]) < 0.1 * many[1]
