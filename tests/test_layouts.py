"""Every layout in every format gives the same pairs, in any order of rows, and a preference is never guessed at."""
import bz2, csv, gzip, json, lzma, random, warnings

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_dataset
from datasets.data_files import DataFilesList, get_data_patterns

from ches_align.lm.texts import split_text
from ches_align.lm.pairs import iter_pairs, load_pairs
from ches_align.core.errors import ChesError
from ches_align.core.formats import data_suffix
from ches_align.core.rows import _folder_splits, read_rows

def user(text): return dict(role='user', content=text)
def assistant(text): return dict(role='assistant', content=text)
def system(text): return dict(role='system', content=text)

HI = [user('Hi'), assistant('Hello'), user('Again?')]
HH = '\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Again?\n\nAssistant:'
LAYOUTS = {  # a row, and what it means
    'TRL text': (dict(prompt='q', chosen=' a', rejected=' b'), ('q', ' a', ' b')),
    'TRL messages': (dict(prompt=HI, chosen=[assistant('a')], rejected=[assistant('b')]),
                     (HI, [assistant('a')], [assistant('b')])),
    'TRL implicit messages': (dict(chosen=[*HI, assistant('a')], rejected=[*HI, assistant('b')]),
                              (HI, [assistant('a')], [assistant('b')])),
    'TRL implicit text': (dict(chosen='Q: who? Sam', rejected='Q: who? Joe'), ('Q: who?', ' Sam', ' Joe')),
    'Chinese implicit text': (dict(chosen='问：你是谁？答：我是', rejected='问：你是谁？答：他是'),
                              ('问：你是谁？答：', '我是', '他是')),
    'UltraFeedback': (dict(prompt='Again?', prompt_id='x', chosen=[*HI, assistant('a')], rejected=[*HI, assistant('b')],
                           score_chosen=8.5, score_rejected=2.0), (HI, [assistant('a')], [assistant('b')])),
    'HH-RLHF': (dict(chosen=f'{HH} a', rejected=f'{HH} b'), (HI, [assistant('a')], [assistant('b')])),
    'StackExchange': (dict(question='q', response_j='a', response_k='b'), ('q', 'a', 'b')),
    'SORRY-Bench': (dict(query='q', chosen='a', rejected='b'), ([user('q')], [assistant('a')], [assistant('b')])),
    'Orca': (dict(system='S', question='q', chosen='a', rejected='b'),
             ([system('S'), user('q')], [assistant('a')], [assistant('b')])),
    'AlpacaFarm': (dict(instruction='i', input='x', output_1='a', output_2='b', preference=2),
                   ([user('i\nx')], [assistant('b')], [assistant('a')])),
    'AlpacaEval': (dict(instruction='i', output_1='a', generator_1='m', output_2='b', generator_2='n', preference=1.03),
                   ([user('i')], [assistant('a')], [assistant('b')])),
    'Persona': (dict(question='q', answer_matching_behavior=' Yes', answer_not_matching_behavior=' No'),
                ('q\n', 'No', 'Yes')),
    'LLaMA-Factory': (dict(instruction='i', input='x', chosen='a', rejected='b'), ('i\nx', 'a', 'b')),
    'LLaMA-Factory with history': (
        dict(instruction='Again?', input='', system='S', history=[['Hi', 'Hello']], chosen='a', rejected='b'),
        ([system('S'), *HI], [assistant('a')], [assistant('b')])),
    'conversations': (dict(conversations=HI, chosen=[assistant('a')], rejected=[assistant('b')]),
                      (HI, [assistant('a')], [assistant('b')]))}
TEXTS = [name for name, (row, _) in LAYOUTS.items() if not any(isinstance(v, list) for v in row.values())]

def write(path, rows):
    "Rows in the format that the name asks for"
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = data_suffix(path)
    if kind == '.parquet':
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    opened = gzip.open if path.suffix == '.gz' else open
    with opened(path, 'wt', encoding='utf-8', newline='') as file:
        if kind == '.json': json.dump(rows, file)
        elif kind == '.jsonl': file.writelines(json.dumps(r) + '\n' for r in rows)
        else:
            names = list(dict.fromkeys(k for r in rows for k in r))
            out = csv.DictWriter(file, names, delimiter='\t' if kind == '.tsv' else ',')
            out.writeheader()
            out.writerows(rows)
    return path

def content(pairs): return [(p.prompt, p.chosen, p.rejected, p.problem) for p in pairs]

