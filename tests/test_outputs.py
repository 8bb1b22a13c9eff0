"What the commands write is loaded by `datasets`, trained on by TRL token for token, and never takes the place of data."
import contextlib
import json
import os
import shutil
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

from ches_align.lm.tiny import save_tiny_model
from ches_align.audit.card import write_selection
from ches_align.lm.pairs import PairSource, load_pairs
from ches_align.lm.encode import encode_pairs
from ches_align.lm.models import load_model
from ches_align.audit.scoring import load_scores, score_dataset
from ches_align.audit.selection import select_pairs
from commands import done, refused

def user(text): return dict(role='user', content=text)

def assistant(text): return dict(role='assistant', content=text)

TEXT = [dict(prompt=f'Q{i}: why? A:', chosen=' because' * (i % 5 + 1), rejected=' no') for i in range(12)]
FORMS = dict(
    text=TEXT,
    messages=[dict(prompt=[user(f'Q{i}')], chosen=[assistant(f'yes {i}')], rejected=[assistant('no')])
              for i in range(6)],
    dialogue=[dict(chosen=f'\n\nHuman: Hi {i}\n\nAssistant: Hello!', rejected=f'\n\nHuman: Hi {i}\n\nAssistant: Go')
              for i in range(6)],
    system=[dict(system='S', prompt=f'q{i}', chosen='a', rejected='b') for i in range(6)])

@pytest.fixture(scope='module')
def model(tmp_path_factory): return save_tiny_model(tmp_path_factory.mktemp('model'))

@pytest.fixture(scope='module')
def bare(model, tmp_path_factory):
    "The same model without a chat template"
    folder = tmp_path_factory.mktemp('bare')/'model'
    shutil.copytree(model, folder)
    (folder/'chat_template.jinja').unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder

def lines_of(path, rows):
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return path

def trl_ids(path, tokenizer, folder):
    "What TRL's own preparation makes of a file"
    trl = pytest.importorskip('trl')
    kind = 'parquet' if path.suffix == '.parquet' else 'json'
    rows = datasets.load_dataset(kind, data_files=str(path), split='train', cache_dir=str(folder/'cache'))
    class Trainer: _tokenizer = tokenizer
    args = trl.DPOConfig(output_dir=str(folder), max_length=None, report_to=[], use_cpu=True, bf16=False)
    prepared = trl.DPOTrainer._prepare_dataset(Trainer(), rows, tokenizer, args, 'train')
    return [(list(r['prompt_ids']), list(r['chosen_ids']), list(r['rejected_ids'])) for r in prepared]

@pytest.mark.parametrize('template', [True, False])
@pytest.mark.parametrize('name', FORMS)
def test_trl_trains_on_the_tokens_that_were_scored(tmp_path, name, template, model, bare):
    "With a chat template as messages, without one as the text that was scored"
    lm = load_model(str(model if template else bare), device='cpu')
    pairs = load_pairs(FORMS[name])
    scores = score_dataset(pairs, lm, progress=False)
    assert (scores.status == 'ok').all()
    for suffix in ('jsonl', 'parquet'):
        card = write_selection(select_pairs(scores, keep=1.), pairs, tmp_path/f'k.{suffix}')
        assert card['form'] == ('messages' if template and name != 'text' else 'text')
        scored = [(list(e.prompt_ids), list(e.chosen_ids), list(e.rejected_ids))
                  for e in encode_pairs(pairs, lm.tokenizer)]
        trained = trl_ids(tmp_path/f'k.{suffix}', lm.tokenizer, tmp_path)
        assert len(trained) == len(scored) > 0
        if not template or name == 'text': assert trained == scored
        else: assert [t[0] for t in trained] == [s[0] for s in scored]  # what follows the end of a turn is not scored


