"""For how many steps of training does the order of pairs by influence hold?

    python benchmarks/influence_decay.py DATA [--pairs 48] [--protected 16] [--marks 0 1 2 4 8 12]
        [--out benchmarks/records/influence_decay.json]

Short pairs are drawn by seed: a pool to train on, and others whose preferred responses are protected. From two starts,
the model as it comes and the model fitted to the pool's preferred responses, DPO trains on the pool. At the marked
steps the audit's own influence of every pair of the pool is computed at the weights of that step, with the rates c_j of
the loss; the log-probabilities of the protected responses are read before and after every step. The record holds the
numbers of each pair; rank correlations are computed where it is read.
"""
import argparse, random, time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ches_align.core.run import provenance
from ches_align.core.writing import json_bytes, write_files
from ches_align.lm.pairs import load_pairs
from ches_align.lm.encode import encode_pairs
from ches_align.lm.models import load_model
from ches_align.lm.batches import default_budget, pad_rows, plan_batches, token_logps
from ches_align.audit.influence import influence_block, make_pull
from ches_align.audit.protected import overlaps, read_protected
from ches_align.audit.token_store import token_hash
from ches_align.studies.single_prompt import OPTIMIZERS, restore, snapshot
from ches_align.theory.losses import LOSSES, PairLogps
from ches_align.theory.oracle import grad_dot

STARTS = 'base', 'fitted'
COST = dict(fit=6, step=18, mark=70)  # seconds on one core, about; for the remaining time

def draw(data, tokenizer, counts, seed):
    "Pool and protected set, of pairs of at most 120 tokens with responses of 6 to 40"
    def fits(pair):
        sides = pair.chosen_ids, pair.rejected_ids
        return pair.status == 'ok' and pair.length <= 120 and all(6 <= len(ids) <= 40 for ids in sides)
    every = load_pairs(data)
    rows = [pair.row_id for pair in encode_pairs(every, tokenizer) if fits(pair)]
    drawn = [every[row] for row in random.Random(seed).sample(rows, sum(counts))]
    return encode_pairs(drawn[:counts[0]], tokenizer), read_protected(drawn[counts[0]:], tokenizer)

def batches(count, size, steps, seed):
    "Indices of each step's batch, every pair once an epoch"
    shuffled = random.Random(seed)
    order = []
    while len(order) < size*steps: order += shuffled.sample(range(count), count)
    return [order[i:i + size] for i in range(0, size*steps, size)]

def summed_logps(lm, prompts, responses):
    "ln pi of each response in nats, differentiable"
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    sums = {}
    for batch in plan_batches(lengths, default_budget(lm)):
        ids = pad_rows([[*prompts[i], *responses[i]] for i in batch], left=False)[0]
        answers = torch.zeros(ids.shape, dtype=torch.bool)
        for row, i in enumerate(batch): answers[row, len(prompts[i]):lengths[i]] = True
        states = lm.backbone(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][answers[:, 1:]]
        logps, _ = token_logps(lm.model.get_output_embeddings()(states), ids[:, 1:][answers[:, 1:]])
        parts = logps.split([len(responses[i]) for i in batch])
        sums |= {i: part.sum() for i, part in zip(batch, parts, strict=True)}
    return torch.stack([sums[i] for i in range(len(lengths))])

def both_logps(lm, pairs):
    "ln pi(y+) and ln pi(y-) of each pair"
    sides = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    return summed_logps(lm, [pair.prompt_ids for pair in pairs]*2, sides).chunk(2)

