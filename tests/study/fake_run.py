"""Stand-in for `python -m` in tests of the worker.

Its runs take milliseconds and import nothing. A run's dev loss depends on its configuration alone.
A run with adapter_lr 13 fails, and one with 17 is stopped early. A stopped run that is resumed
continues, as real runs do. A run that meets another process in its folder leaves a file
`violation`.
"""

import fcntl
import hashlib
import json
import os
import re
import signal
import sys
import time
import zlib
from pathlib import Path

STEP_S = float(os.environ.get("FAKE_STEP_S", "0.01"))


def write(path, value):
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    hidden.write_text(json.dumps(value))
    hidden.replace(path)


def write_recorded(study, path, value):
    """As zofo.disk.recorded does, which this program does not import."""
    with (study / "locks" / "digests").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = study / "zofo_digests.json"
        digests, name = json.loads(file.read_text()), path.relative_to(study).as_posix()
        content = json.dumps(value).encode()
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        write(file, {**digests, name: [*digests[name][-1:], digest]})
    write(path, value)


def read_config(path):
    found = dict(re.findall(r"^(\w+): (\S+)$", path.read_text(), re.MULTILINE))
    keys = ("method", "base_lr", "adapter_lr", "optimizer", "seed", "steps", "measure_test")
    return {key: found[key] for key in keys}


def number(*values):
    return zlib.crc32(repr(values).encode()) / 2**32


def enter(folder):
    """Take the lock of a run's folder, and note a violation if another process holds it.

    The lock ends with the process.
    """
    inside = folder.parent.parent / "inside"
    inside.mkdir(exist_ok=True)
    file = (inside / folder.name).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        (folder.parent.parent / "violation").write_text(folder.name)
    return file


def train(folder, config_file):
    folder.mkdir(exist_ok=True)
    held = enter(folder)
    text = config_file.read_text()
    (folder / "run.yaml").write_text(text)
    config = read_config(config_file)
    assert config["measure_test"] == "false"
    if config["adapter_lr"] == "13.0":
        print("reading\nerror: no such thing")
        sys.exit(2)
    is_continued = (folder / "stopped.json").exists()
    (folder / "stopped.json").unlink(missing_ok=True)
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    steps = [int(p.name.partition("-")[2]) for p in folder.glob("checkpoint-*")]
    for step in range(max(steps, default=0) + 1, int(config["steps"]) + 1):
        time.sleep(STEP_S)
        if config["adapter_lr"] == "17.0" and step == 2 and not is_continued:
            write(folder / "stopped.json", {"step": 2, "reason": "stopped at step 2"})
            sys.exit(1)
        (folder / f"checkpoint-{step}").mkdir()
        if asked:
            (folder / "asked").touch()
            sys.exit(143)
    (folder / "artifact").mkdir(exist_ok=True)
    loss = number("dev", config)
    cost = {"steps": int(config["steps"]), "forward_equivalents": 12, "total_s": 1.0}
    dev = {"after": {"step": 4, "loss": loss, "accuracy": 1 - loss}}
    write(folder / "result.json", {"seed": int(config["seed"]), "dev": dev, "cost": cost})
    held.close()


def main(module, what, *rest):
    if module == "zofo" and what == "train" and rest[0] == "--resume":
        train(Path(rest[1]), Path(rest[1]) / "run.yaml")
    elif module == "zofo" and what == "train":
        train(Path(rest[1].partition("=")[2]), Path(rest[0]))
    elif module == "zofo.study.measure" and what == "start":
        time.sleep(STEP_S)
        write(Path(rest[1]), {"loss": number("start", read_config(Path(rest[0]))["seed"])})
    else:
        assert (module, what) == ("zofo.study.measure", "run")
        folder, start = map(Path, rest)
        time.sleep(STEP_S)
        with (folder / "measured").open("a") as file:
            file.write("once\n")
        assert (folder / "artifact").is_dir()
        result = json.loads((folder / "result.json").read_text())
        after = {"loss": number("test", read_config(folder / "run.yaml"))}
        result["test"] = {"before": json.loads(start.read_text()), "after": after}
        write_recorded(folder.parents[1], folder / "result.json", result)


main(*sys.argv[1:])
