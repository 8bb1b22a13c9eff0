"""The default alarm on seeded runs of a tiny model, harmless and harmful. Its limits were not chosen on these runs:
they were fixed before, and looked at on the seeds 100 and 101 alone."""
import copy
import math
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ches_align.watch.tracker import DisplacementTracker

WORDS = [a + b for a in 'ba be bi bo da de di do ga ge gi go'.split() for b in ('na', 'ne', 'ni', 'no')]
YES = ['yes', 'sure']
NO = ['no', 'never']
NAMES = ['<end>', '<ask>', '<unk>', *YES, *NO, *WORDS]

def tokenizer():
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(NAMES)}, unk_token='<unk>'))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token='<end>', pad_token='<end>', unk_token='<unk>')

TOKENIZER = tokenizer()

def ids(text): return TOKENIZER(text).input_ids

def sentence(draw, count=None, words=WORDS, order=.8):
    "A chain in which most words are followed by their neighbour"
    chain = [draw.choice(words)]
    for _ in range((count or draw.randint(4, 14)) - 1):
        following = words[(words.index(chain[-1]) + 1) % len(words)]
        chain.append(following if draw.random() < order else draw.choice(words))
    return chain

def answer(*words): return ' ' + ' '.join(words)

def pair(draw):
    "The preferred response says yes and goes on as the language does, the other says no and does so less"
    return dict(prompt=' '.join(['<ask>', *sentence(draw, 4)]), chosen=answer(draw.choice(YES), *sentence(draw)),
                rejected=answer(draw.choice(NO), *sentence(draw, order=.3)))

def swapped(draw):
    row = pair(draw)
    return row | dict(chosen=row['rejected'], rejected=row['chosen'])

def opposite(draw):
    "What was a preferred response now loses to the one that says no in its place"
    row = pair(draw)
    return row | dict(chosen=answer(draw.choice(NO), *row['chosen'].split()[1:]), rejected=row['chosen'])

def other_style(draw): return pair(draw) | dict(chosen=answer('sure', *sentence(draw, words=WORDS[:24], order=.7)))
def repetition(draw): return pair(draw) | dict(chosen=answer(*['bana'] * 12))

def logps(model, rows, name):
    "Log-probabilities of the responses, summed [rows]"
    coded = [(ids(row['prompt']), ids(row[name])) for row in rows]
    width = max(len(p) + len(r) for p, r in coded)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width)
    for k, (prompt, response) in enumerate(coded):
        end = len(prompt) + len(response)
        tokens[k, :end] = torch.tensor(prompt + response)
        mask[k, len(prompt):end] = 1
    each = model(tokens).logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return (each * mask[:, 1:]).sum(1)

def sft(model, start, rows): return -logps(model, rows, 'chosen').mean() / 10

def dpo(model, start, rows, beta=.1):
    with torch.no_grad(): reference = logps(start, rows, 'chosen') - logps(start, rows, 'rejected')
    margin = logps(model, rows, 'chosen') - logps(model, rows, 'rejected') - reference
    return -nn.functional.logsigmoid(beta * margin).mean()

def pushed_down(model, start, rows):
    "DPO, and both responses are pushed down beside it"
    push = .09 * logps(model, rows, 'chosen').mean() + .11 * logps(model, rows, 'rejected').mean()
    return dpo(model, start, rows) + push

def steps(model, draw, count, rate, loss, sample):
    "Train; after each step its number"
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.)
    for step in range(1, count + 1):
        optimizer.zero_grad()
        loss(model, [sample(draw) for _ in range(8)]).backward()
        optimizer.step()
        yield step

def language_model(seed):
    "It has learned the language and both kinds of answers"
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(NAMES), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=0, pad_token_id=0))
    def either(model, rows): return -(logps(model, rows, 'chosen') + logps(model, rows, 'rejected')).mean() / 20
    for _ in steps(model, random.Random(seed), 120, 1e-2, either, pair): pass
    return model

HARMLESS = dict(same_text=(sft, pair, 1e-4), same_text_fast=(sft, pair, 1e-3), small_rate=(dpo, pair, 1e-5),
                dpo=(dpo, pair, 3e-4), pushed=(pushed_down, pair, 2e-4), style=(sft, other_style, 3e-4))
HARMFUL = dict(swapped=(dpo, swapped, 1e-3), opposite=(dpo, opposite, 1e-3), repetition=(sft, repetition, 1e-3),
               ruined=(dpo, pair, 10.), not_finite=(sft, pair, 1e-3))

def watched(seed, start, name, out):
    "A run as a script would make it, with default options but for the tokens of a tiny model"
    loss, sample, rate = (HARMLESS | HARMFUL)[name]
    draw = random.Random(1000 + seed)
    model = copy.deepcopy(start)
    tracker = DisplacementTracker(TOKENIZER, [pair(draw) for _ in range(16)], out/f'{name}_{seed}', every=5)
    tracker.start(model)
    for step in steps(model, draw, 40, rate, lambda model, rows: loss(model, start, rows), sample):
        if name == 'not_finite' and step == 7: model.lm_head.weight.data.fill_(math.nan)
        if step % tracker.every == 0: tracker.update(model, step)
        if tracker.stopped: break
    return tracker

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('seed', [0, pytest.param(1, marks=pytest.mark.full)])
def test_default_alarm(tmp_path, seed):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = language_model(seed)
        runs = {name: watched(seed, start, name, tmp_path) for name in [*HARMLESS, *HARMFUL]}
    finally:
        torch.set_num_threads(before)
    fired = {name: any(m.get('alert') for m in run.metrics) for name, run in runs.items()}
    last = {name: [m for m in run.metrics if 'chosen_change' in m][-1] for name, run in runs.items()}
    assert sum(fired[name] for name in HARMLESS) == 0 and sum(fired[name] for name in HARMFUL) == 5, fired
    assert {name for name, run in runs.items() if run.stopped} == {'ruined', 'not_finite'}
    falling = {name: last[name]['share_falling'] for name in runs}
    assert all(falling[name] <= .3 for name in ('same_text', 'same_text_fast', 'small_rate', 'dpo')), falling
    assert all(falling[name] >= .8 for name in ('swapped', 'opposite', 'repetition')), falling
