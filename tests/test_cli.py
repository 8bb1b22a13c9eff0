"The commands end to end, as a user runs them: on files, killed and continued, with what goes wrong in practice."
import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from commands import ENV, command, done, refused, started

from ches_align.lm.tiny import save_tiny_model
from ches_align.lm.pairs import load_pairs
from ches_align.audit.scoring import load_scores

def shards(out): return {f.name: f.stat().st_mtime_ns for f in (out/'scores').glob('*.parquet')}

@pytest.fixture(scope='module')
def settings(tmp_path_factory):
    "A tiny model, by its flags"
    model = save_tiny_model(tmp_path_factory.mktemp('model'))
    return ['--model', str(model), '--dtype', 'float32', '--batch_tokens', '2048', '--max_length', '2048']

def run(*args, ok=True):
    "A command in a process of its own"
    process = subprocess.run(command(*args), capture_output=True, text=True, timeout=900, env=ENV)
    assert (process.returncode == 0) == ok, process.stdout + process.stderr
    return process.stdout if ok else process.stderr

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
def audit(data, settings, tmp_path_factory):
    out = tmp_path_factory.mktemp('audit')/'run'
    return out, run('audit', data, *settings, '--output_dir', out)

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
def test_a_killed_run_continues_and_gives_the_same_table(audit, data, settings, tmp_path):
    whole, _ = audit
    out = tmp_path/'run'
    args = 'score', data, *settings, '--output_dir', out
    process = started(tmp_path, command(*args))
    deadline = time.time() + 240
    while 'part-00001.parquet' not in shards(out) and process.poll() is None and time.time() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    before = process.wait() and shards(out)
    assert process.returncode == -signal.SIGKILL and {'part-00000.parquet', 'part-00001.parquet'} <= set(before)
    assert not json.loads((out/'manifest.json').read_text())['complete']
    run(*args)
    after = shards(out)
    assert {k: after[k] for k in before} == before and len(after) == 3  # what was done was not done again
    pd.testing.assert_frame_equal(load_scores(out), load_scores(whole))
    assert not list(out.rglob('*.partial'))

def test_another_run_is_not_continued(audit, data, settings):
    out, _ = audit
    before = shards(out)
    error = refused('score', data, *settings[:-1], 1024, '--output_dir', out)
    assert 'max_length was 2048, is 1024' in error and 'another --output_dir' in error and shards(out) == before
    other = out.parent/'other.jsonl'
    other.write_text(data.read_text().replace('word word', 'word wort', 1))
    error = refused('score', other, *settings, '--output_dir', out)
    assert 'data_hash was' in error and shards(out) == before

def test_filter_and_report_from_the_run_alone(audit, tmp_path):
    out, _ = audit
    done('filter', out, count=10, highest=True, by='ches', output=tmp_path/'top.parquet')
    scores = load_scores(out)
    assert set(pd.read_parquet(tmp_path/'top.parquet').row_id) == set(scores.nlargest(10, 'ches').row_id)
    done('filter', out, keep=.5, control='random', output=tmp_path/'random.jsonl')
    done('filter', out, weights=True, output=tmp_path/'soft.jsonl')
    soft = pd.read_json(tmp_path/'soft.jsonl', lines=True)
    assert len(soft) == 66 and abs(soft.weight.mean() - 1) < 1e-9
    done('report', out, output_dir=tmp_path/'page')
    assert '</html>' in (tmp_path/'page'/'report.html').read_text()

def test_filter_refuses_other_data(audit, tmp_path):
    out, _ = audit
    other = tmp_path/'other.jsonl'
    other.write_text(ROW * 70)
    error = refused('filter', out, data=other, output=tmp_path/'x.jsonl')
    assert 'not the data that were scored' in error and not (tmp_path/'x.jsonl').exists()

ROW = '{"prompt": "p", "chosen": "a", "rejected": "b"}\n'

@pytest.mark.parametrize('name, content, options, says', [
    ('columns.jsonl', ROW.replace('chosen', 'good'), {}, 'no column for the chosen response; it has good'),
    ('empty.jsonl', '', {}, 'the file is empty'),
    ('blank.jsonl', '\n\n', {}, 'no rows'),
    ('seven.jsonl', ROW * 6 + '{"prompt": "p",\n', {}, 'line 7: not JSON'),
    ('list.json', '{"prompt": "p"}', {}, 'must hold a list of objects'),
    ('ragged.csv', 'prompt,chosen,rejected\np,a,b,c\n', {}, 'line 2: more cells than columns'),
    ('fake.parquet', 'PAR1 not', {}, 'not a readable parquet file'),
    ('fine.jsonl', ROW, dict(model='./no/such/model'), 'no such file or folder'),
    ('fine.jsonl', ROW, dict(model='no/such-model'), 'cannot be loaded'),
    ('fine.jsonl', ROW, dict(share_prompt='mine'), 'must be one of auto, yes, no'),
    ('fine.jsonl', ROW, dict(max_length=1), 'must be a whole number from 2'),
    ('fine.jsonl', ROW, dict(columns='chosen:a'), 'must read like'),
])
def test_wrong_input_is_one_line(tmp_path, settings, name, content, options, says):
    (tmp_path/name).write_text(content)
    assert says in refused('score', tmp_path/name, **dict(model=settings[1], output_dir=tmp_path/'out') | options)

