"Commands as a user runs them, in a process of their own."
import json, os, signal, subprocess, sys, time
from pathlib import Path

ENV = os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
SCRIPTS = Path(sys.executable).parent

def command(name, *args): return [sys.executable, str(SCRIPTS/name), *args]

def _run(place, command):
    return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300, env=ENV)

def run(place, name, *args): return _run(place, command(name, *args))

def command_two(name, *args):
    "The same in two processes, as a launcher starts them"
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    return [*launch, *command(name, *args)[1:]]

def run_two(place, name, *args): return _run(place, command_two(name, *args))

def started(place, command, **kw):
    "A command that goes on while the test looks; what it says is lost unless `kw` asks for it"
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen(command, cwd=place, env=ENV, **silent | kw)

def killed(place, path, *args):
    "Start a command and kill it once `path` has a line"
    process, end = started(place, command(*args)), time.time() + 120
    while not (path.exists() and path.stat().st_size) and process.poll() is None and time.time() < end: time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.wait()

def lines(path):
    return [{k: v for k, v in json.loads(x).items() if 'seconds' not in k} for x in path.read_text().splitlines()]
