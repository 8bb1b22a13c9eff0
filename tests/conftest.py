"What every test runs under; it must stand before the first import of a library that reads it."
import json
import os
import platform
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest

# HF_HUB_OFFLINE=0 pytest --flags hub ... overrides
for name, value in dict(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='agg', TQDM_DISABLE='1').items():
    os.environ.setdefault(name, value)

ROOT = Path(__file__).resolve().parent.parent
DURATIONS = ROOT/'benchmarks'/'records'/'test_durations.json'
ALONE = {'test_notebooks', 'test_checks', 'test_types'}  # files whose tests share nothing
LEAST = 0.1  # seconds: a test that takes less is not in the record
# seconds without a record: what is long by itself comes first, then the files of many tests, then the short notebooks
LONG = {'test_checks.py::test_processing': 60, 'test_types.py': 50, 'tutorials/': 40, '[audit/3': 30,
        '[lm/3': 30, '[studies/': 30, '[experiments/': 30, 'test_callback.py': 10, 'test_train.py': 10,
        'test_workers.py': 10, 'test_run_faults.py': 10, 'test_notebooks.py': 4}
sys.path.insert(0, str(ROOT/'.ci'))

def pytest_addoption(parser):
    parser.addoption('--flags', default='', help="run notebook cells with these flags too: --flags 'slow trl'")
    parser.addoption('--record', action='store_true', help=f'write how long each test took: {DURATIONS.name}')

def pytest_configure(config):
    # an xdist worker has no terminal and reports to the process that has
    if config.getoption('record') and not hasattr(config, 'workerinput'):
        config.pluginmanager.register(Recorder(config), 'durations')

def group(item: pytest.Item) -> str:
    "On several workers the tests of a file, which share what is slow to make, stay together"
    return item.nodeid if item.path.stem in ALONE else item.path.stem

def bare(nodeid: str) -> str:
    "A test's name without the group that xdist puts behind it"
    head, at, tail = nodeid.rpartition('@')
    return head if at and tail == Path(head.partition('::')[0]).stem else nodeid

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items):
    "Put what takes longest first, by the record, so that no worker waits for another at the end"
    for item in items:
        if item.path.stem not in ALONE: item.add_marker(pytest.mark.xdist_group(item.path.stem))
    yield  # where `-m` takes away what is not asked for
    known = json.loads(DURATIONS.read_text())['seconds'] if DURATIONS.exists() else {}
    guess = {} if known else LONG
    groups = {item: group(item) if item.path.stem not in ALONE else bare(item.nodeid) for item in items}
    seconds = defaultdict(float)
    for item in items:
        name = bare(item.nodeid)
        seconds[groups[item]] += known.get(name, max([LEAST, *(took for part, took in guess.items() if part in name)]))
    items.sort(key=lambda item: -seconds[groups[item]])  # stable: within a file the order is the file's

class Recorder:
    "How long tests take, fixtures included; a test that needed no time is left out"
    def __init__(self, config):
        self.config = config
        self.seconds = defaultdict(float)

    def pytest_runtest_logreport(self, report):
        self.seconds[bare(report.nodeid)] += report.duration

    def pytest_sessionfinish(self):
        kept = {name: round(took, 1) for name, took in sorted(self.seconds.items()) if took >= LEAST}
        option = self.config.option
        record = dict(
            config=dict(tests=len(self.seconds), workers=option.numprocesses or 1, marks=option.markexpr,
                        flags=option.flags, least_seconds=LEAST),
            versions=dict(python=platform.python_version()) | {name: version(name) for name in ('torch', 'pytest')},
            hardware=f'{platform.machine()}, {os.cpu_count()} CPUs', sum_seconds=round(sum(self.seconds.values())),
            seconds=kept)
        DURATIONS.write_text(json.dumps(record, indent=1) + '\n')
