"A study of refusals and a reward audit as a user runs them: killed and continued, and with what cannot work."
import json

import pytest
import yaml
from commands import killed, lines, refused, run

from ches_align.lm.tiny import save_tiny_model

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp('refusals')
    save_tiny_model(where/'model')
    talks = [f'\n\nHuman: How do I do thing {i}?\n\nAssistant: By step {i}.\n\nHuman: And then?\n\nAssistant: Rest'
             for i in range(50)]
    rows = [dict(chosen=f'{t}.', rejected=f'{t} well.') for t in talks]
    (where/'talks.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    study = dict(kind='refusal', model='model', prompts='talks.jsonl', limit=24,
                 teach=dict(limit=26, num_train_epochs=1, learning_rate=1e-2), test=.3, max_new_tokens=8,
                 keep=.3, probes=4, max_length=64, arms=['dpo', 'filtered', 'gold'],
                 train=dict(learning_rate=1e-3, per_device_train_batch_size=4, gradient_accumulation_steps=1))
    (where/'study.yaml').write_text(yaml.safe_dump(study))
    (where/'tasks.jsonl').write_text(''.join(json.dumps(dict(prompt=f'Task {i}', answer='a')) + '\n' for i in range(8)))
    return where

@pytest.mark.full
def test_refusals_killed_and_run_again(place):
    "The finished lines stay, the others follow; the table is that of a run in one go"
    done = run(place, 'train', 'study.yaml', '--set', 'output_dir=whole')
    assert done.returncode == 0 and 'table: whole/table.csv' in done.stdout, done.stderr
    killed(place, place/'killed'/'runs.jsonl', 'train', 'study.yaml', '--set', 'output_dir=killed')
    assert 1 <= len(lines(place/'killed'/'runs.jsonl')) < 4
    assert run(place, 'train', 'study.yaml', '--set', 'output_dir=killed').returncode == 0
    assert lines(place/'killed'/'runs.jsonl') == lines(place/'whole'/'runs.jsonl')
    assert (place/'killed'/'rates.png').exists()

def first_change(value): return value[0] if isinstance(value, list) else ''

@pytest.mark.parametrize('changes, words', [
    (['arms=[dpoo]'], "arm 'dpoo'"), (['limit=60'], '50 prompts, the study needs 60'),
    (['prompts=nowhere.jsonl'], 'no such file'), (['teach=null'], 'arm gold needs a file'),
    (['judge=sorry'], 'needs a template'), (['model=nowhere'], 'nowhere')],
    ids=first_change)
def test_what_cannot_work(place, changes, words, monkeypatch):
    "One line and exit code 1, from the command's own function"
    monkeypatch.chdir(place)
    assert words in refused('train', 'study.yaml', set=['output_dir=wrong', *changes])
    assert not (place/'wrong'/'manifest.json').exists()

@pytest.mark.full
def test_reward_audit_killed_and_run_again(place):
    "The same table and rows, and what was drawn is not drawn again"
    asked = ['spread', 'tasks.jsonl', '--model', 'model', '--reward', 'contains', '--max_responses', '16',
             '--min_responses', '4', '--max_new_tokens', '6', '--reward_range', '0', '1', '--batch_tokens', '200',
             '--output_dir']
    done = run(place, *asked, 'audit')
    assert done.returncode == 0 and '8 prompts' in done.stdout, done.stderr
    killed(place, place/'cut'/'round0'/'responses.jsonl', *asked, 'cut')
    assert not (place/'cut'/'table.csv').exists()
    assert run(place, *asked, 'cut').returncode == 0
    for name in ('table.csv', 'rows.jsonl'): assert (place/'cut'/name).read_text() == (place/'audit'/name).read_text()
    assert 'holds another run' in run(place, *asked, 'audit', '--seed', '1').stderr
