"""The compile cache: dumps from cached programs, damaged files, several processes at once, a full disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from torch import nn
from torch._inductor.cpu_vec_isa import valid_vec_isa_list

from dscompile import backend
from dscompile.backend import dscompile
from dscompile.cache_files import RECORDS, CacheFiles
from dscompile.codegen import lower
from dscompile.inductor_compat import InductorFailure, probe_vector_isa
from dscompile.report import REPORTS

ROOT = Path(__file__).parent.parent
LIBRARY = next(Path(torch.__file__).parent.glob("lib/libtorch_global_deps.so"))


@pytest.fixture
def cache_dir(tmp_path, monkeypatch):
    """An empty cache directory, for this process and its children."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compile_here(**options):
    """Compile and run a small model as a new process would; returns for each program whether the cache had it."""
    torch.compiler.reset()
    REPORTS.clear()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    expected = torch.autograd.grad(model(x).sin().sum(), model.parameters())
    compiled = torch.compile(model, backend=dscompile, options={"summary": False, **options})
    for got, want in zip(torch.autograd.grad(compiled(x).sin().sum(), model.parameters()), expected, strict=True):
        torch.testing.assert_close(got, want)
    return [report.cached for report in REPORTS.all()]


# -- an empty directory ------------------------------------------------------------------------------------------------


@pytest.fixture
def probed(cache_dir, monkeypatch):
    """What happens, in order: the probe of vector instructions starts, it is waited for, regions are lowered."""
    log = []
    probe, lowered = SimpleNamespace(join=lambda: log.append("joined")), backend.lower_regions
    monkeypatch.setattr(backend, "probe_vector_isa", lambda: log.append("started") or probe)
    monkeypatch.setattr(backend, "lower_regions", lambda *a: log.append("lowered") or lowered(*a))
    return log


def test_vector_instructions_are_probed_once_and_before_the_first_kernel(probed):
    compile_here()
    assert probed == ["started", *["joined", "lowered"] * 2]
    assert probe_vector_isa() is probe_vector_isa()


def test_no_probe_where_nothing_is_compiled(probed):
    compile_here(regions="aten")
    assert probed == ["lowered"] * 2


def test_probe_finds_what_inductor_uses():
    probe_vector_isa().join()
    assert valid_vec_isa_list.cache_info().currsize == 1


# -- dumps -------------------------------------------------------------------------------------------------------------


def test_cached_program_dumps_what_its_compilation_dumped(tmp_path, cache_dir):
    assert compile_here(regions="aten", cache=False, dump=str(tmp_path / "uncached")) == [False, False]
    assert compile_here(regions="aten", dump=str(tmp_path / "cold")) == [False, False]
    assert compile_here(regions="aten", dump=str(tmp_path / "warm")) == [True, True]
    folders = {name: next((tmp_path / name).glob("graph*")) for name in ("uncached", "cold", "warm")}
    files = {name: {f.name: f.read_text() for f in folder.iterdir()} for name, folder in folders.items()}
    assert set(files["uncached"]) >= {"00-traced.txt", "01-canonicalise.txt", "forward.py", "backward.py"}
    for name in ("cold", "warm"):
        assert {f for f in files["uncached"] if files[name].get(f) != files["uncached"][f]} == set(), name
    entry = json.loads((tmp_path / "warm" / "manifest.json").read_text())["graphs"][folders["warm"].name]
    assert entry["complete"]
    assert entry["cached"]
    steps = ["00-traced.txt", "01-canonicalise.txt", "02-fuse_loss.txt", "03-save_narrow.txt"]
    assert [step["file"].partition("/")[2] for step in entry["steps"]] == steps
    assert entry["steps"][1]["verdict"] == "proved"
    assert [p["file"].partition("/")[2] for p in entry["programs"]] == ["forward.py", "backward.py"]


def test_program_that_was_cached_without_a_dump_is_compiled_again_for_one(tmp_path, cache_dir):
    assert compile_here(regions="aten") == [False, False]
    assert compile_here(regions="aten", dump=str(tmp_path / "d")) == [False, False]
    assert compile_here(regions="aten") == [True, True]


