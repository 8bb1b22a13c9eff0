"""Laws that the scores obey on any input, on inputs that hypothesis makes up. All in fp64; 1e-9 of the terms' size is
room for sums taken in another order."""
import collections, functools, itertools, math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from ches_align.spread.interval import prompt_spread, std_interval, zero_group_chance
from ches_align.theory.ches import (
    CONVENTIONS, Head, head_ches, head_ches_of, neg_edit_distance, pair_scores, predicting_mask)
from ches_align.theory.reward_std import finetuning_times, reward_std_bounds
from ches_align.theory.softmax import random_policy

RULES = settings(max_examples=50, deadline=None, derandomize=True)
HELD = collections.Counter()  # examples that a law held on

def law(*strategies):
    "A test of made-up inputs, which are counted"
    def wrap(test):
        @functools.wraps(test)
        def counted(*args, **named):
            test(*args, **named)
            HELD[test.__name__] += 1
        return RULES(given(*strategies)(counted))
    return wrap

@pytest.fixture(scope='module', autouse=True)
def nothing_counted_before(): HELD.clear()

@pytest.fixture(autouse=True)
def tell_how_many(request, record_property):
    yield
    record_property('survived', HELD[request.function.__name__])
    record_property('tried', HELD[request.function.__name__])

seeds = st.integers(0, 2**31)
lengths = st.integers(1, 6)
scale = st.floats(-8, 8).filter(lambda x: abs(x) > .01)

def draw(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def side(seed, prompt, response, width, left):
    "States and mask of a row of `width` tokens, padded on one side"
    hidden = draw(seed, width, 5)
    mask = torch.zeros(width, dtype=torch.bool)
    start = width - prompt - response if left else 0
    mask[start + prompt:start + prompt + response] = True
    return hidden, mask

def batch(rows, left=False):
    "Rows of (seed, prompt, response) as two padded batches, chosen and rejected"
    width = max(p + max(c, r) for _, p, c, r in rows)
    sides = [[side(2*s + which, p, n, width, left) for s, p, c, r in rows for n in [(c, r)[which]]] for which in (0, 1)]
    return [torch.stack(x) for some in sides for x in zip(*some)]

def close(one, other, size): return bool(((one - other).abs() <= 1e-9*(1 + size)).all())

def size(hidden): return (hidden.abs().sum((1, 2)).max()**2).item()

rows = st.lists(st.tuples(st.integers(0, 2**20), lengths, lengths, lengths), min_size=1, max_size=4)

@law(rows, scale)
def test_ches_scales_with_the_square(drawn, factor):
    states, mask, states2, mask2 = batch(drawn)
    plain = pair_scores(states, mask, states2, mask2)
    scaled = pair_scores(factor*states, mask, factor*states2, mask2)
    square = factor*factor
    for one, other in zip(plain, scaled): assert close(square*one, other, square*size(torch.cat([states, states2], 1)))

@law(rows)
def test_a_response_against_itself_is_zero(drawn):
    states, mask, _, _ = batch(drawn)
    for score in pair_scores(states, mask, states, mask): assert (score == 0).all()

@law(rows)
def test_both_directions_add_up_to_minus_the_squared_distance(drawn):
    states, mask, states2, mask2 = batch(drawn)
    scores = pair_scores(states, mask, states2, mask2)
    apart = [(x*predicting_mask(y)[..., None]).sum(1) for x, y in ((states, mask), (states2, mask2))]
    both = scores.ches + scores.ches_reversed
    assert close(both, -(apart[0] - apart[1]).square().sum(1), size(torch.cat([states, states2], 1)))
    assert (both <= 1e-9*size(torch.cat([states, states2], 1))).all()

@law(rows, st.randoms(use_true_random=False))
def test_the_order_of_a_batch_does_not_matter(drawn, random):
    order = list(range(len(drawn)))
    random.shuffle(order)
    parts = batch(drawn)
    shuffled = pair_scores(*(x[order] for x in parts))
    for one, other in zip(pair_scores(*parts), shuffled): assert torch.equal(one[order], other)

@law(rows, st.sampled_from([0., float('nan'), float('inf'), -1e30]), st.integers(0, 3), st.booleans())
def test_padding_does_not_matter(drawn, junk, more, left):
    "On either side, of any width, whatever stands there"
    parts = batch(drawn)
    wide = []
    for states, mask in (parts[:2], parts[2:]):
        pad = torch.full((len(states), more, states.shape[2]), junk, dtype=states.dtype)
        wide += [torch.cat([pad, states] if left else [states, pad], 1),
                 torch.nn.functional.pad(mask, (more, 0) if left else (0, more))]
    for plain, padded in zip(pair_scores(*parts), pair_scores(*wide)):
        assert close(plain, padded, size(torch.cat([parts[0], parts[2]], 1)))

@law(rows, st.sampled_from(CONVENTIONS))
def test_length_normalised_is_ches_of_means(drawn, convention):
    "Of one pair with equal lengths: divided by the square of the length"
    drawn = [(s, p, c, c) for s, p, c, _ in drawn]
    scores = pair_scores(*batch(drawn[:1], left=True), convention)  # the published module wants padding on the left
    length = drawn[0][2] + (convention == 'official_script')
    assert close(scores.ln_ches*length*length, scores.ches, size(batch(drawn[:1])[0])*4)

@law(seeds, lengths, lengths, st.integers(2, 30), st.integers(1, 40), st.booleans())
def test_head_scores_do_not_depend_on_blocks_or_company(seed, chosen, rejected, vocab, block, capped):
    head = Head(draw(seed, vocab, 4), softcap=2. if capped else None)
    def pair(k):
        gen = torch.Generator().manual_seed(k)
        def ids(count): return torch.randint(vocab, (count,), generator=gen)
        return draw(k, chosen, 4), ids(chosen), draw(k + 1, rejected, 4), ids(rejected)
    pairs = [pair(seed + 10*k) for k in range(3)]
    alone = [head_ches(head, *p) for p in pairs]
    together = head_ches_of(head, pairs, block)
    for one, other in zip(alone, together):
        for value, same in zip(one, other): assert close(value, same, 1e3)
        assert (other.chosen_logps <= 1e-12).all()

@law(seeds, lengths, st.integers(2, 30))
def test_head_ches_of_a_response_against_itself_is_zero(seed, length, vocab):
    states = draw(seed, length, 4)
    ids = torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed))
    assert abs(head_ches(Head(draw(seed + 1, vocab, 4)), states, ids, states, ids).head_ches) < 1e-9*1e3

