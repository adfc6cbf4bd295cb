"""The writer leaves a whole folder or none; the reader refuses every bit that differs."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsmith import durable
from sparsmith.errors import CheckpointError, EnvironmentFault
from tests.kit.hostile import HOSTILE


def write_folder(path: Path, **options) -> Path:
    with durable.durable_folder(path, **options) as temp:
        (temp / "a.bin").write_bytes(bytes(range(256)))
        (temp / "sub").mkdir()
        (temp / "sub" / "b.txt").write_text("words\n")
    return path


def test_a_finished_folder_verifies_and_leaves_nothing_beside_it(tmp_path):
    folder = write_folder(tmp_path / "out")
    assert set(durable.verify_folder(folder)) == {"a.bin", "sub/b.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_inside_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), durable.durable_folder(tmp_path / "out") as temp:
        (temp / "a").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_taken_place_is_refused_and_replaced_on_demand(tmp_path):
    write_folder(tmp_path / "out")
    with pytest.raises(CheckpointError, match="already there"):
        write_folder(tmp_path / "out")
    (tmp_path / "out" / "stale").write_text("x")
    write_folder(tmp_path / "out", replace=True)
    assert not (tmp_path / "out" / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("change", ["flip", "cut", "grow", "remove", "extra"])
def test_every_change_is_named(tmp_path, change):
    folder = write_folder(tmp_path / "out")
    file = folder / "sub" / "b.txt"
    data = file.read_bytes()
    if change == "remove":
        file.unlink()
    elif change == "extra":
        file = folder / "adapter_config.json"
        file.write_text("{}")
    else:
        file.write_bytes({"flip": bytes([data[0] ^ 1]) + data[1:], "cut": data[:-1], "grow": data + b"x"}[change])
    with pytest.raises(CheckpointError) as fault:
        durable.verify_folder(folder)
    assert file.name in fault.value.where


def test_every_bit_of_the_manifest_itself_is_watched(tmp_path):
    folder = write_folder(tmp_path / "out")
    file = folder / durable.MANIFEST
    data = file.read_bytes()
    for position in range(len(data)):
        for bit in range(8):
            file.write_bytes(data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1 :])
            with pytest.raises(CheckpointError):
                durable.read_manifest(folder)


@pytest.mark.parametrize("name", HOSTILE, ids=[str(index) for index in range(len(HOSTILE))])
def test_no_name_leaves_the_folder(tmp_path, name):
    assert len(HOSTILE) >= 50
    with pytest.raises(CheckpointError):
        durable.safe_name(name, "manifest")
    folder = write_folder(tmp_path / "out")
    rows = json.loads((folder / durable.MANIFEST).read_text())["files"]
    forged = {name: rows["a.bin"]}
    (folder / durable.MANIFEST).write_text(json.dumps({"format": 1, "files": forged, "sha256": "0" * 64}))
    with pytest.raises(CheckpointError):
        durable.verify_folder(folder)


def test_links_that_lead_out_are_refused_and_the_hub_cache_is_followed(tmp_path):
    (tmp_path / "secret").write_text("words\n")
    folder = tmp_path / "hub" / "snapshots" / "rev"
    folder.mkdir(parents=True)
    link = folder / "link"
    link.write_text("words\n")
    durable.seal(folder)
    link.unlink()
    link.symlink_to(tmp_path / "secret")
    for use in (durable.verify_folder, durable.seal):
        with pytest.raises(CheckpointError, match="link"):
            use(folder)
    link.unlink()
    blobs = tmp_path / "hub" / "blobs"
    blobs.mkdir()
    (blobs / "abc").write_text("y")
    link.symlink_to(blobs / "abc")
    durable.seal(folder)
    durable.verify_folder(folder)


def test_small_files_are_replaced_whole(tmp_path):
    file = tmp_path / "new" / "a.json"
    durable.write_json(file, {"x": 1})
    durable.write_json(file, {"x": 2})
    assert durable.read_json(file) == {"x": 2}
    with pytest.raises(ValueError):
        durable.write_json(file, {"x": float("nan")})
    assert durable.read_json(file) == {"x": 2}
    assert [path.name for path in file.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("text", ["", "{", '{"a":1,"a":2}', '{"a":NaN}', "[" * 100_000, '"\xff'])
def test_broken_json_is_one_kind_of_error(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="JSON"):
        durable.read_json(tmp_path / "a.json")
    with pytest.raises(CheckpointError):
        durable.read_json(tmp_path / "missing.json")


def test_a_cut_line_is_dropped_before_the_next(tmp_path):
    file = tmp_path / "metrics.jsonl"
    durable.append_line(file, '{"step": 1}')
    with file.open("a") as stream:
        stream.write('{"step": 2, "lo' + "x" * 5000)
    durable.append_line(file, '{"step": 3}', sync=True)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 3]


def test_leftovers_go_and_what_is_being_written_stays(tmp_path):
    (tmp_path / f".out{durable._TEMP}aa").mkdir()
    (tmp_path / f".x.json{durable._TEMP}bb").write_text("")
    (tmp_path / ".unrelated").write_text("")
    with durable.durable_folder(tmp_path / "live") as temp:
        assert {path.name for path in durable.clean_leftovers(tmp_path)} == {
            f".out{durable._TEMP}aa",
            f".x.json{durable._TEMP}bb",
        }
        assert temp.exists()
        (temp / "a").write_text("x")
    assert {path.name for path in tmp_path.iterdir()} == {".unrelated", "live"}


def test_a_folder_moved_aside_comes_back_when_its_successor_never_came(tmp_path):
    write_folder(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / f".out{durable._OLD}aa")
    assert durable.clean_leftovers(tmp_path) == []
    durable.verify_folder(tmp_path / "out")
    write_folder(tmp_path / f".out{durable._OLD}bb")
    assert len(durable.clean_leftovers(tmp_path)) == 1


def test_disk_faults_are_said_with_figures(tmp_path):
    with pytest.raises(EnvironmentFault, match="bytes free"):
        write_folder(tmp_path / "out", needed=1 << 60)
    for text, number in (("x", errno.ENOSPC), ("I/O error: No space left on device (os error 28)", 0)):
        with pytest.raises(EnvironmentFault, match="bytes free"), durable.durable_folder(tmp_path / "out"):
            raise OSError(number, text) if number else RuntimeError(text)
    with pytest.raises(EnvironmentFault, match="rights"), durable.durable_folder(tmp_path / "out"):
        raise OSError(errno.EROFS, "read-only")
    assert list(tmp_path.iterdir()) == []


def test_fingerprint_sees_header_start_and_with_full_every_byte(tmp_path):
    import struct

    header = json.dumps({"w": {"dtype": "U8", "shape": [3 << 20], "data_offsets": [0, 3 << 20]}}).encode()
    file = tmp_path / "model.safetensors"
    payload = bytearray(3 << 20)

    def write():
        file.write_bytes(struct.pack("<Q", len(header)) + header + payload)

    write()
    fast, full = durable.fingerprint(tmp_path), durable.fingerprint(file, "full")
    payload[-1] = 1
    write()
    assert durable.fingerprint(tmp_path) == fast and durable.fingerprint([file], "full") != full
    payload[5] = 1
    write()
    assert durable.fingerprint(tmp_path) != fast
    with pytest.raises(CheckpointError, match="no weight file"):
        durable.fingerprint(tmp_path / "missing")


WRITER = """
import sys, pathlib
from sparsmith import durable
count = 0
while True:
    with durable.durable_folder(sys.argv[1], replace=True) as temp:
        for i in range(20):
            (temp / f"{i}").write_bytes(bytes([count % 256]) * 20000)
    count += 1
"""


def test_killed_at_any_moment_the_last_whole_folder_is_there(tmp_path):
    target = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(Path(durable.__file__).parents[1])}
    for trial in range(6):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], env=environment)
        deadline = time.monotonic() + 30
        while not target.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.013 * trial)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        durable.clean_leftovers(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        durable.verify_folder(target)
        assert len({(target / str(i)).read_bytes() for i in range(20)}) == 1