# -- damaged files, one by one -----------------------------------------------------------------------------------------


@pytest.fixture
def filled(tmp_path):
    """A cache directory with a recorded library, source and program."""
    root = tmp_path / "filled"
    for name in ("ab/lib.main.so", "cd/code.py", "aotautograd/key/entry"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(b"\x00\x01" * 300)
    shutil.copy(LIBRARY, root / "ab/lib.main.so")
    CacheFiles(root).record()
    return root


@pytest.mark.parametrize("name", ["ab/lib.main.so", "cd/code.py", "aotautograd/key/entry"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_file_is_removed_with_a_warning_and_no_other(filled, caplog, name, damage):
    content = (filled / name).read_bytes()
    middle = len(content) // 2
    broken = {"cut": content[:middle], "flip": content[:middle] + b"\xff" + content[middle + 1 :], "empty": b""}
    (filled / name).write_bytes(broken[damage])
    with caplog.at_level(logging.WARNING, "dscompile"):
        logging.getLogger("dscompile").addHandler(caplog.handler)
        assert CacheFiles(filled).check() == [name]
        logging.getLogger("dscompile").removeHandler(caplog.handler)
    assert name in caplog.text
    assert "1 damaged" in caplog.text
    assert not (filled / name).exists()
    assert CacheFiles(filled).check() == []


def test_file_that_only_looks_changed_is_kept_and_recorded_anew(filled):
    os.utime(filled / "cd/code.py", (1, 1))
    assert CacheFiles(filled).check() == []
    lines = "".join(p.read_text() for p in (filled / RECORDS).iterdir()).splitlines()
    assert sum(line.endswith(" 1000000000 cd/code.py") for line in lines) == 1


def test_either_of_two_digests_vouches(filled):
    (filled / "cd/code.py").write_bytes(b"built by another process")
    CacheFiles(filled).record()
    assert CacheFiles(filled).check() == []
    (filled / "cd/code.py").write_bytes(b"\x00\x01" * 300)
    assert CacheFiles(filled).check() == []


def test_unrecorded_files_are_left_alone_but_a_library_that_was_cut_short(filled):
    (filled / "ef").mkdir()
    (filled / "ef/other.py").write_text("x = 1\n")
    shutil.copy(LIBRARY, filled / "ef/whole.so")
    (filled / "ef/cut.so").write_bytes(LIBRARY.read_bytes()[:-100])
    assert CacheFiles(filled).check() == ["ef/cut.so"]


def test_damaged_record_vouches_for_nothing(filled):
    record = next((filled / RECORDS).iterdir())
    record.write_bytes(record.read_bytes()[:-1])
    assert CacheFiles(filled).check() == ["ab/lib.main.so", "aotautograd/key/entry", "cd/code.py"]
    assert CacheFiles(filled).check() == []


@pytest.fixture
def many_records(filled):
    """The same, with forty records more, of a file each."""
    for number in range(40):
        (filled / f"cd/more{number}.py").write_text(f"x = {number}\n")
        CacheFiles(filled)._write({f"cd/more{number}.py": hashlib.sha256(f"x = {number}\n".encode()).hexdigest()})
    return filled


def test_many_records_become_one_that_says_the_same(many_records):
    (many_records / "cd/more3.py").unlink()
    assert CacheFiles(many_records).check() == []
    (joined,) = (many_records / RECORDS).iterdir()
    named = [line.split(" ", 3)[3] for line in joined.read_text().splitlines()]
    others = [f"cd/more{number}.py" for number in range(40) if number != 3]
    assert sorted(named) == sorted(["ab/lib.main.so", "aotautograd/key/entry", "cd/code.py", *others])
    (many_records / "cd/more7.py").write_text("x = 8\n")
    assert CacheFiles(many_records).check() == ["cd/more7.py"]


def test_records_are_joined_while_others_read_them(many_records):
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: CacheFiles(many_records).check(), range(12))) == [[]] * 12
    assert len(list((many_records / "cd").iterdir())) == 41


def test_library_that_another_process_builds_is_left_to_it(filled):
    (filled / "ab/lib.main.so").write_bytes(b"so far")
    (filled / "locks").mkdir()
    with FileLock(filled / "locks/lib.lock"):
        other = [
            sys.executable,
            "-c",
            "import sys; from dscompile.cache_files import *; print(CacheFiles(Path(sys.argv[1])).check())",
        ]
        done = subprocess.run([*other, str(filled)], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
    assert CacheFiles(filled).check() == ["ab/lib.main.so"]


def test_damaged_program_is_compiled_again(cache_dir, caplog):
    assert compile_here(regions="aten") == [False, False]
    (entry,) = (p for p in (cache_dir / "aotautograd").rglob("*") if p.is_file())
    content = entry.read_bytes()
    entry.write_bytes(content[: len(content) // 2])
    assert CacheFiles(cache_dir).check() == [entry.relative_to(cache_dir).as_posix()]
    assert compile_here(regions="aten") == [False, False]
    assert compile_here(regions="aten") == [True, True]
    for broken in (p for p in (cache_dir / "aotautograd").rglob("*") if p.is_file()):
        broken.write_bytes(b"damaged while the process runs")
    assert compile_here(regions="aten") == [False, False]


# -- reasons that pass -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passing", [True, False])
def test_fallback_for_a_reason_that_passes_is_not_kept(cache_dir, monkeypatch, passing):
    def fail(module, **_):
        raise InductorFailure("OSError: No space left on device", passing=passing)

    monkeypatch.setattr(lower, "inductor_compile", fail)
    assert compile_here() == [False, False]
    assert all("No space left" in report.fallbacks[0] for report in REPORTS.all())
    assert compile_here() == [not passing, not passing]


# -- whole processes ---------------------------------------------------------------------------------------------------

SCRIPT = textwrap.dedent(
    """
    import sys
    import torch
    from torch import nn
    from dscompile.backend import dscompile
    from dscompile.report import REPORTS
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4))
    x = torch.randn(8, 16)
    expected = torch.autograd.grad(model(x).sin().sum(), model.parameters())
    compiled = torch.compile(model, backend=dscompile)
    got = torch.autograd.grad(compiled(x).sin().sum(), model.parameters())
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)
    found = REPORTS.all()
    print("right", all(r.cached for r in found), sum(len(r.fallbacks) for r in found))
    """
)


def start(cache):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """What the script printed, and its stderr."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip(), err


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_every_file_damaged(tmp_path, damage):
    assert finish(start(tmp_path))[0] == "right False 0"
    for file in [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"]:
        content = file.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes(b ^ 0xFF for b in content[middle : middle + 64]) + content[middle + 64 :]
        file.write_bytes(content[:middle] if damage == "cut" else flipped)
    out, err = finish(start(tmp_path))
    assert out == "right False 0"
    assert "damaged file(s)" in err
    assert finish(start(tmp_path))[0] == "right True 0"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".so", ".py", ".cpp"])
def test_one_kind_of_file_damaged(tmp_path, suffix):
    assert finish(start(tmp_path))[0] == "right False 0"
    for file in tmp_path.rglob(f"*{suffix}"):
        file.write_bytes(file.read_bytes()[:200])
    out, err = finish(start(tmp_path))
    assert out == "right True 0"
    assert "damaged file(s)" in err


@pytest.mark.slow
def test_three_processes_at_once(tmp_path):
    for cached in (False, True):
        for out, err in map(finish, [start(tmp_path) for _ in range(3)]):
            assert out == f"right {cached} 0"
            assert "damaged" not in err


@pytest.mark.slow
def test_full_disk(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system")
    try:
        out, err = finish(start(tmp_path))
        assert out.startswith("right False")
        assert int(out.split()[-1]) > 0
        assert "No space left on device" in err
        subprocess.run(["mount", "-o", "remount,size=200m", tmp_path], check=True)
        assert finish(start(tmp_path))[0] == "right False 0"  # nothing of the bad start was kept
        assert finish(start(tmp_path))[0] == "right True 0"
    finally:
        subprocess.run(["umount", tmp_path], check=True)
