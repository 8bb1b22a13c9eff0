"The commands end to end, as a user runs them: in processes of their own, on files, with what goes wrong in practice."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from ches_align.audit.data import load_pairs
from ches_align.audit.scoring import load_scores

SETTINGS = ['--model', 'smollm2-135m', '--dtype', 'float32', '--batch_tokens', '2048']

def start(command, *args, **kw):
    script = Path(sys.executable).with_name(command)
    return subprocess.Popen([sys.executable, str(script), *map(str, args)], text=True, **kw,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def run(command, *args, ok=True, **kw):
    process = start(command, *args, **kw)
    out, err = process.communicate(timeout=900)
    assert (process.returncode == 0) == ok, out + err
    return out if ok else err

def shards(out): return {f.name: f.stat().st_mtime_ns for f in (out/'scores').glob('*.parquet')}

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Seventy pairs of the sample set (two shards) and rows that cannot be scored"
    path = tmp_path_factory.mktemp('data')/'pairs.jsonl'
    rows = [dict(prompt=p.prompt, chosen=p.chosen, rejected=p.rejected, kind=p.extra['kind'])
            for p in load_pairs('sample', limit=66)]
    def say(role, text): return [dict(role=role, content=text)]
    rows += [dict(prompt=say('user', prompt), chosen=chosen and say('assistant', chosen.strip()),
                  rejected=say('assistant', 'b'), kind='odd')
             for prompt, chosen in (('q', ' '), ('q', 'b'), ('word ' * 3000, 'a'), ('q', None))]
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return path

@pytest.fixture(scope='module')
def audit(data, tmp_path_factory):
    out = tmp_path_factory.mktemp('audit')/'run'
    return out, run('ches_audit', data, *SETTINGS, '--max_length', 2048, '--out', out)

def test_audit_leaves_scores_selection_and_report(audit, data):
    out, printed = audit
    scores = load_scores(out)
    flagged = {s: 1 for s in ('empty_chosen', 'identical', 'prompt_too_long', 'missing_field')}
    assert scores.status.value_counts().to_dict() == {'ok': 66} | flagged
    assert scores.ches[scores.status == 'ok'].notna().all() and scores.ches[scores.status != 'ok'].isna().all()
    kept = pd.read_json(out/'kept.jsonl', lines=True)
    best = scores[scores.status == 'ok'].nsmallest(33, 'ln_ches')
    assert set(kept.row_id) == set(best.row_id) and {'prompt', 'chosen', 'rejected', 'kind'} <= set(kept)
    assert all((out/f).stat().st_size > 1000 for f in ('report.html', 'report.md', 'report.json'))
    table = [line for line in printed.splitlines() if ' | ' in line]
    assert 'report.html' in printed and len(table) == 11  # a heading and ten pairs

@pytest.mark.full
def test_a_killed_run_continues_and_gives_the_same_table(audit, data, tmp_path):
    whole, _ = audit
    out = tmp_path/'run'
    args = data, *SETTINGS, '--max_length', 2048, '--out', out
    process = start('ches_score', *args)
    deadline = time.time() + 240
    while 'part-00001.parquet' not in shards(out) and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL); process.communicate()
    before = shards(out)
    assert process.returncode == -signal.SIGKILL and set(before) == {'part-00000.parquet', 'part-00001.parquet'}
    assert not json.loads((out/'manifest.json').read_text())['complete']
    run('ches_score', *args)
    after = shards(out)
    assert {k: after[k] for k in before} == before and len(after) == 3  # what was done was not done again
    pd.testing.assert_frame_equal(load_scores(out), load_scores(whole))
    assert not list(out.rglob('*.partial'))

def test_another_run_is_not_continued(audit, data):
    out, _ = audit
    before = shards(out)
    error = run('ches_score', data, *SETTINGS, '--max_length', 1024, '--out', out, ok=False)
    assert 'max_length was 2048, is 1024' in error and 'another --out' in error and shards(out) == before
    other = out.parent/'other.jsonl'
    other.write_text(data.read_text().replace('word word', 'word wort', 1))
    error = run('ches_score', other, *SETTINGS, '--max_length', 2048, '--out', out, ok=False)
    assert 'data_hash was' in error and shards(out) == before

