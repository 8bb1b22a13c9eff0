"""Scoring speed, side by side in one run: the papers' way against ours.

    python benchmarks/score_speed.py DATA [--pairs 24] [--repeats 3] [--whole 64] [--out benchmarks/records/score_speed.json]

The papers' way (written from its description): a process of its own with the model as Transformers loads it, one
response at a time in fp32, the whole model with its output layer, all layers' states kept, scores from
`hidden_states[-1]`; the edit distance by a Python recursion over 0-d tensors. Ours: `load_model` and `score_block`,
with and without what needs the output layer, and without shared prompts. The rate of matrix products is measured beside them, in products of
the backbone's own shapes. Arms alternate and only one computes at a time; medians are compared. A second
part scores all of DATA with `score_dataset` and samples the resident memory.
"""
import argparse, json, multiprocessing, os, platform, statistics, threading, time
from functools import partial
from pathlib import Path

import psutil
import torch
import transformers

from ches_align.audit.data import load_pairs
from ches_align.audit.hidden_states import default_budget, encode_pairs, shares_prompt
from ches_align.audit.models import embedded_gguf, gguf_folder, load_model
from ches_align.audit.scoring import score_block, score_dataset
from ches_align.theory.ches import neg_edit_distance

@torch.no_grad()
def papers_way(model, pairs):
    scores = []
    for prompt, *responses in pairs:
        sums = []
        for ids in responses:
            out = model(input_ids=torch.tensor([[*prompt, *ids]]), output_hidden_states=True)
            sums.append(out.hidden_states[-1][0, len(prompt) - 1:-1].sum(0))
        scores.append((sums[0] @ sums[1] - sums[0].norm() ** 2).item())
    return scores

def papers_worker(pipe, folder):
    "Serves requests; nothing of this package's memory settings reaches it"
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    while (pairs := pipe.recv()) is not None: pipe.send(papers_way(model, pairs))

def papers_edit(a, b):
    a, b = torch.tensor(a), torch.tensor(b)
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        left, row[0] = row[0], i
        for j, y in enumerate(b, 1): left, row[j] = row[j], min(row[j] + 1, row[j-1] + 1, left + int(x != y))
    return row[-1]

@torch.no_grad()
def backbone_products(lm, rows):
    "Every matrix of the backbone times a batch of `rows` states; how many operations that was"
    flops = 0
    for n, p in lm.backbone.named_parameters():
        if p.ndim != 2 or 'embed' in n: continue
        x = torch.ones(rows, p.shape[1], dtype=p.dtype)
        torch.nn.functional.linear(x, p)
        flops += 2*rows*p.numel()
    return flops

def timed(f, *args):
    start = time.perf_counter()
    result = f(*args)
    return time.perf_counter() - start, result

