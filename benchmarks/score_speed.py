"""Scoring speed, side by side in one run: the papers' way against ours.

    python benchmarks/score_speed.py DATA [--model smollm2-135m] [--pairs 24] [--repeats 3] [--precise 500]
        [--grow 100000] [--compile] [--out benchmarks/records/score_speed.json]

The papers' way (written from its description): a process of its own with the model as Transformers loads it, one
response at a time in fp32, the whole model with its output layer, all layers' states kept, scores from
`hidden_states[-1]`; the edit distance by a Python recursion over 0-d tensors. Ours: `load_model` and `score_block`,
with and without what needs the output layer, and without shared prompts. The rate of matrix products is measured
beside them, in products of the backbone's own shapes. Arms alternate and only one computes at a time; medians are
compared. The whole of the papers' way adds to the model part what it does besides for each pair: the vocabulary looked
up three times, and the edit distance. Then: bf16 scores against fp32 ones, and the time and memory of all that is not
the model, for growing numbers of rows with lengths drawn from DATA and a model of one layer.
"""
import argparse, json, multiprocessing, os, platform, random, statistics, subprocess, sys, tempfile, time
from functools import partial
from pathlib import Path

import psutil
import torch
import transformers
from scipy.stats import spearmanr

from ches_align.lm.pairs import load_pairs
from ches_align.lm.encode import EncodedPair, encode_pairs
from ches_align.lm.batches import default_budget
from ches_align.lm.weights import embedded_gguf, gguf_folder
from ches_align.lm.models import load_model, wrap_model
from ches_align.audit.pair_scores import FROM_STATES, score_block
from ches_align.audit.scoring import score_dataset
from ches_align.audit.shared_prompts import choose_sharing, share_saved, sizes_of
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

def papers_edit(one, other):
    one = torch.tensor(one)
    other = torch.tensor(other)
    row = list(range(len(other) + 1))
    for i, token in enumerate(one, 1):
        left = row[0]
        row[0] = i
        for j, candidate in enumerate(other, 1):
            left, row[j] = row[j], min(row[j] + 1, row[j-1] + 1, left + int(token != candidate))
    return row[-1]

@torch.no_grad()
def backbone_products(lm, rows):
    "Every matrix of the backbone times a batch of `rows` states; how many operations that was"
    flops = 0
    for name, weight in lm.backbone.named_parameters():
        if weight.ndim != 2 or 'embed' in name: continue
        states = torch.ones(rows, weight.shape[1], dtype=weight.dtype)
        torch.nn.functional.linear(states, weight)
        flops += 2*rows*weight.numel()
    return flops

def timed(work, *args):
    start = time.perf_counter()
    result = work(*args)
    return time.perf_counter() - start, result

