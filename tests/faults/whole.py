"""Run every case of the suite and print one row a fault: ``bash tests/faults/run.sh``. Exit code 1 if any is wrong."""

import argparse
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from faults.catalogue import FAULTS, NONFINITE, cases  # noqa: E402
from faults.judge import FATE, HANG, UNNAMED, WRONG, Judge, kinds  # noqa: E402
from faults.loop import Case  # noqa: E402
from faults.stage import End, played  # noqa: E402


@dataclass(frozen=True, slots=True)
class Result:
    case: Case
    ends: list[End]
    breaches: list[str]


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

    def run(case: Case) -> Result:
        ends = played(case)
        breaches = judge.breaches(case, ends)
        if options.verbose or breaches:
            said = "; ".join(f"{end.fate} {end.seconds:.1f} s" for end in ends)
            print("\n  ".join([f"{case}: {said}", *breaches]), flush=True)
        return Result(case, ends, breaches)

    results: list[Result] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for result in pool.map(run, listed):
            results.append(result)
            if len(results) % 50 == 0:
                print(f"{len(results)} of {len(listed)}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    print(f"\n{table(results)}\n\n{summary(results)}")
    print(f"{time.monotonic() - start:.0f} s, {options.jobs} at a time, load {os.getloadavg()[2]:.0f}")
    return 1 if any(result.breaches for result in results) else 0


def summary(results: list[Result]) -> str:
    names, sizes, policies = ({getattr(r.case, name) for r in results} for name in ("fault", "size", "nonfinite"))
    found = Counter(kind for r in results for kind in kinds(r.breaches))
    return (
        f"{len(names)} faults on {len(sizes)} sizes with {len(policies)} policies: {len(results)} runs, "
        f"{found[HANG]} with a hang, {found[WRONG]} silently wrong, {found[UNNAMED]} with a culprit not named, "
        f"{found[FATE]} with another end"
    )


def table(results: list[Result]) -> str:
    """One row a fault: runs, how its guilty rank and the others ended, the longest wait of a rank, what was wrong."""
    rows = ["| fault | runs | guilty rank | other ranks | latest s | wrong |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(r.case.fault for r in results):
        these = [r for r in results if r.case.fault == name]
        guilty = Counter(r.ends[r.case.guilty].fate for r in these)
        others = Counter(end.fate for r in these for rank, end in enumerate(r.ends) if rank != r.case.guilty)
        raised = [end.seconds for r in these for end in r.ends if end.fate != "finished"]
        latest = f"{max(raised):.1f}" if raised else ""
        wrong = sum(bool(r.breaches) for r in these)
        rows.append(f"| {name} | {len(these)} | {spelled(guilty)} | {spelled(others)} | {latest} | {wrong} |")
    return "\n".join(rows)


def spelled(fates: Counter[str]) -> str:
    return ", ".join(f"{fate} {count}" for fate, count in fates.most_common())


if __name__ == "__main__":
    raise SystemExit(main())
