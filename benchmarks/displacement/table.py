"""Every score against what training did, in regimes that the map has fixed (table/plan.yaml), in three pools.

    python benchmarks/displacement/table.py OUT --data hh=PAIRS [--starts FOLDER] [--pool 0] [--regime fitted]
    python benchmarks/displacement/table.py OUT --record                    # a case of every finished pool
    python benchmarks/displacement/table.py OUT --tiny

Each pool and regime is a folder of `ches validate`, which says what it takes before it starts, and continues. Pools
and fitted starts are those of the map: `--starts` names the folder `starts` of one of its runs.
"""
import argparse, sys
from itertools import product
from pathlib import Path
from typing import Any

from pools import Place, chosen, load_start, protected_of, read_plan, read_sources
from predict import CASES, make_case

from ches_align.core.errors import ChesError
from ches_align.core.rows import read_rows
from ches_align.core.writing import json_bytes, write_files, write_lines
from ches_align.training.train_plan import Training
from ches_align.validation.bench import UNSEEN
from ches_align.validation.plan import ValidationPlan
from ches_align.validation.validate import validate_scores

HERE = Path(__file__).parent/'table'

def run_place(plan: dict[str, Any], regime: str, pool: int, source: Any, out: Path, starts: Path, tiny: bool) -> str:
    "Validate on a pool in a regime; its one sentence"
    own = plan['regimes'][regime]
    place = Place(plan['model'], plan['data'], pool)
    wanted = [each['start'] for each in plan['regimes'].values()]
    lm, pairs = load_start(plan, place, source, own['start'], wanted=wanted, folder=starts, tiny=tiny)
    protected = protected_of(plan, source, lm, pool, pairs)
    rows = list(read_rows(source))
    def texts(part: list) -> list[dict]: return [rows[pair.row_id] for pair in part]
    folder = out/f'{regime}-{pool}'
    unseen = folder/'unseen.jsonl'
    write_lines(unseen, texts(pairs[plan['trained']:]))
    measuring = ValidationPlan(pairs=plan['trained'], held_out=str(unseen), seed=pool, **plan['measuring'])
    validated = validate_scores(
        texts(pairs[:plan['trained']]), lm, folder/'validation', plan=measuring, training=Training(**own['training']),
        protect={'': texts(protected)}, tell=lambda text: print(f'{folder.name}: {text}', flush=True))
    return validated.verdict['sentence']

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('out', type=Path)
    ap.add_argument('--data', nargs='*', default=[], help='NAME=PATH of the data that the plan names')
    ap.add_argument('--starts', type=Path, help='folder of fitted starts (default: OUT/starts)')
    ap.add_argument('--pool', type=int, nargs='*', help='these pools alone')
    ap.add_argument('--regime', nargs='*', help='these regimes alone')
    ap.add_argument('--record', action='store_true', help='write the cases of finished pools, and end')
    ap.add_argument('--tiny', action='store_true', help='a tiny model and the sample, to try the script')
    args = ap.parse_args()
    try:
        plan = read_plan(HERE/'plan.yaml', args.tiny)
        if args.tiny: plan['measuring'] |= dict(batches=4, arm_pairs=6, batch_size=4)
        regimes = chosen('regime', args.regime, list(plan['regimes']))
        pools = chosen('pool', args.pool, plan['pools'])
        if args.record:
            for regime, pool in product(regimes, pools):
                folder = args.out/f'{regime}-{pool}'/'validation'
                if not (folder/'validation.json').exists(): continue
                case = make_case(folder, f"{plan['case_data']}-{regime}-{pool}")
                if 'tiny' in case['about']['model']: raise ChesError(f'{folder}: of --tiny, no case')
                # judged by what no score has looked at; protected ones stand beside
                case['about'] |= dict(judged=[UNSEEN], pool_of=f"{plan['case_data']}-{regime}-N")
                write_files({CASES/f"{case['name']}.json": json_bytes(case)})
                print(case['name'])
            sys.exit()
        source = read_sources(args.data, {plan['data']}, args.tiny)[plan['data']]
        for pool in pools:
            for regime in regimes:
                print(regime, pool, run_place(plan, regime, pool, source, args.out, args.starts or args.out/'starts',
                                              args.tiny), flush=True)
    except ChesError as error:
        sys.exit(f'table: {error}')
