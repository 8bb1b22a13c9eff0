"What `make checks` looks at, as tests, so that it runs beside the others; `test_docs_check.py` tests the checks."
import subprocess
import sys

import docs_check
import pytest
import structure_check
import write_readme
from project import ROOT

def test_structure(): assert structure_check.check(ROOT) == []

def test_ruff():
    command = [sys.executable, '-m', 'ruff', 'check', '--no-cache', '.']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

def test_readme(): assert write_readme.changes(ROOT) == {}, 'run make readme'

@pytest.mark.parametrize('check', [docs_check.check_cells, docs_check.build], ids=['prose', 'processing'])
def test_pages(check): assert check(ROOT) == []
