"What every test runs under; it must stand before the first import of a library that reads it."
import os
import sys
from pathlib import Path

# HF_HUB_OFFLINE=0 pytest --flags hub ... overrides
for name, value in dict(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='agg', TQDM_DISABLE='1').items():
    os.environ.setdefault(name, value)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'.ci'))

def pytest_addoption(parser):
    parser.addoption('--flags', default='', help="run notebook cells with these flags too: --flags 'slow trl'")
