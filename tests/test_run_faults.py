"Runs that meet what happens in practice: markup in the texts, no network, a full disk at any write, a second run, SIGTERM. Nothing is lost."
import errno, json, os, re, signal, subprocess, sys, time
from html.parser import HTMLParser

import pandas as pd
import pypandoc
import pytest
from commands import ENV, command, run
from conftest import save_tiny
from project import ROOT
from test_loader_faults import tell

from ches_align.audit.card import write_selection
from ches_align.audit.data import PairSource, load_pairs
from ches_align.audit.files import AuditError, only_writer
from ches_align.audit.models import load_model
from ches_align.audit.report import audit_report
from ches_align.audit.scoring import load_scores, score_dataset
from ches_align.audit.selection import select_pairs

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A tiny model, and pairs for several shards"
    where = tmp_path_factory.mktemp('faults')
    save_tiny(where/'model')
    rows = [dict(prompt=p.prompt, chosen=p.chosen, rejected=p.rejected, kind=p.extra['kind']) for p in load_pairs('sample')]*2
    (where/'pairs.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    assert run(where, 'ches_score', 'pairs.jsonl', '--model', 'model', '--out', 'whole').returncode == 0
    return where

NASTY = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "'><svg/onload=alert(1)>", '</style><script>1</script>', '{{ 7*7 }}{% raw %}', '</div></body>',
         '[click](javascript:alert(1))', '<a href="javascript:alert(1)">', '`<b>`', '\u202e<script>', '&lt;script&gt;', '<!--', ']]>', '<iframe src="//x">']

class Elements(HTMLParser):
    "What a browser would act on"
    def __init__(self): super().__init__(); self.found = []
    def handle_starttag(self, tag, attrs): self.found.append((tag, dict(attrs)))

def acting(page):
    parser = Elements()
    parser.feed(page)
    return [(t, a) for t, a in parser.found if t in ('script', 'iframe', 'object', 'embed', 'base', 'form') or any(k.startswith('on') for k in a)
            or re.match(r'\s*javascript:', a.get('href') or a.get('src') or '') or (t == 'img' and not (a.get('src') or '').startswith('data:image/png'))]

def test_texts_cannot_act_in_a_report(tmp_path, place, record_property):
    rows = [dict(prompt=f'{x} {i}', chosen=f'{x} yes', rejected=f'no {x}', kind=x if i % 2 else 'plain', **{x: i}) for i, x in enumerate(NASTY)]*4
    model = load_model(str(place/'model'))
    scores = score_dataset(rows, model, progress=False)
    scores.attrs['manifest']['data'] = scores.attrs['manifest']['model'] = NASTY[0]
    for by in (None, 'kind'): audit_report(scores, load_pairs(rows), tmp_path/'r', title=NASTY[1], by=by)
    page, plain = (tmp_path/'r'/'report.html').read_text(), (tmp_path/'r'/'report.md').read_text()
    assert acting('<script>') and acting('<p onclick="x">')  # the check finds what is planted
    assert acting(page) == [] and '49' not in re.findall(r'>\s*(49)\{', page) and '&lt;script&gt;' in page
    assert acting(pypandoc.convert_text('<script>', 'html', 'gfm')) and acting(pypandoc.convert_text(plain, 'html', 'gfm')) == []
    tell(record_property, ['survived']*len(NASTY))

FORBIDDEN = r'^\s*(import|from)\s+(pickle|marshal|shelve|dill|cloudpickle|joblib)\b|\btorch\.load\(|\byaml\.(unsafe_load|full_load)\(|\byaml\.load\((?!text, _Loader\))|\bread_pickle\b|\beval\(|\bexec\(|shell=True|allow_pickle=True'

def test_no_exported_line_runs_what_it_reads(record_property):
    "`model.eval()` is another thing; `_Loader` is YAML's safe loader that refuses repeated keys"
    files = [*(ROOT/'ches_align').rglob('*.py'), *(ROOT/'benchmarks').glob('*.py')]
    hits = [f'{f.name}:{n}' for f in files for n, line in enumerate(f.read_text().splitlines(), 1) if re.search(FORBIDDEN, line) and not re.search(r'\.eval\(', line)]
    assert re.search(FORBIDDEN, 'import pickle') and re.search(FORBIDDEN, 'x = eval(y)') and len(files) > 40
    assert hits == []
    tell(record_property, ['survived']*len(files))

OFFLINE = """
import socket, sys
def refuse(*a, **k): print('NETWORK', a, file=sys.stderr); raise OSError('no network')
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
from ches_align.cli import ches_audit, ches_filter, ches_report
ches_audit('pairs.jsonl', model='model', out='offline', limit=40)
ches_filter('offline', out='offline/again.jsonl')
ches_report('offline', out='offline')
"""

