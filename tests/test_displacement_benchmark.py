"The scripts of benchmarks/displacement on a tiny model: every arm runs, continues, and is recorded."
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from commands import ENV

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT/'benchmarks'/'displacement'
sys.path.insert(0, str(PLACE))

def script(name, *args):
    "Exit code, and what it printed"
    done = subprocess.run([sys.executable, str(PLACE/f'{name}.py'), *map(str, args)], capture_output=True, text=True,
                          env=ENV, timeout=600)
    return done.returncode, (done.stdout + done.stderr).strip()

def rows_of(folder):
    rows = [json.loads(line) for line in (folder/'runs.jsonl').read_text().splitlines()]
    return [row for row in rows if not row['key'].startswith(('start|', 'slopes|'))]

def test_map_runs_continues_and_is_of_one_plan(tmp_path):
    code, printed = script('map', tmp_path/'a', '--tiny', '--cell', 'default')
    assert code == 0, printed
    first = rows_of(tmp_path/'a')
    assert [row['start'] for row in first] == ['base', 'fit1', 'fit2', 'fit3']
    assert all([reading['steps'] for reading in row['readings']] == [2, 4] for row in first)
    assert first[0]['before'] != first[1]['before'] != first[2]['before']  # fitted further and further
    code, printed = script('map', tmp_path/'a', '--tiny', '--cell', 'default', 'lora', 'on_policy')
    assert code == 0, printed
    again = rows_of(tmp_path/'a')
    assert again[:4] == first and {row['cell'] for row in again} == {'default', 'lora', 'on_policy'}
    own = next(row for row in again if row['cell'] == 'on_policy')
    assert own['rows'] == first[0]['rows'] and own['before'] != first[0]['before']
    assert own['readings'][0].keys() == {'steps', 'trained', 'unseen', 'unseen_of_data'}

@pytest.mark.parametrize('options, words', [
    ([], 'map: --data: alpacafarm=PATH is missing'), (['--tiny', '--cell', 'typo'], '--cell typo: one of default'),
    (['--tiny', '--pool', '7'], '--pool 7: one of 0'), (['--data', 'hh'], '--data hh: write NAME=PATH')])
def test_map_refuses(options, words, tmp_path):
    code, printed = script('map', tmp_path, *options)
    assert code == 1 and words in printed and 'Traceback' not in printed

def test_starts_are_known_by_what_made_them(tmp_path):
    from ches_align.core.errors import ChesError
    from pools import fit_start, read_block, read_plan, tiny_start
    plan = read_plan(PLACE/'map'/'plan.yaml', True)
    lm = tiny_start()
    pairs = read_block(plan, 'hh', 'sample', lm, 0)[:plan['trained']]
    fit_start(plan, lm, pairs, 'fit1', [], tmp_path)
    fitted = lm.model.get_output_embeddings().weight.detach().clone()
    (tmp_path/'fit2.safetensors').write_bytes(b'cut off')  # weights without a stamp: made again
    fit_start(plan, tiny_start(), pairs, 'fit2', [], tmp_path)
    again = tiny_start()
    fit_start(plan, again, pairs, 'fit1', [], tmp_path)
    assert torch.equal(again.model.get_output_embeddings().weight, fitted)
    for other in (plan | dict(fit=plan['fit'] | dict(learning_rate=1e-2)), plan | dict(passes=dict(fit1=9))):
        with pytest.raises(ChesError, match='fit1.safetensors: another start'):
            fit_start(other, again, pairs, 'fit1', [], tmp_path)
    with pytest.raises(ChesError, match='another start'):
        fit_start(plan, again, pairs[::-1], 'fit1', [], tmp_path)

