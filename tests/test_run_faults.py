"Runs that meet markup in the texts, no network, a full disk at any write, a second run, SIGTERM. Nothing is lost."
import ast, errno, json, os, re, resource, signal, subprocess, sys, threading, time
from contextlib import contextmanager
from html.parser import HTMLParser

import pandas as pd
import pypandoc
import pytest
import torch
from commands import ENV, ches, command, started
from fastcore.xtras import working_directory
from project import ROOT
from test_loader_faults import tell

from ches_align.lm.tiny import save_tiny_model
from ches_align.audit.card import write_selection
from ches_align.lm.pairs import PairSource, load_pairs
from ches_align.core.errors import ChesError
from ches_align.lm.models import load_model
from ches_align.audit.report import audit_report
from ches_align.core.run import open_run, run_rows
from ches_align.core.writing import only_writer
from ches_align.audit.scoring import load_scores, score_dataset
from ches_align.audit.selection import select_pairs
from ches_align.cli.main import one_line

@pytest.fixture(scope='module')
def one_thread():
    "As the commands have, so that numbers are the same to the bit"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@pytest.fixture(scope='module')
def place(tmp_path_factory, one_thread):
    "A tiny model, and pairs for several shards"
    where = tmp_path_factory.mktemp('faults')
    save_tiny_model(where/'model')
    rows = [dict(prompt=p.prompt, chosen=p.chosen, rejected=p.rejected, kind=p.extra['kind'])
            for p in load_pairs('sample', limit=150)]
    (where/'pairs.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    assert score_here(where, 'whole')[0] == 0
    return where

def score_here(place, out):
    "The command without a process of its own, which takes seconds to start"
    with working_directory(place): return ches('score', 'pairs.jsonl', model='model', output_dir=out)

NASTY = [
    '<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "'><svg/onload=alert(1)>",
    '</style><script>1</script>', '{{ 7*7 }}{% raw %}', '</div></body>', '[click](javascript:alert(1))',
    '<a href="javascript:alert(1)">', '`<b>`', '\u202e<script>', '&lt;script&gt;', '<!--', ']]>',
    '<iframe src="//x">']

class Elements(HTMLParser):
    "What a browser would act on"
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs): self.found.append((tag, dict(attrs)))

def acting(page):
    parser = Elements()
    parser.feed(page)
    return [(t, a) for t, a in parser.found
            if t in ('script', 'iframe', 'object', 'embed', 'base', 'form') or any(k.startswith('on') for k in a)
            or re.match(r'\s*javascript:', a.get('href') or a.get('src') or '')
            or (t == 'img' and not (a.get('src') or '').startswith('data:image/png'))]

def test_texts_cannot_act_in_a_report(tmp_path, place, record_property):
    rows = [dict(prompt=f'{x} {i}', chosen=f'{x} yes', rejected=f'no {x}', kind=x if i % 2 else 'plain', **{x: i})
            for i, x in enumerate(NASTY)]*4
    model = load_model(str(place/'model'))
    scores = score_dataset(rows, model, progress=False)
    scores.attrs['manifest']['data'] = scores.attrs['manifest']['model'] = NASTY[0]
    for by in (None, 'kind'): audit_report(scores, load_pairs(rows), tmp_path/'r', title=NASTY[1], by=by)
    page = (tmp_path/'r'/'report.html').read_text()
    plain = (tmp_path/'r'/'report.md').read_text()
    assert acting('<script>') and acting('<p onclick="x">')  # the check finds what is planted
    assert acting(page) == [] and '49' not in re.findall(r'>\s*(49)\{', page) and '&lt;script&gt;' in page
    assert acting(pypandoc.convert_text('<script>', 'html', 'gfm'))
    assert acting(pypandoc.convert_text(plain, 'html', 'gfm')) == []
    tell(record_property, ['survived']*len(NASTY))

