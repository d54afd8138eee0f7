"""Packages that racdeploy can do without: the extra that brings each one, and what it is for."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Package:
    """A package of an extra: what is imported, what pip installs, what does not work without."""

    module: str
    name: str
    extra: str
    purpose: str


OPTIONAL = (
    Package("torch", "torch", "prune", "traces and pruning"),
    Package("transformers", "transformers", "prune", "traces and pruning"),
    Package("safetensors", "safetensors", "prune", "pruning"),
    Package("sentencepiece", "sentencepiece", "gguf", "GGUF export of SentencePiece tokenizers"),
    Package("llama_cpp", "llama-cpp-python", "llamacpp", "running and verifying GGUF, K-quants"),
    Package("onnxruntime", "onnxruntime", "ort", "running and verifying ONNX"),
    Package("httpx", "httpx", "server", "asking a server"),
    Package("starlette", "starlette", "serve", "serving a bundle"),
    Package("uvicorn", "uvicorn", "serve", "serving a bundle"),
    Package("onnx", "onnx", "onnx", "ONNX export"),
    Package("onnxruntime_genai", "onnxruntime-genai", "onnx", "the faster ONNX graph"),
    Package("onnxscript", "onnxscript", "onnx", "ONNX graphs by torch's own exporter"),
    Package("optimum", "optimum-onnx", "optimum", "ONNX export under transformers 4.57"),
    Package("huggingface_hub", "huggingface_hub", "hub", "models and bundles of the Hub"),
    Package("math_verify", "math-verify", "math", "scoring formulas"),
    Package("datasets", "datasets", "tasks", "public sets of questions from the Hub"),
    Package("pyarrow", "pyarrow", "tasks", "questions in parquet files"),
    Package("lm_eval", "lm-eval", "ifeval", "scoring IFEval"),
    Package("langdetect", "langdetect", "ifeval", "scoring IFEval"),
    Package("model_signing", "model-signing", "sign", "signing a bundle, checking a signature"),
    Package("OpenSSL", "pyOpenSSL", "sign", "signing a bundle, checking a signature"),
    Package("accelerate", "accelerate", "optimum", "optimum's export of tied weights"),
)
PACKAGES = {package.module: package for package in OPTIONAL}


@dataclass(frozen=True)
class Separate:
    """Packages that get an environment of their own where they do not go with what is installed.

    ``module`` proves that they were installed, ``size`` says what they take.
    """

    requirements: tuple[str, ...]
    module: str
    size: str


SEPARATE = {
    "optimum": Separate(
        (
            "optimum-onnx>=0.1,<0.2",
            "transformers>=4.51,<4.58",
            "accelerate>=1",
            "onnx>=1.17",
            "onnxruntime>=1.32",
            "torch>=2.5",
            "safetensors>=0.4.5",
            # what racdeploy's own modules import there
            "numpy>=1.26",
            "pydantic>=2.7",
            "platformdirs>=4.2",
            "filelock>=3.16",
            "tokenizers>=0.20",
        ),
        "optimum.exporters.onnx",
        "about 1.3 GB, and more where torch brings CUDA",
    )
}


def is_installed(module: str) -> bool:
    """Return whether a module could be imported; it is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # an import hook refuses it
        return False


def installed_version(package: str) -> str:
    """Return the version of a package, or an empty string where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def installed_release(package: str) -> tuple[int, ...]:
    """Return the release of a package as numbers, ``(4, 57, 6)``, or nothing without one."""
    found = re.match(r"\d+(?:\.\d+)*", installed_version(package))
    return tuple(map(int, found[0].split("."))) if found else ()