def compare(data, n_pairs, repeats, batch_tokens):
    context = multiprocessing.get_context('spawn')
    pipe, end = context.Pipe()
    worker = context.Process(target=papers_worker, args=(end, str(gguf_folder(embedded_gguf('smollm2-135m')))))
    worker.start()
    models = {d: load_model('smollm2-135m', dtype=d) for d in ('float32', 'bfloat16')}
    pairs = encode_pairs(load_pairs(data, limit=n_pairs, seed=0), models['float32'].tokenizer)
    pairs = [e for e in pairs if e.status == 'ok']
    plain = [(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in pairs]
    def papers():
        pipe.send(plain)
        return pipe.recv()
    def ours(lm, head, share):
        return [r['ches'] for r in score_block(lm, pairs, head=head, batch_tokens=batch_tokens, share_prompt=share)]
    arms = {'papers_fp32': papers} | {f'ours_{d}_unshared': partial(ours, lm, False, False) for d, lm in models.items()}
    arms |= {f"ours_{d}{'_head' * head}": partial(ours, lm, head, shares_prompt(lm, pairs))
             for d, lm in models.items() for head in (False, True)}
    times, scores = {k: [] for k in arms}, {k: f() for k, f in arms.items()}  # the first round warms up
    products, rates = {d: partial(backbone_products, lm, batch_tokens or default_budget(lm)) for d, lm in models.items()}, {d: [] for d in models}
    for _ in range(repeats):
        for k, f in arms.items(): times[k].append(timed(f)[0])
        for d, f in products.items():
            seconds, flops = timed(f)
            rates[d].append(flops/seconds)
    pipe.send(None); worker.join()
    medians = {k: statistics.median(v) for k, v in times.items()}
    tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    base = torch.tensor(scores['papers_fp32'], dtype=torch.float64)
    error = {k: (torch.tensor(v, dtype=torch.float64) / base - 1).abs().median().item() for k, v in scores.items()}
    prompts = sum(len(p.prompt_ids) for p in pairs)
    rate, weights = {d: statistics.median(r) for d, r in rates.items()}, sum(p.numel() for n, p in models['float32'].backbone.named_parameters() if p.ndim == 2 and 'embed' not in n)
    share = {f'{d}{u}': 2*weights*(tokens - prompts*(not u and shares_prompt(models[d], pairs)))/medians[f'ours_{d}{u}']/rate[d] for d in models for u in ('', '_unshared')}
    return dict(matmul_flops_per_second=rate, share_of_matmul_rate=share, pairs=len(pairs), tokens=tokens, prompt_tokens_saved=prompts / tokens, seconds=times, median_relative_difference=error,
                ratio={k: medians['papers_fp32'] / v for k, v in medians.items()},
                tokens_per_second={k: tokens / v for k, v in medians.items()})

def compare_edit(length=400, repeats=3):
    gen = torch.Generator().manual_seed(0)
    a, b = (torch.randint(50_000, (length,), generator=gen).tolist() for _ in 'ab')
    slow = statistics.median(timed(papers_edit, a, b)[0] for _ in range(repeats))
    def hundred(): return [neg_edit_distance(a, b) for _ in range(100)]
    fast = statistics.median(timed(hundred)[0] / 100 for _ in range(repeats))
    assert papers_edit(a, b) == round(-neg_edit_distance(a, b) * length)
    return dict(length=length, papers_seconds=slow, ours_seconds=fast, ratio=slow / fast)

def whole_run(data, dtype, batch_tokens, limit):
    process, curve, stop = psutil.Process(), [], threading.Event()
    lm = load_model('smollm2-135m', dtype=dtype)
    def watch():
        start = time.time()
        while not stop.wait(2): curve.append([round(time.time() - start), process.memory_info().rss >> 20])
    thread = threading.Thread(target=watch)
    thread.start()
    seconds, scores = timed(lambda: score_dataset(data, lm, batch_tokens=batch_tokens, progress=False, limit=limit, seed=0 if limit else None))
    stop.set()
    thread.join()
    made = scores.attrs['manifest']
    return dict(dtype=dtype, seconds=seconds, rows=len(scores), counts=made['counts'], tokens=made['tokens'],
                data_hash=made['data_hash'], rss_mib=curve)

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('data')
    ap.add_argument('--pairs', type=int, default=24)
    ap.add_argument('--repeats', type=int, default=3)
    ap.add_argument('--batch_tokens', type=int, default=None)
    ap.add_argument('--whole', type=int, default=None, help='pairs of the second part; default: all')
    ap.add_argument('--name', default=None, help='what the record calls the data')
    ap.add_argument('--out', default='benchmarks/records/score_speed.json')
    args = ap.parse_args()
    record = dict(
        config=dict(data=args.name or Path(args.data).name, pairs=args.pairs, repeats=args.repeats,
                    batch_tokens=args.batch_tokens, whole=args.whole, seed=0),
        hardware=f'{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads',
        versions=dict(torch=torch.__version__, transformers=transformers.__version__, python=platform.python_version()),
        model=load_model('smollm2-135m').provenance,
        scoring=compare(args.data, args.pairs, args.repeats, args.batch_tokens), edit_distance=compare_edit())
    record['whole'] = [whole_run(args.data, d, args.batch_tokens, args.whole) for d in ('float32', 'bfloat16')]
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(record, indent=1) + '\n')
    ratios = record['scoring']['ratio'] | dict(edit=record['edit_distance']['ratio'])
    print({k: round(v, 2) for k, v in ratios.items()}, {k: round(v, 2) for k, v in record['scoring']['share_of_matmul_rate'].items()})
