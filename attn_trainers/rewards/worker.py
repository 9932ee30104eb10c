"""The process that compares answers with math-verify. Started by `attn_trainers.rewards.pool` as a script of its own.

One request is one JSON line on stdin, `{"pairs": [[gold, answer], ...], "limit": seconds}`: the answer is right if in
any pair both can be read as LaTeX and are equal. With "golds" in place of "pairs" the question is whether any of them
can be read at all. One reply is one JSON line on stdout, `{"verdict": bool, "retire": bool}`; a worker that has grown
retires after its reply.

What arrives here was written by a model and is hostile until shown otherwise:
- time: the kernel's alarm, which also interrupts one endless big-integer operation, ends the process;
- memory: the address space may grow by `HEADROOM_BYTES` beyond what the imports took;
- code: SymPy turns strings into expressions with `eval`. `parse_expr` is replaced by a reader of numbers, names and
  arithmetic, and `lambdify`, which runs generated code, is refused. No file can grow.
"""

import ast
import cmath
import functools
import json
import logging
import os
import re
import resource
import signal
import sys


HEADROOM_BYTES = 512 * 2**20
_NUMBER = re.compile(r"\s*[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4})?\s*")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*")
_DIGITS = 60  # to which exact numbers are compared, relative to the larger
# Below this magnitude six decimals, math-verify's rounding, no longer tell numbers apart: they must agree to 0.1 %.
_TINY = 1e-3


def install_expression_reader():
    """Put a reader without `eval` where SymPy and math-verify look for `parse_expr`, before its import."""
    import sympy
    import sympy.parsing.sympy_parser as sympy_parser

    def build(node: ast.expr):
        match node:
            case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
                return sympy.Integer(node.value) if isinstance(node.value, int) else sympy.Float(str(node.value))
            case ast.UnaryOp(op=ast.USub()):
                return sympy.Mul(-1, build(node.operand), evaluate=False)
            case ast.UnaryOp(op=ast.UAdd()):
                return build(node.operand)
            case ast.BinOp(op=ast.Add()):
                return sympy.Add(build(node.left), build(node.right), evaluate=False)
            case ast.BinOp(op=ast.Sub()):
                right = sympy.Mul(-1, build(node.right), evaluate=False)
                return sympy.Add(build(node.left), right, evaluate=False)
            case ast.BinOp(op=ast.Mult()):
                return sympy.Mul(build(node.left), build(node.right), evaluate=False)
            case ast.BinOp(op=ast.Div()):
                inverse = sympy.Pow(build(node.right), -1, evaluate=False)
                return sympy.Mul(build(node.left), inverse, evaluate=False)
            case ast.BinOp(op=ast.Pow()):
                return sympy.Pow(build(node.left), build(node.right), evaluate=False)
        raise sympy.SympifyError("neither a number, a name nor arithmetic")

    def read_expression(text: str, *args, **kwargs):
        if _NUMBER.fullmatch(text):
            text = text.strip()
            return sympy.Integer(int(text)) if text.lstrip("+-").isdigit() else sympy.Float(text)
        if _NAME.fullmatch(text):
            return sympy.Symbol(text)
        return build(ast.parse(text.strip(), mode="eval").body)

    def refuse(*args, **kwargs):
        raise ValueError("generated code is not run here")

    sympy_parser.parse_expr = sympy.parsing.parse_expr = sympy.parse_expr = read_expression
    sys.modules["sympy.utilities.lambdify"].lambdify = refuse


def load_reader():
    """Import the LaTeX reader and return `read(text) -> expression`, None for what it cannot read as a whole."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from math_verify.grader import should_treat_as_complex

    # Units are gone already, and fractions and roots have their braces; what its own rules do to both changes numbers.
    form = NormalizationConfig(basic_latex=True, units=False, malformed_operators=False, nits=True, boxed="none")

    def read(text: str):
        if not text.isascii():  # the reader drops characters that it does not know
            return None
        text = normalize_latex(text, form)
        is_real = not should_treat_as_complex(text)
        try:
            return latex2sympy(text, is_real=is_real, convert_degrees=False, normalization_config=None)
        except Exception:  # whatever the reader says about text that it cannot read
            return None

    return read


def load_number_equality(rounded_equal):
    """Return math-verify's comparison of two numbers, made exact where both are; `rounded_equal` is its own."""
    from sympy import Expr, Float, UnevaluatedExpr, nan, oo, zoo

    def numbers_equal(gold, answer, float_rounding, numeric_precision) -> bool:
        both = (gold, answer)
        if not all(isinstance(side, Expr) and not side.has(UnevaluatedExpr, oo, zoo, nan) for side in both):
            return rounded_equal(gold, answer, float_rounding, numeric_precision)
        exact = not any(side.has(Float) for side in both)
        if not all(side.is_number for side in both):  # what is left when both are expanded says more than six decimals
            return not exact and rounded_equal(gold, answer, float_rounding, numeric_precision)
        gold, answer = gold.doit(), answer.doit()
        if exact and gold.is_Rational and answer.is_Rational:
            return gold == answer
        a, b = gold.evalf(_DIGITS), answer.evalf(_DIGITS)
        largest = max(abs(a), abs(b))
        if exact:
            same = abs(a - b) <= largest * Float(10) ** (10 - _DIGITS)
            return bool(same) and not (gold - answer).is_nonzero
        if largest < _TINY:
            return bool(abs(a - b) <= largest * _TINY)
        return rounded_equal(gold, answer, float_rounding, numeric_precision)

    return numbers_equal


