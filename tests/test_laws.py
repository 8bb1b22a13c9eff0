"""Laws that the scores obey on any input, on inputs that hypothesis makes up. All in fp64; 1e-9 of the terms' size is
room for sums taken in another order."""
import collections, functools, itertools, math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from ches_align.rl.spread import prompt_spread, std_interval, zero_group_chance
from ches_align.theory.ches import (
    CONVENTIONS, Head, head_ches, head_ches_of, neg_edit_distance, pair_scores, predicting_mask)
from ches_align.theory.reward_std import finetuning_times, reward_std_bounds
from ches_align.theory.softmax import random_policy

RULES = settings(max_examples=50, deadline=None, derandomize=True)
HELD = collections.Counter()  # examples that a law held on

def law(*made):
    "A test of made-up inputs, which are counted"
    def wrap(test):
        @functools.wraps(test)
        def counted(*args, **named):
            test(*args, **named)
            HELD[test.__name__] += 1
        return RULES(given(*made)(counted))
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

def close(a, b, size): return bool(((a - b).abs() <= 1e-9*(1 + size)).all())

def size(hidden): return (hidden.abs().sum((1, 2)).max()**2).item()

rows = st.lists(st.tuples(st.integers(0, 2**20), lengths, lengths, lengths), min_size=1, max_size=4)

@law(rows, scale)
def test_ches_scales_with_the_square(made, c):
    h, m, h2, m2 = batch(made)
    plain = pair_scores(h, m, h2, m2)
    scaled = pair_scores(c*h, m, c*h2, m2)
    for a, b in zip(plain, scaled): assert close(c*c*a, b, c*c*size(torch.cat([h, h2], 1)))

@law(rows)
def test_a_response_against_itself_is_zero(made):
    h, m, _, _ = batch(made)
    for score in pair_scores(h, m, h, m): assert (score == 0).all()

@law(rows)
def test_both_directions_add_up_to_minus_the_squared_distance(made):
    h, m, h2, m2 = batch(made)
    found = pair_scores(h, m, h2, m2)
    apart = [(x*predicting_mask(y)[..., None]).sum(1) for x, y in ((h, m), (h2, m2))]
    assert close(found.ches + found.ches_reversed, -(apart[0] - apart[1]).square().sum(1), size(torch.cat([h, h2], 1)))
    assert (found.ches + found.ches_reversed <= 1e-9*size(torch.cat([h, h2], 1))).all()

@law(rows, st.randoms(use_true_random=False))
def test_the_order_of_a_batch_does_not_matter(made, random):
    order = list(range(len(made)))
    random.shuffle(order)
    parts = batch(made)
    for a, b in zip(pair_scores(*parts), pair_scores(*(x[order] for x in parts))): assert torch.equal(a[order], b)

@law(rows, st.sampled_from([0., float('nan'), float('inf'), -1e30]), st.integers(0, 3), st.booleans())
def test_padding_does_not_matter(made, junk, more, left):
    "On either side, of any width, whatever stands there"
    parts = batch(made)
    wide = []
    for h, m in (parts[:2], parts[2:]):
        pad = torch.full((len(h), more, h.shape[2]), junk, dtype=h.dtype)
        wide += [torch.cat([pad, h] if left else [h, pad], 1),
                 torch.nn.functional.pad(m, (more, 0) if left else (0, more))]
    for a, b in zip(pair_scores(*parts), pair_scores(*wide)):
        assert close(a, b, size(torch.cat([parts[0], parts[2]], 1)))

@law(rows, st.sampled_from(CONVENTIONS))
def test_length_normalised_is_ches_of_means(made, convention):
    "Of one pair with equal lengths: divided by the square of the length"
    made = [(s, p, c, c) for s, p, c, _ in made]
    found = pair_scores(*batch(made[:1], left=True), convention)  # the published module wants padding on the left
    n = made[0][2] + (convention == 'official_script')
    assert close(found.ln_ches*n*n, found.ches, size(batch(made[:1])[0])*4)

@law(seeds, lengths, lengths, st.integers(2, 30), st.integers(1, 40), st.booleans())
def test_head_scores_do_not_depend_on_blocks_or_company(seed, n, m, vocab, block, capped):
    head = Head(draw(seed, vocab, 4), softcap=2. if capped else None)
    def pair(k):
        gen = torch.Generator().manual_seed(k)
        def ids(count): return torch.randint(vocab, (count,), generator=gen)
        return draw(k, n, 4), ids(n), draw(k + 1, m, 4), ids(m)
    pairs = [pair(seed + 10*k) for k in range(3)]
    alone = [head_ches(head, *p) for p in pairs]
    together = head_ches_of(head, pairs, block)
    for a, b in zip(alone, together):
        for x, y in zip(a, b): assert close(x, y, 1e3)
        assert (b.chosen_logps <= 1e-12).all()

