"""How well does a predictor foresee what training does to preferred responses?

    python benchmarks/displacement/predict.py                                 # the scores of the package, on every case
    python benchmarks/displacement/predict.py --function mine.py:score --data hh_harmless=pairs.jsonl
    python benchmarks/displacement/predict.py --column mine.jsonl:score      # lines with row_hash and the number
    python benchmarks/displacement/predict.py --add FOLDER NAME              # of a finished `ches validate`

A case (`cases/NAME.json`) holds pairs by hash, the package's scores of each, and what steps of a training did to the
pairs' own responses, to responses that were protected, and to unseen ones: it is measured once, and any predictor is
judged by the same numbers. Higher must mean: falls more. Nobody has to train anything; a function needs the texts, so
the data that the case names.
"""
import argparse, importlib.util, math, sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ches_align.core.errors import ChesError
from ches_align.core.formats import read_jsonl
from ches_align.core.rows import read_rows
from ches_align.core.writing import json_bytes, plain, read_object, write_files
from ches_align.lm.pairs import Pair, load_pairs
from ches_align.validation.page import regime_tables
from ches_align.validation.table import LENGTHS, PLAIN

CASES = Path(__file__).parent/'cases'
FORMAT = 1 # of cases; raised when their form changes

def load_case(path: Path) -> dict[str, Any]:
    "Read a case; `values` becomes a table by row_id. Raises `ChesError`"
    case = read_object(path)
    form = case.get('format', 1)
    if form != FORMAT: raise ChesError(f'{path}: a case of format {form}, this version reads format {FORMAT}')
    if not {'name', 'about', 'pairs', 'scores', 'rows'} <= case.keys(): raise ChesError(f'{path}: not a case')
    index = pd.Index([pair['row_id'] for pair in case['pairs']], name='row_id')
    return case | dict(values=pd.DataFrame(case['scores'], index=index, dtype=float))

def make_case(folder: Path, name: str) -> dict[str, Any]:
    "Make a case of a finished validation. Raises `ChesError`"
    from ches_align.audit.scoring import score_table
    from ches_align.training.train_plan import Training, training_loss
    from ches_align.validation.table import score_values
    about = read_object(folder/'validation.json')['about']
    if Path(about['model']).is_absolute(): about['model'] = Path(about['model']).name  # no folder of a machine
    if isinstance(about['plan']['held_out'], str): about['plan']['held_out'] = 0  # a file, whose pairs `held` counts
    scores = score_table([*read_jsonl(folder/'scores.jsonl')])
    values = score_values(scores, partial(training_loss, Training(**about['training'])))
    pairs = [dict(row_id=row.row_id, row_hash=row.row_hash) for row in scores[scores.status == 'ok'].itertuples()]
    return plain(dict(format=FORMAT, name=name, about=about | dict(data=name.partition('-')[0]), pairs=pairs,
                      scores={column: [float(f'{value:.7g}') for value in values[column]] for column in values},
                      rows=[*read_jsonl(folder/'runs.jsonl')]))

def finite(number: Real) -> bool:
    "Is it a number that a computer holds?"
    try:
        return math.isfinite(number)
    except OverflowError:
        return False

def check_numbers(case: dict[str, Any], numbers: list[Any], where: str) -> np.ndarray:
    "A predictor's numbers for the pairs of a case. Raises `ChesError` for another count, and for what is no number"
    if len(numbers) != len(case['pairs']):
        raise ChesError(f"{where}: {len(numbers)} numbers for {len(case['pairs'])} pairs of {case['name']}")
    for pair, number in zip(case['pairs'], numbers, strict=True):
        if isinstance(number, (bool, np.bool_)) or not isinstance(number, Real) or not finite(number): raise ChesError(
            f"{where}: {str(number)[:60]} for row {pair['row_id']} of {case['name']}; every pair needs a finite number")
    return np.array(numbers, float)

def of_column(case: dict[str, Any], rows: Iterable[dict], column: str, where: str) -> np.ndarray:
    "The numbers of a file's column, found by the hashes of the pairs. Raises `ChesError`"
    known: dict[Any, Any] = {}
    for row in rows:
        key = row.get('row_hash')
        if known.setdefault(key, row.get(column)) != row.get(column):
            raise ChesError(f'{where}: two numbers for row_hash {key}')
    return check_numbers(case, [known.get(pair['row_hash']) for pair in case['pairs']], where)

def of_function(case: dict[str, Any], function: Callable[[Pair], float], source: Any, where: str) -> np.ndarray:
    "A function of the pairs of a case. Raises `ChesError` where the data are others"
    wanted = {pair['row_hash'] for pair in case['pairs']}
    pairs = {pair.row_hash: pair for pair in load_pairs(source) if pair.row_hash in wanted}
    if lost := len(wanted) - len(pairs):
        raise ChesError(f"{source}: {lost} of {len(wanted)} pairs of {case['name']} are not there")
    return check_numbers(case, [function(pairs[pair['row_hash']]) for pair in case['pairs']], where)