def compare(data, name, n_pairs, repeats, batch_tokens, compiled):
    context = multiprocessing.get_context('spawn')
    pipe, end = context.Pipe()
    worker = context.Process(target=papers_worker, args=(end, str(gguf_folder(embedded_gguf(name)))))
    worker.start()
    models = {dtype: load_model(name, dtype=dtype) for dtype in ('float32', 'bfloat16')}
    pairs = encode_pairs(load_pairs(data, limit=n_pairs, limit_seed=0), models['float32'].tokenizer)
    pairs = [e for e in pairs if e.status == 'ok']
    plain = [(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in pairs]
    def papers():
        pipe.send(plain)
        return pipe.recv()
    def ours(lm, head, share):
        return [r['ches'] for r in score_block(lm, pairs, head=head, batch_tokens=batch_tokens, share_prompt=share)]
    arms = {'papers_fp32': papers}
    arms |= {f'ours_{dtype}_unshared': partial(ours, lm, False, False) for dtype, lm in models.items()}
    sizes = sizes_of(pairs)
    saved = share_saved(sizes)
    shares = {dtype: choose_sharing(lm, sizes) for dtype, lm in models.items()}
    arms |= {f"ours_{dtype}{'_head' * head}": partial(ours, lm, head, shares[dtype][0])
             for dtype, lm in models.items() for head in (False, True)}
    compiling = {}
    if compiled:  # models of their own; the other arms keep the plain ones
        for dtype in models:
            lm = load_model(name, dtype=dtype)
            compiling[dtype] = timed(lambda: (lm.backbone.compile(dynamic=True), ours(lm, False, shares[dtype][0])))[0]
            arms[f'ours_{dtype}_compiled'] = partial(ours, lm, False, shares[dtype][0])
    times = {k: [] for k in arms}  # the first round warms up
    scores = {k: work() for k, work in arms.items()}
    products = {dtype: partial(backbone_products, lm, batch_tokens or default_budget(lm))
                for dtype, lm in models.items()}
    rates = {dtype: [] for dtype in models}
    for _ in range(repeats):
        for k, work in arms.items(): times[k].append(timed(work)[0])
        for dtype, work in products.items():
            seconds, flops = timed(work)
            rates[dtype].append(flops/seconds)
    pipe.send(None)
    worker.join()
    medians = {k: statistics.median(v) for k, v in times.items()}
    tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    base = torch.tensor(scores['papers_fp32'], dtype=torch.float64)
    error = {k: (torch.tensor(v, dtype=torch.float64) / base - 1).abs().median().item() for k, v in scores.items()}
    rate = {dtype: statistics.median(r) for dtype, r in rates.items()}
    parameters = models['float32'].backbone.named_parameters()
    weights = sum(p.numel() for n, p in parameters if p.ndim == 2 and 'embed' not in n)
    share = {f'{dtype}{u}': 2*weights*tokens*(1 - saved*(not u and shares[dtype][0]))
             / medians[f'ours_{dtype}{u}'] / rate[dtype]
             for dtype in models for u in ('', '_unshared')}
    tokenizer = models['float32'].tokenizer
    lookup = statistics.median(timed(tokenizer.get_vocab)[0] for _ in range(5))*3*len(pairs)
    edit = sum(timed(papers_edit, p.chosen_ids, p.rejected_ids)[0] for p in pairs)
    whole = medians['papers_fp32'] + lookup + edit
    ours = {dtype: medians[f'ours_{dtype}'] for dtype in models}  # edit distances and rows are in it
    return dict(matmul_flops_per_second=rate, share_of_matmul_rate=share, pairs=len(pairs), tokens=tokens,
                prompt_tokens_saved=saved, sharing={dtype: says for dtype, (_, says) in shares.items()}, seconds=times,
                median_relative_difference=error, ratio={k: medians['papers_fp32'] / v for k, v in medians.items()},
                tokens_per_second={k: tokens / v for k, v in medians.items()},
                compile_seconds=compiling, papers_besides=dict(vocabulary=lookup, edit_distance=edit),
                ratio_whole={dtype: whole/v for dtype, v in ours.items()})

def compare_edit(length=400, repeats=3):
    gen = torch.Generator().manual_seed(0)
    one, other = (torch.randint(50_000, (length,), generator=gen).tolist() for _ in 'ab')
    slow = statistics.median(timed(papers_edit, one, other)[0] for _ in range(repeats))
    def hundred(): return [neg_edit_distance(one, other) for _ in range(100)]
    fast = statistics.median(timed(hundred)[0] / 100 for _ in range(repeats))
    assert papers_edit(one, other) == round(-neg_edit_distance(one, other) * length)
    return dict(length=length, papers_seconds=slow, ours_seconds=fast, ratio=slow / fast)

def precision(data, name, limit):
    "Spearman of bf16 with fp32 scores, and the relative error by column"
    tables = {}
    for dtype in ('float32', 'bfloat16'):
        def score():
            model = load_model(name, dtype=dtype)
            return score_dataset(data, model, head=False, progress=False, limit=limit, limit_seed=0)
        seconds, table = timed(score)
        tables[dtype] = table[table.status == 'ok']
        tables[dtype].attrs['seconds'] = seconds
    wide, low = tables.values()
    def errors(column): return (low[column]/wide[column] - 1).abs()
    columns = {column: dict(spearman=float(spearmanr(wide[column], low[column]).statistic),
                            **{f'relative_error_{q}': float(errors(column).quantile(q/100)) for q in (50, 95)})
               for column in FROM_STATES}
    manifest = low.attrs['manifest']
    return dict(pairs=len(wide), columns=columns, data_hash=manifest['data_hash'], sharing=manifest['sharing'],
                seconds={dtype: table.attrs['seconds'] for dtype, table in tables.items()})

def _peak_mib():
    "Linux's high-water mark of this program; getrusage begins with that of the process that started it"
    lines = Path('/proc/self/status').read_text().splitlines()
    return int(next(l for l in lines if l.startswith('VmHWM')).split()[1]) >> 10

def grow_child(data, rows, name):
    "One process for each number of rows: peak memory is that process's own"
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder(embedded_gguf(name)))  # no weights: memory is to be seen
    texts = [(p.prompt, p.chosen, p.rejected) for p in load_pairs(data) if not p.problem][:500]
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                         vocab_size=len(tokenizer), max_position_embeddings=8192)
    torch.manual_seed(0)
    lm = wrap_model(LlamaForCausalLM(config), tokenizer, 'one layer')
    gen = random.Random(0)
    def stream():
        for i in range(rows):
            prompt, chosen, rejected = gen.choice(texts)
            first = dict(role='user', content=f'{i}'), dict(role='assistant', content='.')
            yield dict(prompt=[*first, *prompt], chosen=chosen, rejected=rejected)
    with tempfile.TemporaryDirectory() as out:
        before = psutil.Process().memory_info().rss
        options = dict(output_dir=out, head=False, progress=False, share_prompt='no')
        seconds, scores = timed(lambda: score_dataset(stream(), lm, **options))
        print(json.dumps(dict(rows=rows, seconds=seconds, tokens=scores.attrs['manifest']['tokens'],
                              rss_before_mib=before >> 20, peak_mib=_peak_mib())))

