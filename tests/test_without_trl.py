"TRL and PEFT are an extra: who only reads, checks or trains without them needs neither."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import save_tiny

ROOT = Path(__file__).resolve().parent.parent
BLOCK = "import sys; sys.modules['trl'] = sys.modules['peft'] = None; "

def python(code, *args):
    "Run code in a process that has neither"
    return subprocess.run([sys.executable, '-c', BLOCK + code, *map(str, args)], capture_output=True, text=True,
                          timeout=240, env=os.environ | dict(OMP_NUM_THREADS='1'))

READERS = ('studies.refusal_report', 'studies.subset_report', 'studies.refusal_plan', 'studies.arms', 'training.train',
           'training.train_plan', 'watch.callback', 'studies.grid_report', 'spread.watch')

def test_readers_and_plans():
    done = python('import importlib; [importlib.import_module("ches_align." + m) for m in sys.argv[1:]]; '
                  'assert sys.modules["trl"] is None; print("all")', *READERS)
    assert done.returncode == 0 and done.stdout.strip() == 'all', done.stderr[-2000:]

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp('place')
    save_tiny(place/'tiny')
    rows = [dict(prompt=f'Q{i}:', chosen=' yes indeed', rejected=' no') for i in range(8)]
    (place/'pairs.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return place

def train(place, config, *flags):
    (place/'start.py').write_text(BLOCK + 'from ches_align.cli.main import main; main()')
    return subprocess.run([sys.executable, place/'start.py', 'train', config, *flags], capture_output=True, text=True,
                          timeout=240, env=os.environ | dict(OMP_NUM_THREADS='1'))

def preference(place, **changed):
    settings = dict(kind='preference', model=str(place/'tiny'), data=str(place/'pairs.jsonl'),
                    output_dir=str(place/'out'))
    (place/'run.yaml').write_text(yaml.safe_dump(settings | changed))
    return place/'run.yaml'

def test_a_preference_run_is_checked_and_training_says_what_is_missing(place):
    done = train(place, preference(place), '--check')
    assert done.returncode == 0 and '8 of 8 pairs usable' in done.stdout, done.stderr[-2000:]
    done = train(place, preference(place))
    assert done.returncode == 1 and 'Traceback' not in done.stderr, done.stderr[-2000:]
    assert "TRL is not installed, and training needs it: pip install 'ches_align[train]'" in done.stderr
    done = train(place, preference(place, lora={}), '--check')
    assert done.returncode == 1 and 'PEFT is not installed' in done.stderr and 'Traceback' not in done.stderr

@pytest.mark.parametrize('path', ['persona/smollm2_dpo.yaml', 'grue/smollm2_heuristics.yaml'])
def test_other_kinds_are_checked(place, path):
    done = train(place, ROOT/'configs'/path, '--check')
    print(done.stdout, done.stderr)
    assert 'No module named' not in done.stderr and 'is not installed' not in done.stderr, done.stderr[-2000:]
    assert 'Traceback' not in done.stderr and (done.stdout or done.stderr.startswith('ches train: '))
