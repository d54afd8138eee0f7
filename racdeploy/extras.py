"""Packages that racdeploy can do without: the extra that brings each one, and what it is for."""

from __future__ import annotations

import importlib.util
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
    Package("optimum", "optimum-onnx", "onnx", "ONNX export of every architecture"),
    Package("huggingface_hub", "huggingface_hub", "hub", "models and bundles of the Hub"),
    Package("math_verify", "math-verify", "math", "scoring formulas"),
    Package("datasets", "datasets", "tasks", "public sets of questions from the Hub"),
    Package("pyarrow", "pyarrow", "tasks", "questions in parquet files"),
    Package("lm_eval", "lm-eval", "ifeval", "scoring IFEval"),
    Package("langdetect", "langdetect", "ifeval", "scoring IFEval"),
    Package("model_signing", "model-signing", "sign", "signing a bundle, checking a signature"),
    Package("OpenSSL", "pyOpenSSL", "sign", "signing a bundle, checking a signature"),
    Package("accelerate", "accelerate", "onnx", "ONNX export of tied weights"),
)
PACKAGES = {package.module: package for package in OPTIONAL}


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
