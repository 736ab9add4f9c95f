"""Does the metric `equivalent` accept only what is equal, and how much of what lm-evaluation-harness accepts?

    pip install lm_eval[math]==0.4.13
    cargo build --release -p trine-eval --example equivalent
    python scripts/interop/math_agreement.py math500_test.jsonl \\
        [--equivalent target/release/examples/equivalent] [--seed 0]

Every answer of the file is compared with other ways to write it (fractions as decimals and divided by a
slash, what sympy makes of it expanded, factored and together, terms and spaces moved, commands replaced), with
near misses (another sign, number or bracket, elements exchanged) and with other answers. The harness decides
by `is_equiv` of its `minerva_math`: equal texts, or a difference that sympy simplifies to 0.

sympy cannot read tuples, intervals and matrices, reads some answers as what they are not (`x(x+1)` as a
function x of x + 1, `1\\frac{4}{5}` as a product), and of some only the beginning (`52_8`, `x \\in [-2,7]`), so that
it accepts near misses. So a pair on which the two differ is decided by numbers: both
formulas, element by element, at random values of their letters. Prints how often each accepts, other
ways to write an answer that only the harness accepts, and every pair that is accepted here and not equal by
numbers, which is an error and exits with 1.
"""

import argparse
import json
import random
import re
import subprocess
import sys

import sympy
from lm_eval.tasks.minerva_math.utils import is_equiv, normalize_final_answer
from sympy.parsing.latex import parse_latex


def rewritten(text):
    """Other ways to write an answer."""
    yield text.replace(" ", "")
    yield re.sub(r"([+\-=,])", r" \1 ", text)
    yield text.replace("\\frac", "\\dfrac")
    yield re.sub(r"\\frac\{(\w+)\}\{(\w+)\}", r"\1/\2", text)
    yield re.sub(r"\\d?frac\{(\w+)\}\{(\w+)\}", r"\\frac\1\2", text)
    yield re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", lambda m: str(int(m[1]) / int(m[2])), text)
    yield re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", lambda m: f"\\frac{{{3 * int(m[1])}}}{{{3 * int(m[2])}}}", text)
    yield re.sub(r"\\sqrt\{(\d+)\}", r"\1^{1/2}", text)
    yield re.sub(r"\\sqrt\{(\d+)\}", lambda m: f"\\frac{{\\sqrt{{{4 * int(m[1])}}}}}{{2}}", text)
    yield re.sub(r"^(\d+)$", r"\1.0", text)
    yield text.replace("\\left", "").replace("\\right", "")
    try:
        formula = parse_latex(normalize_final_answer(text))
        for form in (sympy.expand, sympy.factor, sympy.together, sympy.radsimp):
            yield sympy.latex(form(formula))
        terms = sympy.Add.make_args(sympy.expand(formula))
        yield " + ".join(sympy.latex(term) for term in reversed(terms)).replace("+ -", "- ")
    except Exception:
        pass


def changed(text, rng):
    """Near misses."""
    numbers = list(re.finditer(r"\d+", text))
    if numbers:
        m = rng.choice(numbers)
        yield text[: m.start()] + str(int(m[0]) + rng.choice([1, -1, 10])) + text[m.end() :]
    yield text.replace("-", "+") if "-" in text else "-" + text
    yield text.replace("(", "[").replace(")", "]")
    yield re.sub(r"\(\s*([^,()]*),([^,()]*)\)", r"(\2,\1)", text)
    yield re.sub(r"\\frac\{(\w+)\}\{(\w+)\}", r"\\frac{\2}{\1}", text)
    yield re.sub(r"\\sqrt\{(\w+)\}", r"\1", text)
    yield text.replace("x", "y").replace("\\pi", "3.14159265")
    yield re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", lambda m: f"{int(m[1]) / int(m[2]):.3f}", text)
    yield text + text[-1:]


