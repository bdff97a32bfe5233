"""The isolated decoder: killed when it hangs, replaced when it dies, and nothing left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.datasets.conftest import encode
from tokensieve.datasets import Limits, decode_client, read_video
from tokensieve.errors import DecoderCrash, MediaTimeout, MediaTooLarge


def idle_pid() -> int:
    return decode_client._idle[-1].process.pid


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def run_script(text: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)], capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(autouse=True)
def fresh(clip):
    decode_client.shut_down()
    read_video(clip, num_frames=1)  # one idle decoder


def test_one_process_serves_many_calls(clip):
    pid = idle_pid()
    for _ in range(3):
        read_video(clip, num_frames=2)
    with pytest.raises(MediaTooLarge):
        read_video(clip, num_frames=2, limits=Limits(max_pixels=10))
    assert idle_pid() == pid and len(decode_client._ALL) == 1


def test_a_hang_is_killed_and_the_next_call_works(clip):
    pid = idle_pid()
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(MediaTimeout, match="timeout_s=1 s") as caught:
        read_video(clip, limits=Limits(timeout_s=1))
    assert caught.value.retryable
    assert not exists(pid)  # neither running nor a zombie
    assert read_video(clip).num_frames == 8


def test_death_in_the_middle_of_a_call(clip):
    pid = idle_pid()
    os.kill(pid, signal.SIGSTOP)  # so that the call is certainly under way when it dies
    timer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
    timer.start()
    with pytest.raises(DecoderCrash) as caught:
        read_video(clip)
    assert not caught.value.retryable and not exists(pid)
    assert read_video(clip).num_frames == 8


def test_death_while_idle_is_not_blamed_on_the_next_file(clip):
    pid = idle_pid()
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    assert read_video(clip).num_frames == 8
    assert not exists(pid) and idle_pid() != pid


def test_interrupt_kills_the_decoder(clip, monkeypatch):
    pid = idle_pid()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(decode_client.Collector, "room", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_video(clip)
    monkeypatch.undo()
    assert not exists(pid)
    assert read_video(clip).num_frames == 8


def test_memory_limit(folder):
    path = encode(folder / "big.mp4", np.zeros((3, 2160, 3840, 3), np.uint8), options={"preset": "ultrafast"})
    with pytest.raises((MediaTooLarge, DecoderCrash)) as caught:
        read_video(path, num_frames=3, limits=Limits(memory_bytes=30 * 2**20))
    assert "memory_bytes" in str(caught.value)
    assert read_video(path, num_frames=3).data.shape == (3, 2160, 3840, 3)


def test_threads_get_decoders_of_their_own(clip):
    expected = read_video(clip, num_frames=5).data

    def read(number):
        if number % 5 == 4:
            with pytest.raises(MediaTooLarge):
                read_video(clip, limits=Limits(max_pixels=10))
        result = read_video(clip, num_frames=5)
        return np.array_equal(result.data, expected)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, range(30)))
    assert len(decode_client._idle) <= decode_client.MAX_IDLE
    assert set(decode_client._idle) == decode_client._ALL


def test_shut_down_leaves_nothing(clip):
    pid = idle_pid()
    decode_client.shut_down()
    assert not exists(pid)
    assert read_video(clip).num_frames == 8


def test_a_worn_decoder_is_replaced(clip, monkeypatch):
    monkeypatch.setattr(decode_client, "MAX_JOBS", 2)
    pids = set()
    for _ in range(4):
        read_video(clip, num_frames=1)
        pids |= {decoder.process.pid for decoder in decode_client._ALL}
    assert len(pids) >= 2 and sum(map(exists, pids)) <= 1


def test_limits_of_the_process(clip):
    with open(f"/proc/{idle_pid()}/limits") as file:
        rows = {line[:26].strip(): line[26:].split()[:2] for line in file}
    assert rows["Max core file size"] == ["0", "0"] and rows["Max file size"] == ["0", "0"]
    assert rows["Max address space"][0] != "unlimited" and rows["Max cpu time"][0] != "unlimited"
    assert int(rows["Max open files"][1]) <= 64


def test_no_torch_and_no_secrets_in_the_process(clip, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "secret")
    decode_client.shut_down()
    read_video(clip, num_frames=1)
    with open(f"/proc/{idle_pid()}/environ", "rb") as file:
        assert b"SOME_TOKEN" not in file.read()
    with open(f"/proc/{idle_pid()}/maps") as file:
        assert "libtorch" not in file.read()


def test_exit_of_the_parent_ends_the_decoder(clip):
    pid = run_script(f"""
        from tokensieve.datasets import read_video, decode_client
        read_video({str(clip)!r})
        print(decode_client._idle[0].process.pid)
    """)
    assert not exists(int(pid))


def test_a_killed_parent_leaves_no_orphan(clip):
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from tokensieve.datasets import read_video, decode_client; read_video(sys.argv[1]);"
            "print(decode_client._idle[0].process.pid, flush=True); time.sleep(100)",
            str(clip),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while _is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(pid)


def _is_running(pid: int) -> bool:
    """False for a zombie, too: here nobody may be left to reap it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_fork(clip):
    """Parent and forked child both go on reading; the child's end does not take the parent's decoder along."""
    out = run_script(f"""
        import os
        from tokensieve.datasets import read_video, decode_client
        def read():
            return read_video({str(clip)!r}).data.sum()
        first = read()
        pid = decode_client._idle[0].process.pid
        child = os.fork()
        if child == 0:
            assert not decode_client._idle and read() == first
            assert decode_client._idle[0].process.pid != pid
            decode_client.shut_down()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert read() == first and decode_client._idle[0].process.pid == pid
        print("fine")
    """)
    assert out == "fine"


def test_the_main_script_is_not_run_again(clip, tmp_path):
    """Unlike multiprocessing's spawn: a script without a __main__ guard works."""
    script = tmp_path / "script.py"
    script.write_text(f"from tokensieve.datasets import read_video\nprint(read_video({str(clip)!r}).num_frames)\n")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100, check=True)
    assert result.stdout == "8\n"


def test_modules_in_the_working_directory_are_not_picked_up(clip, tmp_path, monkeypatch):
    (tmp_path / "av.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    decode_client.shut_down()
    assert read_video(clip).num_frames == 8


def test_importing_the_room_is_cheap():
    run_script("""
        import sys
        import tokensieve.datasets
        tokensieve.datasets.read_video
        heavy = {"torch", "av", "PIL", "transformers", "decord"} & set(sys.modules)
        assert not heavy, heavy
    """)
