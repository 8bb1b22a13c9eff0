"""Where do preferred responses fall? A designed experiment of short runs (map/plan.yaml), resumable, a line a run.

    python benchmarks/displacement/map.py OUT --data hh=PAIRS alpacafarm=PAIRS [--pool 0] [--cell default sgd]
    python benchmarks/displacement/map.py OUT --record                      # writes map/runs.json from OUT
    python benchmarks/displacement/map.py OUT --tiny                        # all cells in a minute, on a tiny model

The folder keeps fitted starts (weights, 0.5 GB each) beside the journal.
"""
import argparse, dataclasses, hashlib, random, sys, time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from safetensors.torch import load_model as load_weights, save_model as save_weights

from ches_align.audit.influence import Lora, fresh_adapter
from ches_align.audit.shared_prompts import choose_sharing, prompt_key, sizes_of
from ches_align.core.errors import ChesError
from ches_align.core.run import open_run
from ches_align.core.writing import json_bytes, write_files
from ches_align.lm.encode import EncodedPair, encode_pairs
from ches_align.lm.generation import generate_responses
from ches_align.lm.models import ScoringModel, load_model, wrap_model
from ches_align.lm.pairs import load_pairs
from ches_align.lm.sampling import Sampling
from ches_align.lm.tiny import tiny_model, tiny_tokenizer
from ches_align.spread.metrics import rouge_l
from ches_align.studies.study import Group, run_groups, run_record
from ches_align.training.train_plan import Training
from ches_align.validation.steps import Known, StepBench, changes_now, step_bench, take_steps

HERE = Path(__file__).parent/'map'
TOKENS = 1536 # of a batch that is read at once

class Cell(NamedTuple):
    "One way to train, from one start, in one pool."
    name: str  # of the plan's cells
    start: str # of the plan's passes
    pool: int
    model: str
    data: str
    on_policy: bool
    lora_r: int | None
    training: Training

    @property
    def key(self) -> str: return f'{self.name}|{self.start}|{self.pool}'

def plan_cells(plan: dict[str, Any]) -> list[Cell]:
    "All runs of a plan, the default first, pool after pool"
    cells = []
    for pool in plan['pools']:
        for name, changes in plan['cells'].items():
            own = dict(changes)
            given = {key: own.pop(key, other) for key, other in dict(
                model=plan['model'], data=plan['data'], on_policy=False, lora_r=None).items()}
            starts = plan['passes'] if name == 'default' else plan['at']
            cells += [Cell(name, start, pool, **given, training=Training(**plan['training'] | own))
                      for start in starts]
    return cells

def read_block(plan: dict[str, Any], data: str, source: Any, lm: ScoringModel, pool: int) -> list[EncodedPair]:
    "The pairs of a pool, first those that are trained on. Raises `ChesError`"
    low, high = plan['response']
    cut = plan['cut'].get(data)
    of_prompt: dict[int, EncodedPair] = {}
    for pair in encode_pairs(load_pairs(source), lm.tokenizer):
        if pair.status != 'ok': continue
        sides = pair.chosen_ids, pair.rejected_ids
        if cut is not None:
            if len(pair.prompt_ids) > cut or min(map(len, sides)) < low: continue
            pair = dataclasses.replace(pair, chosen_ids=sides[0][:high], rejected_ids=sides[1][:high],
                                       chosen_truncated=len(sides[0]) > high, rejected_truncated=len(sides[1]) > high)
        elif pair.length > plan['longest'] or not all(low <= len(ids) <= high for ids in sides): continue
        if list(pair.chosen_ids) != list(pair.rejected_ids): of_prompt.setdefault(prompt_key(pair.prompt_ids), pair)
    pairs = sorted(of_prompt.values(), key=lambda pair: pair.row_id)
    random.Random(plan['order_seed']).shuffle(pairs)
    size = plan['trained'] + plan['unseen']
    if len(pairs) < size: raise ChesError(f'{data}: {len(pairs)} pairs fit the plan, a pool needs {size}')
    return [pairs[k % len(pairs)] for k in range(pool*size, (pool + 1)*size)]

