"""Broken data: every input gives pairs, bad rows flagged, or a `ChesError` that names the file, and nothing else."""
import csv, io, json, os, pickle, random, shutil, subprocess, sys, time

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from ches_align.lm.pairs import load_pairs
from ches_align.core.errors import ChesError
from ches_align.lm.models import load_model
from ches_align.audit.pair_scores import COLUMNS
from ches_align.core.run import FORMAT
from ches_align.audit.scoring import load_scores

ROWS = [dict(prompt=f'Frage {i}, bitte?', chosen=f'Ja, "{i}"\nund mehr', rejected=f'Nein {i} \u00e9')
        for i in range(20)]

def as_csv(rows, delimiter=','):
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()

def as_parquet(rows):
    out = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue().to_pybytes()

def as_arrow(rows):
    table = pa.Table.from_pylist(rows)
    out = pa.BufferOutputStream()
    with pa.ipc.new_stream(out, table.schema) as writer: writer.write_table(table)
    return out.getvalue().to_pybytes()

WHOLE = {'.jsonl': ''.join(json.dumps(r) + '\n' for r in ROWS).encode(), '.json': json.dumps(ROWS).encode(),
         '.csv': as_csv(ROWS), '.tsv': as_csv(ROWS, '\t'), '.parquet': as_parquet(ROWS), '.arrow': as_arrow(ROWS)}

def outcome(path):
    "'survived' with a pair a row, each usable or flagged, or 'refused' in a line that names the file"
    try:
        pairs = load_pairs(str(path))
    except ChesError as error:
        assert path.name in str(error), error
        return 'refused'
    assert pairs and [p.row_id for p in pairs] == list(range(len(pairs)))
    assert all(p.problem or isinstance(p.chosen, str | list) and isinstance(p.rejected, str | list) for p in pairs)
    return 'survived'

def tell(record_property, outcomes):
    for name in ('survived', 'refused'): record_property(name, outcomes.count(name))
    record_property('tried', len(outcomes))

def truncate(data, gen): return data[:gen.randrange(len(data))]
def flip(data, gen):
    damaged = bytearray(data)
    for _ in range(gen.randint(1, 20)): damaged[gen.randrange(len(damaged))] = gen.randrange(256)
    return bytes(damaged)
def nudge(data, gen):
    at = gen.randrange(len(data))
    return data[:at] + bytes([gen.randrange(256)]) + data[at + 1:]
def insert(data, gen):
    at = gen.randrange(len(data))
    piece = gen.choice([b'\0', b'\xff\xfe', b'"', b'\n', b'{', b'\\ud800', b'NaN', b'\xe9', b',,,,,', b'9'*5000])
    return data[:at] + piece*gen.randint(1, 3) + data[at:]
def noise(data, gen): return gen.randbytes(gen.randint(1, 2000))

# twenty of two hundred land a change
PARTS = [pytest.param(range(20), id='first'), pytest.param(range(20, 200), id='rest', marks=pytest.mark.full)]

@pytest.mark.parametrize('part', PARTS)
@pytest.mark.parametrize('suffix', WHOLE)
@pytest.mark.parametrize('damage', [truncate, nudge, flip, insert, noise])
def test_damaged_files(tmp_path, record_property, suffix, damage, part):
    gen = random.Random(f'{suffix}{damage.__name__}')
    outcomes = []
    for i in range(part.stop):
        damaged = damage(WHOLE[suffix], gen)
        if i not in part: continue
        path = tmp_path/f'damaged{i}{suffix}'
        path.write_bytes(damaged)
        outcomes.append(outcome(path))
        path.unlink()
    tell(record_property, outcomes)
    assert damage is not noise or 'refused' in outcomes
    assert damage is not nudge or 'survived' in outcomes  # what is whole but for a letter is read

