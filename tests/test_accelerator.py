"""The measurements of benchmarks/accelerator on a CPU: tiny shapes, and what must hold of them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="these compare with PyTorch")

from benchmarks.accelerator import (
    attention,
    bring,
    compare,
    encode,
    generate,
    profile,
    roofline,
    table,
    train,
)
from benchmarks.accelerator.record import Contest, Record
from benchmarks.cards import CARDS

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """PyTorch's threads would wait for cores that other tests have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read(record: Record) -> dict[str, Any]:
    return json.loads(record.path.read_text())


def peers_of(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    (peers,) = [peers for peers in table.groups(found["measurements"]).values() if len(peers) > 1]
    return peers


@pytest.fixture
def record(tmp_path: Path, request: pytest.FixtureRequest) -> Record:
    return Record(tmp_path / "part.json", getattr(request, "param", "train"), 600)


def test_a_record_names_what_it_was_measured_with(record: Record) -> None:
    machine = read(record)["machine"]
    assert {"device", "nvidia_smi", "jax", "torch", "transformers", "cuda_of_torch"} <= set(machine)
    assert machine["device"] == "cpu" and machine["peak_flops"] is None


def test_a_failure_is_kept_and_the_part_goes_on(record: Record) -> None:
    contest = Contest(record, "work", 1, llm="some")

    def too_large() -> Any:
        raise RuntimeError("out of memory")

    assert contest.join("ours", lambda: lambda: 1) == 1
    assert contest.join("eager", too_large) is None
    assert contest.join("lean", lambda: too_large) is None
    assert contest.join("compiled", lambda: lambda: 2) == 2
    found = read(record)["measurements"]
    assert "seconds" in found["work: ours"] and "seconds" in found["work: compiled"]
    assert found["work: eager"]["error"] == "RuntimeError: out of memory"
    assert found["work: lean"]["llm"] == "some" and "seconds" not in found["work: lean"]


@pytest.mark.parametrize("part", [train, generate, encode, compare, attention, profile])
def test_nothing_begins_behind_the_deadline(tmp_path: Path, part: Any) -> None:
    record = Record(tmp_path / "part.json", part.__name__.rpartition(".")[2], 0)
    part.run(record, rehearse=True)
    found = read(record)
    assert not found["finished"] and found["measurements"]
    assert all("skipped" in figures for figures in found["measurements"].values())
    assert "Not measured" in table.tables([found])


def test_what_is_cut_off_keeps_what_it_had(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from benchmarks.accelerator.record import Record
record = Record(Path({str(tmp_path)!r}) / "train.json", "train", 1.5)
record.guard()
record.note("first", seconds=1.0)
record.attempt("second", lambda: time.sleep(60))
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=600, check=True)
    found = json.loads((tmp_path / "train.json").read_text())
    assert done.returncode == 0 and found["measurements"] == {"first": {"seconds": 1.0}}
    assert not found["finished"]


def test_all_peers_learn_the_same(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "TINY", train.TINY[:1])
    monkeypatch.setattr(train, "STEPS", 2)
    train.run(record, rehearse=True)
    found = read(record)
    assert found["measurements"]["ceilings"]["flops_per_second"] > 0
    peers = peers_of(found)
    assert list(peers) == ["ours", "eager", "lean", "compiled"]
    for figures in peers.values():
        assert figures["losses"][1] < figures["losses"][0]
        assert figures["loss_difference"] < 1e-4
    assert peers["ours"]["model_flops"] > 0 and peers["ours"]["hbm_bytes"] > 0
    most = found["measurements"]["tiny-llama, front, 8 rows: ours"]
    # With remat the layers run forwards twice, which is not counted for the MFU.
    assert most["flops"] > most["model_flops"] and most["memory_bytes"] > 0
    assert "| tiny-llama, front, 4 rows |" in table.tables([found])


@pytest.mark.parametrize("record", ["generate"], indirect=True)
def test_all_peers_answer_the_same(record: Record) -> None:
    generate.run(record, rehearse=True)
    found = read(record)
    greedy, beams = table.groups(found["measurements"]).values()
    for peers in (greedy, beams):
        assert list(peers) == ["ours", "transformers", "static"]
        assert all(figures["equal"] == 1 for figures in peers.values())
    assert beams["ours"]["flops"] > greedy["ours"]["flops"] > 0
    assert "2 prompts, 4 beams" in table.tables([found])


@pytest.mark.parametrize("record", ["encode"], indirect=True)
def test_all_peers_encode_the_same(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode.importlib.util, "find_spec", lambda name: None)
    encode.run(record, rehearse=True)
    found = read(record)
    for peers in table.groups(found["measurements"]).values():
        assert peers["plain transformers"]["smallest_cosine"] > 0.99  # in bfloat16
        assert peers["ours"]["seconds"] > 0
    assert "plain transformers" in table.tables([found])


@pytest.mark.parametrize("record", ["attention"], indirect=True)
def test_attention_without_cudnn_is_ours_alone(record: Record) -> None:
    attention.run(record, rehearse=True)
    found = read(record)
    measured = found["measurements"]
    for way in ("forwards", "both ways"):
        assert measured[f"tiny, 32 tokens, {way}: ours"]["seconds"] > 0
        assert "cuDNN" in measured[f"tiny, 32 tokens, {way}: cudnn"]["error"]
        assert f"tiny cap, 32 tokens, {way}: cudnn" not in measured
    assert "failed" in table.tables([found])


@pytest.mark.parametrize("record", ["profile"], indirect=True)
def test_a_profile_says_where_the_time_goes(record: Record) -> None:
    profile.run(record, rehearse=True)
    found = read(record)
    step = found["measurements"]["training step, tiny-llama, 8 rows"]
    assert step["busy_seconds"] > 0 and step["kinds"]["products"] > 0
    assert len(step["kernels"]) <= profile.SHOWN
    assert "decoding, tiny-llama" in table.tables([found])


def test_kernels_are_known_by_name() -> None:
    kinds = ["nvjet_tst_128x256 custom-call", "fmha_cutlass", "loop_add_fusion", "Memcpy D2D", "x"]
    found = [profile.kind_of(name) for name in kinds]
    assert found == ["products", "attention by cuDNN", "elementwise", "copies", "other"]


@pytest.mark.parametrize("record", ["compare"], indirect=True)
def test_a_comparison_comes_back_as_an_archive(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command itself is tested elsewhere: here another stands in for it."""
    results = {
        "methods": {
            name: {"loss": {"value": 1.0, "low": 0.5, "high": 1.5}, "versus": {}}
            for name in ("none", "instruction_only")
        }
    }
    code = f"""
import sys
from pathlib import Path
(workdir,) = (Path(a.split("=")[1]) for a in sys.argv if a.startswith("--workdir="))
(workdir / "checkpoints").mkdir()
(workdir / "checkpoints/large").write_text("left out")
(workdir / "results.json").write_text({json.dumps(results)!r})
"""
    run = compare.TINY[0]._replace(methods=("none", "instruction_only"))
    arguments = compare.command(run, Path("DIR"))[3:]
    assert "--mode=compare" in arguments and "--config.eval.num_beams=1" in arguments
    monkeypatch.setattr(compare, "TINY", [run])
    monkeypatch.setattr(
        compare, "command", lambda _, workdir: [sys.executable, "-c", code, f"--workdir={workdir}"]
    )
    compare.run(record, rehearse=True)
    found = read(record)
    (figures,) = found["measurements"].values()
    assert figures["code"] == 0 and not figures["stopped"]
    with compare.tarfile.open(record.path.parent / figures["archive"]) as packed:
        assert set(packed.getnames()) == {"tiny/results.json", "tiny/log.txt"}
    assert "loss 1.000 [0.500, 1.500]" in table.tables([found])
    compare.run(record, rehearse=True)  # nothing is done twice
    assert read(record)["measurements"]["tiny, 2 methods"]["done_before"]


def test_what_is_too_large_travels_in_pieces(tmp_path: Path) -> None:
    whole, there = tmp_path / "whole", tmp_path / "there"
    whole.write_bytes(os.urandom(10_000))
    loads = bring.cut(whole, "model", tmp_path / "bring", load=4096)
    assert len(loads) == 4 and max(map(bring.size_of, loads)) <= 4096
    assert bring.join(tmp_path / "bring", there)["model"].read_bytes() == whole.read_bytes()


def test_a_missing_piece_is_waited_for_and_a_wrong_one_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    whole.write_bytes(bytes(9000))
    first, second, _ = bring.cut(whole, "model", tmp_path / "bring", load=4096)
    second.rename(tmp_path / "later")
    assert bring.join(tmp_path / "bring", tmp_path) == {}
    assert "pieces [2] of 3 are still missing" in capsys.readouterr().out
    (tmp_path / "later").rename(second)
    (first / "piece").write_bytes(b"other")
    with pytest.raises(SystemExit, match="do not make the file"):
        bring.join(tmp_path / "bring", tmp_path)


def test_no_load_is_larger_than_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bring, "BRING", tmp_path)
    for name in ("wheels", "encoder", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "data/file").write_bytes(bytes(2000))
    bring.pack(tmp_path, tmp_path, [])
    monkeypatch.setattr(bring, "LOAD", 1000)
    with pytest.raises(SystemExit, match="data is larger than a load"):
        bring.pack(tmp_path, tmp_path, [])


def test_the_page_keeps_what_stands_around_the_tables(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nbehind\n")
    table.write(page, "new")
    assert page.read_text() == f"before\n{table.BEGIN}\n\nnew\n\n{table.END}\nbehind\n"
    table.write(page, "newer")
    assert "newer" in page.read_text() and page.read_text().endswith("behind\n")
    assert table.PAGE.read_text().count(table.BEGIN) == 1


def test_scratch_space_is_no_traffic() -> None:
    text = """HloModule jit_f, entry_computation_layout={(bf16[8,16]{1,0}, bf16[16,4]{1,0})->bf16[8,4]{1,0}}

ENTRY %main.1 (a: bf16[8,16], b: bf16[16,4]) -> bf16[8,4] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,4]{1,0} parameter(1)
  %cublas-gemm.1 = (bf16[8,4]{1,0}, s8[33554432]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm"
  ROOT %get-tuple-element.1 = bf16[8,4]{1,0} get-tuple-element(%cublas-gemm.1), index=0
}
"""  # noqa: E501
    moved = roofline.traffic(roofline.WORKSPACE.sub(") custom-call", text)).hbm
    assert moved == 2 * (8 * 16 + 16 * 4 + 8 * 4)


def test_what_bounds_a_program_on_a_known_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "find_card", lambda kind: CARDS["H200"])
    traced = jax.jit(jnp.matmul).trace(*np.ones((2, 256, 256), np.float32))
    figures = roofline.predicted(traced, traced.lower().compile())
    assert figures["flops"] == 2 * 256**3
    assert figures["bound_by"] == "HBM"
    assert figures["bound_seconds"] == pytest.approx(3 * 4 * 256**2 / 4.8e12, rel=0.1)