@law(seeds, lengths, st.integers(2, 30))
def test_head_ches_of_a_response_against_itself_is_zero(seed, n, vocab):
    h = draw(seed, n, 4)
    y = torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(seed))
    assert abs(head_ches(Head(draw(seed + 1, vocab, 4)), h, y, h, y).head_ches) < 1e-9*1e3

@law(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_edit_distance(a, b):
    d = neg_edit_distance(a, b)
    assert -1 <= d <= 0 and d == neg_edit_distance(b, a) and (d == 0) == (a == b)

@law(st.lists(st.integers(-20, 20), min_size=1, max_size=12), st.integers(-50, 50), st.sampled_from([-2., .5, 4.]))
def test_spread_ignores_the_mean_and_scales(rewards, shift, c):
    "Interval and verdict with it; quarters, moved and scaled by powers of two, are exact"
    r = np.array(rewards)/4
    ends = np.array([-5., 5.])
    found = prompt_spread(r, tuple(ends), .3)
    moved = prompt_spread(r + shift, tuple(ends + shift), .3)
    scaled = prompt_spread(c*r, tuple(sorted(c*ends)), .3*abs(c))
    for name in ('std', 'low', 'high'):
        x, y, z = (getattr(t, name) for t in (found, moved, scaled))
        assert np.isclose(y, x, atol=1e-9, equal_nan=True) and np.isclose(z, abs(c)*x, atol=1e-9, equal_nan=True)
    assert found.verdict == moved.verdict == scaled.verdict and found.values == moved.values == scaled.values

@law(st.lists(st.integers(-20, 20), min_size=2, max_size=40), st.sampled_from([.05, .0125]))
def test_the_interval_of_the_spread_leaves_room_for_what_has_not_come(rewards, alpha):
    "It holds the sample's own deviation, and a value at an end of the range that is as frequent as can be unseen"
    r = np.array(rewards)/4
    n = len(rewards)
    low, high = std_interval(r, (-5., 5.), alpha)
    unseen = 1 - (alpha/2)**(1/n)
    far = -5. if r.mean() > 0 else 5.
    values = np.append(r, far)
    mass = np.append(np.full(n, (1 - unseen)/n), unseen)
    assert low - 1e-9 <= r.std() <= high + 1e-9
    assert (mass@values**2 - (mass@values)**2)**.5 <= high + 1e-9
    seen = std_interval(r, (float(r.min()), float(r.max())), alpha)
    assert low <= seen[0] + 1e-9 and seen[1] <= high + 1e-9  # a wider range leaves more room

@law(st.lists(st.integers(-2, 2), min_size=2, max_size=8), st.integers(2, 3), st.integers(-9, 9))
def test_the_chance_of_equal_groups_is_their_share(rewards, group, shift):
    "Of all groups that can be drawn; fp64 logarithms of factorials are good to 1e-12"
    found = zero_group_chance(np.array(rewards, float), group)
    r = np.array(rewards)
    if len(r) < group: assert math.isnan(found)
    else:
        counted = np.mean([len(set(g)) == 1 for g in itertools.combinations(rewards, group)])
        assert np.isclose(found, counted, atol=1e-9)
    assert np.isclose(found, zero_group_chance(r[::-1] + float(shift), group), atol=1e-12, equal_nan=True)

@law(seeds, st.integers(1, 3), st.integers(2, 3), st.floats(-.5, .5), scale)
def test_reward_std_ignores_the_mean_and_scales(seed, length, vocab, shift, c):
    "And so does every bound of the gradient; each stays above it"
    policy = random_policy(vocab, length, seed=seed)
    r = draw(seed + 1, vocab**length).tanh()/2
    found = reward_std_bounds(policy, r)
    moved = reward_std_bounds(policy, r + shift)
    scaled = reward_std_bounds(policy, c*r, (-abs(c), abs(c)))
    assert np.allclose(moved.mean, found.mean + shift, atol=1e-9)
    assert np.allclose(scaled.mean, c*found.mean, atol=1e-9*(1 + abs(c)))
    for name in ('grad_norm', 'std', 'paper', 'optimal', 'gamma_linear', 'trace', 'fisher'):
        x, y, z = (getattr(t, name) for t in (found, moved, scaled))
        near = functools.partial(np.isclose, rtol=1e-7, atol=1e-9)  # std**(2/3) magnifies rounding
        assert near(y, x) and near(z, abs(c)*x), name
        assert found.grad_norm <= x + 1e-9 or name == 'std'

@law(st.floats(1e-6, .5))
def test_the_time_of_finetuning_by_reward_is_never_the_shorter(p):
    "STD is that of two outcomes, and at p = 1/2 both are there"
    found = finetuning_times(p)
    assert found.rft >= found.sft - 1e-9 >= -2e-9 and np.isclose(found.std**2, 4*p*(1 - p))
