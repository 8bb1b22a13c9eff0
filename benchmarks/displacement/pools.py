"""What the experiments of this folder share: pools of short pairs, fitted starts, readings on the way, records."""
import dataclasses, hashlib, random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from safetensors.torch import load_model as load_weights, save_model as save_weights
from torch import Tensor

from ches_align.audit.influence import Pull, only_gradients_of, trained_weights
from ches_align.audit.shared_prompts import choose_sharing, prompt_key, sizes_of
from ches_align.core.errors import ChesError
from ches_align.core.run import differences
from ches_align.core.writing import json_bytes, read_object, write_files
from ches_align.lm.encode import EncodedPair, encode_pairs
from ches_align.lm.models import ScoringModel, load_model, wrap_model
from ches_align.lm.pairs import load_pairs
from ches_align.lm.tiny import tiny_model, tiny_tokenizer
from ches_align.studies.study import run_record
from ches_align.theory.influence import slope_along
from ches_align.training.train_plan import Training
from ches_align.validation.steps import Known, StepBench, changes_now, step_bench, take_steps

TOKENS = 1536 # of a batch that is read at once
READ = 16     # trained pairs that are read on the way
MAP = Path(__file__).parent/'map'/'plan.yaml'

def choose_rows(plan: dict[str, Any], data: str, encoded: Sequence[EncodedPair]) -> list[int]:
    "Rows of the pairs that fit a plan, one a prompt, shuffled. Raises `ChesError`"
    low, high = plan['response']
    cut = plan['cut'].get(data)
    of_prompt: dict[int, int] = {}
    for pair in encoded:
        if pair.status != 'ok': continue
        lengths = [len(ids) for ids in (pair.chosen_ids, pair.rejected_ids)]
        if cut is not None: fits = len(pair.prompt_ids) <= cut and min(lengths) >= low
        else: fits = pair.length <= plan['longest'] and low <= min(lengths) and max(lengths) <= high
        alike = cut is not None and list(pair.chosen_ids[:high]) == list(pair.rejected_ids[:high])
        if fits and not alike: of_prompt.setdefault(prompt_key(pair.prompt_ids), pair.row_id)
    rows = sorted(of_prompt.values())
    random.Random(plan['order_seed']).shuffle(rows)
    size = plan['trained'] + plan['unseen']
    if len(rows) < size: raise ChesError(f'{data}: {len(rows)} pairs fit the plan, a pool needs {size}')
    return rows

def read_block(plan: dict[str, Any], data: str, source: Any, lm: ScoringModel, pool: int,
               chooser: Any = None) -> list[EncodedPair]:
    "The pairs of a pool, first those that are trained on; the lengths are those of `chooser`. Raises `ChesError`"
    texts = load_pairs(source)
    rows = choose_rows(plan, data, encode_pairs(texts, chooser or lm.tokenizer))
    size = plan['trained'] + plan['unseen']
    places = {pair.row_id: k for k, pair in enumerate(texts)}
    block = [rows[k % len(rows)] for k in range(pool*size, (pool + 1)*size)]
    pairs = encode_pairs([texts[places[row]] for row in block], lm.tokenizer)
    if lost := next((pair for pair in pairs if pair.status != 'ok'), None):
        raise ChesError(f'{data}, row {lost.row_id}: {lost.status} for {lm.name}')
    if plan['cut'].get(data) is None: return pairs
    high = plan['response'][1]
    return [dataclasses.replace(pair, chosen_ids=pair.chosen_ids[:high], rejected_ids=pair.rejected_ids[:high],
                                chosen_truncated=len(pair.chosen_ids) > high,
                                rejected_truncated=len(pair.rejected_ids) > high) for pair in pairs]