@pytest.mark.parametrize('name', LAYOUTS)
def test_every_layout_in_every_format(tmp_path, name):
    row, parts = LAYOUTS[name]
    wanted = [(*parts, '')]*2
    assert content(load_pairs([row, row])) == wanted
    formats = ['a.jsonl', 'a.json', 'a.parquet', 'a.jsonl.gz', 'a.json.gz']
    formats += ['a.csv', 'a.tsv', 'a.csv.gz', 'a.tsv.gz'] if name in TEXTS else []
    for file in formats:
        pairs = load_pairs(write(tmp_path/file, [row, row]))
        assert content(pairs) == wanted, file
        assert {p.row_hash for p in pairs} == {load_pairs([row])[0].row_hash}, file
    for k in range(2): write(tmp_path/'hub'/'data'/f'train-0000{k}-of-00002-8a7f{k}.parquet', [row])
    (tmp_path/'hub'/'README.md').write_text('---\n---\n')
    (tmp_path/'hub'/'dataset_infos.json').write_text('{}')
    assert content(load_pairs(tmp_path/'hub')) == wanted
    for source in (Dataset.from_list([row, row]), Dataset.from_list([row, row]).to_iterable_dataset(),
                   DatasetDict(train=Dataset.from_list([row, row])), pd.DataFrame([row, row]), iter([row, row])):
        assert content(load_pairs(source)) == wanted, type(source)

def test_the_order_of_rows_means_nothing(tmp_path):
    "All layouts in one file, those with optional columns last; by any format that holds them, in any order"
    plain = dict(prompt='q', chosen='a', rejected='b')
    rows = [plain | dict(prompt=f'q{i}') for i in range(150)] + [row for row, _ in LAYOUTS.values()]
    rows += [plain | dict(system='S'), dict(instruction='i', chosen='a', rejected='b'), dict(prompt='q', chosen='a')]
    read = load_pairs(rows)
    assert [p.problem for p in read] == ['']*(len(rows) - 1) + ['missing_field']
    assert content(read)[150:-3] == [(*parts, '') for _, parts in LAYOUTS.values()]
    assert read[-3].prompt == [system('S'), user('q')]
    for seed in range(5):
        order = random.Random(seed).sample(range(len(rows)), len(rows))
        path = write(tmp_path/f'{seed}.jsonl', [rows[i] for i in order])
        assert content(load_pairs(path)) == [content(read)[i] for i in order]
    texts = [r for r in rows if not any(isinstance(v, list) for v in r.values())]
    implicit = [row for name, (row, _) in LAYOUTS.items() if 'implicit' in name]
    texts = [r for r in texts if r not in implicit]  # beside others they have a column `prompt`, which is empty
    assert content(load_pairs(write(tmp_path/'a.csv', texts)))[:-1] == content(load_pairs(texts))[:-1]
    assert content(load_pairs(Dataset.from_pandas(pd.DataFrame(texts))))[:-1] == content(load_pairs(texts))[:-1]

def test_rows_without_a_layout(tmp_path):
    "Flagged where others have one, however late; refused where none has"
    good = dict(prompt='q', chosen='a', rejected='b')
    bad = dict(prompt='q', text='x')
    for count in (5, 150, 10_010):
        pairs = load_pairs(write(tmp_path/f'{count}.jsonl', [bad]*count + [good]))
        assert [p.problem for p in pairs] == ['missing_field']*count + ['']
    assert pairs[0].detail.startswith('no column for the chosen response; it has prompt, text')
    assert content(iter_pairs(iter([bad]*150 + [good])))[-1][-1] == ''
    with pytest.raises(ChesError, match='bad.jsonl: no column for the chosen response'):
        load_pairs(write(tmp_path/'bad.jsonl', [bad]*150))

