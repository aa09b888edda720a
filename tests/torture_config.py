"""Malformed configurations by the hundred: each must end as one `ConfigError` that names the key, and write nothing."""

import contextlib
import random
import re
from collections import Counter
from pathlib import Path

from malformed_cases import Case, all_cases

from diffusers_cl.arguments import parse_config
from diffusers_cl.errors import ConfigError


CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BASE = b"dataset_name: digits\nclasses_per_task: 2\n"
# What tells a user how to go on.
HELPFUL = r"allowed: |did you mean|--help lists|expected|exactly one|one place|, line \d+: "


def _chosen(count: int, seed: int) -> list[tuple[str, Case]]:
    """The first `count` of all cases: kinds in proportion to their share, and of a kind every key once before any twice."""
    rng = random.Random(seed)
    queue = []
    for kind, (share, cases) in all_cases().items():
        rng.shuffle(cases)
        seen = Counter()
        turns = []
        for case in cases:
            key = case.suggestion or case.pattern
            turns.append(seen[key])
            seen[key] += 1
        order = sorted(range(len(cases)), key=turns.__getitem__)
        queue += [((place + 0.5) / share, kind, cases[index]) for place, index in enumerate(order)]
    return [(kind, case) for _, kind, case in sorted(queue, key=lambda entry: entry[:2])[:count]]


def _parse(command: list[str]) -> tuple[str | None, str | None]:
    """The message of a `ConfigError`, and the name of any other exception."""
    try:
        parse_config(command)
    except ConfigError as error:
        return str(error), None
    except (Exception, SystemExit) as error:
        return None, f"{type(error).__name__}: {error}"
    return None, None


def _is_short(message: str) -> bool:
    return len(message.splitlines()) == 1 and len(message) <= 1000


def malformed_configurations(folder: Path, count: int = 500, seed: int = 0) -> dict:
    """
    Tries malformed configurations.

    Args:
        folder (`Path`): an empty folder to work in.
        count (`int`): how many, of all kinds in proportion.
        seed (`int`): which ones of every kind.

    Returns:
        `dict`: how many were `tried`, `refused` (with a `ConfigError`), `named` (one line with the key and what is allowed);
        how many were `typos`, and `suggested` the right key; `tracebacks`, `files_written`; `kinds` with their counts; and
        `problems`, a line for each case that is not as it must be.
    """
    work, files = folder / "work", folder / "files"
    for path in (work, files):
        path.mkdir(parents=True)
    (files / "base.yaml").write_bytes(BASE)
    chosen = _chosen(count, seed)
    counts = dict.fromkeys(("refused", "named", "typos", "suggested", "tracebacks", "files_written"), 0)
    problems = []
    for kind, case in chosen:
        command = ["--config", str(files / "base.yaml"), *case.command]
        if case.content is not None:
            (files / "bad.yaml").write_bytes(case.content)
            command += ["--config", str(files / "bad.yaml")]
        with contextlib.chdir(work):
            message, traceback = _parse(command)
        named = message is not None and all(re.search(part, message) for part in (case.pattern, HELPFUL))
        suggested = message is not None and f"did you mean {case.suggestion!r}?" in message
        written = [path for path in (*work.iterdir(), *files.iterdir()) if path.name not in ("base.yaml", "bad.yaml")]
        for path in written:
            path.unlink()
        counts["refused"] += message is not None
        counts["named"] += named and _is_short(message)
        counts["typos"] += case.suggestion is not None
        counts["suggested"] += case.suggestion is not None and suggested
        counts["tracebacks"] += traceback is not None
        counts["files_written"] += len(written)
        if written or not (named and _is_short(message)) or (case.suggestion and not suggested):
            tried = case.content[:80] if case.content is not None else [part[:80] for part in case.command]
            problems.append(
                f"{kind}: {tried!r}: {traceback or message or 'accepted'} {[path.name for path in written]}"[:500]
            )
    return {"tried": len(chosen), **counts, "kinds": dict(Counter(kind for kind, _ in chosen)), "problems": problems}


def damaged_configurations(folder: Path, count: int = 500, seed: int = 0) -> dict:
    """
    Tries the presets with bytes changed at random: what can still be read is a configuration, all else is refused in one line.

    Args:
        folder (`Path`): an empty folder to work in.
        count (`int`): how many.
        seed (`int`): which damage.

    Returns:
        `dict`: how many were `tried`, `read`, `refused`; and `problems`, a line for each that ended otherwise.
    """
    rng = random.Random(seed)
    presets = [path.read_bytes() for path in sorted(CONFIGS.rglob("*.yaml"))]
    counts = {"read": 0, "refused": 0}
    problems = []
    for _ in range(count):
        content = bytearray(rng.choice(presets))
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(content))
            change = rng.choice(("flip", "delete", "insert", "repeat", "cut"))
            if change == "flip":
                content[place] ^= 1 << rng.randrange(8)
            elif change == "delete":
                del content[place : place + rng.randint(1, 30)]
            elif change == "insert":
                content[place:place] = rng.choice(
                    (b"\n", b"&a ", b"*a ", b"!!", b"[", b"{", b"- ", b": ", b"\t", b'"', b"\0", b"\xff")
                )
            elif change == "repeat":
                content[place:place] = content[: rng.randint(1, 200)]
            else:
                del content[max(place, 1) :]
            content = content or bytearray(b"\n")
        (folder / "damaged.yaml").write_bytes(content)
        message, traceback = _parse(
            ["--config", str(CONFIGS / "digits.yaml"), "--config", str(folder / "damaged.yaml")]
        )
        counts["refused" if message else "read"] += traceback is None
        if traceback or (message and not _is_short(message)):
            problems.append(f"{bytes(content[:80])!r}: {traceback or message}"[:500])
    return {"tried": count, **counts, "problems": problems}