FOOTER = """
import sys
from pathlib import Path
from ches_align.lm.pairs import load_pairs
from ches_align.core.errors import ChesError
path, counts = Path(sys.argv[1]), dict(survived=0, refused=0)
whole = path.read_bytes()
start = len(whole) - 8 - int.from_bytes(whole[-8:-4], 'little')
for at in range(start, len(whole)):
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
    try: counts['survived' if load_pairs(str(path)) else 'refused'] += 1
    except ChesError as e: counts['refused'] += path.name in str(e)
print(len(whole) - start, *counts.values())
"""

def test_every_byte_of_a_footer(tmp_path, record_property):
    "In a process of its own: some of pyarrow's calls end the process, not the call, on damaged metadata"
    (tmp_path/'x.parquet').write_bytes(WHOLE['.parquet'])
    command = [sys.executable, '-c', FOOTER, str(tmp_path/'x.parquet')]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    tried, survived, refused = map(int, done.stdout.split())
    assert tried == survived + refused > 500
    tell(record_property, ['survived']*survived + ['refused']*refused)

LINE = '{"prompt": "p", "chosen": %s, "rejected": "b"}\n'
ODD = {
    'latin-1': (LINE % '"\u00e9"').encode('latin-1'), 'utf-16': (LINE % '"a"').encode('utf-16'),
    'utf-8 with mark': b'\xef\xbb\xbf' + (LINE % '"a"').encode(),
    'windows line ends': (LINE % '"a"').replace('\n', '\r\n').encode()*3,
    'NUL in a text': (LINE % r'"a\u0000b"').encode(), 'NUL bytes': b'\0'*100,
    'lone surrogate': (LINE % r'"\ud800"').encode(), 'a line of 1 MB': (LINE % json.dumps('word '*200_000)).encode(),
    'a line of 20 MB': (LINE % json.dumps('word '*4_000_000)).encode(),
    'nested a hundred thousand times': (LINE % ('['*100_000 + ']'*100_000)).encode(),
    'nested nine hundred times': (LINE % ('['*900 + ']'*900)).encode(),
    'integer of 5000 digits': (LINE % ('9'*5000)).encode(), 'NaN': (LINE % 'NaN').encode(),
    'number': (LINE % '3').encode(), 'object': (LINE % '{"a": 1}').encode(), 'null': (LINE % 'null').encode(),
    'list of numbers': (LINE % '[1, 2]').encode(),
    'message without content': (LINE % '[{"role": "assistant"}]').encode(),
    'content that is a list': (LINE % '[{"role": "assistant", "content": [{"type": "text"}]}]').encode(),
    'repeated key': b'{"prompt": "p", "chosen": "a", "chosen": "c", "rejected": "b"}\n', 'array lines': b'[1, 2]\n',
    'only blanks': b'\n\n  \n', 'trailing comma': b'{"prompt": "p",}\n',
    'two objects in a line': b'{"a": 1}{"b": 2}\n',
    'markup in names': b'{"<script>": 1, "chosen": "a", "rejected": "b", "prompt": "p"}\n'}

@pytest.mark.parametrize('name', ODD)
def test_odd_jsonl(tmp_path, record_property, name):
    path = tmp_path/'odd.jsonl'
    path.write_bytes(ODD[name])
    start = time.time()
    tell(record_property, [outcome(path)])
    assert time.time() - start < 20  # 20 MB are read in under a second; a loader that goes quadratic takes minutes

@pytest.mark.parametrize('content, where', [
    ((LINE % '"a"')*2 + '{"prompt"\n', 'line 3'), ((LINE % '"a"')*4 + '[1]\n', 'line 5'),
    ('\n\n' + LINE % ('9'*5000), 'line 3'), (LINE % '"a"' + LINE % '"\u00e9"', 'line 2')])
def test_a_bad_line_is_named(tmp_path, record_property, content, where):
    path = tmp_path/'bad.jsonl'
    path.write_bytes(content.encode('latin-1'))
    with pytest.raises(ChesError, match=f'bad.jsonl, {where}: '): load_pairs(str(path))
    tell(record_property, ['refused'])