def preference_sets():
    two = dict(prompt='q', response_0='a', response_1='b')
    yield 'SafeRLHF', two | dict(better_response_id=1, safer_response_id=0), 'better_response_id'
    arena = dict(question='q', model_a='m', model_b='n', conversation_a='a', conversation_b='b', winner='model_b')
    yield 'Arena', arena, 'winner'
    yield 'SHP', dict(history='q', human_ref_A='a', human_ref_B='b', labels=0, score_A=1, score_B=2), 'labels'
    yield 'letters', dict(prompt='q', response_a='a', response_b='b', preference='B'), 'preference'
    yield 'names', dict(prompt='q', response_a='a', response_b='b', winner='model_b', loser='model_a'), 'winner'
    yield 'models', dict(prompt='q', response_a='a', response_b='b', winner='gpt-4', loser='claude'), 'winner'
    yield 'numbers', dict(prompt='q', response_0='a', response_1='b', chosen=1, rejected=0), 'chosen'
    yield 'one number', dict(prompt='q', response_0='a', response_1='b', chosen=1), 'chosen'
    yield 'UltraFeedback', dict(instruction='q', completions=[dict(response='a', overall_score=3.)]), 'completions'
    yield 'HelpSteer', dict(prompt='q', response_1='a', response_2='b', preference_strength=-2), 'preference_strength'
    yield 'list', dict(prompt='q', responses=['a', 'b'], chosen='0', rejected='1'), 'chosen'
    yield 'inside', dict(prompt='q', model_a_text='a', model_b_text='b', vote='model_b'), 'vote'
    yield 'bare', dict(prompt='q', A='a', B='b', label=1), 'label'
    yield 'KTO', dict(prompt='q', completion='a', label=True), 'label'

def text_only(value): return value if isinstance(value, str) else ''

@pytest.mark.parametrize('name, row, column', [*preference_sets()], ids=text_only)
def test_a_preference_in_its_own_column_is_never_guessed_at(name, row, column):
    good = dict(prompt='q', chosen='a', rejected='b')
    pair = load_pairs([good, row])[1]
    assert pair.problem == 'own_preference' and repr(column) in pair.detail and '--columns' not in pair.detail
    try:
        pairs = load_pairs([row]*3)  # a column `chosen` or `winner` is there, but its cells are no responses
    except ChesError as error:
        assert repr(column) in str(error) and '--columns' not in str(error) and '\n' not in str(error)
    else:
        assert [p.problem for p in pairs] == ['own_preference']*3

def test_a_multiple_choice_is_a_pair():
    "Two texts are what TRL would train on, whatever they look like; no text beside a name is none"
    choice = dict(prompt='Which? A) x B) y', option_a='x', option_b='y')
    rows = [choice | dict(chosen='A', rejected='B'), dict(prompt='q', answers=['x', 'y'], chosen='B', rejected='A'),
            dict(prompt='2-1=', response_1='1', response_2='2', chosen='1', rejected='2'),
            dict(prompt='q', summary_1='x', summary_2='y', chosen='3', rejected='17'),
            dict(prompt='q', text_1='x', text_2='y', preferred='good answer', dispreferred='bad answer')]
    read = [load_pairs([row])[0] for row in rows]
    assert [(p.chosen, p.rejected, p.problem) for p in read] == [
        ('A', 'B', ''), ('B', 'A', ''), ('1', '2', ''), ('3', '17', ''), ('good answer', 'bad answer', '')]
    beside = load_pairs([choice | dict(chosen='A', rejected='B'), choice | dict(chosen='A', rejected=None)])
    assert [p.problem for p in beside] == ['', 'own_preference']

def test_a_side_that_is_named_against_its_preference_is_told():
    row = dict(prompt='q', response_0='a', response_1='b', better_response_id=1)
    with pytest.warns(UserWarning, match="'better_response_id' may say which"):
        assert load_pairs([row], columns='chosen=response_0,rejected=response_1')[0].chosen == 'a'

@pytest.mark.parametrize('value, meaning', [
    (1, 'a'), (2, 'b'), (1.03, 'a'), (1.97, 'b'), (1.4999, 'a'), ('1', 'a'), ('1.9', 'b'), (1.5, 'draw'), (0, 'draw'),
    (None, 'draw'), (float('nan'), 'draw'), ('', 'draw'), (-1, 'bad_preference'), (2.1, 'bad_preference'),
    (1e999, 'bad_preference'), (True, 'bad_preference'), ('output_1', 'bad_preference'), ([1], 'bad_preference')])
def test_weighted_preferences(tmp_path, value, meaning):
    row = dict(instruction='i', input='', output_1='a', output_2='b', preference=value)
    frames = [] if isinstance(value, list) else [pd.DataFrame([row])]
    for source in ([row], write(tmp_path/'a.jsonl', [row]), *frames):
        pair = load_pairs(source)[0]
        assert (pair.problem or pair.chosen[0]['content']) == meaning

SCRIPTS = ['Who are you? I am', 'Who are you? It is', 'Who are you?\nI', 'Who are you? ', 'Who are', 'x', ' x', ' y',
           '你是谁？我是人', '你是谁？他不是', 'お名前は？太郎です', 'お名前は？花子です', 'คุณชื่ออะไรผม', 'คุณชื่ออะไรฉัน',
           'من أنت؟ أنا', 'من أنت؟ هو', 'q 👩\u200d👩\u200d👧', 'q 👩\u200d👩\u200d👦', 'e\u0301 a', 'e\u0300 a',
           'q  two', 'q  three', 'q\tone', 'q\ttwo']

