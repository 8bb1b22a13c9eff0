"What `make checks` looks at, as tests, so that it runs beside the others; `test_docs_check.py` tests the checks."
import os
import subprocess
import sys

import docs_check
import structure_check
import write_readme
from forks import forked
from project import ROOT

def test_structure(): assert structure_check.check(ROOT) == []

def test_ruff():
    command = [sys.executable, '-m', 'ruff', 'check', '--no-cache', '.']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

def test_readme(): assert write_readme.changes(ROOT) == {}, 'run make readme'

def test_prose(): assert docs_check.check_cells(ROOT) == []

def execute(words):
    "Run code in a copy of the project, which comes first; with IN_TEST set, nbdev's processing would do nothing"
    os.environ.pop('IN_TEST', None)
    sys.path.insert(0, os.getcwd())
    exec(words[0], {})

def test_processing():
    "In a fork of a process that has the heavy imports behind it"
    assert docs_check.build(ROOT, lambda code, where: forked(execute, [code], where)) == []