FORBIDDEN = (r'^\s*(import|from)\s+(pickle|marshal|shelve|dill|cloudpickle|joblib)\b|\btorch\.load\('
             r'|\byaml\.(unsafe_load|full_load)\(|\byaml\.load\((?!text, _Loader\))|\bread_pickle\b|\beval\(|\bexec\('
             r'|shell=True|allow_pickle=True')

def test_no_exported_line_runs_what_it_reads(record_property):
    "`model.eval()` is another thing; `_Loader` is YAML's safe loader that refuses repeated keys"
    files = [*(ROOT/'ches_align').rglob('*.py'), *(ROOT/'benchmarks').glob('*.py'), *(ROOT/'.ci').glob('*.py'),
             ROOT/'setup.py']
    hits = [f'{f.name}:{n}' for f in files for n, line in enumerate(f.read_text().splitlines(), 1)
            if re.search(FORBIDDEN, line) and not re.search(r'\.eval\(', line)]
    assert re.search(FORBIDDEN, 'import pickle') and re.search(FORBIDDEN, 'x = eval(y)') and len(files) > 40
    assert hits == []
    tell(record_property, ['survived']*len(files))

OFFLINE = """
import socket, sys
def refuse(*a, **k): print('NETWORK', a, file=sys.stderr); raise OSError('no network')
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
from ches_align.cli.main import main
main('audit pairs.jsonl --model model --output_dir offline --limit 20'.split())
main('filter offline --output offline/again.jsonl'.split())
main('report offline --output_dir offline'.split())
print('whole', flush=True)
main('audit pairs.jsonl --model someone/unknown --output_dir missing --limit 20'.split())
"""

def test_offline_nothing_asks_the_network(place, record_property):
    "A model in a folder is enough; one that would have to be fetched is refused"
    done = subprocess.run([sys.executable, '-c', OFFLINE], cwd=place, capture_output=True, text=True, env=ENV)
    assert 'whole\n' in done.stdout and 'NETWORK' not in done.stderr, done.stderr
    assert (place/'offline'/'report.html').exists(), done.stderr
    assert done.returncode == 1 and 'cannot be loaded' in done.stderr, done.stderr
    tell(record_property, ['survived', 'refused'])

def test_a_full_disk_at_every_write(tmp_path, place, monkeypatch, record_property):
    "For every k the k-th file finds the disk full; what was finished stays, and the same call finishes"
    model = load_model(str(place/'model'))
    source = PairSource(str(place/'pairs.jsonl'), limit=70)
    out = tmp_path/'out'
    def whole():
        scores = score_dataset(str(place/'pairs.jsonl'), model, out, limit=70, progress=False)
        write_selection(select_pairs(scores, keep=.5), source, out/'kept.jsonl')
        audit_report(scores, source, out)
    sync = os.fsync
    left = [0]
    def full(fd):
        left[0] -= 1
        if left[0] == 0: raise OSError(errno.ENOSPC, 'No space left on device')
        sync(fd)
    monkeypatch.setattr(os, 'fsync', full)
    outcomes = []
    before = {}
    for k in range(1, 40):
        left[0] = k
        try:
            whole()
            break
        except ChesError as error:
            assert 'No space left on device' in str(error) and 'what was finished is kept' in str(error)
        outcomes.append('refused')
        assert not list(out.rglob('*.partial'))
        now = {shard: shard.read_bytes() for shard in out.rglob('*.parquet')}
        assert before.items() <= now.items()
        for shard in now: pd.read_parquet(shard)
        before = now
    left[0] = 0
    whole()
    for file in ('kept.jsonl', 'report.html'):  # a file that stands is not harmed by a write that fails
        was = (out/file).read_bytes()
        left[0] = 1
        scores = load_scores(out)
        with pytest.raises(ChesError):
            if file == 'kept.jsonl': write_selection(select_pairs(scores, keep=.2), source, out/file)
            else: audit_report(scores, source, out, title='x')
        outcomes.append('refused')
        assert (out/file).read_bytes() == was and not list(out.rglob('*.partial'))
    left[0] = 0
    reference = score_dataset(str(place/'pairs.jsonl'), model, limit=70, progress=False)
    pd.testing.assert_frame_equal(load_scores(out), reference, check_exact=True)
    assert 6 < len(outcomes) < 38 and len(before) == 3  # the flagged rows' shard and two others
    tell(record_property, outcomes)