def test_text_is_cut_as_trl_cuts_it():
    from trl.data_utils import extract_prompt
    gen = random.Random(0)
    texts = list(SCRIPTS)
    compared = 0
    texts += [''.join(gen.choices('ab \n问', k=gen.randint(1, 8))) for _ in range(60)]
    for chosen in texts:
        for rejected in texts:
            prompt, *rest = split_text(chosen, rejected)
            assert [prompt + r for r in rest] == [chosen, rejected]
            if chosen[0] != rejected[0]:  # TRL looks at the last character there
                assert prompt == ''
                continue
            ours = dict(prompt=prompt, chosen=rest[0], rejected=rest[1])
            assert ours == extract_prompt(dict(chosen=chosen, rejected=rejected)), (chosen, rejected)
            compared += 1
    assert compared > 500

FOLDERS = [names.split() for names in (
    'data/train-00000-of-00002-a1.parquet data/train-00001-of-00002-b2.parquet data/test-00000-of-00001.parquet',
    'data/train_prefs-00000-of-00001.parquet data/test_prefs-00000-of-00001.parquet data/train_sft-00000-of-00001.csv',
    'data/a.parquet data/b.parquet', 'harmless/train.jsonl.gz harmless/test.jsonl.gz helpful/train.jsonl.gz',
    'train/0000.parquet train/0001.parquet test/0000.parquet', 'default/train/0000.parquet',
    'my-train-set/a.csv dev/b.csv notes.csv', 'train.csv validation.csv other.csv',
    'train-00000-of-00002.jsonl train-00001-of-00002.jsonl', 'pairs.jsonl', 'training/x.jsonl evaluation/y.jsonl',
    'sub/deep/train.jsonl .cache/train.jsonl __x__/train.jsonl', 'restrained/x.jsonl latest/x.jsonl')]

@pytest.mark.parametrize('files', FOLDERS, ids=lambda files: files[0])
def test_folders_are_split_as_datasets_splits_them(tmp_path, files):
    row = dict(prompt='q', chosen='a', rejected='b')
    for file in files: write(tmp_path/file, [row])
    theirs = {}
    for split, patterns in get_data_patterns(str(tmp_path)).items():
        matched = DataFilesList.from_patterns(patterns, str(tmp_path))
        theirs[split] = sorted({f[len(str(tmp_path)) + 1:] for f in matched})
    ours = {name: sorted(map(str, files)) for name, files in _folder_splits(tmp_path).items()}
    if len(ours) == 1 and len(theirs) == 1: ours = {next(iter(theirs)): next(iter(ours.values()))}  # whatever its name
    assert ours == theirs

def test_a_folder_of_the_hub_is_read_as_load_dataset_reads_it(tmp_path):
    rows = [dict(prompt=f'q{i}', chosen='a', rejected='b') for i in range(6)]
    for k in range(3): write(tmp_path/'set'/'data'/f'train-0000{k}-of-00003.jsonl.gz', rows[2*k:2*k + 2])
    write(tmp_path/'set'/'data'/'test-00000-of-00001.jsonl.gz', rows[:1])
    for split in ('train', 'test'):
        theirs = load_dataset(str(tmp_path/'set'), split=split, cache_dir=str(tmp_path/'cache'))
        assert list(read_rows(tmp_path/'set', split)) == list(theirs)
    with pytest.raises(ChesError, match='no split .dev.; choose --split from test, train'):
        load_pairs(tmp_path/'set', 'dev')

def test_splits_of_the_same_word_are_not_mixed(tmp_path):
    row = dict(prompt='q', chosen='a', rejected='b')
    for name in ('train_gen', 'train_sft', 'test_gen'): write(tmp_path/f'{name}.jsonl', [row | dict(prompt=name)])
    with pytest.raises(ChesError, match='several splits; choose --split from'): load_pairs(tmp_path)
    assert [p.prompt for p in load_pairs(tmp_path, 'train_sft')] == ['train_sft']
    assert [p.prompt for p in load_pairs(tmp_path, 'test')] == ['test_gen']
    write(tmp_path/'train.jsonl', [row | dict(prompt='train')])
    assert [load_pairs(tmp_path, split)[0].prompt for split in (None, 'test')] == ['train', 'test_gen']
    write(tmp_path/'train_prefs.jsonl', [row])
    assert [p.prompt for p in load_pairs(tmp_path)] == ['q']

