"""What keeps preferred responses up, and what does it cost in margin? (mitigation/plan.yaml) At equal steps.

    python benchmarks/displacement/mitigate.py OUT --data hh=PAIRS [--starts FOLDER] [--pool 0]   # resumable
    python benchmarks/displacement/mitigate.py OUT [OUT ...] --record       # writes mitigation/runs.json
    python benchmarks/displacement/mitigate.py OUT --tiny

Pools and fitted starts are those of the map: `--starts` names the folder `starts` of one of its runs.
"""
import argparse, sys, time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pools import (
    READ, TOKENS, Place, batches_of, chosen, hash_of, load_start, protected_of, read_on_the_way, read_plan,
    read_sources, slopes_of, write_record)

from ches_align.audit.band import band_summary
from ches_align.audit.influence import Pull, make_pull, movable, response_batches
from ches_align.audit.protected import read_protected
from ches_align.audit.scoring import score_dataset
from ches_align.audit.selection import length_matched_control, random_control, select_pairs, soft_weights
from ches_align.audit.shared_prompts import choose_sharing, sizes_of
from ches_align.core.errors import ChesError
from ches_align.core.run import open_run
from ches_align.lm.encode import EncodedPair
from ches_align.lm.models import ScoringModel
from ches_align.lm.pairs import load_pairs
from ches_align.lm.structure import fixed_precision
from ches_align.studies.study import Group, run_groups
from ches_align.training.train_plan import Training
from ches_align.validation.steps import step_bench

HERE = Path(__file__).parent/'mitigation'

class Remedies(NamedTuple):
    "What arms choose by."
    scores: pd.DataFrame # of the trained pairs, in their order, influence on the protected ones among them
    slopes: list[Tensor] # how fast each rejected token's ln pi goes with the protected responses
    band_weight: float   # of the SFT term, that brings most pairs inside the band

@torch.no_grad()
@fixed_precision()
def token_slopes(lm: ScoringModel, pull: Pull, pairs: Sequence[EncodedPair]) -> list[Tensor]:
    "Slope of ln pi of every rejected token along the protected gradient; above zero: pushing it down pulls them down"
    def measure() -> Tensor:
        rows: list[Tensor] = [torch.empty(0)]*len(pairs)
        for part in response_batches(lm, pairs, False, TOKENS, [1]):
            for (k, _), one in zip(part.which, part.tokens, strict=True): rows[k] = one.double()
        return torch.cat(rows)
    return list(slopes_of(lm, pull, measure).split([len(pair.rejected_ids) for pair in pairs]))

def find_remedies(lm: ScoringModel, source: Any, trained: list[EncodedPair], protected: list[EncodedPair]) -> Remedies:
    "Score the trained pairs, and their tokens, by what they do to protected ones of another pool"
    texts = {pair.row_id: pair for pair in load_pairs(source)}
    shield = [texts[pair.row_id] for pair in protected]
    scores = score_dataset([texts[pair.row_id] for pair in trained], lm, protect={'': shield}, progress=False)
    scores = scores.set_index('row_id', drop=False).loc[[pair.row_id for pair in trained]].reset_index(drop=True)
    moving = movable(lm)
    pull = make_pull(moving, read_protected(shield, lm.tokenizer), trained[:8])
    summary = band_summary(scores)
    if not summary: raise ChesError(f'{lm.name}: the output layer has no inner products, so no band')
    return Remedies(scores, token_slopes(moving, pull, trained), summary['sft']['sum']['weight'])

def masked(arm: dict[str, Any], remedies: Remedies, seed: int) -> list[Tensor]:
    "A weight for every rejected token: 0 for the share that pulls most, or for as many drawn ones"
    slopes = torch.cat(remedies.slopes)
    order = slopes.argsort(descending=True, stable=True)
    if arm['mask'] == 'random': order = torch.randperm(len(slopes), generator=torch.Generator().manual_seed(seed))
    weights = torch.ones(len(slopes))
    weights[order[:round(arm['share']*len(slopes))]] = 0
    return list(weights.split([len(one) for one in remedies.slopes]))

