"""Broken data: every input gives pairs, bad rows flagged, or an `AuditError` that names the file. Nothing else comes out."""
import csv, io, json, os, pickle, random, time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ches_align.audit.data import load_pairs
from ches_align.audit.files import AuditError
from ches_align.audit.models import load_model
from ches_align.audit.scoring import load_scores

ROWS = [dict(prompt=f'Frage {i}, bitte?', chosen=f'Ja, "{i}"\nund mehr', rejected=f'Nein {i} \u00e9') for i in range(20)]

def as_csv(rows, delimiter=','):
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], delimiter=delimiter)
    writer.writeheader(); writer.writerows(rows)
    return out.getvalue().encode()

def as_parquet(rows):
    out = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue().to_pybytes()

def as_arrow(rows):
    table, out = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with pa.ipc.new_stream(out, table.schema) as w: w.write_table(table)
    return out.getvalue().to_pybytes()

WHOLE = {'.jsonl': ''.join(json.dumps(r) + '\n' for r in ROWS).encode(), '.json': json.dumps(ROWS).encode(), '.csv': as_csv(ROWS),
         '.tsv': as_csv(ROWS, '\t'), '.parquet': as_parquet(ROWS), '.arrow': as_arrow(ROWS)}

def outcome(path):
    "'survived' with as many pairs as there are rows, each usable or flagged, or 'refused' in a line that names the file"
    try: pairs = load_pairs(str(path))
    except AuditError as e:
        assert path.name in str(e), e
        return 'refused'
    assert pairs and [p.row_id for p in pairs] == list(range(len(pairs)))
    assert all(p.problem or isinstance(p.chosen, str | list) and isinstance(p.rejected, str | list) for p in pairs)
    return 'survived'

def tell(record_property, outcomes):
    for name in ('survived', 'refused'): record_property(name, outcomes.count(name))
    record_property('tried', len(outcomes))

def truncate(data, gen): return data[:gen.randrange(len(data))]
def flip(data, gen):
    made = bytearray(data)
    for _ in range(gen.randint(1, 20)): made[gen.randrange(len(made))] = gen.randrange(256)
    return bytes(made)
def insert(data, gen):
    at, piece = gen.randrange(len(data)), gen.choice([b'\0', b'\xff\xfe', b'"', b'\n', b'{', b'\\ud800', b'NaN', b'\xe9', b',,,,,', b'9'*5000])
    return data[:at] + piece*gen.randint(1, 3) + data[at:]
def noise(data, gen): return gen.randbytes(gen.randint(1, 2000))

@pytest.mark.parametrize('suffix', WHOLE)
@pytest.mark.parametrize('damage', [truncate, flip, insert, noise])
def test_damaged_files(tmp_path, record_property, suffix, damage):
    gen, outcomes = random.Random(f'{suffix}{damage.__name__}'), []
    for i in range(200):
        path = tmp_path/f'damaged{i}{suffix}'
        path.write_bytes(damage(WHOLE[suffix], gen))
        outcomes.append(outcome(path))
        path.unlink()
    tell(record_property, outcomes)
    assert damage is not noise or 'refused' in outcomes

