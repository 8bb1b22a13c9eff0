"From prompts to preference pairs with the commands as a user runs them: killed, run again, and with wrong input."
import json
import signal
import time
from pathlib import Path

import pytest
from commands import command, done, refused, run, started

from ches_align.lm.tiny import save_tiny_model
from ches_align.lm.pairs import load_pairs

ROOT = Path(__file__).parents[1]

def save(path, rows):
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return path.name

def lines(path): return [json.loads(x) for x in path.read_text().splitlines()]

SMALL = ['sample', '--model', 'model', '--limit', 6, '--max_new_tokens', 16, '--batch_tokens', 160, '--device', 'cpu']

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp('refusal')
    save_tiny_model(where/'model')
    return where

@pytest.fixture(scope='module')
def answers(place):
    "Two answers of a tiny model to six prompts, drawn by a run that was killed and one that went on"
    out = place/'answers'
    process = started(place, command('generate', *SMALL, '--output_dir', 'answers'))
    journal = out/'responses.jsonl'
    deadline = time.monotonic() + 240
    while not (journal.exists() and journal.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = journal.read_text()
    assert 0 < before.count('\n') < 12 and not (out/'rows.jsonl').exists()
    again = run(place, 'generate', *SMALL, '--output_dir', 'answers')
    assert journal.read_text().startswith(before[:before.rfind('\n') + 1])
    assert '12 responses to 6 prompts' in again.stdout, again.stderr
    return out

@pytest.mark.full
def test_generation_continues_and_carries_ids(answers):
    rows = lines(answers/'rows.jsonl')
    assert [(r['id'], r['k']) for r in rows] == [(f'd0{i}', k) for i in range(6) for k in range(2)]
    assert all(r['category'] and r['tokens'] <= 16 and r['response'] for r in rows)
    assert len(lines(answers/'responses.jsonl')) == 12

@pytest.mark.full
def test_judge_pairs_score(place, answers, monkeypatch):
    monkeypatch.chdir(place)
    shown = done('judge', 'answers', output_dir='judged')
    assert 'rule   12' in shown and '95% interval' in shown
    summary = json.loads(Path('judged/refusals.json').read_text())
    assert summary['rows'] == 12 and summary['model'] == 'model' and summary['sampling']['max_new_tokens'] == 16
    shown = done('pairs', 'judged', output_dir='pairs', test=.2)
    counts = json.loads(Path('pairs/split.json').read_text())['counts']
    assert counts['train'] + counts['test'] + counts['left_out'] == 6 and f"train {counts['train']}, test" in shown
    pairs = load_pairs('pairs/train.jsonl')
    assert len(pairs) == counts['train'] >= 4 and not any(p.problem for p in pairs)
    shown = done('score', 'pairs/train.jsonl', model='model', limit=4, dtype='float32', output_dir='scores')
    assert '4 pairs scored by model' in shown and 'flagged: none' in shown

@pytest.mark.full
def test_a_killed_split_is_written_again(place, answers, monkeypatch):
    "A folder of pairs is a run: another split is refused, the same one is written again where a kill left it"
    monkeypatch.chdir(place)
    done('judge', 'answers', output_dir='judged_twice')
    done('pairs', 'judged_twice', output_dir='split')
    before = {f.name: f.read_bytes() for f in Path('split').glob('*.jsonl')}
    manifest = json.loads(Path('split/manifest.json').read_text())
    assert manifest['complete'] and manifest['format'] == 2 and manifest['counts']['train'] > 0
    Path('split/manifest.json').write_text(json.dumps(manifest | dict(complete=False)))
    Path('split/train.jsonl').unlink()
    done('pairs', 'judged_twice', output_dir='split')
    assert {f.name: f.read_bytes() for f in Path('split').glob('*.jsonl')} == before
    assert 'split holds another set of pairs (seed was 128, is 1)' in refused('pairs', 'judged_twice',
                                                                              output_dir='split', seed=1)

@pytest.mark.full
def test_wrong_input_is_one_line(place, answers, monkeypatch):
    monkeypatch.chdir(place)
    two = save(place/'two.jsonl', [dict(prompt='p', response='r', k=k) for k in (0, 1)])
    none = save(place/'none.jsonl', [dict(text='x')])
    single = save(place/'single.jsonl', [dict(prompt='p', response='r', refused=True)])
    assert "unknown judge 'ruel': rule, sorry, or a model" in refused('judge', two, judge='ruel')
    assert 'needs its prompt, which is not shipped here' in refused('judge', two, judge='sorry')
    assert 'none.jsonl: no prompts' in refused('generate', none, model='model')
    assert 'none.jsonl, row 1: no prompt; it has text' in refused('judge', none)
    assert 'is not of an earlier run of this command' in refused('judge', two, output_dir='answers')
    assert 'one response a prompt, a pair needs two' in refused('pairs', single)

ARMS = [p for p in sorted((ROOT/'configs'/'sorry_bench').glob('*.yaml')) if 'kind: preference' in p.read_text()]

def test_the_study_has_the_published_values():
    from ches_align.studies.refusal_plan import RefusalStudy
    from ches_align.core.config import load_config
    study = load_config(ROOT/'configs'/'sorry_bench'/'gemma_2b_it.yaml', dict(refusal=RefusalStudy))
    assert (study.keep, study.test, study.max_new_tokens) == (.05, .15, 512)
    assert (study.pair_temperature, study.rate_temperature) == (1., .7)
    assert (study.by, study.judge, study.gold) == ('ln_ches', 'sorry', 'hub')
    train = study.train
    assert (train.loss, train.optim, train.learning_rate, train.beta) == ('dpo', 'rmsprop', 5e-6, .1)
    assert (train.per_device_train_batch_size, train.pairs_a_step, train.num_train_epochs) == (4, 32, 1)
    assert study.changes == dict(gold=dict(learning_rate=1e-6))

@pytest.mark.parametrize('path', ARMS, ids=lambda p: p.stem)
def test_published_values(path):
    from ches_align.core.config import load_config
    from ches_align.training.memory import read_architecture
    from ches_align.training.train_plan import TrainConfig
    config = load_config(path, dict(preference=TrainConfig))
    model = next(m for m in ('gemma_2b_it', 'llama3_8b_instruct') if path.stem.startswith(m))
    arm = path.stem.removeprefix(f'{model}_')
    here = f'runs/sorry_bench/{model}'
    assert (config.loss, config.beta, config.optim, config.lr_scheduler_type, config.dtype, config.bf16) == (
        'dpo', .1, 'rmsprop', 'constant', 'float32', False)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (4, 8)
    assert config.num_train_epochs == 1
    assert config.output_dir == f'{here}/{arm}'
    assert config.learning_rate == (1e-6 if arm == 'gold' else 5e-6) and (config.sft > 0) == (arm == 'dpo_sft')
    assert config.max_steps == (12 if arm == 'filtered_matched' else None)
    data = dict(gold='pairs/gold_train', filtered='kept19', filtered_matched='kept19').get(arm, 'pairs/train')
    assert config.data == f'{here}/{data}.jsonl'
    assert read_architecture(config.architecture).model_type in config.model.replace('Meta-Llama', 'llama')
