"Commands as a user runs them, in a process of their own."
import json, os, signal, subprocess, sys, time
from pathlib import Path

ENV = os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
SCRIPTS = Path(sys.executable).parent

def command(name, *args): return [sys.executable, str(SCRIPTS/name), *args]

def run(place, name, *args): return subprocess.run(command(name, *args), cwd=place, capture_output=True, text=True, timeout=300, env=ENV)

def command_two(name, *args):
    "The same in two processes, as a launcher starts them"
    return [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', *command(name, *args)[1:]]

def run_two(place, name, *args): return subprocess.run(command_two(name, *args), cwd=place, capture_output=True, text=True, timeout=300, env=ENV)

def killed(place, path, *args):
    "Start a command and kill it once `path` has a line"
    process, end = subprocess.Popen(command(*args), cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV), time.time() + 120
    while not (path.exists() and path.stat().st_size) and process.poll() is None and time.time() < end: time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.wait()

def lines(path): return [{k: v for k, v in json.loads(x).items() if 'seconds' not in k} for x in path.read_text().splitlines()]
