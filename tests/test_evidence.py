"Checks that cannot fail are found: planted ones, while they run and by reading."
import ast
import builtins

import pytest
from evidence import Evidence, Runtime, blind_checks

def run(source):
    "The source with its checks rewritten, as a notebook's cells are"
    builtins.__evidence__ = Runtime
    exec(compile(Evidence().visit(ast.parse(source)), 'cell', 'exec'), {})

VACUOUS = [
    'assert all(x > 0 for x in [])',
    'assert all([])',
    'assert not any(x < 0 for x in ())',
    'for x in []: assert x > 0',
    'def check(xs):\n    for x in xs:\n        assert x > 0\ncheck([])',
    'assert [a for a, b in zip([1], [1, 2, 3]) if a == b]',
    'assert all(a == b for a, b in zip([1, 2], []))',
    'for a, b in zip([1], [1, 2, 3]): assert a == b',
    'import numpy as np\nassert (np.zeros(0) < 1).all()',
    'import torch\nassert (torch.zeros(0) < 1).all()',
    'import torch\nassert torch.all(torch.zeros(0) < 1)', 'for x in []:\n    if x: assert x > 0',
    'import pandas as pd\nassert (pd.DataFrame(dict(a=[])).a < 1).all()',
    'def test_eq(a, b): assert a == b\ntest_eq(all(x for x in []), True)',
]
SOUND = [
    'assert all(x > 0 for x in [1])', 'assert not any(x < 0 for x in (1,))', 'for x in [1]: assert x > 0',
    'assert all(a == b for a, b in zip([1, 2], [1, 2]))',
    'import torch\nassert (torch.zeros(2) < 1).all()', 'import torch\nassert torch.all(torch.ones(2) > 0)',
    'import itertools\nassert all(a >= 0 for a, b in zip(itertools.count(), [1]))', 'assert not []',
    'for x in []: print(x)', 'xs = [all(()), *zip([1], [1, 2, 3])]',
]

@pytest.mark.parametrize('source', VACUOUS)
def test_a_check_over_nothing_fails(source):
    exec(compile(source, 'cell', 'exec'), {})  # passes as it stands
    with pytest.raises((AssertionError, ValueError), match='nothing|zip of lists'): run(source)

@pytest.mark.parametrize('source', SOUND)
def test_a_check_over_something_passes(source): run(source)

@pytest.mark.parametrize('source, what', [
    ('from fastcore.test import test_eq, test_close', 'compares by zip'),
    ('from fastcore.test import *', 'compares by zip'),
    ('assert x == x', 'with itself'), ('test_eq(x, x)', 'with itself'), ('assert (1, "said")', 'constant'),
    ('test_fail(f)', 'any error'), ('test_fail(f, "message")', 'any error'),
])
def test_blind_checks_are_named(source, what):
    faults = blind_checks(ast.parse(source))
    assert faults and what in faults[0][1]

@pytest.mark.parametrize('source', ['from fastcore.test import test_eq, test_fail', 'assert draw() == draw()',
                                    'test_fail(f, contains="x")', 'assert x == y', 'test_eq(x, [x])'])
def test_other_checks_are_left_alone(source): assert blind_checks(ast.parse(source)) == []