def test_no_command_writes_over_what_it_reads(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = lines_of(tmp_path/'kept.jsonl', TEXT)
    small = dict(model=model, device='cpu')
    before = pairs.read_bytes()
    done('score', 'kept.jsonl', output_dir='o', **small)
    assert 'is read by this command' in refused('filter', 'o')
    os.symlink('kept.jsonl', 'link.jsonl')
    os.link('kept.jsonl', 'hard.jsonl')
    for output in ('link.jsonl', 'hard.jsonl', 'o/../kept.jsonl', 'o/manifest.json', 'o/scores/x.parquet'):
        assert 'name another place' in refused('filter', 'o', output=output), output
    for folder, name in (('a', 'kept.jsonl'), ('b', 'report.json')):
        (tmp_path/folder).mkdir()
        lines_of(tmp_path/folder/name, TEXT) if name == 'kept.jsonl' else \
            (tmp_path/folder/name).write_text(json.dumps(TEXT))
        assert 'is read by this command' in refused('audit', f'{folder}/{name}', output_dir=folder, **small)
    (tmp_path/'data').mkdir()
    lines_of(tmp_path/'data'/'train.jsonl', TEXT)
    done('score', 'data', output_dir='of_folder', **small)
    assert 'would lie in a folder' in refused('filter', 'of_folder', output='data/kept.jsonl')
    assert 'would lie in a folder' in refused('audit', 'data', output_dir='data', **small)
    assert pairs.read_bytes() == before and sorted(os.listdir('data')) == ['train.jsonl']

def test_a_default_name_takes_nobodys_place(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done('score', lines_of(tmp_path/'d.jsonl', TEXT), output_dir='o', model=model, device='cpu')
    lines_of(tmp_path/'kept.jsonl', [dict(mine=1)])
    (tmp_path/'ches_out').mkdir()
    (tmp_path/'ches_out'/'report.md').write_text('mine')
    for command in ('filter', 'report'):
        assert 'exists and is not of an earlier run of this command' in refused(command, 'o')
    assert json.loads(Path('kept.jsonl').read_text()) == dict(mine=1)
    os.remove('kept.jsonl')
    done('filter', 'o')
    done('filter', 'o', keep=.25)  # its own file is replaced
    assert len(Path('kept.jsonl').read_text().splitlines()) == 3

def test_said_before_scoring_and_reported_all_the_same(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = dict(model=model, device='cpu')
    rows = [*TEXT, *FORMS['messages']]
    pairs = lines_of(tmp_path/'d.jsonl', TEXT)
    mixed = lines_of(tmp_path/'mixed.jsonl', rows)
    for odd in (dict(keep=1.5), dict(by='ln_chess'), dict(limit=-1)):
        refused('audit', pairs, output_dir='none', **small, **odd)
        assert not Path('none').exists()
    assert 'text beside messages' in refused('audit', mixed, output_dir='none', **small)
    assert not any(Path('none').iterdir())  # it was read, and nothing of it was scored
    same = lines_of(tmp_path/'same.jsonl', [dict(prompt='Q:', chosen=' yes', rejected=' yes')] * 5)
    line = refused('audit', same, output_dir='flagged', **small)
    assert "{'identical': 5}" in line and 'flagged/report.html says what to do' in line
    assert 'Nothing was scored' in Path('flagged/report.md').read_text() and not Path('flagged/kept.jsonl').exists()

def test_strata_and_batches(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds = [None, 'x', 1, [2]]
    rows = [r | dict(kind=kinds[i % 4], length='long' if i % 2 else 'short') for i, r in enumerate(TEXT)]
    pairs = lines_of(tmp_path/'d.jsonl', rows)
    small = dict(model=model, device='cpu')
    done('score', pairs, output_dir='o', **small)
    scores = load_scores('o')
    done('score', pairs, output_dir='o', batch_tokens=40, **small)  # what the lack of memory advises
    assert load_scores('o').equals(scores)
    assert 'say data:length or score:length' in refused('filter', 'o', stratify='length')
    done('filter', 'o', stratify='data:length', output='by_data.jsonl')
    card = json.loads(Path('by_data.jsonl.card.json').read_text())
    assert card['composition']['data:length'] == dict(long=dict(before=6, after=3), short=dict(before=6, after=3))
    done('filter', 'o', stratify='score:length', output='by_length.parquet')
    done('filter', 'o', stratify='kind', output='by_kind.jsonl')
    card = json.loads(Path('by_kind.jsonl.card.json').read_text())
    before = {k: v['before'] for k, v in card['composition']['kind'].items()}
    assert before == {'(missing)': 3, '1': 3, '[2]': 3, 'x': 3}
    assert select_pairs(scores, keep=.5).selected.sum() == 6 and len(list(PairSource(str(pairs)))) == 12

@contextlib.contextmanager
def counted(monkeypatch):
    "How often the data are gone through, whoever does it"
    from ches_align.lm import pairs
    reads = []
    unharmed = pairs.read_rows
    def read_rows(source, *args, **options):
        reads.append(str(source))
        return unharmed(source, *args, **options)
    with monkeypatch.context() as patched:
        patched.setattr(pairs, 'read_rows', read_rows)
        yield reads

def test_an_audit_reads_three_times_and_is_its_three_steps(tmp_path, model, monkeypatch):
    "Once to score, once for the page, once for the file; a draw counts the rows once more"
    monkeypatch.chdir(tmp_path)
    rows = [row | dict(kind='ab'[i % 2]) for i, row in enumerate(TEXT)]
    pairs = lines_of(tmp_path/'d.jsonl', rows)
    small = dict(model=model, device='cpu')
    with counted(monkeypatch) as reads: done('audit', pairs, output_dir='whole', **small)
    assert reads == [str(pairs)]*3
    with counted(monkeypatch) as reads: done('audit', pairs, output_dir='drawn', limit=8, limit_seed=1, **small)
    assert len(reads) == 4
    for step, times in ((('score', pairs), 1), (('report', 'parts'), 1), (('filter', 'parts'), 1)):
        place = dict(output='parts/kept.jsonl') if step[0] == 'filter' else dict(output_dir='parts')
        with counted(monkeypatch) as reads: done(*step, **place, **small if step[0] == 'score' else {})
        assert len(reads) == times, step
    assert load_scores('parts').equals(load_scores('whole'))
    for name in ('kept.jsonl', 'kept.jsonl.card.md'):
        assert Path('parts', name).read_bytes() == Path('whole', name).read_bytes()
    parts, whole = (json.loads(Path(name, 'report.json').read_text()) for name in ('parts', 'whole'))
    apart = {k for k in whole if parts[k] != whole[k]}
    assert apart <= {'path', 'recommendations', 'manifest'}, apart  # its folder, and when it was scored

def test_a_hub_name_is_asked_for_three_times(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    def load_dataset(*names):
        asked.append(names)
        return datasets.DatasetDict(train=datasets.Dataset.from_list(TEXT))
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    done('audit', 'someone/pairs', output_dir='o', model=model, device='cpu')
    assert asked == [('someone/pairs',)]*3