@contextmanager
def no_file_beyond(size):
    "The system refuses the byte after the last that fits, as a disk does that is full in the middle of a file"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

def contents(out): return {f: f.read_bytes() for f in out.rglob('*') if f.is_file() and f.name != '.lock'}

def test_a_disk_that_fills_up_within_a_file(tmp_path, place, record_property):
    "Half of it is written and taken away again; all that stood there is as it was"
    scores = load_scores(place/'whole')
    source = PairSource(str(place/'pairs.jsonl'))
    out = tmp_path/'out'
    outcomes = []
    def keep(share): write_selection(select_pairs(scores, keep=share), source, out/'kept.jsonl')
    def report(share): audit_report(scores, source, out, title=f'{share}')
    for write in (keep, report):
        write(.5)
        was = contents(out)
        for size in (0, 1, 700, 5000):
            with no_file_beyond(size), pytest.raises(ChesError, match='File too large; what was finished is kept'):
                write(.3)
            assert contents(out) == was
            outcomes.append('refused')
        write(.3)
        assert contents(out) != was
    tell(record_property, outcomes)

def test_scores_on_a_disk_that_fills_up_within_a_file(tmp_path, place, record_property):
    "No half shard is left, and the same call goes on with a larger disk"
    model = load_model(str(place/'model'))
    out = tmp_path/'out'
    outcomes = []
    def score(): return score_dataset(load_pairs(str(place/'pairs.jsonl'), limit=70), model, out, progress=False)
    for size in (0, 100, 3000):
        with no_file_beyond(size), pytest.raises(ChesError, match='File too large'): score()
        assert not list(out.rglob('*.partial'))
        for shard in out.rglob('*.parquet'): pd.read_parquet(shard)
        outcomes.append('refused')
    assert score().status.eq('ok').sum() > 60
    tell(record_property, outcomes)

def test_a_line_of_a_run_that_does_not_fit(tmp_path, record_property):
    "Half a line stands at the end of the file; the folder, opened again, is without it"
    lines = [dict(key=k, word='x'*50) for k in range(6)]
    outcomes = []
    def opened(): return open_run(tmp_path, dict(a=1))
    for k, line in enumerate(lines):
        with opened() as run:
            with no_file_beyond(k*75 + 30), pytest.raises(ChesError, match='File too large'): run.add(line)
        assert run_rows(tmp_path) == lines[:k]
        with opened() as run:
            assert run.rows() == lines[:k]
            run.add(line)
        outcomes.append('refused')
    assert run_rows(tmp_path) == lines
    tell(record_property, outcomes)

def test_a_name_that_cannot_change(tmp_path, place, monkeypatch, record_property):
    "The last step of a write fails, for each file of several: each is the old one or the new one, whole"
    scores = load_scores(place/'whole')
    source = PairSource(str(place/'pairs.jsonl'))
    outcomes = []
    def both(out, share):
        write_selection(select_pairs(scores, keep=share), source, out/'kept.jsonl')
        audit_report(scores, source, out, title=f'{share}')
    both(tmp_path/'old', .5)
    both(tmp_path/'new', .3)
    def by_name(out): return {f.relative_to(out): content for f, content in contents(out).items()}
    old = by_name(tmp_path/'old')
    new = by_name(tmp_path/'new')
    change = os.replace
    left = [0]
    def fails(here, there):
        left[0] -= 1
        if left[0] == 0: raise OSError(errno.EIO, 'Input/output error')
        change(here, there)
    monkeypatch.setattr(os, 'replace', fails)
    for k in range(1, len(old) + 1):
        left[0] = k
        with pytest.raises(ChesError, match='Input/output error; what was finished is kept'): both(tmp_path/'old', .3)
        now = by_name(tmp_path/'old')
        assert now.keys() == old.keys()
        assert all(c in (old[f], same(new[f])) or same(c) == same(new[f]) for f, c in now.items())
        outcomes.append('refused')
    left[0] = 0
    both(tmp_path/'old', .3)
    assert {f: same(c) for f, c in by_name(tmp_path/'old').items()} == {f: same(c) for f, c in new.items()}
    tell(record_property, outcomes)

