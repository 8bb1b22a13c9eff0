"A study of subsets as a user runs it: from a file, killed and continued, by two processes, and with what cannot work."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest
import yaml
from commands import refused, run

from ches_align.lm.tiny import save_tiny_model

ENV = os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp('studies')
    save_tiny_model(where/'model')
    study = dict(kind='subsets', model='model', data='sample', limit=40, max_length=48, measures=['ches', 'random'],
                 quantiles=[0, 1], size=8, held_out=6,
                 train=dict(learning_rate=1e-3, per_device_train_batch_size=2, gradient_accumulation_steps=2))
    (where/'study.yaml').write_text(yaml.safe_dump(study))
    return where

def command(*args): return [sys.executable, '-m', 'ches_align', 'train', 'study.yaml', *args]

def train(place, *args): return run(place, 'train', 'study.yaml', *args)

def lines(out):
    rows = [json.loads(x) for x in (out/'runs.jsonl').read_text().splitlines()]
    return {r['key']: {k: v for k, v in r.items() if 'seconds' not in k} for r in rows}

@pytest.mark.full
def test_killed_and_run_again(place):
    "The finished arms stay, the others follow; the table is that of a run in one go"
    done = train(place, '--set', 'output_dir=whole')
    assert done.returncode == 0 and '3 arms; table: whole' in done.stdout, done.stderr
    process = subprocess.Popen(command('--set', 'output_dir=killed'), cwd=place, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=ENV)
    path = place/'killed'/'runs.jsonl'
    end = time.time() + 120
    while not path.exists() and time.time() < end: time.sleep(.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(path.read_text().splitlines())
    assert 1 <= kept < 3
    assert train(place, '--set', 'output_dir=killed').returncode == 0
    assert lines(place/'killed') == lines(place/'whole')
    assert (place/'killed'/'points.png').exists()

@pytest.mark.full
def test_two_processes(place):
    "With the same pairs a step, two processes train an arm to the weights of one: the changes agree"
    asked = train(place, '--set', 'output_dir=two', 'train.gradient_accumulation_steps=1')
    assert asked.returncode == 0, asked.stderr
    config = Path(__file__).parents[1]/'configs/accelerate/ddp_2gpu.yaml'
    launch = ['accelerate.commands.launch', '--config_file', str(config)]
    both = [sys.executable, '-m', *launch, *command()[1:], '--set', 'output_dir=pair',
            'train.per_device_train_batch_size=1', 'train.gradient_accumulation_steps=1']
    early = subprocess.run(both, cwd=place, capture_output=True, text=True, timeout=300, env=ENV)
    assert early.returncode != 0 and 'score first, in one process' in early.stderr
    done = subprocess.run([*both, 'scores=two/scores'], cwd=place, capture_output=True, text=True, timeout=300, env=ENV)
    assert done.returncode == 0 and done.stdout.count('3 arms; table') == 1, done.stderr
    one = lines(place/'two')
    two = lines(place/'pair')
    assert one.keys() == two.keys()
    for key in one:
        apart = max(abs(a - b) for a, b in zip(one[key]['d_chosen'], two[key]['d_chosen']))
        assert apart < 1e-2 and one[key]['steps'] == two[key]['steps']  # sums of 40 tokens after steps of 1e-3

def first_key(value): return value[0].split('=')[0] if isinstance(value, list) else ''

@pytest.mark.parametrize('changes, words', [
    (['measures=[chess]'], "cannot order by 'chess'"),
    (['size=60'], 'the study needs 60 + 6 held out'),
    (['scores=nowhere'], 'no scores there'),
    (['train={learning_rate: 1e-3, lss: dpo}'], 'did you mean loss'),
    (['quantiles=[1.5]'], 'key quantiles, item 1: must be at least 0 and at most 1, is 1.5'),
    (['pool=39'], 'pairs can be trained on'),
    (['data=nowhere.jsonl'], 'no such file')], ids=first_key)
def test_what_cannot_work(place, changes, words, monkeypatch):
    "One line and exit code 1, from the command's own function"
    monkeypatch.chdir(place)
    assert words in refused('train', 'study.yaml', set=['output_dir=wrong', *changes])
    assert not (place/'wrong'/'manifest.json').exists()  # what cannot work claims no folder
