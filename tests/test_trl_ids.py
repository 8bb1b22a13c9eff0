"""What is scored is what TRL trains on: token ids of every layout by TRL's own preparation, for its chat templates.
Where we differ on purpose the difference has a name here, and exactly that difference is asserted."""
import json
import re
from collections import Counter
from functools import cache
from importlib.resources import files
from types import SimpleNamespace

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ches_align.lm.pairs import load_pairs
from ches_align.lm.encode import encode_pairs

trl = pytest.importorskip('trl')

# -- tokenizers: one vocabulary, the control tokens of a template as single ids
MARKS = r'<\|[^|<>\n\'"{}]{1,40}\|>|<｜[^<>\n\'"{}]{1,40}｜>|</?[a-z_]{2,24}>|<\|?[a-z_]+\|?>|\[[A-Z_/]{3,20}\]'
SHIPPED = {f.name.removesuffix('.jinja'): f.read_text('utf-8')
           for f in (files('trl')/'chat_templates').iterdir() if f.name.endswith('.jinja')}
END = dict(cohere='<|END_OF_TURN_TOKEN|>', deepseek='<｜end▁of▁sentence｜>',
           diffusion_gemma='<turn|>', gemma4='<turn|>',
           gemma='<end_of_turn>', glm4moe=None, gptoss='<|return|>', idefics3='<end_of_utterance>',
           smolvlm='<end_of_utterance>', lfm2='<|im_end|>', llama3='<|eot_id|>', llava_next='</s>',
           muse_glimmer='<|eot|>', nemotron='<|im_end|>', phi3='</s>', qwen='<|im_end|>')  # by the longest prefix
SEES = ('idefics3', 'smolvlm', 'llava_next')  # know contents in parts only

def family(name): return max((key for key in END if name.startswith(key)), key=len)

@pytest.fixture(scope='module')
def base():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = (files('ches_align')/'samples'/'pairs.jsonl').read_text('utf-8').splitlines()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=600, show_progress=False, special_tokens=['<unk>', '<s>', '</s>', '<pad>'],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer.to_str()

def tokenizer_of(base, template):
    marks = sorted(set(re.findall(MARKS, template or '')))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(base), bos_token='<s>', eos_token='</s>', pad_token='<pad>',
        unk_token='<unk>', additional_special_tokens=marks, chat_template=template)
    assert all(len(tokenizer(mark, add_special_tokens=False).input_ids) == 1 for mark in marks)
    return tokenizer

@pytest.fixture(scope='module')
def tokenizers(base): return {name: tokenizer_of(base, template) for name, template in SHIPPED.items()}

# -- both preparations of one row
@cache
def _stored(row): return Dataset.from_list([json.loads(row)])

def stored(row): return _stored(json.dumps(row))

def theirs(row, tokenizer):
    "Ids by TRL's own preparation"
    stub = SimpleNamespace(_tokenizer=tokenizer)
    settings = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode='keep_start')
    rows = stored(row).to_iterable_dataset()
    prepared = next(iter(trl.DPOTrainer._prepare_dataset(stub, rows, tokenizer, settings, 'train')))
    return [list(prepared[k]) for k in ('prompt_ids', 'chosen_ids', 'rejected_ids')]

def encoded(row, tokenizer, **loading):
    "The row by ours, as `datasets` gives it"
    return encode_pairs(load_pairs(stored(row), **loading), tokenizer)[0]

def ids(pair): return [list(pair.prompt_ids), list(pair.chosen_ids), list(pair.rejected_ids)]

def without_white_space(wanted, ours, tokenizer):
    "The named difference of every chat template: white space that follows the end token is no part of a response"
    tails = [tokenizer.decode(theirs[len(own):]) for theirs, own in zip(wanted[1:], ours[1:], strict=True)]
    assert all(tail in ('', ' ', '\n') for tail in tails), tails
    return [wanted[0], *(theirs[:len(own)] for theirs, own in zip(wanted[1:], ours[1:], strict=True))], max(tails)

