"""Every notebook as a test: what `nbdev_test` does, with a traceback and a line in the result for each.

Each runs in a process of its own, forked from one that has the heavy imports behind it: nothing that a notebook sets
reaches the next one, its memory goes with it, and torch is imported once. A check that looks at nothing fails.
"""
import contextlib
import io
import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor

import pytest
from project import ROOT, notebooks, settings

LIMIT = 900  # seconds: a notebook takes 30 without flags; with them it may train

def run(path, skip, force):
    "Execute a notebook; what it says on stderr, with the traceback of the cell that failed"
    from evidence import install
    from nbdev import test
    test.CaptureShell = install(test.CaptureShell)
    if not force and hasattr(signal, 'alarm'): signal.alarm(LIMIT)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        passed, _ = test.test_nb(path, skip_flags=skip, force_flags=force, basepath=str(ROOT))
    return passed, out.getvalue()[-5000:] + err.getvalue()

@pytest.fixture(scope='module')
def context():
    fork = 'forkserver' in multiprocessing.get_all_start_methods()
    ctx = multiprocessing.get_context('forkserver' if fork else 'spawn')
    if fork: ctx.set_forkserver_preload(['nbdev.test', 'torch', 'transformers', 'matplotlib.pyplot'])
    return ctx

# the longest first, so that no worker waits for one at the end
ORDER = sorted(notebooks(ROOT), key=lambda path: path.parent.name != 'tutorials')

@pytest.mark.parametrize('path', [pytest.param(p, id=p.relative_to(ROOT/'nbs').as_posix()) for p in ORDER])
def test_notebook(path, context, request):
    skip, force = settings(ROOT)['tst_flags'].split(), request.config.getoption('flags').split()
    with ProcessPoolExecutor(1, mp_context=context) as pool: passed, said = pool.submit(run, path, skip, force).result()
    if not passed: pytest.fail(said, pytrace=False)
