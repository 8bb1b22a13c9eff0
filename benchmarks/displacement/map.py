"""Where do preferred responses fall? A designed experiment of short runs (map/plan.yaml), resumable, a line a run.

    python benchmarks/displacement/map.py OUT --data hh=PAIRS alpacafarm=PAIRS [--pool 0] [--cell default sgd]
    python benchmarks/displacement/map.py OUT [OUT ...] --record            # writes map/runs.json from folders
    python benchmarks/displacement/map.py OUT --tiny                        # all cells in a minute, on a tiny model

A folder keeps fitted starts (weights, 0.5 GB each) beside the journal. Several processes take a folder and a pool each.
"""
import argparse, dataclasses, sys, time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pools import (
    READ, TOKENS, Place, batches_of, chosen, hash_of, load_start, read_on_the_way, read_plan, read_sources, slopes_of,
    write_record)

from ches_align.audit.influence import Lora, fresh_adapter, make_pull, movable, pair_logps
from ches_align.audit.protected import Protected
from ches_align.audit.shared_prompts import choose_sharing, sizes_of
from ches_align.core.errors import ChesError
from ches_align.core.run import open_run
from ches_align.lm.encode import EncodedPair
from ches_align.lm.generation import generate_responses
from ches_align.lm.models import ScoringModel
from ches_align.lm.sampling import Sampling
from ches_align.spread.metrics import rouge_l
from ches_align.studies.study import Group, run_groups
from ches_align.training.train_plan import Training
from ches_align.validation.steps import step_bench

HERE = Path(__file__).parent/'map'

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
        best = rows[order[-1]]['ids']
        worst = rows[order[0]]['ids']
        if best == worst: raise ChesError(f'prompt {k}: all responses are the same; raise on_policy.responses')
        own.append(dataclasses.replace(pair, chosen_ids=best, rejected_ids=worst, chosen_truncated=False,
                                       rejected_truncated=False))
    return own

def run_cell(cell: Cell, lm: ScoringModel, plan: dict[str, Any], given: list[EncodedPair]) -> dict[str, Any]:
    "Ten steps, read on the way; the weights come back. Of the model's own pairs the data's unseen ones are read too"
    begun = time.perf_counter()
    pairs = own_pairs(plan, lm, given) if cell.on_policy else given
    with ExitStack() as stack:
        moving = stack.enter_context(fresh_adapter(lm, Lora(r=cell.lora_r))) if cell.lora_r else lm
        shared, _ = choose_sharing(moving, sizes_of(pairs), 'auto', None)
        bench = stack.enter_context(step_bench(moving, cell.training, shared, TOKENS))
        known = bench.known(pairs)
        measured = dict(trained=known.take(range(READ)), unseen=known.take(range(plan['trained'], len(pairs))))
        if cell.on_policy: measured['unseen_of_data'] = bench.known(given[plan['trained']:])
        batches = batches_of(known.take(range(plan['trained'])), plan['steps'], cell.training.pairs_a_step)
        readings = read_on_the_way(bench, batches, plan['read'], measured)
    tokens = [[len(getattr(pair, side)) for pair in pairs] for side in ('chosen_ids', 'rejected_ids')]
    return dict(key=cell.key, cell=cell.name, start=cell.start, pool=cell.pool, readings=readings,
                rows=[pair.row_id for pair in pairs],
                before=[round(value, 3) for value in known.before.mean(0).tolist()],
                tokens=[round(float(np.mean(side)), 2) for side in tokens],
                seconds=round(time.perf_counter() - begun, 1))

def run_start(plan: dict[str, Any], cells: Sequence[Cell], wanted: Sequence[str], sources: dict[str, Any],
              folder: Path, tiny: bool, missing: Sequence[str]) -> Iterator[dict]:
    "All cells that share model, data, pool and start"
    first = cells[0]
    place = Place(first.model, first.data, first.pool)
    lm, pairs = load_start(plan, place, sources[first.data], first.start, wanted=wanted, folder=folder, tiny=tiny)
    for cell in cells:
        if cell.key in missing: yield run_cell(cell, lm, plan, pairs)
    if key_of('start', first) in missing: yield read_start(first, lm, plan, pairs)
    if key_of('slopes', first) in missing: yield read_slopes(first, lm, plan, pairs)

