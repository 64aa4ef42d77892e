"""The tables of docs/performance.md: `python -m benchmarks.accelerator.table FILE.json ...`"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path("docs/performance.md")
BEGIN, END = "<!-- made by benchmarks.accelerator.table: begin -->", "<!-- end -->"
GIB = 2**30
Measurements = Mapping[str, Mapping[str, Any]]
Rows = Iterable[Sequence[str]]


def markdown(header: Sequence[str], rows: Rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(value: float | None, form: str, factor: float = 1.0, unit: str = "") -> str:
    return "" if value is None else f"{value * factor:{form}}{unit}"


def groups(found: Measurements) -> dict[str, dict[str, Mapping[str, Any]]]:
    """NAME: PEER -> figures, as NAME -> PEER -> figures, of those that ours was timed in."""
    grouped: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, figures in found.items():
        if "peer" in figures:
            grouped.setdefault(name.rpartition(": ")[0], {})[figures["peer"]] = figures
    return {name: peers for name, peers in grouped.items() if "seconds" in peers.get("ours", {})}


def faster(peers: Mapping[str, Mapping[str, Any]], peer: str) -> str:
    """How many times faster ours is."""
    figures = peers.get(peer, {})
    if "seconds" in figures:
        return f"{figures['seconds'] / peers['ours']['seconds']:.2f} x"
    return "failed" if "error" in figures else ""


def bound(ours: Mapping[str, Any], calls: int) -> list[str]:
    """The planner's bound of one call in ms, by what, and the time taken over it."""
    if "bound_seconds" not in ours:
        return ["", "", ""]
    seconds = ours["seconds"] / calls
    least = ours["bound_seconds"]
    return [figure(least, ".2f", 1e3), ours["bound_by"], f"{seconds / least:.2f}"]


BOUND = ("bound, ms", "by", "time over bound")


def train(content: Mapping[str, Any]) -> str:
    peak, rows = content["machine"]["peak_flops"], []
    for name, peers in groups(content["measurements"]).items():
        ours = peers["ours"]
        seconds = ours["seconds"] / ours["steps"]
        eager = peers.get("eager", {}).get("memory_bytes")
        rows.append(
            [
                name,
                figure(seconds, ".1f", 1e3),
                figure(ours["tokens"] / seconds, ",.0f"),
                figure(peak and ours["model_flops"] / seconds / peak, ".1%"),
                figure(ours["memory_bytes"], ".1f", 1 / GIB),
                figure(eager, ".1f", 1 / GIB),
                *(faster(peers, peer) for peer in ("eager", "lean", "compiled")),
                *bound(ours, ours["steps"]),
            ]
        )
    header = ["training step", "ms", "tokens/s", "MFU", "GiB", "eager's GiB"]
    return markdown([*header, "x eager", "x lean", "x compiled", *BOUND], rows)


def generate(content: Mapping[str, Any]) -> str:
    rows = []
    for name, peers in groups(content["measurements"]).items():
        ours = peers["ours"]
        tokens = ours["prompts"] * ours["new_tokens"]
        equal = peers.get("transformers", {}).get("equal")
        rows.append(
            [
                name,
                figure(ours["seconds"], ".0f", 1e3),
                figure(tokens / ours["seconds"], ",.0f"),
                faster(peers, "transformers"),
                faster(peers, "static"),
                figure(equal, ".0%"),
                *bound(ours, 1),
            ]
        )
    header = ["decoding", "ms", "tokens/s", "x transformers", "x static cache", "equal answers"]
    return markdown([*header, *BOUND], rows)


def encode(content: Mapping[str, Any]) -> str:
    rows = []
    for name, peers in groups(content["measurements"]).items():
        ours = peers["ours"]
        for peer, figures in peers.items():
            if peer != "ours":
                rows.append(
                    [
                        name,
                        f"{ours['texts']:,}",
                        figure(ours["texts"] / ours["seconds"], ",.0f"),
                        peer,
                        faster(peers, peer),
                        figure(figures.get("smallest_cosine"), ".4f"),
                    ]
                )
    return markdown(["encoding", "texts", "texts/s", "peer", "ours is", "smallest cosine"], rows)


