"""What the experiments of this folder share: pools of short pairs, fitted starts, readings on the way, records."""
import dataclasses, hashlib, random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from safetensors.torch import load_model as load_weights, save_model as save_weights

from ches_align.audit.shared_prompts import choose_sharing, prompt_key, sizes_of
from ches_align.core.errors import ChesError
from ches_align.core.run import differences
from ches_align.core.writing import json_bytes, write_files
from ches_align.lm.encode import EncodedPair, encode_pairs
from ches_align.lm.models import ScoringModel, load_model, wrap_model
from ches_align.lm.pairs import load_pairs
from ches_align.lm.tiny import tiny_model, tiny_tokenizer
from ches_align.studies.study import run_record
from ches_align.training.train_plan import Training
from ches_align.validation.steps import Known, StepBench, changes_now, step_bench, take_steps

TOKENS = 1536 # of a batch that is read at once
READ = 16     # trained pairs that are read on the way

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

def fit_start(plan: dict[str, Any], lm: ScoringModel, pairs: list[EncodedPair], start: str, wanted: Sequence[str],
              folder: Path) -> None:
    "Put the weights of a fitted start into the model; those that are wanted of a pool are made in one go and kept"
    passes = plan['passes']
    if not passes[start]: return
    if not (folder/f'{start}.safetensors').exists():
        folder.mkdir(parents=True, exist_ok=True)
        fitted = sorted({name for name in wanted if passes[name]}, key=passes.__getitem__)
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
                save_weights(lm.model, str(folder/f'{name}.safetensors'))
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
    pairs = read_block(plan, place.data, source, lm, place.pool)
    fit_start(plan, lm, pairs[:plan['trained']], start, wanted, folder/f'{place.model}-{place.data}-{place.pool}')
    lm.model.eval()
    return wrap_model(lm.model, lm.tokenizer, f'{lm.name}, {start}'), pairs  # known by the weights it has now

def hash_of(source: Any) -> str:
    "Of a file, or of the embedded data"
    text = Path(source).read_bytes() if Path(str(source)).is_file() else repr(load_pairs(source)).encode()
    return hashlib.sha256(text).hexdigest()[:16]

def read_plan(path: Path, tiny: bool) -> dict[str, Any]:
    "The plan of an experiment; a tiny one is of few pairs, whose tokens are letters"
    plan = yaml.safe_load(path.read_text())
    if not tiny: return plan
    plan |= dict(longest=400, response=[6, 200], trained=16, unseen=8, pools=[0], steps=4, read=[2, 4], cut={},
                 passes={name: min(count, 2 + k) for k, (name, count) in enumerate(plan['passes'].items())})
    return plan

def read_sources(given: Sequence[str], names: set[str], tiny: bool) -> dict[str, Any]:
    "NAME=PATH of every data set that is named. Raises `ChesError`"
    sources: dict[str, Any] = {'sample': 'sample'} | dict(each.split('=', 1) for each in given)
    if tiny: return dict.fromkeys(names, 'sample')
    if lost := sorted(names - sources.keys()): raise ChesError(f'--data: {lost[0]}=PATH is missing')
    return sources

def write_record(folders: Sequence[str], path: Path) -> None:
    "One record of the folders of one plan. Raises `ChesError` for folders of several"
    records = [run_record(folder) for folder in folders]
    first = records[0]
    for folder, record in zip(folders, records, strict=True):
        changed = differences(*({key: one[key] for key in ('plan', 'data', 'tiny')} for one in (first, record)))
        if changed: raise ChesError(f'{folder}: of another plan than {folders[0]} ({changed[0]})')
    runs = {run['key']: run for record in records for run in record['runs']}
    write_files({path: json_bytes(first | dict(seconds=sum(record['seconds'] for record in records),
                                               runs=list(runs.values())))})
