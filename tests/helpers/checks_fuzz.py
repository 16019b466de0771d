"""Read randomly changed files of a run: no crash, no hang, little memory.

    python tests/helpers/checks_fuzz.py RUN COUNT

Reads COUNT changed best.safetensors and COUNT changed checkpoints of a finished run. Half of the
checkpoints have valid checksums, which anybody can compute. Prints the counts; an exception other
than UserError and CorruptCheckpointError ends the script.
"""

import hashlib
import json
import math
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from trainers import prepare

from lab.checkpoint import manager, run_dir, train_state
from lab.checkpoint import weights as weights_module
from lab.config.schema import TrainConfig
from lab.distributed import build_accelerator
from lab.errors import UserError
from lab.models import build_model

MAX_BYTES = 2**30  # that the readers may allocate
MAX_SECONDS = 20  # for one file
ODD = [0, -1, 1, 2**31, 2**63, 10**30, 10**400, 1.5, math.nan, math.inf, None, True, "", "x",
       "\x1b[31m", "../..", [], {}, [[]], [0] * 100, {"a": 1}, [[[[]]]]]  # fmt: skip


def changed_bytes(content: bytes, choose: random.Random) -> bytes:
    """Return the content with bytes flipped, removed, repeated or overwritten."""
    data = bytearray(content)
    for _ in range(choose.choice((1, 1, 2, 8))):
        end = choose.choice((8, 100, 2000, len(data) or 1))
        at = choose.randrange(min(end, len(data)) or 1)
        length = choose.choice((1, 4, 100, 10_000))
        kind = choose.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << choose.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = choose.randbytes(length)
        elif kind == 4:
            data[at : at + length] = choose.randbytes(length)
        else:
            data[at:at] = data[at : at + length]
    return bytes(data)


def changed_json(value: object, choose: random.Random) -> object:
    """Return the value with one part, at any depth, replaced or removed."""
    if isinstance(value, dict | list) and value and choose.random() < 0.9:
        copy = value.copy()
        key = choose.choice(list(copy)) if isinstance(copy, dict) else choose.randrange(len(copy))
        if choose.random() < 0.1:
            del copy[key]
        else:
            copy[key] = changed_json(copy[key], choose)
        return copy
    return choose.choice(ODD)


def changed_header(content: bytes, choose: random.Random) -> bytes:
    """Return a safetensors file with a changed header that is still JSON."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    if "__metadata__" in header and choose.random() < 0.7:
        weights_metadata = changed_json(
            json.loads(header["__metadata__"][weights_module.KEY]), choose
        )
        header["__metadata__"][weights_module.KEY] = json.dumps(weights_metadata)
    else:
        header = changed_json(header, choose)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def change(content: bytes, choose: random.Random) -> bytes:
    return choose.choice((changed_bytes, changed_header))(content, choose)


def read_weights(path: Path) -> None:
    weights_metadata = weights_module.read_metadata(path)
    weights_module.load_model(path, weights_metadata)


def read_checkpoint(path: Path, train_step) -> None:
    metadata, tensors = train_state.read_checkpoint(path)
    run = run_dir.RunDir(path.parent.parent)
    metadata["best"] = manager._best_metrics(run, metadata)
    checkpoint = train_state.Checkpoint(run, path, metadata, tensors)
    checkpoint.config({"epochs": 10**6})
    checkpoint.train_state(0, 1)
    checkpoint.train_state(0, 2)
    manager.restore(train_step, checkpoint)


def write_changed_checkpoint(
    folder: Path, metadata: bytes, tensors: bytes, choose: random.Random
) -> None:
    sealed, which = choose.random() < 0.5, choose.randrange(2)
    if which:
        tensors = change(tensors, choose)
    elif not sealed:
        metadata = changed_bytes(metadata, choose)
    if sealed:
        state = json.loads(metadata)["metadata"]
        state = state if which else changed_json(state, choose)
        if isinstance(state, dict):
            state["tensors_sha256"] = hashlib.sha256(tensors).hexdigest()
        digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
        metadata = json.dumps({"metadata": state, "sha256": digest}).encode()
    (folder / train_state.METADATA_FILE).write_bytes(metadata)
    (folder / train_state.TENSORS_FILE).write_bytes(tensors)


def main() -> None:
    run, count = run_dir.RunDir(sys.argv[1]), int(sys.argv[2])
    weights, folder = run.best.read_bytes(), run.checkpoints[0]
    metadata, tensors = (
        (folder / name).read_bytes()
        for name in (train_state.METADATA_FILE, train_state.TENSORS_FILE)
    )
    config = TrainConfig(**json.loads(metadata)["metadata"]["config"])
    accelerator = build_accelerator(mixed_precision="no", threads=1, quiet=True)
    weights_metadata = weights_module.read_metadata(run.best)
    train_step = prepare(accelerator, build_model(**weights_metadata["model"]), config)
    read_weights(run.best)  # to import and allocate what is needed once
    read_checkpoint(folder, train_step)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MAX_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    choose, counts = random.Random(0), Counter()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "best.safetensors"
        path.write_bytes(weights)
        checkpoint = Path(temporary) / "checkpoints" / folder.name
        checkpoint.mkdir(parents=True)
        for number in range(2 * count):
            start, kind = time.monotonic(), "weights" if number < count else "checkpoints"
            try:
                if kind == "weights":
                    path.write_bytes(change(weights, choose))
                    read_weights(path)
                else:
                    path.write_bytes(weights)
                    write_changed_checkpoint(checkpoint, metadata, tensors, choose)
                    read_checkpoint(checkpoint, train_step)
                counts[f"{kind} loaded"] += 1
            except (UserError, train_state.CorruptCheckpointError):
                counts[f"{kind} refused"] += 1
            except BaseException:
                print(f"file {number}", file=sys.stderr)
                raise
            assert time.monotonic() - start < MAX_SECONDS, number
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps(counts | {"MiB more": more // 1024}))


if __name__ == "__main__":
    main()