def test_filter_and_report_from_the_run_alone(audit, tmp_path):
    out, _ = audit
    run('ches_filter', out, '--count', 10, '--highest', '--by', 'ches', '--out', tmp_path/'top.parquet')
    scores = load_scores(out)
    assert set(pd.read_parquet(tmp_path/'top.parquet').row_id) == set(scores.nlargest(10, 'ches').row_id)
    run('ches_filter', out, '--keep', '0.5', '--control', 'random', '--out', tmp_path/'random.jsonl')
    run('ches_filter', out, '--weights', '--out', tmp_path/'soft.jsonl')
    soft = pd.read_json(tmp_path/'soft.jsonl', lines=True)
    assert len(soft) == 66 and abs(soft.weight.mean() - 1) < 1e-9
    run('ches_report', out, '--out', tmp_path/'page')
    assert '</html>' in (tmp_path/'page'/'report.html').read_text()

def test_filter_refuses_other_data(audit, tmp_path):
    out, _ = audit
    other = tmp_path/'other.jsonl'
    other.write_text(ROW * 70)
    error = run('ches_filter', out, '--data', other, '--out', tmp_path/'x.jsonl', ok=False)
    assert 'not the data that were scored' in error and not (tmp_path/'x.jsonl').exists()

def one_line(error): return len(error.strip().splitlines()) == 1 and 'Traceback' not in error

ROW = '{"prompt": "p", "chosen": "a", "rejected": "b"}\n'

@pytest.mark.parametrize('name, content, args, says', [
    ('columns.jsonl', ROW.replace('chosen', 'good'), (), 'no column for the chosen response; it has good'),
    ('empty.jsonl', '', (), 'the file is empty'),
    ('blank.jsonl', '\n\n', (), 'no rows'),
    ('seven.jsonl', ROW * 6 + '{"prompt": "p",\n', (), 'line 7: not JSON'),
    ('list.json', '{"prompt": "p"}', (), 'must hold a list of objects'),
    ('ragged.csv', 'prompt,chosen,rejected\np,a,b,c\n', (), 'line 2: more cells than columns'),
    ('fake.parquet', 'PAR1 not', (), 'not a readable parquet file'),
    ('fine.jsonl', ROW, ('--model', './no/such/model'), 'no such file or folder'),
    ('fine.jsonl', ROW, ('--model', 'no/such-model'), 'cannot be loaded'),
    ('fine.jsonl', ROW, ('--convention', 'mine'), 'must be one of paper, official_script'),
    ('fine.jsonl', ROW, ('--max_length', '1'), 'must be a whole number from 2'),
    ('fine.jsonl', ROW, ('--columns', 'chosen:a'), 'must read like'),
])
def test_wrong_input_is_one_line(tmp_path, name, content, args, says):
    (tmp_path/name).write_text(content)
    error = run('ches_score', tmp_path/name, '--out', tmp_path/'out', *args, ok=False)
    assert says in error and one_line(error), error

def test_no_permission(tmp_path, data):
    locked = tmp_path/'locked'
    locked.mkdir(mode=0o555)
    for folder in (tmp_path, *tmp_path.parents[:2]): os.chmod(folder, 0o755)
    code = '\n'.join(['import os', 'from pathlib import Path', 'from ches_align.audit.runs import write_files',
                      'if not os.geteuid(): os.setgid(65534); os.setuid(65534)  # root may write anywhere: be nobody',
                      f"write_files({{Path({str(locked/'x')!r}): b'x'}})"])
    got = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'AuditError' in got.stderr and 'Permission denied' in got.stderr, got.stderr

@pytest.fixture
def tiny_disk(tmp_path):
    place = tmp_path/'disk'
    place.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', str(place)], capture_output=True).returncode:
        pytest.skip('needs the right to mount a small tmpfs')
    yield place
    subprocess.run(['umount', str(place)], check=True)

def test_full_disk_keeps_what_was_finished(tiny_disk, data):
    out = tiny_disk/'run'
    (tiny_disk/'ballast').write_bytes(bytes(24 << 10))
    error = run('ches_score', data, *SETTINGS, '--max_length', 2048, '--out', out, ok=False)
    assert 'No space left on device' in error and 'what was finished is kept' in error and error.count('\n') <= 3, error
    kept = shards(out)
    (tiny_disk/'ballast').unlink()
    run('ches_score', data, *SETTINGS, '--max_length', 2048, '--out', out)
    assert kept.items() <= shards(out).items() and len(load_scores(out)) == 70

def test_help_names_every_flag_and_loads_nothing_heavy():
    text = run('ches_score', '--help')
    assert all(f'--{flag}' in text for flag in ('model', 'out', 'split', 'limit', 'dtype', 'max_length', 'batch_tokens',
                                               'convention', 'columns', 'seed'))
    code = 'import sys, ches_align.cli; print({"torch", "transformers", "pandas"} & set(sys.modules))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == 'set()'
