"""Scoring speed, side by side in one run: the papers' way against ours.

    python benchmarks/score_speed.py DATA [--pairs 24] [--repeats 3] [--out benchmarks/records/score_speed.json]

The papers' way (written from its description): one response at a time in fp32, the whole model with its output layer,
all layers' states kept, scores from `hidden_states[-1]`; the edit distance by a Python recursion over 0-d tensors.
Ours: `score_block`, with and without what needs the output layer. Arms alternate, medians are compared. A second part
scores all of DATA with `score_dataset` and samples the resident memory.
"""
import argparse, json, os, platform, statistics, subprocess, sys, threading, time
from pathlib import Path

import psutil
import torch

from ches_align.audit.data import load_pairs
from ches_align.audit.hidden_states import encode_pairs
from ches_align.audit.models import load_model
from ches_align.audit.scoring import score_block, score_dataset
from ches_align.theory.ches import neg_edit_distance

@torch.no_grad()
def papers_way(lm, pairs):
    scores = []
    for p in pairs:
        sums = []
        for ids in (p.chosen_ids, p.rejected_ids):
            out = lm.model(input_ids=torch.tensor([[*p.prompt_ids, *ids]]), output_hidden_states=True)
            sums.append(out.hidden_states[-1][0, len(p.prompt_ids) - 1:-1].sum(0))
        scores.append((sums[0] @ sums[1] - sums[0].norm() ** 2).item())
    return scores

def papers_edit(a, b):
    a, b = torch.tensor(a), torch.tensor(b)
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        left, row[0] = row[0], i
        for j, y in enumerate(b, 1): left, row[j] = row[j], min(row[j] + 1, row[j-1] + 1, left + int(x != y))
    return row[-1]

def timed(f, *args):
    start = time.perf_counter()
    result = f(*args)
    return time.perf_counter() - start, result

def compare(data, n_pairs, repeats, batch_tokens):
    models = {d: load_model('smollm2-135m', dtype=d) for d in ('float32', 'bfloat16')}
    lm = models['float32']
    pairs = [e for e in encode_pairs(load_pairs(data, limit=n_pairs, seed=0), lm.tokenizer) if e.status == 'ok']
    arms = {'papers_fp32': lambda: papers_way(lm, pairs)}
    for dtype, m in models.items():
        for head in (False, True):
            arms[f"ours_{dtype}{'_head' if head else ''}"] = lambda m=m, head=head: [
                r['ches'] for r in score_block(m, pairs, head=head, batch_tokens=batch_tokens)]
    times, scores = {k: [] for k in arms}, {}
    for k, f in arms.items(): f()  # warm-up
    for _ in range(repeats):
        for k, f in arms.items():
            t, scores[k] = timed(f)
            times[k].append(t)
    medians = {k: statistics.median(v) for k, v in times.items()}
    tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    base = torch.tensor(scores['papers_fp32'], dtype=torch.float64)
    error = {k: (torch.tensor(v, dtype=torch.float64) / base - 1).abs().median().item() for k, v in scores.items()}
    return dict(pairs=len(pairs), tokens=tokens, seconds=times, ratio={k: medians['papers_fp32'] / v for k, v in medians.items()},
                tokens_per_second={k: tokens / v for k, v in medians.items()}, median_relative_difference=error)

def compare_edit(length=400, repeats=3):
    gen = torch.Generator().manual_seed(0)
    a, b = (torch.randint(50_000, (length,), generator=gen).tolist() for _ in 'ab')
    slow = statistics.median(timed(papers_edit, a, b)[0] for _ in range(repeats))
    fast = statistics.median(timed(lambda: [neg_edit_distance(a, b) for _ in range(100)])[0] / 100 for _ in range(repeats))
    assert papers_edit(a, b) == round(-neg_edit_distance(a, b) * length)
    return dict(length=length, papers_seconds=slow, ours_seconds=fast, ratio=slow / fast)

def whole_run(data, dtype, out, batch_tokens):
    process, curve, stop = psutil.Process(), [], threading.Event()
    lm = load_model('smollm2-135m', dtype=dtype)
    def watch():
        start = time.time()
        while not stop.wait(0.5): curve.append([round(time.time() - start, 1), process.memory_info().rss >> 20])
    thread = threading.Thread(target=watch); thread.start()
    seconds, scores = timed(lambda: score_dataset(data, lm, out=out, batch_tokens=batch_tokens, progress=False))
    stop.set(); thread.join()
    return dict(dtype=dtype, seconds=seconds, rows=len(scores), counts=scores.status.value_counts().to_dict(),
                tokens=scores.attrs['manifest']['tokens'], data_hash=scores.attrs['manifest']['data_hash'], rss_mib=curve)

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('data')
    ap.add_argument('--pairs', type=int, default=24)
    ap.add_argument('--repeats', type=int, default=3)
    ap.add_argument('--batch_tokens', type=int, default=4096)
    ap.add_argument('--name', default=None, help='what the record calls the data')
    ap.add_argument('--no_whole', action='store_true')
    ap.add_argument('--out', default='benchmarks/records/score_speed.json')
    args = ap.parse_args()
    record = dict(
        config={k: v for k, v in vars(args).items() if k not in ('out', 'data')} | dict(data=args.name or Path(args.data).name),
        hardware=f'{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads',
        versions=dict(torch=torch.__version__, python=platform.python_version()),
        model=load_model('smollm2-135m').provenance,
        scoring=compare(args.data, args.pairs, args.repeats, args.batch_tokens), edit_distance=compare_edit())
    if not args.no_whole: record['whole'] = [whole_run(args.data, d, None, args.batch_tokens) for d in ('float32', 'bfloat16')]
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(record, indent=1) + '\n')
    print(json.dumps({k: round(v, 2) for k, v in record['scoring']['ratio'].items()}), 'edit distance', round(record['edit_distance']['ratio']))