@pytest.mark.parametrize('words, says', [
    (['audit', 'pairs.jsonl'], 'ches audit: --model is missing'),
    (['score', 'pairs.jsonl'], 'ches score: --model is missing'),
    (['generate', 'prompts.jsonl'], 'ches generate: --model is missing'),
    (['refusal-rate', 'prompts.jsonl'], 'ches refusal-rate: --model is missing'),
    (['spread', 'tasks.jsonl', '--reward', 'contains'], 'ches spread: --model is missing'),
    (['audit'], 'ches audit: the following arguments are required: DATA'),
    (['audit', 'sample', '--limit_s', '1'], 'unknown option --limit_s; did you mean --limit_seed?'),  # no abbreviations
    (['audit', 'sample', '--out', 'x'], 'unknown option --out; did you mean --output_dir?'),
    (['audit', 'sample', '--limit', 'ten'], "argument --limit: invalid int value: 'ten'"),
    (['audit', 'sample', 'other'], "unexpected argument 'other'"),
    (['ches_audit', 'sample'], "ches: unknown command 'ches_audit'; did you mean audit?"),
    (['serve'], "ches: unknown command 'serve'")])
def test_wrong_usage_ends_with_code_2(words, says): assert says in refused(*words, code=2)

def test_no_permission(tmp_path, data):
    locked = tmp_path/'locked'
    locked.mkdir(mode=0o555)
    for folder in (tmp_path, *tmp_path.parents[:2]): os.chmod(folder, 0o755)
    code = '\n'.join(['import os', 'from pathlib import Path', 'from ches_align.core.writing import write_files',
                      'if not os.geteuid(): os.setgid(65534); os.setuid(65534)  # root may write anywhere: be nobody',
                      f"write_files({{Path({str(locked/'x')!r}): b'x'}})"])
    got = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'ChesError' in got.stderr and 'Permission denied' in got.stderr, got.stderr

@pytest.fixture
def tiny_disk(tmp_path):
    place = tmp_path/'disk'
    place.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=96k', 'tmpfs', str(place)], capture_output=True).returncode:
        pytest.skip('needs the right to mount a small tmpfs')
    yield place
    subprocess.run(['umount', str(place)], check=True)

def test_full_disk_keeps_what_was_finished(tiny_disk, data, settings):
    out = tiny_disk/'run'
    (tiny_disk/'ballast').write_bytes(bytes(56 << 10))
    error = refused('score', data, *settings, '--output_dir', out)
    assert 'No space left on device' in error and 'what was finished is kept' in error
    kept = shards(out)
    (tiny_disk/'ballast').unlink()
    done('score', data, *settings, '--output_dir', out)
    assert kept.items() <= shards(out).items() and len(load_scores(out)) == 70

def test_help_names_every_command_and_loads_nothing_heavy():
    "Neither the overview nor the help of a command imports torch"
    code = """import contextlib, io, sys
from ches_align.cli.main import COMMANDS, main
for words in ([], *([name] for name in COMMANDS)):
    with contextlib.redirect_stdout(io.StringIO()) as shown: main([*words, '--help'])
    assert all(name in shown.getvalue() for name in ([] if words else COMMANDS)), words
print({'torch', 'transformers', 'pandas', 'datasets'} & set(sys.modules))"""
    shown = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert shown.stdout.strip() == 'set()', shown.stderr
    text = done('score', '--help')
    assert all(f'--{flag} ' in text for flag in ('model', 'output_dir', 'split', 'limit', 'dtype', 'max_length',
                                                 'batch_tokens', 'columns', 'limit_seed', 'apply_chat_template'))
    for heading in ('Output:', 'Data:', 'Model:', 'Scoring:'): assert f'\n{heading}\n' in text

def test_options_of_one_name_are_one_option():
    "Groups are shared by the commands: a name has one type and, within a group, one help"
    from ches_align.cli.main import COMMANDS, command_parser, load_command
    options = {}
    for name in COMMANDS:
        for action in command_parser(load_command(name), name)._actions:
            for flag in action.option_strings: options.setdefault(flag, set()).add((action.nargs, action.type))
    assert {flag for flag, kinds in options.items() if len(kinds) > 1} == {'--against'}  # several rates, one record