def same(content): return content.replace(b'/new/', b'/old/')  # the card names its folder

def test_a_second_run_on_a_folder_is_refused(place, record_property):
    "By a process of its own: the test of the signals"
    with only_writer(place/'whole'): code, _, words = score_here(place, 'whole')
    assert code == 1 and re.match('ches score: .*another run is writing there', words), words
    assert score_here(place, 'whole')[0] == 0
    tell(record_property, ['refused', 'survived'])

def test_a_signal_is_heard_only_while_a_command_runs(record_property, capsys):
    "The handler that was there is there again, whatever ends the command; a thread may not set one"
    def mine(*_): return None
    heard = []
    before = signal.signal(signal.SIGTERM, mine)
    try:
        def refuse(): raise ChesError('x')
        for end in (lambda: None, lambda: os.kill(os.getpid(), signal.SIGTERM), refuse, lambda: 1/0):
            try:
                with one_line('ches score'):
                    end()
                    time.sleep(.01)
            except (SystemExit, ZeroDivisionError) as stop:
                heard.append(str(stop))
            assert signal.getsignal(signal.SIGTERM) is mine
        def apart():
            with one_line('ches score'): heard.append('thread')
        thread = threading.Thread(target=apart)
        thread.start()
        thread.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ['130', '1', 'division by zero', 'thread']
    assert capsys.readouterr().err == 'ches score: stopped; the same command continues\nches score: x\n'
    tell(record_property, ['survived']*5)

def test_every_command_ends_in_one_line(record_property):
    "All start in one place, and none catches what ends a command there"
    from ches_align.cli.main import COMMANDS, load_command
    trees = [ast.parse(f.read_text()) for f in (ROOT/'ches_align'/'cli').glob('*.py')]
    ends = [f for tree in trees for f in ast.walk(tree) if isinstance(f, ast.With)
            and ast.unparse(f.items[0].context_expr).startswith('one_line(')]
    assert len(ends) == 1 and re.findall(r'^    (\w+)=ches_align', (ROOT/'settings.ini').read_text(), re.M) == ['ches']
    for name in COMMANDS: assert callable(load_command(name))
    tell(record_property, ['survived']*len(COMMANDS))

@pytest.mark.full
@pytest.mark.parametrize('which', [signal.SIGTERM, signal.SIGINT])  # a kill: tests/test_cli.py
def test_a_signal_ends_a_run_that_goes_on(place, which, record_property):
    out = place/f'cut{int(which)}'
    def heard(): signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts in its background is deaf to Ctrl-C
    process = started(place, command('score', 'pairs.jsonl', '--model', 'model', '--output_dir', out.name),
                      stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    end = time.time() + 120
    while process.poll() is None and time.time() < end and not any(out.glob('scores/part-*.parquet')): time.sleep(.002)
    process.send_signal(signal.SIGSTOP)  # a second run comes while the first has the folder
    assert 'another run is writing there' in score_here(place, out.name)[2]
    process.send_signal(signal.SIGCONT)
    process.send_signal(which)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 130 and 'ches score: stopped; the same command continues' in words, words
    assert not json.loads((out/'manifest.json').read_text())['complete'] and not list(out.rglob('*.partial'))
    with only_writer(out): pass  # nobody holds it
    for shard in out.glob('scores/*.parquet'): pd.read_parquet(shard)
    kept = {shard: shard.stat().st_mtime_ns for shard in out.glob('scores/*.parquet')}
    assert score_here(place, out.name)[0] == 0
    assert all(shard.stat().st_mtime_ns == t for shard, t in kept.items())
    pd.testing.assert_frame_equal(load_scores(out), load_scores(place/'whole'), check_exact=True)
    tell(record_property, ['refused', 'survived'])
