"""Threads: both runtimes give the same bits, honour PyTorch's thread count, survive forks, callers' threads and exit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import fastllm
from fastllm.backends import cpu_module

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60  # a deadlock is what this is waiting for; nothing here takes longer than a few seconds
_cpu = cpu_module()
RUNTIMES = [name for name in ("openmp", "pool") if name == "pool" or _cpu.thread_runtime() == "openmp"]


@pytest.fixture(params=RUNTIMES)
def runtime(request):
    before = _cpu.thread_runtime()
    _cpu.set_thread_runtime(request.param)
    yield request.param
    _cpu.set_thread_runtime(before)


@pytest.fixture
def threads():
    """PyTorch's thread count, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def example(rows=257, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 576, generator=g), torch.randn(576, generator=g)


def bits(t):
    """Compared without PyTorch's own threads, which a forked child must not use."""
    return t.numpy().tobytes()


def test_an_unknown_runtime_is_refused_and_changes_nothing(runtime):
    with pytest.raises(ValueError, match="thread runtime 'gcd' is not available, expected 'pool', or 'openmp'"):
        _cpu.set_thread_runtime("gcd")
    assert _cpu.thread_runtime() == runtime


def test_bits_are_the_same_with_any_number_of_threads(runtime, threads):
    x, weight = example()
    threads(1)
    expected = bits(fastllm.rms_norm(x, weight))
    for count in (2, 3, 7):
        threads(count)
        for _ in range(20):
            assert bits(fastllm.rms_norm(x, weight)) == expected


COUNT = """
import os, torch, fastllm
from fastllm.backends import cpu_module
_cpu = cpu_module()
torch.set_num_threads(1)  # before PyTorch's own ops start threads
x, w, y = torch.ones(999, 576), torch.ones(576), torch.empty(999, 576)
def tasks(threads):
    torch.set_num_threads(threads)
    _cpu.rms_norm(x, w, None, y, None, 1e-6, 0.0, True, torch.get_num_threads())
    return len(os.listdir("/proc/self/task"))
first = tasks(1)
print(_cpu.thread_runtime(), *[tasks(n) - first for n in (1, 2, 4)])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
@pytest.mark.parametrize("name", RUNTIMES)
def test_set_num_threads_is_honoured(name):
    environment = {**os.environ, "FASTLLM_CPU_THREADS": name}
    done = subprocess.run(
        [sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, timeout=SECONDS, check=True
    )
    assert done.stdout.split() == [name, "0", "1", "3"]


def in_child(body):
    """Run body in a forked child; its exit status, or a failure after SECONDS."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"child: {error!r}\n".encode())
            os._exit(1)
    for _ in range(SECONDS * 20):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return pytest.fail(f"the forked child did not end within {SECONDS} s")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_can_go_on(runtime, threads):
    threads(3)
    x, weight = example()
    expected = bits(fastllm.rms_norm(x, weight))  # the parent's threads exist now, the child's do not

    def body():
        for _ in range(10):
            assert bits(fastllm.rms_norm(x, weight)) == expected
        assert _cpu.thread_runtime() == "pool"
        assert in_child(lambda: fastllm.rms_norm(x, weight)) == 0  # and a child of the child

    for _ in range(3):
        assert in_child(body) == 0
    assert bits(fastllm.rms_norm(x, weight)) == expected
    assert _cpu.thread_runtime() == runtime


class Normed(Dataset):
    def __init__(self):
        self.x, self.weight = example(rows=64)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return fastllm.rms_norm(self.x + index, self.weight)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_data_loader_workers_can_call_ops(runtime):
    data = Normed()
    expected = [data[i] for i in range(len(data))]
    loaded = list(DataLoader(data, batch_size=None, num_workers=2, timeout=SECONDS))
    assert all(a.equal(b) for a, b in zip(loaded, expected, strict=True))


def test_concurrent_callers_get_their_own_results(runtime, threads):
    threads(2)
    inputs = [example(rows=40 + 13 * i, seed=i) for i in range(6)]
    expected = [bits(fastllm.rms_norm(x, w)) for x, w in inputs]
    wrong = []

    def call(i):
        for _ in range(100):
            if bits(fastllm.rms_norm(*inputs[i])) != expected[i]:
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(len(inputs))]
    for caller in callers:
        caller.start()
    deadline = time.monotonic() + SECONDS
    for caller in callers:
        caller.join(max(0.0, deadline - time.monotonic()))
    assert not any(caller.is_alive() for caller in callers), "a caller hangs"
    assert not wrong


def test_kernels_release_the_gil():
    """With a switch interval that never ends, another thread runs only where this one lets go of the lock by itself."""
    x, y, weight = torch.ones(1024, 4096), torch.empty(1024, 4096), torch.ones(4096)
    started, state = threading.Event(), {}

    def call():
        state["done"] = False
        started.set()
        _cpu.rms_norm(x, weight, None, y, None, 1e-6, 0.0, True, 1)
        state["done"] = True

    interval = sys.getswitchinterval()
    seen = []
    try:
        sys.setswitchinterval(1000.0)
        for _ in range(20):
            started.clear()
            caller = threading.Thread(target=call)
            caller.start()
            started.wait(SECONDS)
            seen.append(state["done"])
            caller.join(SECONDS)
    finally:
        sys.setswitchinterval(interval)
    assert False in seen, "in 20 calls, no other thread ever ran during the kernel"


EXIT = """
import threading, torch, fastllm
torch.set_num_threads(3)
x, w = torch.ones(999, 576), torch.ones(576)
callers = [threading.Thread(target=fastllm.rms_norm, args=(x, w)) for _ in range(3)]
for caller in callers:
    caller.start()
fastllm.rms_norm(x, w)
print("leaving", flush=True)
"""


# Not with daemon threads: before Python 3.14 those abort the process in PyTorch's own ops too.
@pytest.mark.parametrize("name", RUNTIMES)
def test_a_process_ends_while_workers_wait(name):
    environment = {**os.environ, "FASTLLM_CPU_THREADS": name}
    done = subprocess.run(
        [sys.executable, "-c", EXIT], env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_pool_is_clean_under_the_sanitizers(tmp_path, sanitizer):
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path / "threads"
    sources = [ROOT / "tests/native/threads.cpp", ROOT / "csrc/cpu/parallel.cpp"]
    options = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-fsanitize={sanitizer}", f"-I{ROOT / 'csrc'}"]
    built = subprocess.run(
        [*compiler, *options, *sources, "-o", program, "-pthread", "-ldl"], capture_output=True, text=True, check=False
    )
    if "cannot find" in built.stderr:
        pytest.skip(f"this compiler has no runtime for -fsanitize={sanitizer}")
    assert built.returncode == 0, built.stderr
    clean = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # ours, when the suite itself runs sanitized
    done = subprocess.run([program, "20000"], env=clean, capture_output=True, text=True, timeout=4 * SECONDS, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot run with this kernel's address space randomisation")
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr
