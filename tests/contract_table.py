"""Write ``docs/peft_contract.md``: which promise of PEFT every method keeps, from a test run.

    python tests/contract_table.py

runs ``tests/test_peft_methods.py`` and turns its outcome into the table; a failure is written as
one.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "test_peft_methods.py"
TABLE = ROOT / "docs" / "peft_contract.md"
METHODS = ("SODA", "SVDiff", "Spectral Adapter A", "Spectral Adapter R", "LiDB")

HEAD = """# The methods and PEFT's contract

Written by `python tests/contract_table.py` from a run of `tests/test_peft_methods.py`; not by hand.
A cell says how many cases passed (kinds of layers, dtypes); skipped ones lacked an optional
package.

"""


def promises() -> dict[str, str]:
    """The first line of each test's docstring, by the test's name."""
    found = {}
    for node in ast.parse(TESTS.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found[node.name] = (ast.get_docstring(node) or node.name).splitlines()[0]
    return found


def outcomes() -> dict[str, dict[str, list[str]]]:
    """Passed, failed and skipped cases by test and method."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", str(TESTS), f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, check=False)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for case in cases:
            name, _, parameters = case.attrib["name"].partition("[")
            bad = case.find("failure") is not None or case.find("error") is not None
            outcome = (
                "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
            )
            for method in METHODS:
                if method in parameters:
                    found[name][method].append(outcome)
    return found


def cell(results: list[str]) -> str:
    """``"6"``, ``"6, 2 skipped"`` or ``"4, **2 failed**"``."""
    counts = {kind: results.count(kind) for kind in ("passed", "failed", "skipped")}
    parts = [str(counts["passed"])] if counts["passed"] else []
    parts += [f"**{counts['failed']} failed**"] if counts["failed"] else []
    parts += [f"{counts['skipped']} skipped"] if counts["skipped"] else []
    return ", ".join(parts) or "-"


def main() -> None:
    found = outcomes()
    lines = [f"| promise | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + 1) + "|"]
    for name, promise in promises().items():
        if len(found.get(name, ())) == len(METHODS):
            cells = [cell(found[name][method]) for method in METHODS]
            lines.append(f"| {promise} | {' | '.join(cells)} |")
    TABLE.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{TABLE.relative_to(ROOT)} written")


if __name__ == "__main__":
    main()
