"""Print a hash of everything that racdeploy exports: run it before and after a change that must
change no byte.

    python -m benchmarks.export_hashes build/before > before.txt
    python -m benchmarks.export_hashes build/after > after.txt; diff before.txt after.txt

Runs the ``racdeploy`` beside the interpreter on one thread, with the embedded model and tiny random
ones. Tensors are hashed in order, with name, type and bytes; metadata apart from them, without the
keys that name a version. What is refused has an exit code in place of hashes. Compare runs of one
machine: another processor rounds otherwise. On one core everything takes 13 minutes.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import onnx

from tests.support.tiny_models import FAMILIES, make_checkpoint

Commands = Iterator[tuple[str, str]]
"""Names and commands; ``OUT`` is a new folder, ``$(…)`` the folder that another command prints."""
PROGRAM = Path(sys.executable).parent / "racdeploy"
VERSIONED = {"general.quantized_by", "racdeploy.version", "racgguf.sha256", "racgguf.size_bytes"}
# Dates, times, versions, and hashes of code
SKIPPED = re.compile(r"\.lock|README\.md|(inputs|stage|racdeploy)\.json|records\.jsonl|report\..*")
BRIEF = "--work work --threads 1 --set calibration.keep_truncated=true --set traces.max_new_tokens="
REASONER = f"tiny-reasoner {BRIEF}256 --trace-prompts 16 --set calibration.held_out_share=0.25"
RANDOM = f"{BRIEF}32 --trace-prompts 8"
ZEROS = {
    "magnitude": "--sparsity 0.5 --method magnitude",
    "wanda": "--sparsity 0.5 --method wanda",
    "sparsegpt": "--sparsity 0.5",
    "sparsegpt-alone": "--sparsity 0.5 --set prune.refit_steps=0 "
    "--set 'prune.target=\"linear_output\"'",
    "admm": "--sparsity 0.5 --method admm",
    "2of4": "--pattern 2:4",
    "error": "--sparsity 0.5 --set 'prune.allocation=\"error\"'",
    "prompt": "--sparsity 0.5 --calibration prompt",
    "cut": "--sparsity 0.5 --keep ffn=0.75",
}
CUTS = ("ffn=0.5", "heads=0.75", "kv_groups=0.5", "blocks=0.75", "experts=0.5")
CODES = ("q4_0", "q4_k", "q3_k", "q2_k", "q8_0", "sparse_q4", "matmulnbits_4", "matmulnbits_8")
METHODS = {"full": "on_policy=0.0", "blockwise": "on_policy=0.0", "scales": "on_policy=0.0"}
PRUNED_FAMILIES = ("gemma3_text", "gpt_oss", "granitemoehybrid", "lfm2", "phi3", "qwen3_moe")


def list_exports(quants: Iterable[str]) -> Commands:
    """Yield exports of every number format, packed and not."""
    sparse = f"$(prune {REASONER} --sparsity 0.5)"
    for quant in quants:
        options = f"--quant {quant} --allow-losing-zeros --out OUT/model.gguf"
        yield f"gguf/{quant}", f"export tiny-reasoner {options}"
        yield f"gguf/{quant}-sparse", f"export {sparse} {options}"
        packed = f"packing/{quant}/model.racgguf"
        yield (
            f"packing/{quant}",
            f"export {sparse} --quant {quant} --packing bitmask --out {packed}",
        )
        yield f"packing/{quant}-unpacked", f"unpack {packed} --out OUT/model.gguf"

    for quant in ("f32", "matmulnbits_4", "matmulnbits_8", "k_quant"):
        for packing in ("plain", "bitmask_graph", "bitmask_op"):
            options = f"--target onnx --quant {quant} --packing {packing} --out OUT/model.onnx"
            yield f"onnx/{quant}-{packing}", f"export {sparse} {options}"


def list_prunings() -> Commands:
    """Yield what makes pruned models, and exports of those whose codes were chosen."""
    yield "zeros/traces", f"traces {REASONER}"
    for name, options in ZEROS.items():
        yield f"zeros/{name}", f"prune {REASONER} {options}"

    for cut in CUTS:
        model = f"models/qwen3_moe {RANDOM}" if "experts" in cut else REASONER
        for criterion in ("error", "magnitude"):
            options = f"--keep {cut} --set 'structure.criterion=\"{criterion}\"'"
            yield f"structures/{cut}-{criterion}", f"prune {model} {options}"
    fewer = "--keep vocabulary=416 --tasks multiplication"
    yield "structures/vocabulary", f"prune {REASONER} {fewer}"

    for quant in CODES:
        target = "onnx" if quant.startswith("matmulnbits") else "gguf"
        optimized = "--set 'export.rounding=\"optimized\"'"
        options = f"{optimized} --set 'export.quant=\"{quant}\"' --target {target}"
        pruning = f"prune {REASONER} --sparsity 0.5 {options}"
        yield f"codes/{quant}", pruning
        options = f"--allow-losing-zeros --target {target} --out OUT/model.{target}"
        yield f"codes/{quant}-exported", f"export $({pruning}) --quant {quant} {options}"

    models = REASONER.replace(" ", f" $(prune {REASONER} --sparsity 0.75) ", 1)
    few = "--recover-tokens 20000 --set recover.rounds=1 --set recover.max_accuracy_drop=0.5"
    for method, setting in METHODS.items():
        options = f"{few} --set 'recover.methods=[\"{method}\"]' --set recover.{setting}"
        yield f"recovered/{method}", f"recover {models} {options}"


def list_models() -> Commands:
    """Yield what is made of random models of every family, and whole builds."""
    for family in FAMILIES:
        for quant in ("q8_0", "q4_k_m", "mxfp4_moe"):
            options = f"--quant {quant} --out OUT/model.gguf"
            yield f"families/{family}-{quant}", f"export {name_folder(family)} {options}"
    for family in PRUNED_FAMILIES:
        yield f"families/{family}-pruned", f"prune {name_folder(family)} {RANDOM} --sparsity 0.5"

    brief = "--tier smoke --prompts 2 --out OUT/bundle"
    mix = '--quant q4_k --set \'export.tensors={"ffn_down"="q6_k"}\''
    yield "bundles/default", f"build {REASONER} --more-targets onnx {brief}"
    yield "bundles/mix", f"build {REASONER} {mix} {brief}"
    for exporter in ("torch", "optimum"):
        options = f"--target onnx --quant f32 --set 'export.exporter=\"{exporter}\"'"
        yield f"bundles/{exporter}", f"build models/qwen3 {RANDOM} {options} {brief}"


def name_folder(family: str) -> str:
    """Return the folder of a random model; of one called phi3, llama.cpp asks for a token."""
    return "models/" + family.replace("phi3", "phi")


@cache
def run(command: str) -> Any:
    """Return the object that a command prints; of one that refuses nothing but its exit code."""
    command = re.sub(r"\$\((.*?)\)", lambda inner: run(inner[1]).get("folder", "none"), command)
    print(command, file=sys.stderr, flush=True)
    arguments = [str(PROGRAM), *shlex.split(command), "--json"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode in (0, 1, 3):  # a bundle whose verdict is no, or unknown, is one
        return json.loads(done.stdout)
    print(done.stdout, done.stderr, file=sys.stderr, flush=True)
    return {"refusal": f"exit {done.returncode}"}


def describe(name: str, command: str) -> Iterator[str]:
    """Run a command and yield a line with the hashes of each file that it wrote."""
    out = Path(name)
    out.mkdir(parents=True)
    printed = run(command.replace("OUT", name))
    if "refusal" in printed:
        yield f"{name}  {printed['refusal']}"
        return

    folder = out if any(out.iterdir()) else Path(printed["folder"])
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not SKIPPED.fullmatch(file.name):
            hashes = [f"{what} {digest(values)}" for what, values in read(file).items()]
            yield "  ".join([name, file.relative_to(folder).as_posix(), *hashes])


def digest(values: Iterable[Any]) -> str:
    """Return a hash of bytes, and of other values as they print."""
    found = hashlib.sha256()
    for value in values:
        found.update(value if isinstance(value, bytes) else repr(value).encode())
    return found.hexdigest()[:16]


def read(file: Path) -> dict[str, list[Any]]:
    """Return tensors and metadata of a GGUF file or a graph, each for itself, or bytes."""
    if file.suffix in (".gguf", ".racgguf"):
        reader = gguf.GGUFReader(file)
        tensors: list[Any] = []
        for each in reader.tensors:
            kind, shape = int(each.tensor_type), each.shape.tolist()
            tensors += [(each.name, kind, shape), each.data.tobytes()]
        fields = [field for key, field in reader.fields.items() if key not in VERSIONED]
        return {"tensors": tensors, "metadata": [(f.name, f.types, f.contents()) for f in fields]}

    if file.suffix == ".onnx":
        model = onnx.load(str(file), load_external_data=False)
        nodes = [*model.graph.node, *model.graph.input, *model.graph.output]
        for node in nodes:
            node.ClearField("metadata_props")  # torch names lines of code there
        tensors = [each.SerializeToString(deterministic=True) for each in model.graph.initializer]
        structure = [each.SerializeToString(deterministic=True) for each in nodes]
        properties = [(p.key, p.value) for p in model.metadata_props if p.key not in VERSIONED]
        return {"tensors": tensors, "nodes": structure, "metadata": properties}

    return {"bytes": [file.read_bytes()]}


def main() -> None:
    """Run the commands and print the hashes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path, help="new folder for all that is written")
    parser.add_argument("--only", nargs="+", default=[""], help="what names begin with, as gguf")
    arguments = parser.parse_args()

    arguments.work.mkdir(parents=True)
    os.chdir(arguments.work)  # metadata names the model by its path
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    os.environ |= threads | {"XDG_CACHE_HOME": str(Path("cache").resolve())}
    for family in FAMILIES:
        make_checkpoint(Path(name_folder(family)), family)

    plugins = run("plugins")
    exports = list_exports([*plugins["quant"], *plugins["presets"]])
    lines: list[str] = []
    for name, command in (*exports, *list_prunings(), *list_models()):
        if name.startswith(tuple(arguments.only)):
            lines += describe(name, command)
    print("\n".join(sorted(lines)))


if __name__ == "__main__":
    main()