HEAD = b'prompt,chosen,rejected\n'
ODD_CSV = {
    'NUL in a text': HEAD + b'p,a\0,b\n', 'latin-1': HEAD + 'p,\u00e9,b\n'.encode('latin-1'),
    'utf-16': (HEAD + b'p,a,b\n').decode().encode('utf-16'), 'encoded surrogate': HEAD + b'p,\xed\xa0\x80,b\n',
    'utf-8 with mark': b'\xef\xbb\xbf' + HEAD + b'p,a,b\n',
    'old line ends': (HEAD + b'p,a,b\n').replace(b'\n', b'\r'),
    'windows line ends': (HEAD + b'p,a,b\n').replace(b'\n', b'\r\n'), 'open quote': HEAD + b'p,"a,b\n',
    'too few cells': HEAD + b'p,a\n', 'too many cells': HEAD + b'p,a,b,c\n', 'only names': HEAD,
    'only blanks': b'\n\n\n', 'empty names': b',,\np,a,b\n',
    'repeated name': b'prompt,chosen,chosen,rejected\np,a,c,b\n',
    'a cell of 20 MB': HEAD + b'p,' + b'word '*4_000_000 + b',b\n',
    'paths and formulas': HEAD + b'../../../etc/passwd,/etc/shadow,=cmd()\n'}
ODD_JSON = {
    'nested a hundred thousand times': b'['*100_000 + b']'*100_000,
    'nested objects': b'{"data":'*5000 + b'[]' + b'}'*5000, 'number': b'3', 'no data': b'{"data": null}',
    'no rows': b'[]', 'integer of 5000 digits': b'[{"chosen": ' + b'9'*5000 + b'}]',
    'infinite': b'[{"prompt": 1e999, "chosen": "a", "rejected": "b"}]', 'NaN': b'[NaN]',
    'utf-16': json.dumps(ROWS).encode('utf-16'), 'latin-1': json.dumps(ROWS, ensure_ascii=False).encode('latin-1'),
    'utf-8 with mark': b'\xef\xbb\xbf' + json.dumps(ROWS).encode(), 'two lists': json.dumps(ROWS).encode()*2,
    'mixed rows': b'[{"chosen": "a", "rejected": "b"}, 3]'}

@pytest.mark.parametrize('name', [f'{k}.csv' for k in ODD_CSV] + [f'{k}.json' for k in ODD_JSON])
def test_odd_csv_and_json(tmp_path, record_property, name):
    key, _, suffix = name.rpartition('.')
    path = tmp_path/f'odd.{suffix}'
    path.write_bytes((ODD_CSV if suffix == 'csv' else ODD_JSON)[key])
    tell(record_property, [outcome(path)])

SOURCES = [
    '', '/dev/zero', '/dev/null', '\0', 'a\0b.jsonl', 'x'*5000, 'x'*5000 + '.jsonl', '~no-such-user/x.jsonl',
    '../../../etc/passwd', '/etc/shadow', 'file:///etc/passwd', 'http://127.0.0.1:1/x.jsonl', 'name:', '::',
    '\ud800.jsonl', '-rf', 'a b;c']

def test_odd_names_of_data(tmp_path, monkeypatch, record_property):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'loop.jsonl').symlink_to('loop.jsonl')
    for folder in ('folder.jsonl', 'more/part.csv'): (tmp_path/folder).mkdir(parents=True)
    asked = SOURCES + ['loop.jsonl', 'folder.jsonl', 'more']
    for name in asked:
        with pytest.raises(ChesError): load_pairs(name)
    tell(record_property, ['refused']*len(asked))

def saved(where):
    "A data set as `datasets` saves it"
    Dataset.from_list(ROWS).save_to_disk(where)
    return json.loads((where/'state.json').read_text())