def batches_of(known: Known, steps: int, size: int) -> list[Known]:
    "The pairs of each step: shuffled passes"
    drawn: list[int] = []
    for epoch in range(-(-steps*size//len(known.pairs))):
        drawn += np.random.default_rng(epoch).permutation(len(known.pairs)).tolist()
    return [known.take(drawn[k*size:(k + 1)*size]) for k in range(steps)]

def stamp_of(plan: dict[str, Any], pairs: Sequence[EncodedPair], start: str) -> dict[str, Any]:
    "What decides on a fitted start"
    return dict(fit=plan['fit'], passes=plan['passes'][start],
                pairs=hashlib.sha256(' '.join(pair.row_hash for pair in pairs).encode()).hexdigest()[:16])

def save_start(lm: ScoringModel, path: Path, stamp: dict[str, Any]) -> None:
    "Weights first, then their stamp, without which they count for nothing"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(lm.model, str(path))
    write_files({path.with_suffix('.json'): json_bytes(stamp)})

def has_start(path: Path, stamp: dict[str, Any]) -> bool:
    "Is a fitted start there? Raises `ChesError` for another one in its place"
    if not path.with_suffix('.json').exists(): return False
    changed = differences(read_object(path.with_suffix('.json')), stamp)
    if changed: raise ChesError(f'{path}: another start ({changed[0]}); name another folder')
    return True

def fit_start(plan: dict[str, Any], lm: ScoringModel, pairs: list[EncodedPair], start: str, wanted: Sequence[str],
              folder: Path) -> None:
    "Put the weights of a fitted start into the model; those that are wanted of a pool are made in one go and kept"
    passes = plan['passes']
    if not passes[start]: return
    if not has_start(folder/f'{start}.safetensors', stamp_of(plan, pairs, start)):
        fitted = sorted({name for name in [*wanted, start] if passes[name]}, key=passes.__getitem__)
        size = plan['fit']['per_device_train_batch_size']
        brief = [dataclasses.replace(pair, rejected_ids=pair.rejected_ids[:1]) for pair in pairs]  # SFT reads no y-
        shared, _ = choose_sharing(lm, sizes_of(brief), 'auto', None)
        with step_bench(lm, Training(**plan['fit']), shared, TOKENS) as bench:
            known = bench.known(brief)
            batches = batches_of(known, passes[fitted[-1]]*len(pairs)//size, size)
            done = 0
            for name in fitted:
                until = passes[name]*len(pairs)//size
                if not take_steps(bench, batches[done:until]): raise ChesError(f'{name}: the fit destroyed the weights')
                done = until
                save_start(lm, folder/f'{name}.safetensors', stamp_of(plan, pairs, name))
    load_weights(lm.model, str(folder/f'{start}.safetensors'))

def read_on_the_way(bench: StepBench, batches: Sequence[Known], read: Sequence[int],
                    measured: dict[str, Known]) -> list[dict[str, Any]]:
    "Take steps, and look after some of them: [y+, y-] of every pair, change in nats"
    readings = []
    done = 0
    for until in read:
        whole = take_steps(bench, batches[done:until])
        done = until
        changes = changes_now(bench, list(measured.values())) if whole else [
            torch.full_like(known.before, torch.nan) for known in measured.values()]
        readings.append(dict(steps=until) | {
            name: [[round(value, 4) for value in side] for side in change.T.tolist()]
            for name, change in zip(measured, changes, strict=True)})
    return readings

def tiny_start() -> ScoringModel:
    "A model of a few thousand weights, to try a plan"
    tokenizer = tiny_tokenizer()
    return wrap_model(tiny_model(tokenizer), tokenizer, 'tiny')

class Place(NamedTuple):
    "Where pairs come from, and who reads them."
    model: str
    data: str
    pool: int

def load_start(plan: dict[str, Any], place: Place, source: Any, start: str, *, wanted: Sequence[str], folder: Path,
               tiny: bool) -> tuple[ScoringModel, list[EncodedPair]]:
    "A model at its start, and the pairs of a pool"
    lm = tiny_start() if tiny else load_model(place.model, dtype='float32', device='cpu')
    chooser = None if tiny or place.model == plan['model'] else load_model(plan['model'], device='cpu').tokenizer
    pairs = read_block(plan, place.data, source, lm, place.pool, chooser)
    fit_start(plan, lm, pairs[:plan['trained']], start, wanted, folder/f'{place.model}-{place.data}-{place.pool}')
    lm.model.eval()
    return wrap_model(lm.model, lm.tokenizer, f'{lm.name}, {start}'), pairs  # known by the weights it has now

def hash_of(source: Any) -> str:
    "Of a file, or of the embedded data"
    text = Path(source).read_bytes() if Path(str(source)).is_file() else repr(load_pairs(source)).encode()
    return hashlib.sha256(text).hexdigest()[:16]

def read_plan(path: Path, tiny: bool) -> dict[str, Any]:
    "The plan of an experiment, with what it takes from the map's; a tiny one is of few pairs, whose tokens are letters"
    plan = yaml.safe_load(path.read_text())
    if 'as_the_map' in plan:
        shared = read_plan(MAP, tiny)
        return {key: shared[key] for key in plan['as_the_map']} | plan
    if not tiny: return plan
    plan |= dict(longest=400, response=[6, 200], trained=16, unseen=8, pools=[0], steps=4, read=[2, 4], cut={},
                 passes={name: min(count, 2 + k) for k, (name, count) in enumerate(plan['passes'].items())})
    return plan

def read_sources(given: Sequence[str], names: set[str], tiny: bool) -> dict[str, Any]:
    "NAME=PATH of every data set that is named. Raises `ChesError`"
    if wrong := [each for each in given if '=' not in each]: raise ChesError(f'--data {wrong[0]}: write NAME=PATH')
    sources: dict[str, Any] = {'sample': 'sample'} | dict(each.split('=', 1) for each in given)
    if tiny: return dict.fromkeys(names, 'sample')
    if lost := sorted(names - sources.keys()): raise ChesError(f'--data: {lost[0]}=PATH is missing')
    return sources

def chosen(option: str, asked: Sequence[Any] | None, known: Sequence[Any]) -> list[Any]:
    "What is asked for of what there is; None: all. Raises `ChesError`"
    for each in asked or []:
        if each not in known: raise ChesError(f"--{option} {each}: one of {', '.join(map(str, known))}")
    return list(known) if asked is None else list(dict.fromkeys(asked))

def apart(*parts: Sequence[EncodedPair]) -> None:
    "Refuse parts that share a pair. Raises `ChesError`"
    rows = [pair.row_id for part in parts for pair in part]
    if len({*rows}) < len(rows):
        raise ChesError('pools share pairs: there are too few for a protected set that nobody trains on')

def protected_of(plan: dict[str, Any], source: Any, lm: ScoringModel, pool: int,
                 pairs: Sequence[EncodedPair]) -> list[EncodedPair]:
    "Unseen pairs of another pool, which a pool neither trains on nor is judged by. Raises `ChesError`"
    other = read_block(plan, plan['data'], source, lm, (pool + 1) % max(2, len(plan['pools'])))[plan['trained']:]
    apart(pairs, other)
    return other

def slopes_of(lm: ScoringModel, pull: Pull, measure: Callable[[], Tensor]) -> Tensor:
    "Slopes of what is measured along the summed gradient of a protected set"
    assert pull.direction is not None and pull.step is not None
    with only_gradients_of(lm.model, trained_weights(lm.model)):
        return slope_along(lm.model, pull.direction, pull.step.length, measure)

def write_record(folders: Sequence[str], path: Path, plan: dict[str, Any]) -> None:
    "One record of the folders of a plan. Raises `ChesError` for folders of another"
    records = [run_record(folder) for folder in folders]
    wanted = dict(plan=plan, data=records[0].get('data'), tiny=False)
    for folder, record in zip(folders, records, strict=True):
        changed = differences({key: record.get(key) for key in wanted}, wanted)
        if changed: raise ChesError(f'{folder}: not of this plan ({changed[0]})')
    runs: dict[str, dict] = {}
    for folder, record in zip(folders, records, strict=True):
        for row in record['runs']:
            first = runs.setdefault(row['key'], row)
            if first | dict(seconds=0) != row | dict(seconds=0):
                raise ChesError(f"{folder}: {row['key']} is in another folder too, with other numbers")
    write_files({path: json_bytes(records[0] | dict(seconds=round(sum(row['seconds'] for row in runs.values())),
                                                    runs=list(runs.values())))})
