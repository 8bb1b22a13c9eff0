"The same messages however they are written in a cell, and a reason that names cell and shape where there are none."
import json

import numpy as np
import pandas as pd
import pytest

from ches_align.lm.pairs import load_pairs
from ches_align.lm.encode import encode_pairs
from ches_align.audit.pair_scores import blank_row

def user(content): return dict(role='user', content=content)
def assistant(content): return dict(role='assistant', content=content)

ROWS = [dict(prompt=[user('Hi'), assistant('It\'s "me"\n{x} }'), user(f'And {i}?')], chosen=[assistant('yes\\d "q"')],
             rejected=[assistant("no 'q', 'role'")]) for i in range(3)]

def as_sharegpt(messages):
    return [{'from': {'user': 'human', 'assistant': 'gpt'}[m['role']], 'value': m['content']} for m in messages]

WRITTEN = {
    'JSON': json.dumps, 'indented JSON': lambda m: json.dumps(m, indent=2), 'Python': str,
    'numpy': lambda m: str(np.array(m, dtype=object)), 'from and value': as_sharegpt,
    'from and value in JSON': lambda m: json.dumps(as_sharegpt(m)),
    'capital roles': lambda m: [x | dict(role=x['role'].upper()) for x in m],
    'array': lambda m: np.array(m, dtype=object), 'tuple': tuple}

@pytest.mark.parametrize('way', WRITTEN)
def test_messages_however_they_are_written(way):
    pairs = load_pairs([{k: WRITTEN[way](v) for k, v in row.items()} for row in ROWS])
    assert [p.row_hash for p in pairs] == [p.row_hash for p in load_pairs(ROWS)]
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [tuple(row.values()) for row in ROWS]
    assert {bool(p.detail) for p in pairs} == {way not in ('array', 'tuple')} and not any(p.problem for p in pairs)

def test_a_csv_file_that_pandas_wrote(tmp_path):
    pd.DataFrame(ROWS).to_parquet(tmp_path/'a.parquet')
    pd.read_parquet(tmp_path/'a.parquet').to_csv(tmp_path/'arrays.csv', index=False)
    pd.DataFrame(ROWS).to_csv(tmp_path/'lists.csv', index=False)
    for name in ('a.parquet', 'arrays.csv', 'lists.csv'):
        assert [p.row_hash for p in load_pairs(tmp_path/name)] == [p.row_hash for p in load_pairs(ROWS)], name

STAYS = ['[1] says so', '[{"a": 1}]', '["a", "b"]', '{"role": "x"}', '[{"role": "user", "content": "x"}] is JSON', '[',
         '{}', '[{"role": "narrator", "content": "x"}]']

@pytest.mark.parametrize('text', STAYS)
def test_text_that_starts_with_a_bracket_stays_text(text):
    pair, = load_pairs([dict(prompt=text, chosen=text + ' a', rejected=text + ' b')])
    assert (pair.prompt, pair.chosen, pair.problem, pair.detail) == (text, text + ' a', '', '')
    pair, = load_pairs([dict(prompt='p', chosen=text, rejected='b')])
    assert (pair.chosen, pair.problem) == (text, '')

class NoTokenizer:
    "Nothing of a flagged row is tokenised"
    all_special_ids = []
    added_tokens_decoder = {}

ANSWER_A = [assistant('a')]
ANSWER_B = [assistant('b')]
SHAPES = {
    'chosen is None': dict(prompt='p', chosen=None, rejected='b'),
    'prompt is of type int': dict(prompt=3, chosen='a', rejected='b'),
    'chosen is a dictionary of text': dict(prompt='p', chosen=dict(text='a'), rejected=dict(text='b')),
    'chosen is a list of 2 texts; rejected is a list of 1 text': dict(prompt='p', chosen=['a', 'c'], rejected=['b']),
    'chosen is a list of 1 list': dict(prompt='p', chosen=[ANSWER_A], rejected=[ANSWER_B]),
    'chosen is an empty list': dict(prompt='p', chosen=[], rejected=ANSWER_B),
    'prompt[0] has no role': dict(prompt=[dict(role=None, content='x')], chosen=ANSWER_A, rejected=ANSWER_B),
    'rejected[0].content is None': dict(prompt=[user('p')], chosen=ANSWER_A, rejected=[assistant(None)]),
    'prompt[0].content is a list of 2 texts': dict(prompt=[user(['p', 'q'])], chosen=ANSWER_A, rejected=ANSWER_B),
    'prompt[0].content has a part of type image': dict(
        prompt=[user([dict(type='image')])], chosen=ANSWER_A, rejected=ANSWER_B),
    'chosen has the turns assistant, user after the common prompt': dict(
        prompt=[user('p')], chosen=[*ANSWER_A, user('x')], rejected=ANSWER_B),
    'chosen is white space': dict(prompt='p', chosen=' \n', rejected='b'),
    'tools is a text that is not JSON': dict(prompt=[user('p')], chosen=ANSWER_A, rejected=ANSWER_B, tools='hammer'),
    'chat_template_kwargs is a list of 1 int': dict(
        prompt=[user('p')], chosen=ANSWER_A, rejected=ANSWER_B, chat_template_kwargs=[1])}

@pytest.mark.parametrize('detail', SHAPES)
def test_the_reason_names_cell_and_shape_up_to_the_table(detail):
    pair, = load_pairs([SHAPES[detail]])
    assert pair.problem and pair.detail == detail
    row = blank_row(encode_pairs([pair], NoTokenizer())[0])
    assert (row['status'], row['detail']) == (pair.problem, detail)