def test_records_of_two_plans_are_refused(tmp_path):
    from ches_align.core.errors import ChesError
    from ches_align.core.run import open_run
    from pools import write_record
    for name, steps in dict(a=4, b=5).items():
        with open_run(tmp_path/name, dict(plan=dict(steps=steps), data={}, tiny=False)) as run:
            run.add(dict(key=name, seconds=1.5))
    write_record([tmp_path/'a', tmp_path/'a'], tmp_path/'one.json', dict(steps=4))
    assert [row['key'] for row in json.loads((tmp_path/'one.json').read_text())['runs']] == ['a']
    with pytest.raises(ChesError, match='b: not of this plan .*plan.steps was 5, is 4'):
        write_record([tmp_path/'a', tmp_path/'b'], tmp_path/'two.json', dict(steps=4))
    assert not (tmp_path/'two.json').exists()

def test_masks_take_the_tokens_that_pull_most():
    from mitigate import Remedies, masked
    slopes = [torch.tensor([3., -1., 0.]), torch.tensor([2., -5., 1., .5])]
    remedies = Remedies(None, slopes, 0.)
    assert [one.tolist() for one in masked(dict(mask='influence', share=2/7), remedies, 0)] == [[0, 1, 1], [0, 1, 1, 1]]
    drawn = masked(dict(mask='random', share=2/7), remedies, 0)
    assert sum((one == 0).sum() for one in drawn) == 2

@pytest.mark.full
@pytest.mark.parametrize('name, count', [('map', 30), ('mitigate', 18)])
def test_every_arm_runs(name, count, tmp_path):
    code, printed = script(name, tmp_path, '--tiny')
    assert code == 0, printed
    rows = rows_of(tmp_path)
    assert len({row['key'] for row in rows}) == count
    for row in rows:
        numbers = torch.tensor([reading['unseen'] for reading in row['readings']])
        assert numbers.isfinite().all() and numbers.abs().max() > 0

@pytest.mark.full
def test_table_and_its_case(tmp_path):
    for _ in range(2):  # the second goes on where nothing is missing
        code, printed = script('table', tmp_path, '--tiny')
        assert code == 0 and 'fitted 0 ' in printed, printed
    from predict import judge, load_case, make_case
    case = make_case(tmp_path/'fitted-0'/'validation', 'hh_harmless-tiny')
    (tmp_path/'case.json').write_text(json.dumps(case))
    tables = judge(load_case(tmp_path/'case.json'))
    assert set(tables) == {'single', 'batch', 'run'} and 'influence' in set(tables['batch'].score)

def test_a_score_foresees_in_every_pool_and_further_than_lengths():
    from predict import over_pools
    names = ['chosen_tokens', 'rejected_tokens', 'length', 'good', 'torn', 'weak', 'empty']
    tables = [pd.DataFrame(dict(score=names, rho=rhos)) for rhos in (
        [.1, -.3, 0., .5, .9, .1, None], [.1, -.5, 0., .4, -.1, .2, .9])]
    pooled = over_pools(tables)
    assert pooled.foresees.index[pooled.foresees].tolist() == ['good']
    assert pooled.loc['good', ['mean', 'lowest', 'highest']].astype(float).round(6).tolist() == [.45, .4, .5]
    assert pooled['mean'].isna().tolist() == [name == 'empty' for name in names]  # no number in one pool: none

@pytest.mark.full
def test_persona_on_many_prompts(tmp_path):
    rows = [dict(question=f'Is {k} more than {k - 1}?', answer_matching_behavior=' Yes' if k % 2 else ' No')
            for k in range(60)]
    (tmp_path/'persona.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    code, printed = script('persona', tmp_path/'out', '--tiny', '--data', f"persona={tmp_path/'persona.jsonl'}")
    assert code == 0, printed
    rows = rows_of(tmp_path/'out')
    assert [(row['start'], row['chosen']) for row in rows] == [
        ('base', 'No'), ('fitted', 'No'), ('base', 'Yes'), ('fitted', 'Yes')]
    fitted = rows[1]['readings'][0]['trained']
    assert sum(row[0] for row in fitted)/len(fitted) > rows[0]['readings'][0]['trained'][0][0] + .7  # twice as likely