def load_difference():
    """Return `apart(gold, answer) -> bool`, which sees by one value each that two expressions differ."""
    from sympy import Derivative, Expr, Float, Integral, Limit, Product, Sum, UnevaluatedExpr
    from sympy.core.function import AppliedUndef

    # What these stand for is not given by their value at a point.
    not_pointwise = (Sum, Product, Integral, Limit, Derivative, AppliedUndef, UnevaluatedExpr)

    def apart(gold, answer) -> bool:
        """Whether two expressions differ at a point where every variable is positive: far cheaper than to simplify."""
        if not all(isinstance(side, Expr) and not side.is_Symbol for side in (gold, answer)):
            return False
        symbols = gold.free_symbols | answer.free_symbols
        if not symbols or gold.has(*not_pointwise) or answer.has(*not_pointwise):
            return False
        names = sorted({symbol.name for symbol in symbols})
        point = {symbol: Float("1.37") + Float("0.61") * names.index(symbol.name) for symbol in symbols}
        try:
            a, b = (complex(side.doit().evalf(15, subs=point)) for side in (gold, answer))
        except (TypeError, ValueError, OverflowError, ZeroDivisionError):  # it has no value there
            return False
        return cmath.isfinite(a) and cmath.isfinite(b) and abs(a - b) > 1e-5 * max(abs(a), abs(b))

    return apart


def load_equality():
    """Return `equal(gold, answer) -> bool` for two expressions.

    Math-verify's comparison of numbers, which rounds exact ones too, is replaced where it looks for it, so that items
    of sets and tuples, ends of intervals and sides of equations are compared exactly as well. It is replaced in this
    process alone, which does nothing but grade.
    """
    from latex2sympy2_extended.logic import And
    from math_verify import grader
    from sympy import Add, Eq, MatrixBase

    apart = load_difference()

    def describes_curve(answer) -> bool:
        """3x + 4y + 14 = 0 and the like: an equation that gives no value."""
        last = answer._unsorted_args[-1] if isinstance(answer, And) else answer
        return isinstance(last, Eq) and last.rhs == 0 and isinstance(last.lhs, Add) and bool(last.lhs.free_symbols)

    def equal(gold, answer) -> bool:
        if describes_curve(answer) and not isinstance(gold, Eq):
            return False
        if isinstance(gold, MatrixBase) != isinstance(answer, MatrixBase):
            return False
        return not apart(gold, answer) and grader.verify(gold, answer, timeout_seconds=None)

    grader.sympy_numeric_eq = load_number_equality(grader.sympy_numeric_eq)
    return equal


def load_grader():
    """Import math-verify and return `grade(request) -> bool`."""
    install_expression_reader()
    read, equal = load_reader(), load_equality()
    logging.disable(logging.CRITICAL)  # math-verify reports each hostile answer
    read_gold = functools.lru_cache(maxsize=256)(read)

    def grade(request: dict) -> bool:
        if "pairs" not in request:
            return any(read(gold) is not None for gold in request["golds"])
        for gold_text, text in request["pairs"]:
            gold = read_gold(gold_text)
            answer = None if gold is None else read(text)
            if answer is not None and equal(gold, answer):
                return True
        return False

    assert grade({"pairs": [["\\frac{1}{2}", "x = 0.5"]]}) and not grade({"pairs": [["2", "3 \\to 2"]]})
    return grade


def limit_resources():
    """Cap the address space (bytes) above its present size; allow neither core dumps nor growing files."""
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[0])
    limit = pages * resource.getpagesize() + HEADROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def main():
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it is doing
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    replies = os.dup(1)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    grade = load_grader()
    limit_resources()
    os.write(replies, b'{"ready": true}\n')
    os.dup2(devnull, 2)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, the peak
    for line in sys.stdin.buffer:
        request = json.loads(line.decode("utf-8", "surrogatepass"))
        signal.setitimer(signal.ITIMER_REAL, request["limit"])
        try:
            verdict = grade(request)
        except Exception:  # whatever SymPy makes of a hostile answer, the answer is not shown to be right
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
        retire = grown * 1024 > HEADROOM_BYTES // 2
        os.write(replies, json.dumps({"verdict": verdict, "retire": retire}).encode() + b"\n")
        if retire:
            return


if __name__ == "__main__":
    main()
