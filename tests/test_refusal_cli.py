"From prompts to preference pairs with the commands as a user runs them: killed, run again, and with wrong input."
import json
import os
import signal
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import pytest

from ches_align.audit.data import load_pairs

ROOT = Path(__file__).parents[1]
CONFIG = ConfigParser(delimiters=['='])
CONFIG.read(ROOT/'settings.ini')
ENTRIES = dict(line.split('=') for line in CONFIG['DEFAULT']['console_scripts'].split())
SHELL = '''import sys
from {module} import {function}
if __name__ == '__main__':
    sys.argv[0] = {name!r}
    sys.exit({function}())
'''

@pytest.fixture(scope='module')
def start(tmp_path_factory):
    "Commands as settings.ini registers them, in the shell that pip writes around an entry, in one folder"
    place = tmp_path_factory.mktemp('refusal')
    def begin(name, *args):
        module, function = ENTRIES[name].split(':')
        script = place/f'{name}.command'
        script.write_text(SHELL.format(module=module, function=function, name=name))
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
        return subprocess.Popen([sys.executable, str(script), *map(str, args)], cwd=place, text=True,
                                env=os.environ | dict(PYTHONPATH=paths), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    begin.place = place
    return begin

def end(process, ok=True):
    out, err = process.communicate(timeout=300)
    assert process.returncode == (0 if ok else 1), out + err
    return out if ok else err

def save(path, rows): path.write_text(''.join(json.dumps(r) + '\n' for r in rows)); return path.name

def lines(path): return [json.loads(x) for x in path.read_text().splitlines()]

SMALL = ['sample', '--limit', 6, '--max_new_tokens', 16, '--batch_tokens', 160, '--device', 'cpu']

@pytest.fixture(scope='module')
def answers(start):
    "Two answers of the embedded model to six prompts, drawn by a run that was killed and one that went on"
    out = start.place/'answers'
    process, journal = start('ches_generate', *SMALL, '--out', 'answers'), out/'responses.jsonl'
    deadline = time.monotonic() + 240
    while not (journal.exists() and journal.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(.01)
    process.send_signal(signal.SIGKILL); process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = journal.read_text()
    assert 0 < before.count('\n') < 12 and not (out/'rows.jsonl').exists()
    said = end(start('ches_generate', *SMALL, '--out', 'answers'))
    assert journal.read_text().startswith(before[:before.rfind('\n') + 1]) and '12 responses to 6 prompts' in said
    return out

@pytest.mark.full
def test_generation_continues_and_carries_ids(answers):
    rows = lines(answers/'rows.jsonl')
    assert [(r['id'], r['k']) for r in rows] == [(f'd0{i}', k) for i in range(6) for k in range(2)]
    assert all(r['category'] and r['tokens'] <= 16 and r['response'] for r in rows)
    assert len(lines(answers/'responses.jsonl')) == 12

@pytest.mark.full
def test_judge_pairs_score(start, answers):
    assert 'rule   12' in (said := end(start('ches_judge', 'answers', '--out', 'judged'))) and '95% interval' in said
    judged, place = start.place/'judged', start.place
    made = json.loads((judged/'refusals.json').read_text())
    assert made['rows'] == 12 and made['model'] == 'smollm2-135m' and made['sampling']['max_new_tokens'] == 16
    said = end(start('ches_refusal_pairs', 'judged', '--out', 'pairs', '--test', '0.2'))
    counts = json.loads((place/'pairs'/'split.json').read_text())['counts']
    assert counts['train'] + counts['test'] + counts['left_out'] == 6 and f"train {counts['train']}, test" in said
    pairs = load_pairs(place/'pairs'/'train.jsonl')
    assert len(pairs) == counts['train'] >= 4 and not any(p.problem for p in pairs)
    said = end(start('ches_score', 'pairs/train.jsonl', '--limit', 4, '--dtype', 'float32', '--out', 'scores'))
    assert '4 pairs scored by smollm2-135m' in said and 'flagged: none' in said

@pytest.mark.full
def test_wrong_input_is_one_line(start, answers):
    place, judge = start.place, 'ches_judge'
    two = save(place/'two.jsonl', [dict(prompt='p', response='r', k=k) for k in (0, 1)])
    none = save(place/'none.jsonl', [dict(text='x')])
    single = save(place/'single.jsonl', [dict(prompt='p', response='r', refused=True)])
    wrong = {
        'ruel': (start(judge, two, '--judge', 'ruel'), "unknown judge 'ruel': rule, sorry, or a model"),
        'template': (start(judge, two, '--judge', 'sorry'), 'needs its prompt, which is not shipped here'),
        'no prompts': (start('ches_generate', none), 'none.jsonl: no prompts'),
        'no responses': (start(judge, none), 'none.jsonl, row 1: no prompt; it has text'),
        'another run': (start(judge, two, '--out', 'answers'), 'is not of an earlier run of this command'),
        'single': (start('ches_refusal_pairs', single), 'one response a prompt, a pair needs two'),
    }
    for name, (process, says) in wrong.items():
        error = end(process, ok=False)
        assert says in error and len(error.strip().splitlines()) == 1, f'{name}: {error}'

ARMS = [p for p in sorted((ROOT/'configs'/'sorry_bench').glob('*.yaml')) if 'kind: preference' in p.read_text()]

def test_the_study_has_the_published_values():
    from ches_align.studies.refusal_plan import RefusalStudy
    from ches_align.training.config import load_config
    c = load_config(ROOT/'configs'/'sorry_bench'/'gemma_2b_it.yaml', dict(refusal=RefusalStudy))
    assert (c.keep, c.test, c.pair_temperature, c.rate_temperature, c.max_new_tokens) == (.05, .15, 1., .7, 512)
    assert (c.by, c.judge, c.gold) == ('ln_ches', 'sorry', 'hub')
    assert {k: c.train[k] for k in ('loss', 'optimizer', 'learning_rate', 'batch', 'accumulation', 'epochs')} == dict(
        loss='dpo', optimizer='rmsprop', learning_rate=5e-6, batch=4, accumulation=8, epochs=1)
    assert c.changes == dict(gold=dict(learning_rate=1e-6))

@pytest.mark.parametrize('path', ARMS, ids=lambda p: p.stem)
def test_published_values(path):
    from ches_align.training.config import load_config
    from ches_align.training.memory import read_architecture
    from ches_align.training.train_config import TrainConfig
    c = load_config(path, dict(preference=TrainConfig))
    model = next(m for m in ('gemma_2b_it', 'llama3_8b_instruct') if path.stem.startswith(m))
    arm = path.stem.removeprefix(f'{model}_')
    here = f'runs/sorry_bench/{model}'
    assert (c.loss, c.loss_args, c.optimizer, c.schedule, c.dtype, c.bf16) == (
        'dpo', dict(beta=.1), 'rmsprop', 'constant', 'float32', False)
    assert (c.batch, c.accumulation, c.epochs, c.out) == (4, 8, 1, f'{here}/{arm}')
    assert c.learning_rate == (1e-6 if arm == 'gold' else 5e-6) and (c.sft > 0) == (arm == 'dpo_sft')
    assert c.max_steps == (12 if arm == 'filtered_matched' else None)
    data = dict(gold='pairs/gold_train', filtered='kept19', filtered_matched='kept19').get(arm, 'pairs/train')
    assert c.data == f'{here}/{data}.jsonl'
    assert read_architecture(c.architecture).model_type in c.model.replace('Meta-Llama', 'llama')
