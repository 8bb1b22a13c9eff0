"""A run of generation that dies by SIGKILL in the middle ends with the texts of one that did not; then it is judged."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ches_align.lm.tiny import save_tiny_model

SCRIPT = '''
import sys
from ches_align.lm.models import load_model
from ches_align.lm.generation import generate_responses
from ches_align.lm.sampling import Sampling
prompts = [f'Say {i} things about the number {i}.' for i in range(12)]
generate_responses(load_model('model', device='cpu'), prompts, Sampling(max_new_tokens=60, responses=4, seed=5),
                   sys.argv[1], batch_tokens=400, progress=False)
'''

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with a tiny model that has the embedded model's tokenizer"
    where = tmp_path_factory.mktemp('generation')
    save_tiny_model(where/'model')
    return where

def run(place, out):
    return subprocess.Popen([sys.executable, '-c', SCRIPT, out], cwd=place, stderr=subprocess.PIPE, text=True)

@pytest.fixture(scope='module')
def whole(place):
    "A run in one go"
    process = run(place, 'whole')
    assert process.wait(180) == 0, process.stderr.read()
    return place/'whole'/'responses.jsonl'

def rows(path):
    responses = [json.loads(x) for x in path.read_text().splitlines()]
    return {(r['prompt_index'], r['k']): (r['response'], r['tokens'], r['finished']) for r in responses}, len(responses)

@pytest.mark.full
def test_killed_and_run_again(place, whole):
    process = run(place, 'killed')
    path = place/'killed'/'responses.jsonl'
    deadline = time.time() + 120
    while not (path.exists() and path.stat().st_size) and process.poll() is None and time.time() < deadline:
        time.sleep(.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    have, _ = rows(path)
    assert 0 < len(have) < 48
    process = run(place, 'killed')
    assert process.wait(180) == 0, process.stderr.read()
    (again, lines) = rows(path)
    (unbroken, _) = rows(whole)
    assert again == unbroken and len(unbroken) == lines == 48 and have.items() <= unbroken.items()

@pytest.mark.full
def test_two_at_once_and_judged(place, whole):
    from filelock import FileLock
    from ches_align.refusal.judges import judge_responses
    with FileLock(place/'whole'/'.lock'):
        process = run(place, 'whole')
        assert process.wait(120) and 'another run is writing there' in process.stderr.read()
    responses = [json.loads(x) for x in whole.read_text().splitlines()]
    judged = judge_responses(responses, output_dir=place/'judged')
    assert [r['response'] for r in judged] == [r['response'] for r in responses]
    assert judge_responses(responses, output_dir=place/'judged') == judged