def judge(case: dict[str, Any], numbers: np.ndarray | None = None, name: str = 'yours') -> dict[str, pd.DataFrame]:
    "Hold every score of a case, and one more, against what was measured: a table a regime"
    values = case['values'] if numbers is None else case['values'].assign(**{name: numbers})
    about = case['about']
    rows = case['rows'] if numbers is None else [row for row in case['rows'] if not row['key'].startswith('run|')]
    return regime_tables(rows, values, list(about['held']), about['judged'], about['plan']['seed'])

def over_pools(tables: Sequence[pd.DataFrame], column: str = 'rho') -> pd.DataFrame:
    """A number of every score in several pools: mean, lowest, highest. It foresees, if it goes the right way in every
    pool, and its mean goes further than that of every length, whichever way"""
    wide = pd.concat([table.set_index('score')[column].astype(float) for table in tables], axis=1)
    pooled = wide.agg(['mean', 'min', 'max'], axis=1, skipna=False).set_axis(['mean', 'lowest', 'highest'], axis=1)
    lengths = wide.reindex(LENGTHS).mean(axis=1).abs().max()
    foresees = (pooled.lowest > 0) & ~(pooled['mean'] <= lengths) & ~pooled.index.isin(PLAIN)
    return pooled.assign(foresees=foresees).rename_axis('score')

def read_function(text: str) -> Callable[[Pair], float]:
    "FILE.py:name or module:name. Raises `ChesError`"
    place, _, name = text.rpartition(':')
    try:
        if place.endswith('.py'):
            spec = importlib.util.spec_from_file_location('predictor', place)
            assert spec and spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else: module = importlib.import_module(place)
        return getattr(module, name)
    except (ImportError, AttributeError, OSError, ValueError, AssertionError) as error:
        raise ChesError(f'--function {text}: {error}') from None

def shown(table: pd.DataFrame) -> str:
    "A table for a terminal"
    names = ('score', 'rho', 'low', 'high', 'partial', 'auroc', 'overlap', 'chance', 'rho_protected', 'fall_lowest',
             'fall_lowest_matched', 'fall_highest', 'fall_highest_matched', 'random_fall', 'limit')
    columns = [name for name in names if name in table]
    order = table.sort_values('rho', ascending=False) if 'rho' in table else table
    return order[columns].to_string(index=False, na_rep='-', float_format='{:.2f}'.format)

def predictions(case: dict[str, Any], args: argparse.Namespace) -> np.ndarray | None:
    "The numbers that the command line asks for. Raises `ChesError`"
    if args.column:
        path, _, column = args.column.rpartition(':')
        return of_column(case, read_rows(path), column, f'--column {args.column}')
    if not args.function: return None
    sources = dict(each.split('=', 1) for each in args.data)
    data = case['about']['data']
    if data not in sources: raise ChesError(f"case {case['name']}: its data are needed, --data {data}=PATH")
    return of_function(case, read_function(args.function), sources[data], f'--function {args.function}')

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--function', help='FILE.py:name or module:name, called with a Pair')
    ap.add_argument('--column', help='FILE.jsonl:column, lines with row_hash')
    ap.add_argument('--data', nargs='*', default=[], help='NAME=PATH of the data that cases name')
    ap.add_argument('--case', nargs='*', default=[], help='names of cases (default: all that there are)')
    ap.add_argument('--add', nargs=2, metavar=('FOLDER', 'NAME'), help='make a case of a finished validation')
    args = ap.parse_args()
    try:
        if args.add:
            target = CASES/f'{args.add[1]}.json'
            if target.exists(): raise ChesError(f'{target}: exists; name the case otherwise')
            write_files({target: json_bytes(make_case(Path(args.add[0]), args.add[1]))})
            print(target)
        series: dict[tuple[str, str], list[pd.DataFrame]] = {}
        for path in sorted(CASES.glob('*.json')):
            if args.add or args.case and path.stem not in args.case: continue
            case = load_case(path)
            for regime, table in judge(case, predictions(case, args)).items():
                print(f"\n{case['name']}, {regime}:\n{shown(table)}")
                if of := case['about'].get('pool_of'): series.setdefault((of, regime), []).append(table)
        for (of, regime), tables in series.items():
            if regime == 'run' or len(tables) < 2: continue
            over = over_pools(tables).sort_values('mean', ascending=False)
            print(f"\n{of}, {regime}, {len(tables)} pools:\n{over.to_string(na_rep='-', float_format='{:.2f}'.format)}")
    except ChesError as error:
        sys.exit(f'predict: {error}')