def key_of(kind: str, cell: Cell) -> str: # of a row that describes what a cell starts from
    return f'{kind}|{cell.model}|{cell.data}|{cell.start}|{cell.pool}'

def read_slopes(cell: Cell, lm: ScoringModel, plan: dict[str, Any], pairs: list[EncodedPair]) -> dict[str, Any]:
    "What theory says of a start: <g, D> of both responses of every trained pair, D the mean gradient of unseen y+"
    begun = time.perf_counter()
    trained = pairs[:plan['trained']]
    unseen = [dataclasses.replace(pair, rejected_ids=[]) for pair in pairs[plan['trained']:]]
    moving = movable(lm)
    pull = make_pull(moving, Protected('', unseen, '', []), trained[:8])
    assert pull.step is not None
    slopes = slopes_of(moving, pull, partial(pair_logps, moving, trained, False, TOKENS))/len(unseen)
    return dict(key=key_of('slopes', cell), model=cell.model, data=cell.data, start=cell.start, pool=cell.pool,
                slopes=[[round(value, 4) for value in side] for side in slopes.T.tolist()],
                step_error=round(pull.step.error, 5), seconds=round(time.perf_counter() - begun, 1))

def read_start(cell: Cell, lm: ScoringModel, plan: dict[str, Any], pairs: list[EncodedPair]) -> dict[str, Any]:
    "ln pi of both responses of every pair where the cells start, so that one sees what the fit did"
    begun = time.perf_counter()
    shared, _ = choose_sharing(lm, sizes_of(pairs), 'auto', None)
    logps = pair_logps(lm, pairs, shared, TOKENS)
    count = plan['trained']
    return dict(key=key_of('start', cell), model=cell.model, data=cell.data, start=cell.start, pool=cell.pool,
                weights_hash=lm.provenance['weights_hash'],
                logps={name: [[round(value, 3) for value in side] for side in part.T.tolist()]
                       for name, part in (('trained', logps[:count]), ('unseen', logps[count:]))},
                seconds=round(time.perf_counter() - begun, 1))

def groups_of(plan: dict[str, Any], cells: Sequence[Cell], sources: dict[str, Any], folder: Path,
              tiny: bool) -> list[Group]:
    "Cells by what they start from"
    starts: dict[tuple, list[Cell]] = {}
    for cell in cells: starts.setdefault((cell.pool, cell.model, cell.data, cell.start), []).append(cell)
    def wanted(place: tuple) -> list[str]: return [other[-1] for other in starts if other[:-1] == place[:-1]]
    def more(cell: Cell) -> list[str]:
        usual = cell.model == plan['model'] and cell.data == plan['data']
        return [key_of('start', cell), *([key_of('slopes', cell)] if usual else [])]
    return [Group([*(cell.key for cell in group), *more(group[0])],
                  partial(run_start, plan, group, wanted(place), sources, folder, tiny))
            for place, group in starts.items()]

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('out', nargs='+')
    ap.add_argument('--data', nargs='*', default=[], help='NAME=PATH of the data that the plan names')
    ap.add_argument('--pool', type=int, nargs='*', help='these pools alone')
    ap.add_argument('--cell', nargs='*', help='these cells alone')
    ap.add_argument('--record', action='store_true', help='write map/runs.json, and end')
    ap.add_argument('--tiny', action='store_true', help='a tiny model and the sample, to try the script')
    args = ap.parse_args()
    try:
        plan = read_plan(HERE/'plan.yaml', args.tiny)
        if args.record:
            write_record(args.out, HERE/'runs.json', plan)
            sys.exit()
        if args.tiny: plan['on_policy']['max_new_tokens'] = 8
        cells = plan_cells(plan)
        sources = read_sources(args.data, {cell.data for cell in cells}, args.tiny)
        hashes = {name: hash_of(sources[name]) for name in sorted({cell.data for cell in cells})}
        identity = dict(plan=plan, data=hashes, tiny=args.tiny)
        pools = chosen('pool', args.pool, plan['pools'])
        names = chosen('cell', args.cell, list(plan['cells']))
        asked = [cell for cell in cells if cell.pool in pools and cell.name in names]
        out = Path(args.out[0])
        with open_run(out, identity, what='map', packages=['rouge-score']) as run:
            run_groups(run, groups_of(plan, asked, sources, out/'starts', args.tiny), unit='run')
    except ChesError as error:
        sys.exit(f'map: {error}')
