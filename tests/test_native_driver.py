"""The native code on other processors and by other compilers: a driver without torch compares it with plain loops."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
KERNELS = [path for path in sorted((ROOT / "kernels/csrc").glob("*.cpp")) if not path.name.startswith("python")]
SOURCES = [*KERNELS, ROOT / "tests/native_driver.cpp"]
FLAGS = ["-std=c++17", "-Wall", "-Werror", "-Wno-psabi", f"-I{ROOT / 'kernels/csrc'}"]
# Of the levels in setup.py, this processor's: flags, and bits of a vector.
WIDEST = {
    "AVX512": (["-march=x86-64-v4", "-DVECTOR_BYTES=64"], 512),
    "AVX2": (["-march=x86-64-v3", "-DVECTOR_BYTES=32"], 256),
}.get(torch.backends.cpu.get_cpu_capability(), ([], 128))


def found(*names: str) -> str:
    """The first of these programs that is here; without any of them the test is skipped."""
    paths = [path for path in map(shutil.which, names) if path]
    if not paths:
        pytest.skip(f"no {names[0]} here")
    return paths[0]


def driver(folder: Path, compiler: str, *flags: str) -> Path:
    objects = [folder / f"{source.name}.o" for source in SOURCES]

    def compiled(source: Path, to: Path) -> None:
        subprocess.run([compiler, *FLAGS, *flags, "-c", source, "-o", to], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, SOURCES, objects))
    subprocess.run([compiler, *flags, *objects, "-o", folder / "driver"], check=True)
    return folder / "driver"


def output(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_aarch64(tmp_path):
    compiler, emulator = found("aarch64-linux-gnu-g++"), found("qemu-aarch64", "qemu-aarch64-static")
    program = driver(tmp_path, compiler, "-O1", "-static")
    assert output(emulator, program, 2) == "equal, vectors of 128 bits\n"


def test_without_openmp(tmp_path):
    program = driver(tmp_path, found("g++", "c++", "clang++"), "-O1")
    assert output(program, 2) == "equal, vectors of 128 bits\n"


def test_clang(tmp_path):
    flags, bits = WIDEST
    program = driver(tmp_path, found("clang++", "clang++-14"), "-O1", *flags)
    assert output(program, 2) == f"equal, vectors of {bits} bits\n"


def test_clang_compiles_what_python_calls(tmp_path):
    compiler, include = found("clang++", "clang++-14"), f"-I{sysconfig.get_path('include')}"
    for source in sorted((ROOT / "kernels/csrc").glob("python*.cpp")):
        for flags in ([], ["-Xpreprocessor", "-fopenmp"]):  # a Mac's, which bring the header but no library
            subprocess.run([compiler, *FLAGS, include, *flags, "-fPIC", "-fsyntax-only", source], check=True)


def test_members_of_a_team_and_one_that_takes_their_turns_compute_the_same(tmp_path):
    program = driver(tmp_path, found("g++"), "-O1", "-fopenmp")
    assert output(program, 3) == output(program, 3, "alone") == "equal, vectors of 128 bits\n"


def test_who_waited_too_long_works_alone(tmp_path):
    """A team of one for `together`, all members in turn for `one_by_one`; then company again."""
    source = tmp_path / "main.cpp"
    source.write_text("""
        #include <cstdio>
        #include <thread>
        #include "team.h"
        int main() {
            const auto teams = [](bool alone) {  // on a busy machine any call may lose time: each begins anew
                const auto begin = [&] {
                    company = Company();
                    if (alone) company.lost(100);
                };
                int64_t size = 0, members[3] = {};
                std::thread::id threads[3];
                begin();
                together(3, [&] { if (thread_index() == 0) size = team_size(); barrier(); });
                begin();
                one_by_one(3, [&] {
                    members[thread_index()] += team_size();
                    threads[thread_index()] = std::this_thread::get_id();
                });
                const bool apart = threads[0] != threads[1] && threads[1] != threads[2];
                std::printf("%d %d %d%d%d; ", int(size), int(apart), int(members[0]), int(members[1]), int(members[2]));
            };
            teams(false);
            teams(true);
            teams(false);
            std::printf("%d", int(team_size()));
        }
    """)
    flags = ["-std=c++17", "-fopenmp", "-Wno-psabi", f"-I{ROOT / 'kernels/csrc'}"]
    subprocess.run([found("g++"), *flags, source, "-o", tmp_path / "main"], check=True)
    assert output(tmp_path / "main") == "3 1 333; 1 0 333; 3 1 333; 1"


def test_strips_are_shared_out_as_nearly_as_they_can_be(tmp_path):
    """Of four strips with nearly equal entries two threads have two each, whichever has one more."""
    source = tmp_path / "main.cpp"
    source.write_text("""
        #include <cstdio>
        #include "order.h"
        int main() {
            const auto shared = [](int strips, const Tile* tiles, int parts) {
                Schedule s{};
                s.rows = 75 * strips, s.strip = 75, s.strips = strips, s.blocks = 1, s.tiles = tiles;
                for (int part = 0; part < parts; ++part)
                    std::printf("%d ", int(fair_share(s, part, parts).end - fair_share(s, part, parts).begin));
                std::printf("of %d; ", int(fair_share(s, parts - 1, parts).end));
            };
            const Tile less[] = {{0, 0, 0}, {0, 0, 99}, {0, 0, 199}, {0, 0, 300}, {0, 0, 401}};
            const Tile more[] = {{0, 0, 0}, {0, 0, 102}, {0, 0, 203}, {0, 0, 302}, {0, 0, 401}};
            const Tile last[] = {{0, 0, 0}, {0, 0, 0}, {0, 0, 0}, {0, 0, 9000}};
            shared(4, less, 2), shared(4, more, 2), shared(4, less, 3), shared(3, last, 2), shared(4, less, 6);
            shared(0, less, 2);
        }
    """)
    subprocess.run([found("g++"), *FLAGS, source, "-o", tmp_path / "main"], check=True)
    assert output(tmp_path / "main") == "2 2 of 4; 2 2 of 4; 1 2 1 of 4; 2 1 of 3; 1 0 1 1 0 1 of 4; 0 0 of 0; "