def rows_kept(arm: dict[str, Any], remedies: Remedies, seed: int) -> list[int]:
    "Positions of the pairs that an arm trains on"
    taken = select_pairs(remedies.scores, arm['keep_by'], keep=arm['keep'])
    if arm.get('control') == 'length': taken = length_matched_control(taken, seed, 4)
    elif 'control' in arm: taken = random_control(taken, 10*seed + arm['control'])
    return np.flatnonzero(taken.selected.to_numpy()).tolist()

def weights_by(score: str, remedies: Remedies, seed: int) -> Tensor:
    "Weights in [0, 2] that fall with the rank of a score, or of chance"
    scores = remedies.scores
    if score == 'random': scores = scores.assign(chance=np.random.default_rng(seed).permutation(len(scores)))
    return torch.tensor(soft_weights(scores, 'chance' if score == 'random' else score).to_numpy(float))

def run_arm(name: str, lm: ScoringModel, plan: dict[str, Any], pairs: list[EncodedPair], protected: list[EncodedPair],
            remedies: Remedies, pool: int) -> dict[str, Any]:
    "As many steps as the others, read on the way"
    begun = time.perf_counter()
    arm = plan['arms'][name]
    own = dict(arm.get('training', {}))
    if own.get('sft') == 'band': own['sft'] = remedies.band_weight
    training = Training(**plan['training'] | own)
    count = plan['trained']
    shared, _ = choose_sharing(lm, sizes_of(pairs), 'auto', None)
    with step_bench(lm, training, shared, TOKENS) as bench:
        unseen = bench.known(pairs[count:])
        weights = None
        if 'weigh_by' in arm: weights = weights_by(arm['weigh_by'], remedies, pool)
        train = bench.known(pairs[:count], weights, masked(arm, remedies, pool) if 'mask' in arm else None)
        whole = train if 'mask' not in arm else bench.known(pairs[:count])
        measured = dict(trained=whole.take(range(READ)), unseen=unseen, protected=bench.known(protected))
        if 'keep' in arm: train = train.take(rows_kept(arm, remedies, pool))
        batches = batches_of(train, plan['steps'], training.pairs_a_step)
        readings = read_on_the_way(bench, batches, plan['read'], measured)
    return dict(key=f'{name}|{pool}', arm=name, pool=pool, pairs=len(train.pairs), sft=training.sft, readings=readings,
                start=lm.provenance['weights_hash'], seconds=round(time.perf_counter() - begun, 1))

def run_pool(plan: dict[str, Any], pool: int, names: Sequence[str], source: Any, folder: Path, tiny: bool,
             missing: Sequence[str]) -> Iterator[dict]:
    "All arms of a pool"
    place = Place(plan['model'], plan['data'], pool)
    lm, pairs = load_start(plan, place, source, plan['start'], wanted=[plan['start']], folder=folder, tiny=tiny)
    protected = protected_of(plan, source, lm, pool, pairs)
    remedies = find_remedies(lm, source, pairs[:plan['trained']], protected)
    for name in names:
        if f'{name}|{pool}' in missing: yield run_arm(name, lm, plan, pairs, protected, remedies, pool)

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('out', nargs='+')
    ap.add_argument('--data', nargs='*', default=[], help='NAME=PATH of the data that the plan names')
    ap.add_argument('--starts', type=Path, help='folder of fitted starts (default: OUT/starts)')
    ap.add_argument('--pool', type=int, nargs='*', help='these pools alone')
    ap.add_argument('--record', action='store_true', help='write mitigation/runs.json, and end')
    ap.add_argument('--tiny', action='store_true', help='a tiny model and the sample, to try the script')
    args = ap.parse_args()
    try:
        plan = read_plan(HERE/'plan.yaml', args.tiny)
        if args.record:
            write_record(args.out, HERE/'runs.json', plan)
            sys.exit()
        source = read_sources(args.data, {plan['data']}, args.tiny)[plan['data']]
        identity = dict(plan=plan, data={plan['data']: hash_of(source)}, tiny=args.tiny)
        pools = chosen('pool', args.pool, plan['pools'])
        folder = args.starts or Path(args.out[0])/'starts'
        with open_run(args.out[0], identity, what='study of remedies') as run:
            run_groups(run, [Group([f'{name}|{pool}' for name in plan['arms']], partial(
                run_pool, plan, pool, list(plan['arms']), source, folder, args.tiny)) for pool in pools])
    except ChesError as error:
        sys.exit(f'mitigate: {error}')