def test_a_saved_data_set_stays_in_its_folder(tmp_path, record_property):
    "The names of its shards and splits lead nowhere else"
    state = saved(tmp_path/'set')
    set_up = []
    saved(tmp_path/'outside')
    file = state['_data_files'][0]['filename']
    for name in (f'../outside/{file}', str(tmp_path/'outside'/file)):
        set_up.append(('state.json', json.dumps(state | dict(_data_files=[dict(filename=name)]))))
    set_up += [('dataset_dict.json', json.dumps(dict(splits=['../outside']))), ('state.json', '{}'),
               ('state.json', 'not'), ('dataset_info.json', '['), ('state.json', '['*100_000)]
    assert len(load_pairs(str(tmp_path/'set'))) == len(ROWS)
    for file, text in set_up:
        where = tmp_path/'set'
        shutil.rmtree(where)
        saved(where)
        (where/file).write_text(text)
        with pytest.raises(ChesError, match='set'): load_pairs(str(where))
    tell(record_property, ['survived'] + ['refused']*len(set_up))

@pytest.mark.parametrize('damage', [truncate, nudge, flip, noise])
def test_a_damaged_saved_data_set(tmp_path, record_property, damage):
    gen = random.Random(damage.__name__)
    outcomes = []
    where = tmp_path/'set'
    shard = where/saved(where)['_data_files'][0]['filename']
    whole = shard.read_bytes()
    for _ in range(60):
        shard.unlink()  # what is mapped stays as it was
        shard.write_bytes(damage(whole, gen))
        outcomes.append(outcome(where))
    tell(record_property, outcomes)
    assert damage is not nudge or 'survived' in outcomes

@pytest.mark.parametrize('suffix', ['.parquet', '.arrow'])
def test_odd_tables(tmp_path, record_property, suffix):
    "Columns of types that no text has"
    none = pa.array([], pa.string())
    two = ['a', 'b']
    columns = [dict(chosen=[1, 2], rejected=two), dict(chosen=[b'\xff', b'a'], rejected=two),
               dict(chosen=[None, None], rejected=two), dict(chosen=none, rejected=none),
               dict(chosen=[dict(a=1)], rejected=[[1]]), {}]
    tables = [pa.table(c) for c in columns]
    outcomes = []
    for i, table in enumerate(tables):
        path = tmp_path/f'odd{i}{suffix}'
        if suffix == '.parquet': pq.write_table(table, path)
        else:
            with pa.ipc.new_stream(str(path), table.schema) as writer: writer.write_table(table)
        outcomes.append(outcome(path))
    tell(record_property, outcomes)

def declared(path):
    "A column of 300 MiB, as the metadata say"
    table = pa.table(dict(chosen=['a'*(300 << 20)], rejected=['b'], prompt=['p']))
    pq.write_table(table, path, compression='zstd', use_dictionary=False, write_statistics=False)

def repeated(path):
    "A value of 20 MiB that stands once in the file and in each of 400 rows: 8 GiB that no metadata tell of"
    value = pa.DictionaryArray.from_arrays(pa.array([0]*400, pa.int32()), pa.array(['a'*(20 << 20)]))
    table = pa.table(dict(chosen=value, rejected=['b']*400, prompt=['p']*400))
    pq.write_table(table, path, compression='zstd', dictionary_pagesize_limit=1 << 30, store_schema=False)

def packed(path):
    table = pa.table(dict(chosen=['a'*(300 << 20)], rejected=['b'], prompt=['p']))
    options = pa.ipc.IpcWriteOptions(compression='zstd')
    with pa.ipc.new_stream(str(path), table.schema, options=options) as writer: writer.write_table(table)

@pytest.mark.parametrize('make, suffix', [(declared, '.parquet'), (repeated, '.parquet'), (packed, '.arrow')])
def test_a_file_that_unpacks_to_much_more_is_refused(tmp_path, record_property, make, suffix):
    path = tmp_path/f'bomb{suffix}'
    make(path)
    assert path.stat().st_size < 1 << 20
    process = subprocess.run([sys.executable, '-c', PEAK, str(path)], capture_output=True, text=True, timeout=60)
    peak, words = process.stdout.split(' ', 1)
    assert 'unpacks from' in words and path.name in words and 'write it again' in words, process
    record_property('peak_kib', int(peak))
    assert int(peak) < 1400 << 10  # KiB: 256 MiB, where it is refused, in Arrow and in Python, and the libraries
    tell(record_property, ['refused'])

