"""Every notebook as a test: what `nbdev_test` does, with a traceback and a line in the result for each.

Each runs in a process of its own, forked from one that has the heavy imports behind it: nothing that a notebook sets
reaches the next one, its memory goes with it, and each library is imported once. A check that looks at nothing fails.
Cells with `#| full` run with `make test-all` alone: their notebook is a test twice, without them and with them.
"""
import contextlib
import io
import signal
from concurrent.futures import ProcessPoolExecutor

import pytest
from forks import context
from project import ROOT, cells, notebooks, settings

LIMIT = 900  # seconds: a notebook takes 30 without flags; with them it may train

def run(path, skip, force):
    "Execute a notebook; what it says on stderr, with the traceback of the cell that failed"
    from evidence import install
    from nbdev import test
    test.CaptureShell = install(test.CaptureShell)
    if not force and hasattr(signal, 'alarm'): signal.alarm(LIMIT)
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        passed, _ = test.test_nb(path, skip_flags=skip, force_flags=force, basepath=str(ROOT))
    return passed, out.getvalue()[-5000:] + err.getvalue()

def asked():
    "Every notebook, and once more with its cells for `make test-all` where it has some"
    for path in notebooks(ROOT):
        name = path.relative_to(ROOT/'nbs').as_posix()
        yield pytest.param(path, '', id=name)
        if any('full' in cell.marks for cell in cells(path)):
            yield pytest.param(path, 'full', id=f'{name}, full', marks=pytest.mark.full)

@pytest.mark.parametrize('path, flags', [*asked()])
def test_notebook(path, flags, request):
    skip = settings(ROOT)['tst_flags'].split()
    force = request.config.getoption('flags').split() + flags.split()
    with ProcessPoolExecutor(1, mp_context=context()) as pool:
        passed, why = pool.submit(run, path, skip, force).result()
    if not passed: pytest.fail(why, pytrace=False)
