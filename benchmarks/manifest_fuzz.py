"""Broken manifests, each given to `MultimodalManifest`: a clear error, a counted skip, or a clean load.

Run: OMP_NUM_THREADS=1 python benchmarks/manifest_fuzz.py [--runs 1000] [--seed 0]

The damage goes round: missing columns, empty cells, wrong types, truncated and damaged files, audio without samples,
giant images, mixed encodings, and a manifest that is damaged itself; in CSV, JSONL and Parquet, with `on_error="raise"`
and `"skip"`, three in ten with a second kind. Whatever loads is looked through: finite, none of the rows that can't be
used among it, all others there. Prints JSON; `wrong` counts what is none of the three (another exception, a hang, a
row that went unnoticed, a good row that was left out), which is wanted to be 0, and then the exit status is 1.
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

from broken_manifests import Breaker, judge


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in ("error", "skipped", "clean")}
    wrong, rows, slowest = [], 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        breaker = Breaker(Path(folder), arguments.seed)
        for number in range(arguments.runs):
            broken = breaker.manifest(number)
            # Kinds go round by eight and files by three: by 24 every pair has been there.
            verdict = judge(broken, breaker.good, ("raise", "skip")[number // 24 % 2])
            if verdict.outcome == "wrong":
                wrong.append({"number": number, "kinds": broken.kinds, "what": verdict.message})
            else:
                outcomes[verdict.outcome][broken.kinds[0]] += 1
            rows += verdict.skipped
            slowest = max(slowest, verdict.seconds)
    found = {
        "runs": arguments.runs,
        "clear_errors": {"total": outcomes["error"].total(), **outcomes["error"]},
        "counted_skips": {"total": outcomes["skipped"].total(), "rows": rows, **outcomes["skipped"]},
        "clean_loads": {"total": outcomes["clean"].total(), **outcomes["clean"]},
        "slowest_seconds": round(slowest, 2),
        "wrong": len(wrong),
        "first_wrong": wrong[:10],
    }
    print(json.dumps(found, indent=2))
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
