"`ches` as a user runs it, in a process of its own, or in this one where only its words matter."
import contextlib, io, json, os, signal, subprocess, sys, time

from forks import forked

ENV = os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')

def command(*args): return [sys.executable, '-m', 'ches_align', *map(str, args)]

def main(words):
    from ches_align.cli.main import main
    main(words)

def run(place, *args): return forked(main, args, place, OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')

def run_two(place, *args):
    "The same in two processes, with what a launcher tells each of them"
    return forked(main, args, place, 2, OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')

def command_two(*args):
    "The same in two processes, as a launcher starts them"
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    return [*launch, *command(*args)[1:]]

def launched_two(place, *args):
    return subprocess.run(command_two(*args), cwd=place, capture_output=True, text=True, timeout=300, env=ENV)

def flags(**options):
    "Keywords as words of a command line; True is a flag, a list several words"
    words = []
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [] if value is True else [value]
        words += [f'--{name}', *map(str, values)]
    return words

def ches(*args, **options):
    "A command in this process: exit code, stdout, stderr"
    from ches_align.cli.main import main
    out = io.StringIO()
    err = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([*map(str, args), *flags(**options)])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()

def done(*args, **options):
    "A command in this process that must succeed; what it prints"
    code, out, err = ches(*args, **options)
    assert code == 0, err
    return out

def refused(*args, code=1, **options):
    "A command in this process that must end in one line; the line"
    ended, _, err = ches(*args, **options)
    lines = [line for line in err.splitlines() if line.startswith('ches')]
    assert ended == code and len(lines) == 1 and err.endswith(lines[0] + '\n') and 'Traceback' not in err, (ended, err)
    return lines[0]

def started(place, command, **kw):
    "A command that goes on while the test looks; what it says is lost unless `kw` asks for it"
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen(command, cwd=place, env=ENV, **silent | kw)

def killed(place, path, *args):
    "Start a command and kill it once `path` has a line"
    process = started(place, command(*args))
    end = time.time() + 120
    while not (path.exists() and path.stat().st_size) and process.poll() is None and time.time() < end: time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.wait()

def lines(path):
    return [{k: v for k, v in json.loads(x).items() if 'seconds' not in k} for x in path.read_text().splitlines()]