def test_what_is_packed_is_guarded(tmp_path):
    path = tmp_path/'bomb.jsonl.zst'
    with pa.CompressedOutputStream(str(path), 'zstd') as file:
        for _ in range(300): file.write(b' ' * (1 << 20))
    with pytest.raises(ChesError, match='bomb.jsonl.zst: unpacks from'): load_pairs(path)
    for name, data in (('a.jsonl.gz', b'{"prompt": 1}'), ('b.csv.xz', b'x'), ('c.json.zst', b'[]'), ('d.tsv.bz2', b'')):
        (tmp_path/name).write_bytes(data)
        with pytest.raises(ChesError, match=name): load_pairs(tmp_path/name)

@pytest.mark.parametrize('suffix', ['.gz', '.bz2', '.xz', '.zst'])
def test_a_packed_file_that_is_cut_short_or_damaged(tmp_path, suffix):
    "Refused by its name, or read as far as nothing is wrong; never rows that are not there"
    rows = [dict(prompt=f'question {i} {i*i}', chosen='a'*(i % 7 + 1), rejected='b') for i in range(3000)]
    text = ''.join(json.dumps(r) + '\n' for r in rows).encode()
    path = tmp_path/f'a.jsonl{suffix}'
    if suffix == '.zst':
        with pa.CompressedOutputStream(str(path), 'zstd') as file: file.write(text)
    else: path.write_bytes({'.gz': gzip, '.bz2': bz2, '.xz': lzma}[suffix].compress(text))
    assert list(read_rows(path)) == rows
    whole = path.read_bytes()
    gen = random.Random(suffix)
    for _ in range(20):
        path.write_bytes(whole[:gen.randrange(1, len(whole) - 1)])
        with pytest.raises(ChesError, match=f'a.jsonl{suffix}'): list(read_rows(path))
        at = gen.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << gen.randrange(8)]) + whole[at + 1:])
        try:
            assert len(list(read_rows(path))) <= len(rows)
        except ChesError as error:
            assert path.name in str(error)

def test_settings_of_the_process_stay(tmp_path):
    limit = csv.field_size_limit()
    path = write(tmp_path/'a.csv', [dict(prompt='q', chosen='a'*200_000, rejected='b')]*3)
    pairs = iter_pairs(path)
    for _ in range(3):
        assert len(next(pairs).chosen) == 200_000 and csv.field_size_limit() == limit

@pytest.mark.parametrize('source', [
    None, 5, b'x', dict(prompt=['q'], chosen=['a']), dict(prompt='q', chosen='a', rejected='b'), ['a.jsonl', 'b.jsonl'],
    [['q', 'a', 'b']], [1, 2], {}, iter([]), pd.DataFrame(), pd.Series(['a'])])
def test_what_holds_no_rows(source):
    with pytest.raises(ChesError) as refusal: load_pairs(source)
    assert '\n' not in str(refusal.value)

def test_a_row_that_is_nested_without_end_is_flagged(tmp_path):
    deep = lambda n: json.loads('['*n + ']'*n)
    row = dict(prompt='q', chosen='a', rejected='b')
    assert load_pairs([row | dict(x=deep(60))])[0].extra['x'] == deep(60)
    rows = [row, row | dict(x=deep(600)), row | dict(chosen=deep(600)), row | dict(x=dict(y=deep(300)))]
    for source in (rows, write(tmp_path/'deep.jsonl', rows)):
        pairs = load_pairs(source)
        assert [p.problem for p in pairs] == ['', 'too_deep', 'too_deep', 'too_deep']
        assert pairs[1].detail == 'x is nested deeper than 100 levels' and not any('x' in p.extra for p in pairs)
        with pytest.raises(ChesError, match="row 1: column 'x' is nested deeper than 100"): list(read_rows(source))

def test_images_are_flagged_and_sounds_told():
    row = dict(prompt='q', chosen='a', rejected='b')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        pairs = load_pairs([row | more for more in (
            dict(images=['x.png']), dict(image=dict(path='x')), dict(images=[], video=None))])
    assert [p.problem for p in pairs] == ['not_text', 'not_text', '']
    assert pairs[0].detail.startswith('images is not empty')
    with pytest.warns(UserWarning, match="column 'audio' is passed over") as warned:
        assert [p.problem for p in load_pairs([row | dict(audio='x.wav')]*3)] == ['']*3
    assert len(warned) == 1