def batches_of(known: Known, steps: int, size: int) -> list[Known]:
    "The pairs of each step: shuffled passes"
    drawn: list[int] = []
    for epoch in range(-(-steps*size//len(known.pairs))):
        drawn += np.random.default_rng(epoch).permutation(len(known.pairs)).tolist()
    return [known.take(drawn[k*size:(k + 1)*size]) for k in range(steps)]

def own_pairs(plan: dict[str, Any], lm: ScoringModel, pairs: Sequence[EncodedPair]) -> list[EncodedPair]:
    "The model's own responses to the prompts of pairs: nearest to the data's preferred one, and farthest"
    prompts = [lm.tokenizer.decode(pair.prompt_ids) for pair in pairs]
    drawn = generate_responses(lm, prompts, Sampling(**plan['on_policy']), apply_chat_template='no', keep_ids=True,
                               progress=False)
    score = rouge_l()
    own = []
    for k, pair in enumerate(pairs):
        rows = [row for row in drawn if row['prompt_index'] == k and row['ids']]
        wanted = lm.tokenizer.decode(pair.chosen_ids, skip_special_tokens=True)
        near = score(prompts=[''], completions=[row['response'] for row in rows], answer=[[wanted]]*len(rows))
        order = np.argsort(near, kind='stable').tolist()
        best, worst = rows[order[-1]]['ids'], rows[order[0]]['ids']
        if best == worst: raise ChesError(f'prompt {k}: all responses are the same')
        own.append(dataclasses.replace(pair, chosen_ids=best, rejected_ids=worst, chosen_truncated=False,
                                       rejected_truncated=False))
    return own

def fit_start(plan: dict[str, Any], lm: ScoringModel, pairs: list[EncodedPair], start: str, wanted: Sequence[str],
              folder: Path) -> None:
    "Put the weights of a fitted start into the model; those that are wanted of a pool are made in one go and kept"
    passes = plan['passes']
    if not passes[start]: return
    if not (folder/f'{start}.safetensors').exists():
        folder.mkdir(parents=True, exist_ok=True)
        fitted = sorted({name for name in wanted if passes[name]}, key=passes.__getitem__)
        size = plan['fit']['per_device_train_batch_size']
        with step_bench(lm, Training(**plan['fit']), batch_tokens=TOKENS) as bench:
            known = bench.known(pairs)
            batches = batches_of(known, passes[fitted[-1]]*len(pairs)//size, size)
            done = 0
            for name in fitted:
                until = passes[name]*len(pairs)//size
                if not take_steps(bench, batches[done:until]): raise ChesError(f'{name}: the fit destroyed the weights')
                done = until
                save_weights(lm.model, str(folder/f'{name}.safetensors'))
    load_weights(lm.model, str(folder/f'{start}.safetensors'))

def run_cell(cell: Cell, lm: ScoringModel, plan: dict[str, Any], pairs: list[EncodedPair]) -> dict[str, Any]:
    "Ten steps, read on the way; the weights come back"
    begun = time.perf_counter()
    with ExitStack() as stack:
        moving = stack.enter_context(fresh_adapter(lm, Lora(r=cell.lora_r))) if cell.lora_r else lm
        shared, _ = choose_sharing(moving, sizes_of(pairs), 'auto', None)
        bench: StepBench = stack.enter_context(step_bench(moving, cell.training, shared, TOKENS))
        known = bench.known(pairs)
        train = known.take(range(plan['trained']))
        measured = [known.take(range(16)), known.take(range(plan['trained'], len(pairs)))]
        batches = batches_of(train, plan['steps'], cell.training.pairs_a_step)
        lost = [torch.full_like(each.before, torch.nan) for each in measured]
        readings, done = [], 0
        for until in plan['read']:
            whole = take_steps(bench, batches[done:until])
            done = until
            changes = changes_now(bench, measured) if whole else lost
            readings.append(dict(steps=until) | {
                name: [[round(value, 4) for value in side] for side in change.T.tolist()]
                for name, change in zip(('trained', 'unseen'), changes, strict=True)})
    before = known.before.mean(0).tolist()
    return dict(key=cell.key, cell=cell.name, start=cell.start, pool=cell.pool, readings=readings,
                rows=[pair.row_id for pair in pairs], before=[round(value, 3) for value in before],
                tokens=[round(float(np.mean([len(getattr(pair, side)) for pair in pairs])), 2)
                        for side in ('chosen_ids', 'rejected_ids')],
                seconds=round(time.perf_counter() - begun, 1))

def run_start(plan: dict[str, Any], cells: Sequence[Cell], wanted: Sequence[str], sources: dict[str, Any],
              folder: Path, tiny: bool, missing: Sequence[str]) -> Iterator[dict]:
    "All cells that share model, data, pool and start"
    first = cells[0]
    lm = tiny_start() if tiny else load_model(first.model, dtype='float32', device='cpu')
    pairs = read_block(plan, first.data, sources.get(first.data, first.data), lm, first.pool)
    starts = folder/f'{first.model}-{first.data}-{first.pool}'
    fit_start(plan, lm, pairs[:plan['trained']], first.start, wanted, starts)
    for cell in cells:
        if cell.key not in missing: continue
        yield run_cell(cell, lm, plan, own_pairs(plan, lm, pairs) if cell.on_policy else pairs)

def tiny_start() -> ScoringModel:
    "A model of a few thousand weights, to try a plan"
    tokenizer = tiny_tokenizer()
    return wrap_model(tiny_model(tokenizer), tokenizer, 'tiny')

def groups_of(plan: dict[str, Any], cells: Sequence[Cell], sources: dict[str, Any], folder: Path,
              tiny: bool) -> list[Group]:
    "Cells by what they start from"
    starts: dict[tuple, list[Cell]] = {}
    for cell in cells: starts.setdefault((cell.pool, cell.model, cell.data, cell.start), []).append(cell)
    def wanted(place: tuple) -> list[str]: return [other[-1] for other in starts if other[:-1] == place[:-1]]
    return [Group([cell.key for cell in group],
                  partial(run_start, plan, group, wanted(place), sources, folder, tiny))
            for place, group in starts.items()]

def hash_of(source: Any) -> str:
    "Of a file, or of the embedded data"
    text = Path(source).read_bytes() if Path(str(source)).is_file() else repr(load_pairs(source)).encode()
    return hashlib.sha256(text).hexdigest()[:16]

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('out')
    ap.add_argument('--data', nargs='*', default=[], help='NAME=PATH of the data that the plan names')
    ap.add_argument('--pool', type=int, nargs='*', help='these pools alone')
    ap.add_argument('--cell', nargs='*', help='these cells alone')
    ap.add_argument('--record', action='store_true', help='write map/runs.json, and end')
    ap.add_argument('--tiny', action='store_true', help='a tiny model and the sample, to try the script')
    args = ap.parse_args()
    try:
        if args.record:
            write_files({HERE/'runs.json': json_bytes(run_record(args.out))})
            sys.exit()
        plan = yaml.safe_load((HERE/'plan.yaml').read_text())
        sources = {'sample': 'sample'} | dict(each.split('=', 1) for each in args.data)
        if args.tiny: # the tiny tokenizer makes more tokens of a text
            plan |= dict(longest=400, response=[6, 200], trained=16, unseen=8, pools=[0], steps=4, read=[2, 4],
                         passes=dict(base=0, fit1=1, fit2=2, fit3=3), cut={})
            plan['on_policy']['max_new_tokens'] = 8
            sources = dict.fromkeys(('hh', 'alpacafarm', 'sample'), 'sample')
        cells = plan_cells(plan)
        names = {cell.data for cell in cells}
        if lost := sorted(names - sources.keys()): raise ChesError(f'--data: {lost[0]}=PATH is missing')
        identity = dict(plan=plan, data={name: hash_of(sources[name]) for name in sorted(names)}, tiny=args.tiny)
        asked = [cell for cell in cells if (args.pool is None or cell.pool in args.pool)
                 and (args.cell is None or cell.name in args.cell)]
        with open_run(args.out, identity, what='map', packages=['rouge-score']) as run:
            run_groups(run, groups_of(plan, asked, sources, Path(args.out)/'starts', args.tiny), unit='run')
    except ChesError as error:
        sys.exit(f'map: {error}')