# -- layouts
def user(content): return dict(role='user', content=content)
def assistant(content, **more): return dict(role='assistant', content=content, **more)
def part(text): return [dict(type='text', text=text)]
CALL = [dict(type='function', function=dict(name='get_weather', arguments=dict(city='Rome')))]
TOOLS = [dict(type='function', function=dict(name='get_weather', description='Weather of a city', parameters=dict(
    type='object', properties=dict(city=dict(type='string', description='A city')), required=['city'])))]
ASK = dict(prompt=[user('Is 7 prime?')], chosen=[assistant('Yes, it is.')], rejected=[assistant('No idea')])
PAST = [user('Hi'), assistant('Hello'), user('Again?')]
LAYOUTS = dict(
    explicit=ASK,
    turns=ASK | dict(prompt=PAST),
    system=ASK | dict(prompt=[dict(role='system', content='Be brief.'), *PAST]),
    implicit=dict(chosen=PAST + ASK['chosen'], rejected=PAST + ASK['rejected']),
    parted_behind_the_assistant=dict(chosen=[*PAST[:2], assistant('b')], rejected=[*PAST[:2], assistant('c')]),
    chinese=dict(prompt=[user('你好，七是质数吗？')], chosen=[assistant('是的。')], rejected=[assistant('不知道')]),
    white_space=dict(prompt=[user(' Hi \n')], chosen=[assistant(' Yes. ')], rejected=[assistant('\nNo\n')]),
    tools=ASK | dict(tools=TOOLS),
    tools_in_text=ASK | dict(tools=json.dumps(TOOLS)),
    no_tools=ASK | dict(tools=[]),
    settings=ASK | dict(chat_template_kwargs=dict(enable_thinking=False, thinking=False)),
    thought=ASK | dict(chosen=[assistant('<think>\nOdd.\n</think>\n\nYes.')]),
    parts=dict(prompt=[user(part('Is 7 prime?'))], chosen=[assistant(part('Yes.'))], rejected=[assistant(part('No.'))]),
    call_in_prompt=ASK | dict(prompt=[user('Weather?'), assistant(None, tool_calls=CALL),
                                      dict(role='tool', content='22', name='get_weather')], tools=TOOLS),
    call_in_chosen=ASK | dict(chosen=[assistant('', tool_calls=CALL)], tools=TOOLS),
    several_turns=ASK | dict(chosen=[assistant('a'), user('x'), assistant('b')],
                             rejected=[assistant('a'), user('x'), assistant('d')]),
    turns_and_one=ASK | dict(chosen=[assistant('a'), user('x'), assistant('b')]),
)

def in_parts(row):
    "A row as TRL gives it to the template of a model that sees"
    cells = {k: row[k] for k in ('prompt', 'chosen', 'rejected') if k in row}
    return row | {k: trl.data_utils.prepare_multimodal_messages(v) for k, v in cells.items()}

def outcome(name, layout, tokenizer):
    "What became of a layout by both, and the white space that ours leaves off; else what differs"
    ours = encoded(LAYOUTS[layout], tokenizer)
    row = in_parts(LAYOUTS[layout]) if name.startswith(SEES) else LAYOUTS[layout]
    try:
        wanted = theirs(row, tokenizer)
    except Exception as error:  # a template raises what it likes
        words = ' '.join(str(error).split())[:60]
        agree = ours.status == 'template_error' and words in ours.detail
        return ('refused' if agree else f'TRL: {words}; ours: {ours.status} {ours.detail}'), ''
    if wanted[1] == wanted[2]: return ('no difference' if ours.status == 'identical' else f'ours: {ours.status}'), ''
    if ours.status != 'ok': return f'{ours.status}: {ours.detail}', ''
    wanted, tail = without_white_space(wanted, ids(ours), tokenizer)
    return ('equal' if wanted == ids(ours) else f'TRL: {wanted}; ours {ids(ours)}'), tail

