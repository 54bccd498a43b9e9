"""The house style that a linter does not know: DESIGN's rules about statements, names and density.

ruff watches the width of lines, complexity and the number of arguments (pyproject.toml). The rules
here are explained in CONTRIBUTING.md. The last part plants one mistake of each kind.
"""

import ast
import io
import tokenize
from pathlib import Path

import pytest

import minia3

ROOT = Path(minia3.__file__).parents[1]
FILES = [*sorted((ROOT / "minia3").rglob("*.py")), ROOT / "train.py"]
MOST_EXPRESSIONS = 6.0  # per line of code, averaged over a file; nanoGPT has 5.2
MOST_LINES = 60  # of a function
PRONOUNS = {"own", "some", "one", "said", "it", "this", "that", "these", "those", "such", "others"}
PREPOSITIONS = {"of", "by", "at", "on", "to", "with_"}
QUESTION_WORDS = {"how", "what", "which", "who", "there"}
NOT_NAMES = PRONOUNS | PREPOSITIONS | QUESTION_WORDS

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LITERALS = {
    "list": (ast.List, ast.ListComp),
    "dict": (ast.Dict, ast.DictComp),
    "set": (ast.Set, ast.SetComp),
    "tuple": ast.Tuple,
    "str": ast.JoinedStr,
    "bool": ast.Compare,
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def findings(tree):
    """Yield (line, what is wrong) for each statement that breaks a rule."""
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS):
            yield from in_comprehension(node)
        if isinstance(node, ast.For) and isinstance(node.iter, ast.IfExp):
            yield node.lineno, "a loop over a conditional expression"
        if isinstance(node, ast.BinOp) and is_text_times_condition(node):
            yield node.lineno, "text * condition"
        if isinstance(node, ast.Assign) and has_several_values(node):
            yield node.lineno, "several assignments on one line"
        if isinstance(node, ast.Call):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            if any(map(has_condition, arguments)):
                yield node.lineno, "a conditional expression inside arguments"
        if isinstance(node, ast.FunctionDef):
            n_lines = node.end_lineno - node.lineno + 1
            if n_lines > MOST_LINES:
                yield node.lineno, f"{node.name} has {n_lines} lines"
            yield from second_kinds(node)
        name = bound_name(node)
        if name in NOT_NAMES:
            yield node.lineno, f"{name!r} is not the name of a thing"


def has_condition(argument):
    return any(isinstance(part, ast.IfExp) for part in ast.walk(argument))


def in_comprehension(node):
    if len(node.generators) > 1:
        yield node.lineno, "two loops in a comprehension"
    if any(len(generator.ifs) > 1 for generator in node.generators):
        yield node.lineno, "two conditions in a comprehension"
    if any(isinstance(generator.iter, ast.IfExp) for generator in node.generators):
        yield node.lineno, "a comprehension over a conditional expression"
    if any(isinstance(part, ast.NamedExpr) for part in ast.walk(node)):
        yield node.lineno, "an assignment inside a comprehension"


def second_kinds(function):
    """Yield each name that is bound to, say, a list and then a text, as far as literals tell."""
    kinds = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            kind = kind_of_literal(node.value)
            name = node.targets[0].id
            if kind is not None and kinds.setdefault(name, kind) != kind:
                yield node.lineno, f"{name!r} is a {kinds[name]}, and then a {kind}"


def kind_of_literal(value):
    for kind, classes in LITERALS.items():
        if isinstance(value, classes):
            return kind
    is_constant = isinstance(value, ast.Constant) and value.value is not None
    return type(value.value).__name__ if is_constant else None


def has_several_values(assignment):
    return isinstance(assignment.value, ast.Tuple) and isinstance(assignment.targets[0], ast.Tuple)


def is_text_times_condition(node):
    if not isinstance(node.op, ast.Mult):
        return False
    for text, condition in ((node.left, node.right), (node.right, node.left)):
        is_text = isinstance(text, ast.JoinedStr | ast.Tuple | ast.List)
        is_text = is_text or (isinstance(text, ast.Constant) and isinstance(text.value, str))
        is_bool_call = isinstance(condition, ast.Call) and ast.unparse(condition.func) == "bool"
        if is_text and (is_bool_call or isinstance(condition, ast.Compare | ast.BoolOp)):
            return True
    return False


def bound_name(node):
    if isinstance(node, ast.arg):
        return node.arg
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    return None


def density(text):
    """Return expressions per line of code. Docstrings, comments and blank lines do not count."""
    tree = ast.parse(text)
    docstring_lines = set()
    n_docstrings = 0
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            docstring_lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
            n_docstrings += 1
    n_expressions = sum(isinstance(node, ast.expr) for node in ast.walk(tree)) - n_docstrings
    code_lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
            code_lines |= set(range(token.start[0], token.end[0] + 1))
    n_lines = len(code_lines - docstring_lines)
    return n_expressions / max(n_lines, 1)


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_statements_hold_one_thought_each(path):
    found = sorted(findings(ast.parse(path.read_text(encoding="utf-8"))))
    assert not found, "\n".join(f"{name_of(path)}:{line}: {text}" for line, text in found)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_lines_are_not_dense(path):
    assert density(path.read_text(encoding="utf-8")) <= MOST_EXPRESSIONS


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


# One mistake of each kind

MISTAKES = {
    "[x for y in z for x in y]": "two loops",
    "[x for x in y if x if z]": "two conditions",
    "[x for x in (y if z else [])]": "comprehension over a conditional",
    "[y for x in z if (y := x)]": "assignment inside a comprehension",
    "for x in y if z else []: pass": "loop over a conditional",
    "'text' * bool(x)": "text * condition",
    "f'{x} text' * (x > 1)": "text * condition",
    "a, b = x, y": "several assignments",
    "f(x if y else z)": "inside arguments",
    "f(key=x if y else z)": "inside arguments",
    "f([x if x else y for x in z])": "inside arguments",
    "def f():\n    x = []\n    x = f'{y}'": "'x' is a list, and then a str",
    "own = 1": "not the name of a thing",
    "def f(of): pass": "not the name of a thing",
    "def f():\n" + "    x\n" * MOST_LINES: "61 lines",
}


@pytest.mark.parametrize(("code", "message"), MISTAKES.items())
def test_a_planted_mistake_is_found(code, message):
    found = [text for _, text in findings(ast.parse(code))]
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize("code", ["a, b = f(x)", "n * 2", "[x for x in y if z]", "x if y else z"])
def test_a_plain_statement_is_not_blamed(code):
    assert not list(findings(ast.parse(code)))


def test_density_counts_expressions_and_lines_of_code_only():
    assert density('"""Text."""\n\n# a comment\nx = y\n') == 2
    assert density("x = f(y, z)\nx\n") == 3
