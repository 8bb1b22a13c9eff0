"Scoring and reward audits by two processes: one table, to the bit; what is cut off goes on; what cannot work ends all."
import json, os, signal, subprocess, time

import pandas as pd
import pytest
from commands import command_two, launched_two, run, run_two, started

from ches_align.lm.tiny import save_tiny_model
from ches_align.lm.pairs import load_pairs
from ches_align.audit.scoring import load_scores

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp('workers')
    save_tiny_model(where/'model')
    rows = [dict(prompt=p.prompt, chosen=p.chosen, rejected=p.rejected) for p in load_pairs('sample')]*2
    rows.append(dict(prompt='a', chosen='b', rejected='b'))
    (where/'pairs.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    assert run(where, 'score', 'pairs.jsonl', '--model', 'model', '--output_dir', 'one').returncode == 0
    return where

@pytest.mark.parametrize('start', [run_two, pytest.param(launched_two, marks=pytest.mark.full)])
def test_two_processes_one_table(place, start):
    out = start.__name__
    done = start(place, 'score', 'pairs.jsonl', '--model', 'model', '--output_dir', out)
    assert done.returncode == 0 and done.stdout.count('pairs scored by model') == 1, done.stderr
    one = load_scores(place/'one')
    two = load_scores(place/out)
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert len(one.attrs['token_scores']) > 1000 and one.attrs['token_scores'] == two.attrs['token_scores']
    assert [s.attrs['manifest']['processes'] for s in (one, two)] == [1, 2] and two.attrs['manifest']['complete']

@pytest.mark.full
def test_a_killed_process_loses_its_open_shard(place):
    "The launcher ends the other; finished shards are not made again"
    out = place/'cut'
    process = started(place, command_two('score', 'pairs.jsonl', '--model', 'model', '--output_dir', 'cut'))
    end = time.time() + 200
    workers = []
    while process.poll() is None and time.time() < end:
        children = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout
        workers = [int(p) for p in children.split()]
        if len(workers) > 1 and len(list(out.glob('scores/*.parquet'))) > 2: break
        time.sleep(.005)
    os.kill(workers[-1], signal.SIGKILL)
    assert process.wait(100) != 0
    kept = {f: f.stat().st_mtime_ns for f in out.glob('scores/*.parquet')}
    assert len(kept) > 2 and not json.loads((out/'manifest.json').read_text())['complete']
    assert run_two(place, 'score', 'pairs.jsonl', '--model', 'model', '--output_dir', 'cut').returncode == 0
    assert all(f.stat().st_mtime_ns == t for f, t in kept.items())
    pd.testing.assert_frame_equal(load_scores(out), load_scores(place/'one'), check_exact=True)

@pytest.mark.parametrize('args, words', [
    (['--limit', '5', '--output_dir', 'one'], 'holds another run'),
    pytest.param(['--output_dir', '/proc/no'], 'cannot be written', marks=pytest.mark.full)], ids=['other', 'folder'])
def test_what_cannot_work_ends_both(place, args, words):
    done = run_two(place, 'score', 'pairs.jsonl', '--model', 'model', *args)
    assert done.returncode != 0, done.stderr
    assert done.stderr.count(f'ches score: {words}' if words.startswith('/') else words) == 2, done.stderr

def test_two_processes_audit_rewards(place):
    "Each draws what it takes from the counter; texts, rewards and table are those of one process"
    (place/'tasks.jsonl').write_text(''.join(json.dumps(dict(prompt=f'Task {i}', answer='a')) + '\n' for i in range(8)))
    asked = ['tasks.jsonl', '--model', 'model', '--reward', 'contains', '--max_responses', '8', '--min_responses', '4',
             '--max_new_tokens', '6', '--reward_range', '0', '1', '--batch_tokens', '100', '--output_dir']
    assert run(place, 'spread', *asked, 'audit1').returncode == 0
    done = run_two(place, 'spread', *asked, 'audit2')
    assert done.returncode == 0 and done.stdout.count('8 prompts, ') == 1, done.stderr
    for name in ('table.csv', 'rows.jsonl'):
        assert (place/'audit1'/name).read_text() == (place/'audit2'/name).read_text()
    assert (place/'audit2'/'round0'/'responses-1.jsonl').exists()