# a template for training marks the same texts for the loss: a few layouts show it
SOME = ('explicit', 'tools', 'call_in_chosen', 'several_turns')
ALWAYS = ('explicit', 'turns', 'implicit', 'chinese', 'white_space', 'settings', 'several_turns', 'turns_and_one')
BREAKS = ('diffusion_gemma', 'gemma', 'idefics3', 'lfm2', 'nemotron', 'qwen', 'smolvlm')  # end a turn with a line break

def test_every_template_and_layout(tokenizers):
    outcomes = {}
    tails = {}
    for name, tokenizer in tokenizers.items():
        for layout in SOME if name.endswith('_training') else LAYOUTS:
            outcomes[name, layout], tails[name, layout] = outcome(name, layout, tokenizer)
    counts = Counter(outcomes.values())
    odd = {k: v[:300] for k, v in outcomes.items() if v not in ('equal', 'refused', 'no difference')}
    assert not odd
    assert len(SHIPPED) >= 72 and counts['equal'] >= 780 and counts['refused'] + counts['no difference'] <= 50, counts
    assert {outcomes[name, layout] for name, layout in outcomes if layout in ALWAYS} == {'equal'}
    for name in SHIPPED:
        assert tails[name, 'explicit'] == ('\n' if name.startswith(BREAKS) else ' ' * name.startswith('llava'))

def test_responses_end_in_the_template_s_mark(tokenizers):
    seen = 0
    for name, tokenizer in tokenizers.items():
        mark = END[family(name)]
        last = {tokenizer.decode(response[-1:]) for response in ids(encoded(ASK, tokenizer))[1:]}
        if mark: seen += last == {mark}
        else: assert not any(e in tokenizer.all_special_tokens for e in last) or last == {'<|user|>'}  # the next turn's
    assert seen == sum(END[family(name)] is not None for name in SHIPPED) >= 70

def test_openings_that_the_conversation_does_not_repeat(tokenizers):
    cut = {}
    for name, tokenizer in tokenizers.items():
        pair = encoded(ASK, tokenizer)
        if pair.prompt_cut: cut[name] = pair.detail
    assert len(cut) >= 12 and {'deepseek_r1_distill', 'deepseekv3', 'nemotron_3_nano'} <= set(cut)
    assert all('the responses begin before the end of the prompt' in detail for detail in cut.values())

# -- text
TEXTS = dict(
    explicit=dict(prompt='2 + 2 =', chosen=' 4', rejected=' five'),
    space_at_the_end=dict(prompt='Name a colour: ', chosen='red', rejected='blue'),
    line_break_at_the_end=dict(prompt='Q\n', chosen='\nyes', rejected='no'),
    within_a_word=dict(prompt='Is it th', chosen='e one', rejected='at one'),
    chinese=dict(prompt='七是质数吗？', chosen='是的', rejected='不知道'),
    its_own_end=dict(prompt='Q:', chosen=' yes</s>', rejected=' no'),
    its_own_beginning=dict(prompt='<s>Q:', chosen=' yes', rejected=' no'),
    tools=dict(prompt='Q:', chosen=' yes', rejected=' no', tools=TOOLS),
    implicit=dict(chosen='Q: who? Sam', rejected='Q: who? Joe'),
    implicit_within_a_word=dict(chosen='Q: who? I am', rejected='Q: who? It is'),
    implicit_chinese=dict(chosen='问：谁？答：我', rejected='问：谁？答：他'),
    brackets=dict(prompt='[1] Cite:', chosen=' [{"a": 1}]', rejected=' [2]'))

