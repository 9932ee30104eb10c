"""The process that compares answers with math-verify. Started by `attn_trainers.rewards.pool` as a script of its own.

One request is one JSON line on stdin, `{"golds": [...], "texts": [...], "limit": seconds}`: the answer is right if any
text, read by math-verify, equals any gold. Without "texts" the question is whether any gold can be parsed at all. One
reply is one JSON line on stdout, `{"verdict": bool, "retire": bool}`; a worker that has grown retires after its reply.

What arrives here was written by a model and is hostile until shown otherwise:
- time: the kernel's alarm, which also interrupts one endless big-integer operation, ends the process;
- memory: the address space may grow by `HEADROOM_BYTES` beyond what the imports took;
- code: SymPy turns strings into expressions with `eval`. `parse_expr` is replaced by a reader of numbers, names and
  arithmetic, and `lambdify`, which runs generated code, is refused. No file can grow.
"""

import ast
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


def load_grader():
    """Import math-verify and return `grade(request) -> bool`."""
    install_expression_reader()
    from math_verify import parse, verify
    from sympy import Basic, Expr

    logging.disable(logging.CRITICAL)  # math-verify reports each hostile answer

    @functools.lru_cache(maxsize=256)
    def parse_gold(gold: str) -> list:
        return parse("\\boxed{" + gold + "}", parsing_timeout=None)

    def tiny_and_apart(gold, answer) -> bool:
        if not (isinstance(gold, Expr) and isinstance(answer, Expr) and gold.is_number and answer.is_number):
            return False
        try:
            a, b = complex(gold.doit().evalf(15)), complex(answer.doit().evalf(15))
        except (TypeError, OverflowError):  # not a finite number: as math-verify found it
            return False
        largest = max(abs(a), abs(b))
        return largest < _TINY and abs(a - b) > 1e-3 * largest

    def equal(gold, answer) -> bool:
        if isinstance(gold, str) or isinstance(answer, str):
            return gold == answer and bool(gold.strip())
        return verify(gold, answer, timeout_seconds=None) and not tiny_and_apart(gold, answer)

    def grade(request: dict) -> bool:
        golds = [parse_gold(gold) for gold in request["golds"]]
        if "texts" not in request:
            return any(not isinstance(form, str) for gold in golds for form in gold)
        for text in request["texts"]:
            answers = parse(text, parsing_timeout=None)
            if any(equal(g, a) for gold in golds for g in gold for a in answers):
                return True
        return False

    assert grade({"golds": ["\\frac{1}{2}"], "texts": ["\\boxed{x = 0.5}"]}) and isinstance(parse("1/2")[0], Basic)
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