def test_offline_nothing_asks_the_network(place, record_property):
    done = subprocess.run([sys.executable, '-c', OFFLINE], cwd=place, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0 and 'NETWORK' not in done.stderr and (place/'offline'/'report.html').exists(), done.stderr
    missing = subprocess.run([sys.executable, '-c', OFFLINE.replace("model='model'", "model='someone/unknown'")], cwd=place, capture_output=True, text=True, env=ENV)
    assert missing.returncode == 1 and 'NETWORK' not in missing.stderr and 'cannot be loaded' in missing.stderr, missing.stderr
    tell(record_property, ['survived', 'refused'])

def test_a_full_disk_at_every_write(tmp_path, place, monkeypatch, record_property):
    "The k-th file that is forced to the disk finds none left, for every k; what was finished stays, and the same call finishes"
    model, source, out = load_model(str(place/'model')), PairSource(str(place/'pairs.jsonl'), limit=140), tmp_path/'out'
    def whole():
        scores = score_dataset(str(place/'pairs.jsonl'), model, out=out, limit=140, progress=False)
        write_selection(select_pairs(scores, keep=.5), source, out/'kept.jsonl')
        audit_report(scores, source, out)
    sync, left = os.fsync, [0]
    def full(fd):
        left[0] -= 1
        if left[0] == 0: raise OSError(errno.ENOSPC, 'No space left on device')
        sync(fd)
    monkeypatch.setattr(os, 'fsync', full)
    outcomes, before = [], {}
    for k in range(1, 40):
        left[0] = k
        try: whole(); break
        except AuditError as e: assert 'No space left on device' in str(e) and 'what was finished is kept' in str(e)
        outcomes.append('refused')
        assert not list(out.rglob('*.partial'))
        now = {f: f.read_bytes() for f in out.rglob('*.parquet')}
        assert before.items() <= now.items()
        for f in now: pd.read_parquet(f)
        before = now
    left[0] = 0
    whole()
    for file in ('kept.jsonl', 'report.html'):  # a file that stands is not harmed by a write that fails
        was = (out/file).read_bytes()
        left[0] = 1
        with pytest.raises(AuditError): write_selection(select_pairs(load_scores(out), keep=.2), source, out/'kept.jsonl') if file == 'kept.jsonl' else audit_report(load_scores(out), source, out, title='x')
        outcomes.append('refused')
        assert (out/file).read_bytes() == was and not list(out.rglob('*.partial'))
    left[0] = 0
    reference = score_dataset(str(place/'pairs.jsonl'), model, limit=140, progress=False)
    pd.testing.assert_frame_equal(load_scores(out), reference, check_exact=True)
    assert 6 < len(outcomes) < 38 and len(before) == 4  # the flagged rows' shard and three others
    tell(record_property, outcomes)

def test_a_second_run_on_a_folder_is_refused(place, record_property):
    with only_writer(place/'whole'):
        second = run(place, 'ches_score', 'pairs.jsonl', '--model', 'model', '--out', 'whole')
    assert second.returncode == 1 and 'another run is writing there' in second.stderr, second.stderr
    assert run(place, 'ches_score', 'pairs.jsonl', '--model', 'model', '--out', 'whole').returncode == 0
    tell(record_property, ['refused', 'survived'])

@pytest.mark.parametrize('which', [signal.SIGTERM, signal.SIGINT])  # a kill: tests/test_cli.py
def test_a_signal_ends_a_run_that_goes_on(place, which, record_property):
    out = place/f'cut{int(which)}'
    def heard(): signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell starts what stands in its background deaf to Ctrl-C
    process = subprocess.Popen(command('ches_score', 'pairs.jsonl', '--model', 'model', '--out', out.name), cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV, preexec_fn=heard)
    end = time.time() + 120
    while process.poll() is None and time.time() < end and not any(out.glob('scores/part-*.parquet')): time.sleep(.002)
    process.send_signal(which)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and 'ches_score: stopped; the same command continues' in said, said
    assert not json.loads((out/'manifest.json').read_text())['complete']
    kept = {f: f.stat().st_mtime_ns for f in out.glob('scores/*.parquet')}
    again = run(place, 'ches_score', 'pairs.jsonl', '--model', 'model', '--out', out.name)
    assert again.returncode == 0 and all(f.stat().st_mtime_ns == t for f, t in kept.items()), again.stderr
    pd.testing.assert_frame_equal(load_scores(out), load_scores(place/'whole'), check_exact=True)
    tell(record_property, ['survived'])
