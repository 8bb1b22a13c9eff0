"Processes forked from one that has the heavy imports behind it: a start takes a tenth of a second instead of six."
import io
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

# what a notebook or a command imports directly or by the way; an extra that is not installed is imported by nobody
PRELOAD = [
    'nbdev.test', 'nbdev.showdoc', 'matplotlib.pyplot', 'seaborn', 'pandas', 'pyarrow.parquet', 'scipy.stats',
    'datasets', 'torch', 'torch._dynamo', 'transformers.models.llama.modeling_llama', 'transformers.trainer', 'gguf',
    'accelerate', 'peft', 'trl.trainer.dpo_trainer', 'trl.trainer.sft_trainer']
LIMIT = 300  # seconds for a process

@lru_cache
def context():
    "How processes start; there is one server of forks in a test process, whoever asks first"
    fork = 'forkserver' in multiprocessing.get_all_start_methods()
    method = multiprocessing.get_context('forkserver' if fork else 'spawn')
    if fork: method.set_forkserver_preload(PRELOAD)
    return method

def _inside(function, words, place, env, out, err):
    "What a started process does: its folder, its environment, its outputs, then the call"
    os.chdir(place)
    os.environ.update(env)
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    sys.stdout = io.TextIOWrapper(os.fdopen(os.dup(1), 'wb'), encoding='utf-8', line_buffering=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(os.dup(2), 'wb'), encoding='utf-8', line_buffering=True)
    function(words)

def ranks(count):
    "The environment a launcher gives each of its processes"
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        port = taken.getsockname()[1]
    shared = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
    each = [shared | dict(RANK=k, LOCAL_RANK=k) for k in range(count)]
    return [{name: str(value) for name, value in env.items()} for env in each]

def forked(function, words, place, count=1, **env):
    "`function(words)` in `count` processes that talk to each other, as `subprocess.run` would tell of them"
    words = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder)/name for name in ('out', 'err')]
        for path in paths: path.touch()
        more = ranks(count) if count > 1 else [{}]
        started = [context().Process(target=_inside, args=(function, words, str(place), env | own, *paths))
                   for own in more]
        for process in started: process.start()
        for process in started: process.join(LIMIT)
        waiting = [process for process in started if process.exitcode is None]
        for process in waiting: process.kill()
        assert not waiting, f'{len(waiting)} of {count} processes do not end: {paths[1].read_text()[-2000:]}'
        code = next((process.exitcode for process in started if process.exitcode), 0)
        return subprocess.CompletedProcess(words, code, *(path.read_text() for path in paths))
