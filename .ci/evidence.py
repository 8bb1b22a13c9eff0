"""Checks that cannot fail: found while a notebook runs, and by reading.

`all` of nothing is true, a loop over nothing asserts nothing, and `zip` stops at the shorter of two lists. `Evidence`
rewrites these where an assertion stands in a notebook, so that they fail when there was nothing to look at.
`blind_checks` finds by reading, in notebooks and tests, what compares a thing with itself, asserts a constant, or
accepts any error. Neither looks into what a check calls, nor at `np.allclose` and its kin of empty arrays.
"""
import ast
import builtins

class Runtime:
    "What the rewritten checks call."
    @staticmethod
    def items(line, values):
        "The items; fails after the last one when there was none"
        empty = True
        for value in values:
            empty = False
            yield value
        assert not empty, f'line {line}: a check over nothing'

    @staticmethod
    def array(line, values):
        "An array or table before its `.all()`; fails when it is empty"
        size = values.numel() if hasattr(values, 'numel') else getattr(values, 'size', 1)
        assert size, f'line {line}: all of nothing'
        return values

    @staticmethod
    def zip(line, *columns, **options):
        "`zip`, which here fails where one list is empty and another is not, or is shorter by more than a neighbour"
        sizes = [len(column) for column in columns if hasattr(column, '__len__')]
        apart = max(sizes, default=0) - min(sizes, default=0)  # zip(x, x[1:]) pairs neighbours
        assert apart == 0 or apart == 1 and min(sizes), f'line {line}: zip of lists of lengths {sizes}'
        return zip(*columns, **options)

def is_check(node: ast.AST) -> bool:
    "An `assert`, or a call of `test_eq`, `test_close` and the like"
    if isinstance(node, ast.Assert): return True
    call = node.value if isinstance(node, ast.Expr) else node
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id.startswith('test_')

def runtime(name: str, line: int, *values: ast.expr, keywords=()) -> ast.Call:
    function = ast.Attribute(ast.Name('__evidence__', ast.Load()), name, ast.Load())
    return ast.Call(function, [ast.Constant(line), *values], list(keywords))

class Inside(ast.NodeTransformer):
    "Within one check: `all`, `not any`, `.all()`, `zip`"
    def visit_UnaryOp(self, node):
        self.generic_visit(node)
        call = node.operand
        if isinstance(node.op, ast.Not) and isinstance(call, ast.Call) and ast.unparse(call.func) == 'any':
            call.args = [runtime('items', node.lineno, *call.args)]
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == 'all' and len(node.args) == 1:
            node.args = [runtime('items', node.lineno, *node.args)]
        elif isinstance(node.func, ast.Name) and node.func.id == 'zip':
            return runtime('zip', node.lineno, *node.args, keywords=node.keywords)
        elif isinstance(node.func, ast.Attribute) and node.func.attr == 'all':
            if ast.unparse(node.func.value) in ('np', 'numpy', 'torch'):
                node.args[:1] = [runtime('array', node.lineno, value) for value in node.args[:1]]
            else: node.func.value = runtime('array', node.lineno, node.func.value)
        return node

class Evidence(ast.NodeTransformer):
    "Rewrite the checks of a cell; register with `install`."
    def visit_Assert(self, node):
        node.test = Inside().visit(node.test)
        return node

    def visit_Expr(self, node):
        return Inside().visit(node) if is_check(node) else self.generic_visit(node)

    def visit_For(self, node):
        self.generic_visit(node)
        if any(is_check(inner) for statement in node.body for inner in ast.walk(statement)):
            node.iter = runtime('items', node.lineno, Inside().visit(node.iter))
        return node

    def visit_Module(self, node):
        self.generic_visit(node)
        return ast.fix_missing_locations(node)

def install(shell_class: type) -> type:
    "A shell of IPython that rewrites the checks of every cell that it runs"
    class Shell(shell_class):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.ast_transformers.append(Evidence())
    builtins.__evidence__ = Runtime
    return Shell

def blind_checks(tree: ast.AST) -> list[tuple[int, str]]:
    "Line and reason of each check that passes whatever the code does"
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == 'fastcore.test':
            if any(alias.name in ('test_close', 'is_close', '*') for alias in node.names):
                faults.append((node.lineno, 'compares by zip: take test_close from ches_align.theory.checks'))
        if isinstance(node, ast.Assert) and isinstance(node.test, (ast.Constant, ast.Tuple, ast.JoinedStr)):
            faults.append((node.lineno, 'asserts a constant'))
        if not is_check(node): continue
        pairs = [(c.left, c.comparators[0]) for c in ast.walk(node) if isinstance(c, ast.Compare)]
        calls_test = isinstance(node, ast.Call) and node.func.id != 'test_fail'
        if calls_test and len(node.args) > 1: pairs.append(node.args[:2])
        if any(ast.dump(left) == ast.dump(right) and not calls(left) for left, right in pairs):
            faults.append((node.lineno, 'compares a thing with itself'))
        if isinstance(node, ast.Call) and node.func.id == 'test_fail':
            if len(node.args) < 3 and not {'contains', 'exc'} & {word.arg for word in node.keywords}:
                faults.append((node.lineno, 'any error passes: say what it contains'))
    return faults

def calls(tree: ast.AST) -> bool:
    "Is something called in it (which may give another value each time)?"
    return any(isinstance(node, ast.Call) for node in ast.walk(tree))
