"""Memory that is read off the system is that of this process."""

import subprocess
import sys

import pytest
import torch

from pertoken import native
from pertoken.machine import memory
from pertoken.machine.memory import give_back_freed_memory, installed_memory, peak_memory, used_memory

CPU = torch.device("cpu")


def alone(code: str) -> str:
    """What `code` prints in a process of its own, whose heap no other test has used."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout.strip()


def test_a_large_tensor_shows_and_stays_in_the_peak():
    give_back_freed_memory()  # else the block may lie in memory that this process has already
    before = used_memory(CPU)
    block = torch.ones(100_000_000)  # 0.4 GB
    assert 0.3 < used_memory(CPU) - before < 0.6
    del block
    give_back_freed_memory()
    assert used_memory(CPU) < peak_memory(CPU) <= installed_memory(CPU)


def test_freed_memory_goes_back():
    """In a process of its own: many small blocks, freed below one that stays, are kept by the heap until it is told."""
    code = (
        "import torch\n"
        "from pertoken.machine.memory import *\n"
        "cpu = torch.device('cpu')\n"
        "blocks = [torch.ones(5_000) for _ in range(20_000)]\n"  # 0.4 GB in pieces of 20 kB, all from the heap
        "last = torch.ones(5_000)\n"
        "full = used_memory(cpu)\n"
        "del blocks\n"
        "kept = used_memory(cpu)\n"
        "give_back_freed_memory()\n"
        "print(full - kept, kept - used_memory(cpu))\n"
    )
    by_itself, when_told = map(float, alone(code).split())
    assert by_itself < 0.1
    assert when_told > 0.2


@pytest.mark.parametrize(("text", "expected"), [("1000000000\n", 1.0), ("max\n", None), ("9" * 19, None)])
def test_what_a_container_allows_is_all_that_there_is(tmp_path, monkeypatch, text, expected):
    whole = memory.installed_memory(CPU)
    (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr(memory, "CONTAINER_LIMITS", (str(tmp_path / "memory.max"), str(tmp_path / "nothing")))
    assert memory.installed_memory(CPU) == (expected or pytest.approx(whole, rel=1))


def test_giving_back_hurts_nothing_that_is_alive():
    block = torch.arange(1000)
    give_back_freed_memory()
    assert torch.equal(block, torch.arange(1000))


def test_the_heap_gives_back_when_it_has_grown_by_a_tenth(monkeypatch):
    given, used = [], [0.0]
    monkeypatch.setattr(memory, "give_back_freed_memory", lambda: given.append(used[0]))
    monkeypatch.setattr(memory, "used_memory", lambda device: used[0])
    heap = memory.Heap(torch.device("cpu"))
    for used[0] in (3.0, 4.0, 4.0, 4.3, 4.5, 4.2, 9.0):
        heap.before_update()
        heap.after_update()
    assert given == [3.0, 4.0, 4.5, 9.0]  # in the first two, nothing is known yet


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_freed_memory_is_used_again_without_new_pages():
    """Page faults of writing to 64 MB that were freed before, in a process of its own."""
    code = (
        "import resource, torch\n"
        "from pertoken.machine.memory import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): torch.ones(1 << 24)\n"  # until what glibc keeps of each thread's small chunks is full
        "before = faults()\n"
        "for _ in range(5): torch.ones(1 << 24)\n"
        "print(faults() - before)\n"
    )
    assert int(alone(code)) < 5 * (1 << 26) // 4096 // 10


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_what_the_first_update_leaves_is_not_among_activations():
    """0.2 GB of activations, between tensors that stay, and as much in one piece once they are gone."""
    code = (
        "import torch\n"
        "from pertoken.machine.memory import *\n"
        "cpu = torch.device('cpu')\n"
        "heap = Heap(cpu)\n"
        "heap.before_update()\n"
        "first, activations, gradients = used_memory(cpu), [], []\n"
        "for _ in range(200):\n"
        "    activations.append(torch.ones(250_000))\n"
        "    gradients.append(torch.ones(250_000))\n"
        "del activations\n"
        "heap.after_update()\n"
        "again = torch.ones(50_000_000)\n"  # as much in one piece
        "print(used_memory(cpu) - first)\n"
    )
    assert float(alone(code)) == pytest.approx(0.4, abs=0.05)  # 0.6 if their pages were still there, among others


@pytest.mark.skipif(sys.platform != "linux" or not native.available(), reason="glibc's heap, and a C++ compiler")
def test_a_tensor_fits_where_one_of_its_size_has_been():
    """In a process of its own: tensors between others that stay are freed, and made again."""
    code = (
        "import torch\n"
        "from pertoken.machine.memory import *\n"
        "heap = Heap(torch.device('cpu'))\n"
        "keep_freed_memory()\n"
        "tensors = [torch.empty(250_000 + 16 * n) for n in range(9)]\n"
        "assert not any(t.data_ptr() % 64 for t in tensors)\n"
        "at = [t.data_ptr() for t in tensors[1::2]]\n"
        "del tensors[1::2]\n"
        "again = [torch.empty(250_000 + 16 * n) for n in range(1, 9, 2)]\n"
        "print([t.data_ptr() for t in again] == at)\n"
    )
    assert alone(code) == "True"


@pytest.mark.skipif(sys.platform != "linux" or not native.available(), reason="glibc's heap, and a C++ compiler")
def test_too_large_a_tensor_is_an_error_and_sizes_are_free():
    memory.Heap(CPU)
    assert torch.empty(0).data_ptr() == 0
    with pytest.raises(RuntimeError, match=r"you tried to allocate 4611686018427387904 bytes"):
        torch.empty(2**60)
    grown = torch.ones(3)
    grown.resize_(1000)
    assert grown[:3].tolist() == [1.0] * 3


@pytest.mark.skipif(sys.platform != "linux" or not native.available(), reason="glibc's heap, and a C++ compiler")
def test_what_onednn_had_before_is_freed_after():
    """In a process of its own, which would crash: oneDNN frees its tensors by the allocator of the day."""
    code = (
        "import torch\n"
        "from pertoken.machine.memory import Heap\n"
        "pack = lambda: torch.randn(64, 64).to_mkldnn()\n"
        "before = [pack() for _ in range(20)]\n"
        "heap = Heap(torch.device('cpu'))\n"
        "after = [pack() for _ in range(20)]\n"
        "del before, after\n"
        "print('alive')\n"
    )
    assert alone(code) == "alive"