@pytest.mark.parametrize('form', ['$A', '<s> $A', '<s> $A </s>'])
def test_text(base, form):
    tokenizer = tokenizer_of(base, SHIPPED['qwen3'])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[(mark, tokenizer.convert_tokens_to_ids(mark)) for mark in ('<s>', '</s>')])
    ours = {name: encoded(row, tokenizer) for name, row in TEXTS.items()}
    assert {name: ids(e) for name, e in ours.items()} == {name: theirs(row, tokenizer) for name, row in TEXTS.items()}
    assert all(e.status == 'ok' and e.chosen_ids[-1] == tokenizer.eos_token_id for e in ours.values())
    cut = {name for name, e in ours.items() if e.prompt_cut}
    assert {'space_at_the_end', 'within_a_word'} <= cut and not {'explicit', 'its_own_end', 'tools'} & cut

# -- where we differ on purpose, besides the white space
def said(turn): return dict(role={'user': 'human', 'assistant': 'gpt'}[turn['role']]) | dict(content=turn['content'])

CELLS = [('prompt', ASK['prompt']), ('chosen', ASK['chosen']), ('rejected', ASK['rejected'])]
READ = {  # rows that TRL refuses or takes for something else, and that are read as `ASK`
    'from and value': {k: [{'from': said(m)['role'], 'value': m['content']} for m in v] for k, v in CELLS},
    'names of roles': {k: [said(m) for m in v] for k, v in CELLS},
    'capital letters': {k: [m | dict(role=m['role'].title()) for m in v] for k, v in CELLS},
    'one message for a list': {k: v[0] for k, v in CELLS},
    'JSON in a cell': {k: json.dumps(v) for k, v in CELLS},
    'Python in a cell': {k: str(v) for k, v in CELLS},
    'prompt repeated': ASK | {k: ASK['prompt'] + ASK[k] for k in ('chosen', 'rejected')},
    'prompt in a text': ASK | dict(prompt='Is 7 prime?'),
}

@pytest.mark.parametrize('name', READ)
def test_read_where_trl_does_not(base, name):
    tokenizer = tokenizer_of(base, SHIPPED['qwen2_5'])
    assert ids(encoded(READ[name], tokenizer)) == ids(encoded(ASK, tokenizer))
    try:
        assert theirs(READ[name], tokenizer)[0] != theirs(ASK, tokenizer)[0]
    except (TypeError, AttributeError, KeyError, ValueError):
        pass  # TRL's words for what it cannot read

FLAGGED = {  # rows that TRL trains on
    'the response is of the user': (ASK | dict(chosen=[user('a')]), 'prompts_differ', 'chosen has the turns user'),
    'the conversations part at the user': (
        dict(chosen=[*PAST[:2], user('a'), assistant('b')], rejected=[*PAST[:2], user('c'), assistant('d')]),
        'prompts_differ', 'chosen has the turns user, assistant'),
    'the same response twice': (ASK | dict(rejected=ASK['chosen']), 'identical', 'the same'),
}

@pytest.mark.parametrize('name', FLAGGED)
def test_flagged_where_trl_trains(base, name):
    tokenizer = tokenizer_of(base, SHIPPED['qwen2_5'])
    row, status, words = FLAGGED[name]
    ours = encoded(row, tokenizer)
    assert ours.status == status and words in ours.detail and len(theirs(row, tokenizer)[1]) > 1

def test_messages_without_a_template_get_dialogue_marks(base):
    tokenizer = tokenizer_of(base, None)
    with pytest.raises(ValueError, match='chat_template'): theirs(ASK, tokenizer)
    text = dict(prompt='\n\nHuman: Is 7 prime?\n\nAssistant:', chosen=' Yes, it is.', rejected=' No idea')
    assert ids(encoded(ASK, tokenizer)) == theirs(text, tokenizer)

def test_length_limit_cuts_as_keep_start_does(base):
    tokenizer = tokenizer_of(base, SHIPPED['qwen2_5'])
    whole = ids(encoded(ASK, tokenizer))
    ours = encode_pairs(load_pairs([ASK]), tokenizer, max_length=len(whole[0]) + 3)[0]
    assert ids(ours) == [whole[0], whole[1][:3], whole[2][:3]]
    assert encode_pairs(load_pairs([ASK]), tokenizer, max_length=len(whole[0]))[0].status == 'prompt_too_long'