def elements(text):
    """An answer, cut at commas, brackets that are no parentheses of a formula, and cells."""
    text = re.sub(r"\\left|\\right|\\!|\\,|\\;|\\begin\{pmatrix\}|\\end\{pmatrix\}", "", text)
    if re.fullmatch(r"\\?[(\[{].*,.*[)\]}]", text) or "\\cup" in text:
        shape = re.sub(r"[^()\[\]]", "", text)
        return shape, re.split(r",|\\cup|\\\\|&", re.sub(r"\\\{|\\\}|[()\[\]]", "", text) if "," in text else text)
    return "", re.split(r",|\\\\|&", text)


LETTERS = {name: random.Random(name).uniform(1.5, 2.5) for name in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"}


def number(text):
    """A formula at fixed values of its letters, read by Python: a second reader, and a lax one."""
    text = text.replace("\\infty", "1e99").replace("\\cdot", "*").replace("\\times", "*").replace("\\pi", "(3.14159265358979323846)")
    while True:
        was = text
        text = re.sub(r"\\[dtc]?frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
        text = re.sub(r"\\[dtc]?frac\{([^{}]*)\}(\d)", r"((\1)/(\2))", text)
        text = re.sub(r"\\sqrt\[(\d+)\]\{([^{}]*)\}", r"((\2)**(1/\1))", text)
        text = re.sub(r"\\sqrt\{([^{}]*)\}", r"((\1)**0.5)", text)
        text = re.sub(r"\^\{([^{}]*)\}", r"**(\1)", text)
        text = re.sub(r"(?<![a-z\\])\{([^{}]*)\}", r"(\1)", text)
        if text == was:
            break
    text = text.replace("^", "**")
    text = re.sub(r"(?<=[\w.)])\s*(?=[A-Za-z(])(?<!\d(?=e\d))", "*", text)
    try:
        return complex(eval(text, {"__builtins__": {}}, dict(LETTERS)))
    except Exception:
        return None


def equal_by_numbers(a, b):
    (shape, x), (other, y) = elements(a), elements(b)
    if shape != other or len(x) != len(y):
        return False
    for s, t in zip(x, y):
        m, n = number(s), number(t)
        if m is None or n is None:
            return None
        if abs(m - n) > 1e-9 * max(1, abs(m)):
            return False
    return True


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("items")
    parser.add_argument("--equivalent", default="target/release/examples/equivalent")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with open(args.items) as file:
        answers = sorted({json.loads(line)["answer"] for line in file})
    pairs = {}
    for target in answers:
        for kind, texts in [
            ("rewritten", list(rewritten(target))),
            ("near misses", list(changed(target, rng))),
            ("other answers", rng.sample(answers, 3)),
        ]:
            for text in texts:
                if text != target:
                    pairs.setdefault((text, target), kind)
    lines = "".join(json.dumps({"answer": a, "target": t}) + "\n" for a, t in pairs)
    done = subprocess.run([args.equivalent], input=lines, stdout=subprocess.PIPE, text=True, check=True)
    counts, wrong = {}, 0
    for ((answer, target), kind), line in zip(pairs.items(), done.stdout.splitlines(), strict=True):
        a, b = normalize_final_answer(answer), normalize_final_answer(target)
        here, there = line == "true", is_equiv(a, b)
        count = counts.setdefault(kind, dict(pairs=0, same=0, harness=0, here=0, only_harness=0, only_here=0, undecided=0))
        count["pairs"] += 1
        count["same"] += a == b
        count["harness"] += there
        count["here"] += here
        count["only_harness"] += there and not here
        count["only_here"] += here and not there
        if here and not there:
            judged = equal_by_numbers(a, b)
            count["undecided"] += judged is None
            if judged is not True:
                wrong += judged is False
                print(f"accepted here only: {answer!r} for {target!r}: {'not equal' if judged is False else 'not decided'}")
        if there and not here and kind == "rewritten":
            print(f"accepted by the harness only: {answer!r} for {target!r}")
    print("\n| pairs | | same text | accepted by the harness | here | only by the harness | only here | of these not decided |")
    print("|" + " --- |" * 8)
    for kind, count in counts.items():
        print(f"| {kind} | " + " | ".join(f"{n:,}" for n in count.values()) + " |")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
