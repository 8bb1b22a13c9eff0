"TRL and PEFT are an extra: who only reads, checks or trains without them needs neither."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ches_align.lm.tiny import save_tiny_model

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
    save_tiny_model(place/'tiny')
    rows = [dict(prompt=f'Q{i}:', chosen=' yes indeed', rejected=' no') for i in range(8)]
    (place/'pairs.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return place

START = """
import json, os, sys
sys.path.insert(0, os.path.join(sys.argv[1], 'tests'))
from commands import ches

print(json.dumps([ches('train', *words) for words in json.loads(sys.argv[2])]))
"""

@pytest.fixture(scope='module')
def ended(place):
    "The command with several command lines, in one process without the libraries: name -> code, stdout, stderr"
    asked = dict(checked=[preference(place, 'plain'), '--check'], trained=[preference(place, 'plain')],
                 adapter=[preference(place, 'adapter', lora={}), '--check'])
    asked |= {name: [ROOT/'configs'/name, '--check'] for name in OTHERS}
    words = [list(map(str, line)) for line in asked.values()]
    done = python(START, ROOT, json.dumps(words))
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(asked, json.loads(done.stdout.splitlines()[-1]), strict=True))

OTHERS = ('persona/smollm2_dpo.yaml', 'grue/smollm2_heuristics.yaml')

def preference(place, name, **changed):
    settings = dict(kind='preference', model=str(place/'tiny'), data=str(place/'pairs.jsonl'),
                    output_dir=str(place/'out'))
    (place/f'{name}.yaml').write_text(yaml.safe_dump(settings | changed))
    return place/f'{name}.yaml'

def test_a_preference_run_is_checked_and_training_says_what_is_missing(ended):
    code, out, err = ended['checked']
    assert code == 0 and '8 of 8 pairs usable' in out, err
    code, _, err = ended['trained']
    assert code == 1 and 'Traceback' not in err, err
    assert "TRL is not installed, and training needs it: pip install 'ches_align[train]'" in err
    code, _, err = ended['adapter']
    assert code == 1 and 'PEFT is not installed' in err and 'Traceback' not in err

@pytest.mark.parametrize('name', OTHERS)
def test_other_kinds_are_checked(ended, name):
    _, out, err = ended[name]
    assert 'No module named' not in err and 'is not installed' not in err, err
    assert 'Traceback' not in err and (out or err.startswith('ches train: '))
