"""All small changes of a Python source that the campaign can make."""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
TWINS = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """One change of one file. What names it survives changes elsewhere in the file, unlike its line."""

    path: str
    """Of the file, from the root of the repository."""
    function: str
    """Dotted, of class and function; empty at the level of the module."""
    operator: str
    before: str
    after: str
    nth: int = 0
    """Which of several with the same names, counted from 0."""
    line: int = 0
    """Where it is, for a reader."""
    start: int = 0
    """Offset in bytes."""
    end: int = 0
    at_import: bool = False
    """Whether it is run when the module is imported, and not when something is called."""

    @property
    def name(self) -> tuple:
        """What finds it again."""
        return self.path, self.function, self.operator, self.before, self.after, self.nth

    def apply(self, source: bytes) -> bytes:
        """Return the source with the change."""
        return source[: self.start] + self.after.encode() + source[self.end :]


class _Finder(ast.NodeVisitor):
    def __init__(self, path: str, source: bytes) -> None:
        self.path, self.source = path, source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.where: list[str] = []
        self.calls = 0  # functions that the place lies in
        self.found: list[Mutant] = []

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def add(self, node: ast.AST, operator: str, after: str) -> None:
        start, end = self.span(node)
        before = self.source[start:end].decode()
        self.found.append(
            Mutant(self.path, ".".join(self.where), operator, before, after, 0, node.lineno, start, end, not self.calls)
        )

    def replace(self, node: ast.AST, operator: str, **changes: object) -> None:
        """Add the node with other fields."""
        other = copy.copy(node)
        for field, value in changes.items():
            setattr(other, field, value)
        self.add(node, operator, ast.unparse(other))

    def negate(self, condition: ast.expr) -> None:
        if isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not):
            return  # the change that drops `not` is the same
        start, end = self.span(condition)
        self.add(condition, "condition negated", f"(not ({self.source[start:end].decode()}))")

    # What is entered, and what is left alone: texts, types, decorators and what is said in an error.

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        self.where.append(node.name)
        if not isinstance(node, ast.ClassDef):
            for default in (*node.args.defaults, *node.args.kw_defaults):
                if default is not None:
                    self.visit(default)
        self.calls += not isinstance(node, ast.ClassDef)
        for statement in node.body:
            self.visit(statement)
        self.calls -= not isinstance(node, ast.ClassDef)
        self.where.pop()

    visit_AsyncFunctionDef = visit_ClassDef = visit_FunctionDef

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass  # Python 3.11 does not know where its parts are

    def visit_Raise(self, node: ast.Raise) -> None:
        self.add(node, "statement dropped", "pass")

    def visit_Assert(self, node: ast.Assert) -> None:
        pass

    # The changes.

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        self.negate(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While | ast.IfExp) -> None:
        if not isinstance(node.test, ast.Constant):
            self.negate(node.test)
        self.generic_visit(node)

    visit_IfExp = visit_While

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for condition in node.ifs:
            self.negate(condition)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for place, operator in enumerate(node.ops):
            ops = list(node.ops)
            ops[place] = COMPARISONS[type(operator)]()
            self.replace(node, "comparison", ops=ops)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.replace(node, "and, or", op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        texts = any(
            isinstance(side, ast.JoinedStr) or (isinstance(side, ast.Constant) and isinstance(side.value, (str, bytes)))
            for side in (node.left, node.right)
        )
        if type(node.op) in ARITHMETIC and not texts:
            self.replace(node, "arithmetic", op=ARITHMETIC[type(node.op)]())
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in ARITHMETIC:
            self.replace(node, "arithmetic", op=ARITHMETIC[type(node.op)]())
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, (ast.Not, ast.USub)):
            self.add(node, "sign or not dropped", f"({ast.unparse(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.add(node, "constant", str(not node.value))
        elif isinstance(node.value, (int, float)):
            self.add(node, "constant", repr(node.value + 1))

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in TWINS:
            self.replace(node, "min, max, any, all", func=ast.Name(TWINS[node.func.id]))
        for place, keyword in enumerate(node.keywords):
            if keyword.arg is not None:
                rest = [other for at, other in enumerate(node.keywords) if at != place]
                self.replace(node, f"argument {keyword.arg} dropped", keywords=rest)
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self.add(node, "statement dropped", "pass")
        self.generic_visit(node)

    def visit_Break(self, node: ast.Break) -> None:
        self.add(node, "break, continue", "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self.add(node, "break, continue", "break")


def mutants(path: str, source: bytes) -> Iterator[Mutant]:
    """Find every change of a file that still compiles, in the order of the text."""
    finder = _Finder(path, source)
    for statement in ast.parse(source).body:
        finder.visit(statement)
    seen: Counter[tuple] = Counter()
    for one in sorted(finder.found, key=lambda one: (one.start, one.end, one.operator)):
        names = one.name[:-1]
        named = replace(one, nth=seen[names])
        seen[names] += 1
        try:
            compile(named.apply(source), path, "exec")
        except SyntaxError:
            continue
        yield named
