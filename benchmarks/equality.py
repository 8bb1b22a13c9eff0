"""Are the scores right? Against a slow loop in fp64, on real pairs, in any batch size, order and padding side.

    python benchmarks/equality.py DATA [--pairs 50] [--out benchmarks/records/equality.json]

The loop follows the definition literally: weights and sums in fp64, one response at a time, no padding, every state of
`hidden_states[-1]` added by itself. The official conventions are checked against loops written from the description of
the two public codes. Errors are relative to the score itself, the largest over the pairs.
"""
import argparse, json, os, platform, time
from pathlib import Path

import torch
from scipy.stats import spearmanr

from ches_align.lm.pairs import load_pairs
from ches_align.lm.encode import encode_pairs
from ches_align.lm.models import load_model
from ches_align.audit.pair_scores import score_block
from ches_align.theory.ches import ches_scores

@torch.no_grad()
def states(model, prompt, response, **kw):
    return model(input_ids=torch.tensor([[*prompt, *response]]), output_hidden_states=True, **kw).hidden_states[-1][0]

def slow(model, pairs, extra=0):
    """By the definition, for each pair: CHES, ln-CHES, and the size of the terms that each subtracts.
    `extra`: states more at the end, as the official script has"""
    scores = []
    for pair in pairs:
        sums = []
        counts = []
        for ids in (pair.chosen_ids, pair.rejected_ids):
            hidden = states(model, pair.prompt_ids, ids).double()
            total = 0
            first = len(pair.prompt_ids) - 1
            for k in range(first, first + len(ids) + extra): total = total + hidden[k]
            sums.append(total)
            counts.append(len(ids) + extra)
        chosen, rejected = sums
        chosen_count, rejected_count = counts
        cross = torch.stack([chosen @ rejected, chosen @ rejected / (chosen_count * rejected_count)])
        own = torch.stack([chosen @ chosen, chosen @ chosen / chosen_count**2])
        scores.append(torch.cat([cross - own, cross.abs() + own]).tolist())
    return torch.tensor(scores, dtype=torch.float64)

@torch.no_grad()
def padded_left(lm, pairs):
    "Both responses in one left-padded batch with mask and positions, scored by the theory's function"
    sides = []
    for side in ('chosen_ids', 'rejected_ids'):
        full = [[*pair.prompt_ids, *getattr(pair, side)] for pair in pairs]
        width = max(map(len, full))
        ids, mask, response = (torch.zeros(len(full), width, dtype=torch.long) for _ in range(3))
        for i, (row, pair) in enumerate(zip(full, pairs)):
            ids[i, width - len(row):] = torch.tensor(row)
            mask[i, width - len(row):] = 1
            response[i, width - len(row) + len(pair.prompt_ids):] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = lm.backbone(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        sides += [out.last_hidden_state, response.bool()]
    return ches_scores(*sides).double()

def column(rows, name): return torch.tensor([r[name] for r in rows], dtype=torch.float64)

def worst(rows, exact):
    "Largest errors over the pairs: relative to the score, and to the terms that it is the difference of"
    errors = {}
    for i, name in enumerate(('ches', 'ln_ches')):
        off = (column(rows, name) - exact[:, i]).abs()
        errors[name] = (off / exact[:, i].abs()).max().item()
        errors[f'{name}_of_scale'] = (off / exact[:, i + 2]).max().item()
    return errors

def against_bf16(rows, exact):
    "What bf16 weights cost: the median relative error, and the rank correlation with the exact scores"
    names = dict(ches=exact[:, 0], ln_ches=exact[:, 1])
    return dict(
        median_relative_error={k: ((column(rows, k) - v) / v).abs().median().item() for k, v in names.items()},
        spearman={k: spearmanr(column(rows, k), v).statistic.item() for k, v in names.items()})

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('data')
    ap.add_argument('--pairs', type=int, default=50)
    ap.add_argument('--name', default=None)
    ap.add_argument('--out', default='benchmarks/records/equality.json')
    args = ap.parse_args()
    start = time.time()
    lm = load_model('smollm2-135m', dtype='float32')
    rows = load_pairs(args.data)
    pairs = [e for e in encode_pairs(rows, lm.tokenizer) if e.status == 'ok'][:args.pairs]
    no_end = [e for e in encode_pairs(rows, lm.tokenizer, None, 'official_script') if e.status == 'ok'][:args.pairs]
    double = load_model('smollm2-135m', dtype='float32').model.double()
    exact = slow(double, pairs)
    script = slow(double, no_end, extra=1)
    errors = {}
    for name, budget, order in (('rows of one', 1, 1), ('batches of 2048 tokens', 2048, 1),
                                ('batches of 8192 tokens', 8192, 1), ('reverse order', 2048, -1)):
        got = score_block(lm, pairs[::order], head=False, batch_tokens=budget)[::order]
        errors[name] = worst(got, exact)
    errors['prompt shared'] = worst(score_block(lm, pairs, head=False, share_prompt=True), exact)
    left = torch.cat([padded_left(lm, pairs[i:i + 5]) for i in range(0, len(pairs), 5)])
    errors['padding on the left'] = dict(ches=((left - exact[:, 0]) / exact[:, 0]).abs().max().item())
    for convention, sample, theirs in (('official_script', no_end, script), ('official_module', pairs, exact)):
        got = score_block(lm, sample, convention=convention, head=False, batch_tokens=2048)
        errors[convention] = worst(got, theirs)
    bf16 = score_block(load_model('smollm2-135m', dtype='bfloat16'), pairs, head=False, batch_tokens=2048)
    record = dict(
        config=dict(data=args.name or Path(args.data).name, pairs=len(pairs)), model=lm.provenance,
        largest_relative_error=errors, bf16=against_bf16(bf16, exact), seconds=round(time.time() - start, 1),
        hardware=f'{platform.machine()}, {os.cpu_count()} CPUs',
        versions=dict(torch=torch.__version__, python=platform.python_version()))
    Path(args.out).write_text(json.dumps(record, indent=1) + '\n')
    print(json.dumps(record, indent=1))
