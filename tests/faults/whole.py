"""Run every case of the suite and print one row a fault: ``bash tests/faults/run.sh``. Exit code 1 if any is wrong."""

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from faults.catalogue import FAULTS, NONFINITE, cases  # noqa: E402
from faults.judge import HANG, UNNAMED, WRONG, Judge, kinds  # noqa: E402
from faults.loop import Case  # noqa: E402
from faults.stage import End, played  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="cases that run at a time")
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--nonfinite", nargs="+", choices=NONFINITE, default=NONFINITE)
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for every case")
    options = parser.parse_args()
    names = [name for name in FAULTS if options.only in name]
    listed = cases(options.sizes, options.nonfinite, names)
    start, judge = time.monotonic(), Judge()

    def run(case: Case) -> tuple[Case, list[End], list[str]]:
        ends = played(case)
        breaches = judge.breaches(case, ends)
        if options.verbose or breaches:
            said = "; ".join(f"{end.fate} {end.seconds:.1f} s" for end in ends)
            print("\n  ".join([f"{case}: {said}", *breaches]), flush=True)
        return case, ends, breaches

    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(run, listed))
    print("\n" + table(results))
    wrong = [case for case, _, breaches in results if breaches]
    found = Counter(kind for _, _, breaches in results for kind in kinds(breaches))
    print(
        f"\n{len(names)} faults, sizes {options.sizes}, nonfinite {', '.join(options.nonfinite)}: {len(results)} runs, "
        f"{found[HANG]} with a hang, {found[WRONG]} silently wrong, {found[UNNAMED]} with a culprit not named, "
        f"{len(wrong)} against the contract in all; {time.monotonic() - start:.0f} s"
    )
    return 1 if wrong else 0


def table(results: list[tuple[Case, list[End], list[str]]]) -> str:
    """One row a fault: runs, how its guilty rank and the others ended, the longest wait of a rank, what was wrong."""
    rows = ["| fault | runs | guilty rank | other ranks | latest s | wrong |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(case.fault for case, _, _ in results):
        these = [(case, ends, breaches) for case, ends, breaches in results if case.fault == name]
        guilty = Counter(ends[case.guilty].fate for case, ends, _ in these)
        others = Counter(e.fate for case, ends, _ in these for rank, e in enumerate(ends) if rank != case.guilty)
        raised = [e.seconds for _, ends, _ in these for e in ends if e.fate != "finished"]
        latest = f"{max(raised):.1f}" if raised else ""
        wrong = sum(bool(breaches) for _, _, breaches in these)
        rows.append(f"| {name} | {len(these)} | {spelled(guilty)} | {spelled(others)} | {latest} | {wrong} |")
    return "\n".join(rows)


def spelled(fates: Counter[str]) -> str:
    return ", ".join(f"{fate} {count}" for fate, count in fates.most_common())


if __name__ == "__main__":
    raise SystemExit(main())