def compare(content: Mapping[str, Any]) -> str:
    rows = []
    for name, figures in content["measurements"].items():
        for method, entry in figures.get("results", {}).items():
            metrics = [m for m in ("loss", "rouge1", "rougeL", "style") if m in entry]
            cells = [
                f"{metric} {entry[metric]['value']:.3f} [{entry[metric]['low']:.3f}, "
                f"{entry[metric]['high']:.3f}]"
                for metric in metrics
            ]
            versus = entry["versus"].get("instruction_only", {}).get("loss")
            against = f"{versus['difference']:+.3f}, p = {versus['p_value']:.4f}" if versus else ""
            rows.append([name, method, ", ".join(cells), against])
    return markdown(["comparison", "method", "means over seeds", "loss less no history's"], rows)


def attention(content: Mapping[str, Any]) -> str:
    rows = []
    for name, peers in groups(content["measurements"]).items():
        ours = peers["ours"]
        rows.append(
            [
                name,
                str(ours["rows"]),
                figure(ours["seconds"] / ours["calls"], ".2f", 1e3),
                *(faster(peers, peer) for peer in ("cudnn", "cudnn lengths")),
                *bound(ours, ours["calls"]),
            ]
        )
    header = ["attention", "rows", "ms", "x cuDNN, masked", "x cuDNN, lengths"]
    return markdown([*header, *BOUND], rows)


def profile(content: Mapping[str, Any]) -> str:
    rows = []
    for name, figures in content["measurements"].items():
        if "kinds" in figures:
            busy = figures["busy_seconds"]
            kinds = ", ".join(f"{k} {v / busy:.0%}" for k, v in figures["kinds"].items())
            waiting = max(0.0, 1 - busy / figures["seconds"])
            top = figures["kernels"][0]
            longest = f"`{top['kernel'][:60]}` {top['seconds'] / busy:.0%}"
            ms = 1e3 * figures["seconds"] / figures["calls"]
            rows.append([name, f"{ms:.1f}", f"{waiting:.0%}", kinds, longest])
    header = ["profile", "ms", "waiting", "of the card's time", "longest kernel"]
    return markdown(header, rows)


PARTS = {
    "train": train,
    "generate": generate,
    "encode": encode,
    "compare": compare,
    "attention": attention,
    "profile": profile,
}


def failures(content: Mapping[str, Any]) -> str:
    lines = [
        f"- {name}: {(figures.get('error') or figures['skipped']).splitlines()[0][:160]}"
        for name, figures in content["measurements"].items()
        if figures.get("error") or figures.get("skipped")
    ]
    return "\n".join(["Not measured:", "", *lines]) if lines else ""


def tables(contents: Iterable[Mapping[str, Any]]) -> str:
    """Each part's table, under the card that it was measured on."""
    found = []
    for content in contents:
        machine = content["machine"]
        title = f"### {content['part']}: {machine['nvidia_smi'] or machine['device']}"
        versions = ", ".join(f"{name} {machine[name]}" for name in ("jax", "torch", "transformers"))
        about = f"{content['started']}; {versions}."
        if not content["finished"]:
            about += " It was cut off."
        found += [title, about, PARTS[content["part"]](content), failures(content)]
    return "\n\n".join(filter(None, found))


def write(page: Path, text: str) -> None:
    """Puts the text between the page's marks."""
    before, rest = page.read_text().split(BEGIN)
    behind = rest.split(END, 1)[1]
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{behind}")


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.accelerator.table")
    parser.add_argument("files", type=Path, nargs="+", help="what the parts wrote")
    given = parser.parse_args()
    contents = [json.loads(file.read_text()) for file in given.files]
    contents.sort(key=lambda content: list(PARTS).index(content["part"]))
    write(PAGE, tables(contents))


if __name__ == "__main__":
    main()
