"""
The long form of the tests of reliability: `make torture` runs it and writes results/torture.json. The tests run the same
functions with small counts.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# Name in the file: module, function, how many, and what else it is asked for. The longest first; two at a time.
PARTS = {
    "kills": ("torture_runs", "kills", 200, {}),
    "rank_faults": ("torture_ranks", "rank_faults", 20, {}),
    "resume_at_every_step": ("torture_runs", "every_step", 10, {}),
    "resume_at_every_step_2_workers": ("torture_runs", "every_step", 10, {"variant": "everything"}),
    "resume_at_every_step_2_processes": ("torture_runs", "every_step", 10, {"processes": 2}),
    "resume_at_every_step_2_processes_2_workers": (
        "torture_runs",
        "every_step",
        10,
        {"variant": "everything", "processes": 2},
    ),
    "sigterms": ("torture_runs", "sigterms", 40, {}),
    "non_finite": ("torture_nonfinite", "injections", 20, {}),
    "file_mutations": ("torture_storage", "file_mutations", 200, {}),
    "malformed_configurations": ("torture_config", "malformed_configurations", 500, {}),
    "damaged_data_folders": ("torture_data", "damaged_data_folders", 300, {}),
    "interrupted_fisher": ("torture_fisher", "interruptions", 200, {}),
    "interrupted_sampling": ("torture_sampling", "interrupted_sampling", 100, {}),
    "kills_in_a_publication": ("torture_kills", "kill_points", 200, {}),
    "disk_full": ("torture_storage", "disk_full", 20, {}),
    "hostile_files": ("torture_security", "hostile_files", 120, {}),
    # By itself: it is a measurement.
    "cost": ("torture_cost", "cost", 1, {}),
}
# Beside the lists, which must all be empty: what a part has to reach.
LIMITS = {
    "kills": lambda part: (
        min(part["by_phase"].get(phase, 0) for phase in ("replay", "train", "fisher", "evaluate", "publish"))
        >= part["kills"] // 20
        and part["in_a_save"] >= part["kills"] / 4
        and part["in_recovery"] > 0
    ),
    "sigterms": lambda part: part["exit_143"] == part["signals"] and part["steps_lost"] == 0,
    "non_finite": lambda part: part["stopped"] == part["tried"],
    "interrupted_fisher": lambda part: part["equal"] == part["tried"],
    "interrupted_sampling": lambda part: part["equal"] == part["only_missing"] == part["tried"],
    "cost": lambda part: part["percent"] <= 1.0,
}


def run_part(name: str, seed: int, scale: float) -> dict:
    """Returns the result of a part, with its seconds; every part has a temporary folder of its own."""
    module, function, count, options = PARTS[name]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        call = getattr(__import__(module), function)
        result = call(Path(folder), max(1, round(count * scale)), seed=seed, **options)
    return {**result, "minutes": round((time.monotonic() - began) / 60, 1)}


def passed(name: str, result: dict) -> bool:
    """Returns whether a part found nothing wrong, and did what it is for."""
    return not any(isinstance(value, list) and value for value in result.values()) and LIMITS.get(name, bool)(result)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "torture.json")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of all counts")
    parser.add_argument("--jobs", type=int, default=2, help="parts at a time")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    # Parts that are not asked for stay as the file has them.
    known = {"minutes": 0.0, "parts": {}}
    if args.output.exists() and set(args.parts) != set(PARTS):
        known = json.loads(args.output.read_text())
    began, results = time.monotonic(), {}
    with ProcessPoolExecutor(args.jobs) as pool:
        running = {name: pool.submit(run_part, name, args.seed, args.scale) for name in args.parts if name != "cost"}
        for name, part in running.items():
            results[name] = part.result()
            print(
                f"{name}: {'passed' if passed(name, results[name]) else 'FAILED'}: {json.dumps(results[name])[:2000]}"
            )
    if "cost" in args.parts:
        results["cost"] = run_part("cost", args.seed, args.scale)
        print(f"cost: {results['cost']}")
    from diffusers_cl.record import versions

    content = {
        "how": f"make torture (tests/torture.py, seed {args.seed}, {args.jobs} parts at a time)",
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores, CPU only",
        "versions": versions(),
        "minutes": round(known["minutes"] + (time.monotonic() - began) / 60, 1),
        "passed": True,
        "parts": {**known["parts"], **results},
    }
    content["passed"] = all(passed(name, result) for name, result in content["parts"].items())
    args.output.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{'All passed' if content['passed'] else 'FAILED'}: {args.output}")
    return 0 if content["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