@law(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_edit_distance(one, other):
    distance = neg_edit_distance(one, other)
    assert -1 <= distance <= 0 and distance == neg_edit_distance(other, one) and (distance == 0) == (one == other)

@law(st.lists(st.integers(-20, 20), min_size=1, max_size=12), st.integers(-50, 50), st.sampled_from([-2., .5, 4.]))
def test_spread_ignores_the_mean_and_scales(rewards, shift, factor):
    "Interval and verdict with it; quarters, moved and scaled by powers of two, are exact"
    quarters = np.array(rewards)/4
    ends = np.array([-5., 5.])
    spread = prompt_spread(quarters, tuple(ends), .3)
    moved = prompt_spread(quarters + shift, tuple(ends + shift), .3)
    scaled = prompt_spread(factor*quarters, tuple(sorted(factor*ends)), .3*abs(factor))
    for name in ('std', 'low', 'high'):
        plain, with_shift, with_factor = (getattr(t, name) for t in (spread, moved, scaled))
        assert np.isclose(with_shift, plain, atol=1e-9, equal_nan=True)
        assert np.isclose(with_factor, abs(factor)*plain, atol=1e-9, equal_nan=True)
    assert spread.verdict == moved.verdict == scaled.verdict and spread.values == moved.values == scaled.values

@law(st.lists(st.integers(-20, 20), min_size=2, max_size=40), st.sampled_from([.05, .0125]))
def test_the_interval_of_the_spread_leaves_room_for_what_has_not_come(rewards, alpha):
    "It holds the sample's own deviation, and a value at an end of the range that is as frequent as can be unseen"
    quarters = np.array(rewards)/4
    count = len(rewards)
    low, high = std_interval(quarters, (-5., 5.), alpha)
    unseen = 1 - (alpha/2)**(1/count)
    far = -5. if quarters.mean() > 0 else 5.
    values = np.append(quarters, far)
    mass = np.append(np.full(count, (1 - unseen)/count), unseen)
    assert low - 1e-9 <= quarters.std() <= high + 1e-9
    assert (mass@values**2 - (mass@values)**2)**.5 <= high + 1e-9
    seen = std_interval(quarters, (float(quarters.min()), float(quarters.max())), alpha)
    assert low <= seen[0] + 1e-9 and seen[1] <= high + 1e-9  # a wider range leaves more room

@law(st.lists(st.integers(-2, 2), min_size=2, max_size=8), st.integers(2, 3), st.integers(-9, 9))
def test_the_chance_of_equal_groups_is_their_share(rewards, group, shift):
    "Of all groups that can be drawn; fp64 logarithms of factorials are good to 1e-12"
    chance = zero_group_chance(np.array(rewards, float), group)
    values = np.array(rewards)
    if len(values) < group: assert math.isnan(chance)
    else:
        counted = np.mean([len(set(g)) == 1 for g in itertools.combinations(rewards, group)])
        assert np.isclose(chance, counted, atol=1e-9)
    assert np.isclose(chance, zero_group_chance(values[::-1] + float(shift), group), atol=1e-12, equal_nan=True)

@law(seeds, st.integers(1, 3), st.integers(2, 3), st.floats(-.5, .5), scale)
def test_reward_std_ignores_the_mean_and_scales(seed, length, vocab, shift, factor):
    "And so does every bound of the gradient; each stays above it"
    policy = random_policy(vocab, length, seed=seed)
    rewards = draw(seed + 1, vocab**length).tanh()/2
    bounds = reward_std_bounds(policy, rewards)
    moved = reward_std_bounds(policy, rewards + shift)
    scaled = reward_std_bounds(policy, factor*rewards, (-abs(factor), abs(factor)))
    assert np.allclose(moved.mean, bounds.mean + shift, atol=1e-9)
    assert np.allclose(scaled.mean, factor*bounds.mean, atol=1e-9*(1 + abs(factor)))
    for name in ('grad_norm', 'std', 'paper', 'optimal', 'gamma_linear', 'trace', 'fisher'):
        plain, with_shift, with_factor = (getattr(t, name) for t in (bounds, moved, scaled))
        near = functools.partial(np.isclose, rtol=1e-7, atol=1e-9)  # std**(2/3) magnifies rounding
        assert near(with_shift, plain) and near(with_factor, abs(factor)*plain), name
        assert bounds.grad_norm <= plain + 1e-9 or name == 'std'

@law(st.floats(1e-6, .5))
def test_the_time_of_finetuning_by_reward_is_never_the_shorter(chance):
    "STD is that of two outcomes, and at p = 1/2 both are there"
    times = finetuning_times(chance)
    assert times.rft >= times.sft - 1e-9 >= -2e-9 and np.isclose(times.std**2, 4*chance*(1 - chance))
