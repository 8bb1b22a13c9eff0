"A study of refusals and a reward audit as a user runs them: killed and continued, and with what cannot work."
import json

import pytest
import yaml
from commands import killed, lines, run
from conftest import save_tiny

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp('refusals')
    save_tiny(where/'model')
    talks = [f'\n\nHuman: How do I do thing {i}?\n\nAssistant: By step {i}.\n\nHuman: And then?\n\nAssistant: Rest'
             for i in range(50)]
    rows = [dict(chosen=f'{t}.', rejected=f'{t} well.') for t in talks]
    (where/'talks.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    study = dict(kind='refusal', model='model', prompts='talks.jsonl', count=24,
                 teach=dict(count=26, epochs=1, learning_rate=1e-2), test=.3, max_new_tokens=8, keep=.3, probes=4,
                 max_length=64, arms=['dpo', 'filtered', 'gold'],
                 train=dict(learning_rate=1e-3, batch=4, accumulation=1))
    (where/'study.yaml').write_text(yaml.safe_dump(study))
    (where/'tasks.jsonl').write_text(''.join(json.dumps(dict(prompt=f'Task {i}', answer='a')) + '\n' for i in range(8)))
    return where

@pytest.mark.full
def test_refusals_killed_and_run_again(place):
    "The finished lines stay, the others follow; the table is that of a run in one go"
    done = run(place, 'ches_train', 'study.yaml', '--set', 'out=whole')
    assert done.returncode == 0 and 'table: whole/table.csv' in done.stdout, done.stderr
    killed(place, place/'killed'/'runs.jsonl', 'ches_train', 'study.yaml', '--set', 'out=killed')
    assert 1 <= len(lines(place/'killed'/'runs.jsonl')) < 4
    assert run(place, 'ches_train', 'study.yaml', '--set', 'out=killed').returncode == 0
    assert lines(place/'killed'/'runs.jsonl') == lines(place/'whole'/'runs.jsonl')
    assert (place/'killed'/'rates.png').exists()

@pytest.mark.parametrize('changes, said', [
    (['arms=[dpoo]'], "arm 'dpoo'"), (['count=60'], '50 prompts, the study needs 60'),
    (['prompts=nowhere.jsonl'], 'no such file'), (['teach=null'], 'arm gold needs a file'),
    (['judge=sorry'], 'needs a template'), (['model=nowhere'], 'nowhere')],
    ids=lambda v: v[0] if isinstance(v, list) else '')
def test_what_cannot_work(place, changes, said, monkeypatch):
    "One line and exit code 1, from the command's own function"
    from ches_align.cli_train import ches_train
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as stop: ches_train('study.yaml', set=['out=wrong', *changes])
    assert said in str(stop.value) and '\n' not in str(stop.value) and not (place/'wrong'/'manifest.json').exists()

@pytest.mark.full
def test_reward_audit_killed_and_run_again(place):
    "The same table and rows, and what was drawn is not drawn again"
    asked = ['ches_reward_std', 'tasks.jsonl', '--model', 'model', '--reward', 'contains', '--samples', '16',
             '--first', '4', '--max_new_tokens', '6', '--low', '0', '--high', '1', '--batch_tokens', '200', '--out']
    done = run(place, *asked, 'audit')
    assert done.returncode == 0 and '8 prompts' in done.stdout, done.stderr
    killed(place, place/'cut'/'round0'/'responses.jsonl', *asked, 'cut')
    assert not (place/'cut'/'table.csv').exists()
    assert run(place, *asked, 'cut').returncode == 0
    for name in ('table.csv', 'rows.jsonl'): assert (place/'cut'/name).read_text() == (place/'audit'/name).read_text()
    assert 'holds runs of another' in run(place, *asked, 'audit', '--seed', '1').stderr
