#!/usr/bin/env python3
"""What a stored record of a teacher costs to write, to read and to keep, packed in several ways.

    tools/bench/store.py [FOLDER] [--json FILE]

FOLDER is a store, which lies beside its teacher (`teaches/<what was asked>`); without it records
are made up, eight hypotheses of ten tokens each.  All ways compress the whole with zlib, as the
store does, which uses safetensors.  Printed are medians over the records; time is that of the wall.
"""

import io
import json
import sqlite3
import time
import zlib
from pathlib import Path
from statistics import median

import numpy as np
import torch
from common import machine, parser

from espnet_pl.parts.store import _packed, _unpacked


def _npz(record: dict) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{name: x.numpy() for name, x in record.items()})
    return file.getvalue()


def _from_npz(data: bytes) -> dict:
    with np.load(io.BytesIO(data)) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def _torch(record: dict) -> bytes:
    file = io.BytesIO()
    torch.save(record, file)
    return file.getvalue()


def _from_torch(data: bytes) -> dict:
    return torch.load(io.BytesIO(data), weights_only=True)


PEERS = {"numpy": (_npz, _from_npz), "torch": (_torch, _from_torch)}


def records(folder: Path | None, number: int) -> list[dict]:
    """So many records, of a store or made up."""
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        return [
            {
                "labels": torch.randint(1, 30, (8, 10), generator=generator),
                "lengths": torch.full((8,), 10),
                "log_p": -torch.rand(8, generator=generator),
            }
            for _ in range(number)
        ]
    found: list[dict] = []
    for path in sorted(folder.glob("records.*.sqlite")):
        rows = sqlite3.connect(path).execute("SELECT payload FROM records LIMIT ?", (number,))
        found += [_unpacked(payload) for (payload,) in rows]
    return found[:number]


def spent(function, values: list) -> tuple[float, list]:
    """The median of the milliseconds of a call, and what the calls gave."""
    times, out = [], []
    for value in values:
        began = time.perf_counter()
        out.append(function(value))
        times.append(1000 * (time.perf_counter() - began))
    return median(times), out


def main() -> None:
    """Measure, print, write."""
    made = parser(__doc__, 1000, "records")
    made.add_argument("folder", type=Path, nargs="?")
    options = made.parse_args()
    ours = records(options.folder, options.repeat)
    ways = {"the store": (_packed, _unpacked)}
    for name, (pack, unpack) in PEERS.items():
        ways[name] = (
            lambda record, pack=pack: zlib.compress(pack(record), level=3),
            lambda data, unpack=unpack: unpack(zlib.decompress(data)),
        )
    print("| | ms to write | ms to read | of the store's | bytes |")
    print("|-|-:|-:|-:|-:|")
    rows: dict[str, dict[str, float]] = {}
    for name, (pack, unpack) in ways.items():
        write, packed = spent(pack, ours)
        read, back = spent(unpack, packed)
        assert all(torch.equal(x, b[key]) for a, b in zip(ours, back) for key, x in a.items())
        rows[name] = {"write": write, "read": read, "bytes": median(map(len, packed))}
        rows[name]["ratio"] = read / rows["the store"]["read"]
        row = rows[name]
        print(f"| {name} | {write:.3f} | {read:.3f} | {row['ratio']:.2f} | {row['bytes']:.0f} |")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