def fit(lm, pool, args, bar):
    "Raise the preferred responses of the pool, as supervised training does"
    optimizer = torch.optim.AdamW(lm.model.parameters(), args.fit_rate, weight_decay=0.)
    for batch in batches(len(pool), args.batch, args.epochs*len(pool)//args.batch, args.seed):
        pairs = [pool[i] for i in batch]
        chosen = summed_logps(lm, [pair.prompt_ids for pair in pairs], [pair.chosen_ids for pair in pairs])
        lengths = torch.tensor([len(pair.chosen_ids) for pair in pairs])
        LOSSES['sft_mean'](PairLogps(chosen, chosen.detach(), chosen_len=lengths)).loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.update(COST['fit'])

def cosine(one, other): return grad_dot(one, other)/(grad_dot(one, one)*grad_dot(other, other))**.5

def measure(lm, pool, pull, reference, beta):
    "Influence of each pair at the present weights, the rate of DPO, and where the responses stand"
    influence = [row['influence'] for row in influence_block(lm, pool, [pull], share_prompt=True)]
    with torch.no_grad(): chosen, rejected = both_logps(lm, pool)
    rates = LOSSES['dpo'](PairLogps(chosen, rejected, *(reference or (chosen, rejected))), beta).d_w
    return dict(influence=influence, rate=rates.tolist(), chosen=chosen.tolist(), rejected=rejected.tolist(),
                difference_step=pull.step._asdict())

def train(lm, pool, protected, args, bar):
    "DPO from the present weights, measured at the marks; the protected responses at every step"
    optimizer = OPTIMIZERS['rmsprop'](lm.model.parameters(), args.rate)
    order = batches(len(pool), args.batch, max(args.marks), args.seed + 1)
    prompts = [row.prompt_ids for row in protected.pairs]
    responses = [row.chosen_ids for row in protected.pairs]
    direction = None
    marks = []
    guarded = []
    for step in range(len(order) + 1):
        if step in args.marks:
            pull = make_pull(lm, protected, pool[:2])
            direction = direction or pull.direction
            start = marks and [torch.tensor(marks[0][side]) for side in ('chosen', 'rejected')]
            same = dict(cosine=cosine(direction, pull.direction))  # of the summed gradient with that of the start
            marks.append(dict(step=step) | same | measure(lm, pool, pull, start, args.beta))
            bar.update(COST['mark'])
        with torch.no_grad(): guarded.append(summed_logps(lm, prompts, responses).tolist())
        if step == len(order): return dict(marks=marks, batches=order, protected=guarded)
        pairs = [pool[i] for i in order[step]]
        now = both_logps(lm, pairs)
        before = [torch.tensor([marks[0][side][i] for i in order[step]]) for side in ('chosen', 'rejected')]
        LOSSES['dpo'](PairLogps(*now, *before), args.beta).loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.update(COST['step'])

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('data')
    ap.add_argument('--pairs', type=int, default=48)
    ap.add_argument('--protected', type=int, default=16)
    ap.add_argument('--marks', type=int, nargs='+', default=[0, 1, 2, 4, 8, 12], help='steps; the first is 0')
    ap.add_argument('--batch', type=int, default=8)
    ap.add_argument('--rate', type=float, default=1e-6, help='of RMSProp')
    ap.add_argument('--beta', type=float, default=.1)
    ap.add_argument('--epochs', type=int, default=3, help='of the fit')
    ap.add_argument('--fit_rate', type=float, default=1e-5, help='of AdamW')
    ap.add_argument('--seed', type=int, default=0)
    ap.add_argument('--name', default=None, help='what the record calls the data')
    ap.add_argument('--out', default='benchmarks/records/influence_decay.json')
    args = ap.parse_args()
    if args.marks[0] != 0: ap.error('--marks: the first is 0, with which the others are compared')
    began = time.time()
    lm = load_model('smollm2-135m', dtype='float32', device='cpu')
    lm.model.requires_grad_(True)
    pool, protected = draw(args.data, lm.tokenizer, (args.pairs, args.protected), args.seed)
    base = snapshot(lm.model)
    fits = args.epochs*args.pairs//args.batch
    total = COST['fit']*fits + len(STARTS)*(COST['mark']*len(args.marks) + COST['step']*max(args.marks))
    runs = {}
    with tqdm(total=total, desc='influence', mininterval=5) as bar:
        for name in STARTS:
            restore(lm.model, base)
            if name == 'fitted': fit(lm, pool, args, bar)
            runs[name] = train(lm, pool, protected, args, bar)
    config = {key: value for key, value in vars(args).items() if key not in ('data', 'name', 'out')}
    record = dict(
        config=dict(data=args.name or Path(args.data).parent.name) | config, model=lm.provenance,
        data_hash=token_hash(pool), protected_hash=protected.token_hash, overlaps=overlaps(protected, pool),
        rows=[pair.row_hash for pair in pool], protected_rows=[pair.row_hash for pair in protected.pairs],
        tokens=dict(chosen=[len(pair.chosen_ids) for pair in pool], rejected=[len(pair.rejected_ids) for pair in pool]),
        runs=runs, seconds=round(time.time() - began), **provenance())
    write_files({Path(args.out): json_bytes(record)})
    print(f"{args.out}: {record['seconds']} s")