LINE = '{"prompt": "p", "chosen": %s, "rejected": "b"}\n'
ODD = {
    'latin-1': (LINE % '"\u00e9"').encode('latin-1'), 'utf-16': (LINE % '"a"').encode('utf-16'), 'utf-8 with mark': b'\xef\xbb\xbf' + (LINE % '"a"').encode(),
    'windows line ends': (LINE % '"a"').replace('\n', '\r\n').encode()*3, 'NUL in a text': (LINE % r'"a\u0000b"').encode(), 'NUL bytes': b'\0'*100,
    'lone surrogate': (LINE % r'"\ud800"').encode(), 'a line of 1 MB': (LINE % json.dumps('word '*200_000)).encode(),
    'a line of 20 MB': (LINE % json.dumps('word '*4_000_000)).encode(), 'nested a hundred thousand times': (LINE % ('['*100_000 + ']'*100_000)).encode(),
    'nested nine hundred times': (LINE % ('['*900 + ']'*900)).encode(), 'integer of 5000 digits': (LINE % ('9'*5000)).encode(), 'NaN': (LINE % 'NaN').encode(),
    'number': (LINE % '3').encode(), 'object': (LINE % '{"a": 1}').encode(), 'null': (LINE % 'null').encode(), 'list of numbers': (LINE % '[1, 2]').encode(),
    'message without content': (LINE % '[{"role": "assistant"}]').encode(), 'content that is a list': (LINE % '[{"role": "assistant", "content": [{"type": "text"}]}]').encode(),
    'repeated key': b'{"prompt": "p", "chosen": "a", "chosen": "c", "rejected": "b"}\n', 'array lines': b'[1, 2]\n', 'only blanks': b'\n\n  \n', 'trailing comma': b'{"prompt": "p",}\n',
    'two objects in a line': b'{"a": 1}{"b": 2}\n', 'markup in names': b'{"<script>": 1, "chosen": "a", "rejected": "b", "prompt": "p"}\n'}

@pytest.mark.parametrize('name', ODD)
def test_odd_jsonl(tmp_path, record_property, name):
    path = tmp_path/'odd.jsonl'
    path.write_bytes(ODD[name])
    start = time.time()
    tell(record_property, [outcome(path)])
    assert time.time() - start < 20  # 20 MB are read in under a second; a loader that goes quadratic takes minutes

@pytest.mark.parametrize('suffix', ['.parquet', '.arrow'])
def test_odd_tables(tmp_path, record_property, suffix):
    "Columns of types that no text has"
    tables = [pa.table(dict(chosen=[1, 2], rejected=['a', 'b'])), pa.table(dict(chosen=[b'\xff', b'a'], rejected=['a', 'b'])), pa.table(dict(chosen=[None, None], rejected=['a', 'b'])),
              pa.table(dict(chosen=pa.array([], pa.string()), rejected=pa.array([], pa.string()))), pa.table(dict(chosen=[dict(a=1)], rejected=[[1]])), pa.table({})]
    outcomes = []
    for i, table in enumerate(tables):
        path = tmp_path/f'odd{i}{suffix}'
        if suffix == '.parquet': pq.write_table(table, path)
        else:
            with pa.ipc.new_stream(str(path), table.schema) as w: w.write_table(table)
        outcomes.append(outcome(path))
    tell(record_property, outcomes)

def test_a_file_that_unpacks_to_much_more_is_refused(tmp_path, record_property):
    path = tmp_path/'bomb.parquet'
    pq.write_table(pa.table(dict(chosen=['a'*(300 << 20)], rejected=['b'], prompt=['p'])), path, compression='zstd', use_dictionary=False)
    assert path.stat().st_size < 1 << 20
    tell(record_property, [outcome(path)])
    with pytest.raises(AuditError, match='unpacks from'): load_pairs(str(path))

class Fires:
    "What a pickle may do when it is read"
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return os.mkdir, (self.mark,)

@pytest.mark.parametrize('name', ['data.jsonl', 'data.parquet', 'data.pkl', 'data.pt', 'model/pytorch_model.bin', 'lora/adapter_model.bin', 'run/scores/part-00000.parquet'])
def test_a_pickle_is_not_read(tmp_path, record_property, name):
    mark, path = tmp_path/'fired', tmp_path/name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Fires(mark)))
    if name.startswith('model'): (path.parent/'config.json').write_text(json.dumps(dict(model_type='llama', vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)))
    if name.startswith('lora'): (path.parent/'adapter_config.json').write_text(json.dumps(dict(peft_type='LORA', base_model_name_or_path='smollm2-135m')))
    read = load_pairs if name.startswith('data') else load_scores if name.startswith('run') else load_model
    with pytest.raises(AuditError): read(str(path if name.startswith('data') else tmp_path/name.split('/')[0]))
    tell(record_property, ['refused'])
    assert not mark.exists()
