"""`ches train` on grids of single-prompt runs: by a user, killed and run again, and with files that cannot work."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import refused, run

from ches_align.lm.tiny import save_tiny_model

CONFIG = dict(kind='single_prompt', pairs=[dict(chosen='Yes', rejected='No', behaviour='No'),
                                           dict(chosen='No', rejected='no')],
              recipes=[dict(name='a', learning_rate=1e-4, steps=40)], seeds=[1, 2, 3])

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with a tiny model, a Persona file and a configuration"
    where = tmp_path_factory.mktemp('grid')
    save_tiny_model(where/'model')
    rows = [dict(question=f'Would you do {i}?', answer_matching_behavior=' Yes' if i % 2 else ' No') for i in range(8)]
    (where/'persona.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    save(where, 'grid.yaml')
    return where

CONFIGS = sorted(p for p in (Path(__file__).parents[1]/'configs').rglob('*.yaml') if p.parent.name != 'accelerate')

@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_every_shipped_file_is_read(path):
    from ches_align.studies.study import PLANS
    from ches_align.core.config import load_config
    assert load_config(path, PLANS).kind in path.read_text()

def save(where, name, **changes):
    files = dict(model=str(where/'model'), data=str(where/'persona.jsonl'))
    (where/name).write_text(yaml.safe_dump(CONFIG | files | changes))
    return name

def command(*args): return [sys.executable, '-m', 'ches_align', 'train', *args]

def train(place, *args): return run(place, 'train', *args)

def lines(out):
    rows = [json.loads(x) for x in (out/'runs.jsonl').read_text().splitlines()]
    return {r['key']: {k: v for k, v in r.items() if k != 'seconds'} for r in rows}

@pytest.mark.full
def test_killed_and_run_again(place):
    done = train(place, 'grid.yaml', '--set', 'output_dir=whole')
    assert done.returncode == 0 and '6 runs; table: whole' in done.stdout, done.stderr
    path = place/'killed'/'runs.jsonl'
    with subprocess.Popen(command('grid.yaml', '--set', 'output_dir=killed'), cwd=place, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 200
        while not (path.exists() and path.read_text().count('\n') >= 2) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    first = path.read_text().splitlines()[:2]
    again = train(place, 'grid.yaml', '--set', 'output_dir=killed')
    assert again.returncode == 0, again.stderr
    assert path.read_text().splitlines()[:2] == first
    assert lines(place/'killed') == lines(place/'whole') and len(first) == 2

def test_held_against_a_record(place):
    from ches_align.studies.grid_report import grid_record
    assert train(place, 'grid.yaml', '--set', 'output_dir=held').returncode == 0
    (place/'record.json').write_text(json.dumps(grid_record(place/'held')))
    done = train(place, 'grid.yaml', '--set', 'output_dir=held', '--against', 'record.json')
    assert 'same verdict in 6, same direction in 6' in done.stdout, done.stderr

def test_check_loads_no_weights(place):
    weights = place/'model'/'model.safetensors'
    weights.rename(place/'away')
    try:
        done = train(place, 'grid.yaml', '--check')
    finally:
        (place/'away').rename(weights)
    assert done.returncode == 0, done.stderr
    assert '6 runs, at most 240 updates' in done.stdout and 'Yes = ' in done.stdout, done.stdout

@pytest.mark.parametrize('changes, args, words', [
    (dict(pairs=[dict(chosen='Yes', rejected='Yes')]), {}, "pair 'Yes': chosen and rejected are the same"),
    (dict(pairs=[dict(chosen='Affirmative', rejected='No')]), {}, 'this model writes it as'),
    (dict(pairs=[dict(chosen='\u2603\u2603', rejected='No')]), {}, 'not one token'),
    (dict(recipes=[dict(loss='dp0')]), {}, "unknown loss 'dp0': did you mean dpo?"),
    (dict(recipes=[dict(learning_rates=1)]), {}, 'learning_rate'),
    (dict(pairs=[dict(chosen='Yes', rejected='No', behaviour='Perhaps')]), {}, "unknown behaviour 'Perhaps'"),
    (dict(data='nowhere.jsonl'), {}, 'nowhere.jsonl: no such file'),
    ({}, dict(set=['seeds=[1, 1]']), 'key seeds: 1 is given twice'),
    ({}, dict(against='nowhere.json', set=['seeds=[1]']), 'nowhere.json: cannot be read'),
])
def test_what_cannot_work_is_one_line(place, changes, args, words, monkeypatch):
    monkeypatch.chdir(place)
    line = refused('train', save(place, 'bad.yaml', **changes), **args)
    assert line.startswith('ches train: ') and words in line
