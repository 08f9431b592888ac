"""Prints the failed cases of a conformance report and the line "N passed, N failed".

A report that does not hold exactly the expected number of cases is of a run that ended early, or of another suite:
the status is 2 then.
"""

import json
import sys

PASSED = {"OK", "NON-STRICT", "INFORMATIONAL"}


def main(path: str, expected: int) -> int:
    with open(path, encoding="utf-8") as file:
        agents = json.load(file)
    passed = failed = 0
    for cases in agents.values():
        for case, result in cases.items():
            behavior, close = result["behavior"], result["behaviorClose"]
            if behavior in PASSED and close in PASSED:
                passed += 1
            else:
                failed += 1
                print(f"case {case}: {behavior}, closing {close}")
    if passed + failed != expected:
        print(f"the report holds {passed + failed} cases, expected {expected}", file=sys.stderr)
        return 2
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