PEAK = """
import re, sys
from pathlib import Path
from ches_align.lm.pairs import iter_pairs
from ches_align.core.errors import ChesError
said = 'read'
try: all(iter_pairs(sys.argv[1]))
except ChesError as e: said = str(e)
# ru_maxrss would be the test's own, which a child inherits
print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1], said)
"""

class Fires:
    "What a pickle may do when it is read"
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return os.mkdir, (self.mark,)

@pytest.mark.parametrize('name', [
    'data.jsonl', 'data.parquet', 'data.pkl', 'data.pt', 'model/pytorch_model.bin', 'lora/adapter_model.bin',
    'run/scores/part-00000.parquet'])
def test_a_pickle_is_not_read(tmp_path, record_property, name):
    mark = tmp_path/'fired'
    path = tmp_path/name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Fires(mark)))
    if name.startswith('model'): (path.parent/'config.json').write_text(json.dumps(dict(
        model_type='llama', vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)))
    if name.startswith('lora'): (path.parent/'adapter_config.json').write_text(json.dumps(dict(
        peft_type='LORA', base_model_name_or_path='smollm2-135m')))
    read = load_pairs if name.startswith('data') else load_scores if name.startswith('run') else load_model
    with pytest.raises(ChesError): read(str(path if name.startswith('data') else tmp_path/name.split('/')[0]))
    tell(record_property, ['refused'])
    assert not mark.exists()

def scored(where, **more):
    "A folder of one shard of made-up scores"
    (where/'scores').mkdir(parents=True)
    types = COLUMNS | more
    table = pd.DataFrame({k: ['a']*9 if v == 'str' else range(9) for k, v in types.items()}).astype(types)
    table.to_parquet(where/'scores'/'part-00000.parquet')
    return where/'scores'/'part-00000.parquet'

@pytest.mark.parametrize('damage', [truncate, nudge, flip, noise])
def test_damaged_shards(tmp_path, record_property, damage):
    gen = random.Random(damage.__name__)
    shard = scored(tmp_path/'run')
    outcomes = []
    whole = shard.read_bytes()
    for _ in range(60):
        shard.write_bytes(damage(whole, gen))
        try:
            outcomes.append('survived' if len(load_scores(tmp_path/'run')) else 'refused')
        except ChesError as error:
            outcomes.append('refused')
            assert str(tmp_path/'run') in str(error)
    tell(record_property, outcomes)

def test_paths_in_a_table_open_nothing(tmp_path, record_property):
    "Only the folder's own files are read: the manifest's lists of others, and cells that are paths, are words"
    shard = scored(tmp_path/'run', file='str')
    outside = scored(tmp_path/'outside')
    (tmp_path/'run'/'manifest.json').write_text(json.dumps(dict(
        format=FORMAT, shards=['../../outside/scores/part-00000.parquet'], out='../outside', file=str(outside))))
    before = {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}
    assert len(load_scores(tmp_path/'run')) == 9
    cells = pd.read_parquet(shard).assign(
        row_hash='../../outside/scores/part-00000.parquet', status='/etc/passwd', file=str(outside))
    cells.to_parquet(tmp_path/'cells.parquet')
    assert load_scores(tmp_path/'cells.parquet').status.tolist() == ['/etc/passwd']*9
    odd = dict(prompt=str(outside), chosen='../../outside', rejected='/etc/passwd', image='/etc/shadow')
    rows = [r | odd for r in ROWS]
    (tmp_path/'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    assert [p.prompt for p in load_pairs(str(tmp_path/'rows.jsonl'))] == [str(outside)]*len(rows)
    assert all(f.read_bytes() == was for f, was in before.items())
    tell(record_property, ['survived']*3)
