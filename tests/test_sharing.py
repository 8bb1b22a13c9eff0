"Prompts computed once: pairs of one prompt in any order give the table of responses apart, in one process or two."
import json

import pandas as pd
import pytest
from commands import run, run_two

from ches_align.lm.tiny import save_tiny_model
from ches_align.audit.pair_scores import COLUMNS, NOTES
from ches_align.audit.scoring import load_scores

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "Every prompt has all six pairs of four responses, the way rated answers become pairs"
    where = tmp_path_factory.mktemp('sharing')
    save_tiny_model(where/'model')
    words = ['yes, of course', 'no', 'never in my life', 'well, perhaps']
    rows = [dict(prompt=f'Question {q}: ' + 'and so on ' * q, chosen=a, rejected=b)
            for a in words for b in words for q in range(9) if a < b]
    (where/'pairs.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    for wish in ('yes', 'no'):
        done = run(where, 'score', 'pairs.jsonl', '--model', 'model', '--output_dir', wish, '--share_prompt', wish)
        assert done.returncode == 0, done.stderr
    return where

def test_the_same_scores(place):
    shared = load_scores(place/'yes')
    apart = load_scores(place/'no')
    manifests = [t.attrs['manifest'] for t in (shared, apart)]
    assert [m['share_prompt'] for m in manifests] == [True, False]
    assert 'prompts shared' in manifests[0]['sharing'] and 'as asked' in manifests[1]['sharing']
    assert len(shared) == 54 and list(shared) == list(COLUMNS | NOTES)
    # fp32, other kernels; CHES cancels
    pd.testing.assert_frame_equal(shared, apart, check_exact=False, rtol=1e-3, atol=1e-3)

def test_two_processes_share_to_the_bit(place):
    done = run_two(place, 'score', 'pairs.jsonl', '--model', 'model', '--output_dir', 'two', '--share_prompt', 'yes')
    assert done.returncode == 0, done.stderr
    pd.testing.assert_frame_equal(load_scores(place/'two'), load_scores(place/'yes'), check_exact=True)

@pytest.mark.parametrize('args, words', [
    (['--share_prompt', 'maybe', '--output_dir', 'x'], 'one of auto, yes, no'),
    (['--share_prompt', 'no', '--output_dir', 'yes'], 'share_prompt was True, is False')], ids=['wish', 'other'])
def test_refused(place, args, words):
    done = run(place, 'score', 'pairs.jsonl', '--model', 'model', *args)
    assert done.returncode == 1 and words in done.stderr and 'Traceback' not in done.stderr
