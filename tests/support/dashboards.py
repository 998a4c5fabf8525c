"""What offline runs of Weights & Biases hold."""

import json
import time


def hide_credentials(directory, monkeypatch):
    """The tests must not find the key of the person who runs them."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(directory / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(directory / "no-config"))


def stored(directory):
    """Reads the records of a finished offline run once wandb's own process has written them all."""
    (path,) = directory.glob("run-*.wandb")
    while not (found := parsed(path.read_bytes()))["exit"]:
        time.sleep(0.05)
    return found


def parsed(log):
    """Records by kind: protobuf in LevelDB's log format, after 7 bytes of wandb's own."""
    from wandb.proto import wandb_internal_pb2

    at, parts, found = 7, [], []
    while at + 7 <= len(log):
        block_left = 32768 - at % 32768
        if block_left < 7:
            at += block_left
            continue
        length, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        parts.append(log[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(wandb_internal_pb2.Record.FromString(b"".join(parts)))
            parts = []
    return {
        kind: [getattr(r, kind) for r in found if r.HasField(kind)] for kind in ("run", "metric", "history", "exit")
    }


def history(directory):
    rows = [
        {item.nested_key[0]: json.loads(item.value_json) for item in row.item} for row in stored(directory)["history"]
    ]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]