def grow(data, name, most):
    counts = [n for n in (100, 1000, 10_000, 100_000) if n <= most]
    def child(count):
        command = [sys.executable, __file__, data, '--model', name, '--grow_child', str(count)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [json.loads(child(n).splitlines()[-1]) for n in counts]

def loading(name):
    "Seconds of the first load, which converts into an empty cache, and of a later one; a process each, without imports"
    code = ('import time; from ches_align.lm.models import load_model; '
            'import transformers.models.auto.modeling_auto; '
            f'start = time.perf_counter(); load_model({name!r}); print(time.perf_counter() - start)')
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | dict(CHES_ALIGN_CACHE=cache)
        def once():
            done = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True, env=env)
            return float(done.stdout.split()[-1])
        return dict(first=once(), later=once())

def by_length(name, dtype='bfloat16'):
    "Seconds that one pair takes, by its length"
    lm = load_model(name, dtype=dtype)
    rows = []
    gen = random.Random(0)
    for length in (64, 256, 1024, 4096):
        ids = [gen.randrange(10, 40_000) for _ in range(length)]
        pair = EncodedPair(0, '', 'ok', ids[:length//2], ids[length//2:3*length//4], ids[3*length//4:])
        def score(): return score_block(lm, [pair], head=False, share_prompt=True)
        seconds = statistics.median(timed(score)[0] for _ in range(3))
        rows.append(dict(tokens=length, seconds=seconds))
    return rows

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('data')
    ap.add_argument('--pairs', type=int, default=24)
    ap.add_argument('--repeats', type=int, default=3)
    ap.add_argument('--batch_tokens', type=int, default=None)
    ap.add_argument('--model', default='smollm2-135m', help='an embedded model')
    ap.add_argument('--precise', type=int, default=500, help='pairs for bf16 against fp32; 0: none')
    ap.add_argument('--grow', type=int, default=100_000, help='most rows of the growth curve; 0: none')
    ap.add_argument('--compile', action='store_true', help='also with torch.compile; minutes')
    ap.add_argument('--grow_child', type=int, help=argparse.SUPPRESS)
    ap.add_argument('--name', default=None, help='what the record calls the data')
    ap.add_argument('--out', default='benchmarks/records/score_speed.json')
    args = ap.parse_args()
    if args.grow_child:
        grow_child(args.data, args.grow_child, args.model)
        sys.exit()
    start = time.time()
    record = dict(
        config=dict(data=args.name or Path(args.data).parent.name, model=args.model, pairs=args.pairs,
                    repeats=args.repeats, batch_tokens=args.batch_tokens, precise=args.precise, grow=args.grow,
                    compile=args.compile, seed=0),
        hardware=f'{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads',
        versions=dict(torch=torch.__version__, transformers=transformers.__version__, python=platform.python_version()),
        model=load_model(args.model).provenance,
        scoring=compare(args.data, args.model, args.pairs, args.repeats, args.batch_tokens, args.compile),
        edit_distance=compare_edit(), load_seconds=loading(args.model), by_length=by_length(args.model))
    if args.precise: record['precision'] = precision(args.data, args.model, args.precise)
    if args.grow: record['growth'] = grow(args.data, args.model, args.grow)
    record['wall_seconds'] = time.time() - start
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(record, indent=1) + '\n')
    shown = {k: record['scoring'][k] for k in ('ratio', 'ratio_whole', 'share_of_matmul_rate')}
    print(json.dumps(shown, indent=1), record.get('precision'), record.get('growth'))
