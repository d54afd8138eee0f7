"""Compare a GPU with the CPU, step by step: the same numbers within rounding, and the seconds.

A sum of n products in float32 has an error of at most 8 √n u of its terms' size, with u = 2⁻²⁴, in
whatever order it is added (Higham and Mary 2019, SIAM J. Sci. Comput. 41(5), theorem 2.4), so two
devices differ by at most twice that. TF32, which has 11 bits, fails the first step. The error of a
solution grows by the condition number, which eight random tokens an input limit (Marchenko and
Pastur 1967). Zeros and codes are compared by their output error: choices that rounding exchanges
are equally good within its size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.sources import EMBEDDED, resolve_model
from racdeploy.pruning.device import CPU
from racdeploy.pruning.methods import sparsegpt
from racdeploy.pruning.walk.statistics import InputStatistic
from racdeploy.pruning.weights.patterns import Unstructured
from racdeploy.pruning.weights.rounding import round_to_grid
from racdeploy.quant import load_grid
from racdeploy.recipe import Pruning, Recovery
from racdeploy.recovery.divergence import LMHead, kl_and_gradient
from racdeploy.recovery.optimizer import MaskedAdam
from racdeploy.recovery.student import Student
from racdeploy.recovery.training_run import TrainingRun

WIDTH = 2048  # inputs and outputs of the linear
_BATCH_TOKENS = 128
_CONDITION = 4.4  # ((1 + √⅛) / (1 − √⅛))², of eight tokens an input


def name_gpu(device: torch.device) -> str:
    """Return the name of an NVIDIA card."""
    return torch.cuda.get_device_name(device)


def compare_with_cpu(device: torch.device) -> Iterator[tuple[str, bool, str]]:
    """Yield each step that a GPU computes: its name, whether the results agree, and the figures."""
    if device.type != CPU.type:
        list(_measure(device))  # the first run loads the device's kernels

    for on_cpu, on_device in zip(_measure(CPU), _measure(device), strict=True):
        step, cpu_s, expected_X, tolerance = on_cpu
        _, device_s, found_X, _ = on_device

        difference = float((found_X - expected_X).abs().max() / expected_X.abs().max())
        figures = f"difference {difference:.1e}, at most {tolerance:.1e} by rounding"
        yield step, difference <= tolerance, f"CPU {cpu_s:.2f} s, here {device_s:.2f} s, {figures}"


def _measure(device: torch.device) -> Iterator[tuple[str, float, Tensor, float]]:
    """Yield name, seconds, result and tolerance of each step."""
    start = time.perf_counter()
    for step, result_X, tolerance in _run_steps(device):
        on_cpu_X = torch.as_tensor(result_X).cpu()  # waits for the device
        yield step, time.perf_counter() - start, on_cpu_X, tolerance
        start = time.perf_counter()


def _run_steps(device: torch.device) -> Iterator[tuple[str, Tensor | float, float]]:
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(8 * WIDTH, WIDTH, generator=generator).to(device)
    weight_OI = torch.randn(WIDTH, WIDTH, generator=generator).to(device)

    statistic = InputStatistic(WIDTH, device)
    for x_TI in torch.split(x_NI, _BATCH_TOKENS):
        statistic.add(x_TI[None], None, torch.zeros(1, _BATCH_TOKENS))
    hessian = statistic.hessian(damping=0.01)
    yield "statistics", hessian.matrix_II, _bound_rounding(_BATCH_TOKENS)

    tolerance = _CONDITION * _bound_rounding(WIDTH)
    pruned = sparsegpt.prune(weight_OI.clone(), hessian, Unstructured(0.5), Pruning())
    yield "solving", hessian.energy(weight_OI - pruned.weight_OI), tolerance

    rounded_OI, _ = round_to_grid(pruned, weight_OI, hessian, load_grid("q4_k"))
    yield "codes", hessian.energy(weight_OI - rounded_OI), tolerance

    # In each of 4 blocks 28 products of width 768 follow each other: 7 forward, 7 again, 14 back.
    # Moments are in bfloat16.
    yield "recovery", _run_recovery_step(device), 4 * 28 * _bound_rounding(768) + 2**-8


def _run_recovery_step(device: torch.device) -> Tensor:
    """Train the embedded model for a step, to the states of other tokens; return its moments."""
    model = Checkpoint(resolve_model(EMBEDDED).folder)
    out = model.folder  # nothing is written
    run = TrainingRun(
        sparse=model,
        dense=model,
        sources=(),
        train_traces=(),
        held_out=(),
        settings=Recovery(),
        tokens=0,
        direction="forward",
        folder=out,
        out=out,
        device=device,
    )

    student = Student(run, model.shape.prunable_weights)
    ids_BT = torch.arange(4096).view(16, 256) % 500
    hidden_ND = student.hidden_states(ids_BT, training=True).flatten(0, 1)
    own_ND = hidden_ND.detach()
    weight_N = own_ND.new_full((4096,), 1 / 4096)
    head = LMHead.from_checkpoint(model, device)
    other_ND = own_ND.roll(1, 0)
    _, gradient_ND = kl_and_gradient(head, own_ND, other_ND, weight_N, direction="forward")
    student.backward(hidden_ND, gradient_ND)

    optimizer = MaskedAdam(student.weights, masked=())
    optimizer.step(learning_rate=1e-3, gradient_norm=1.0)
    return torch.cat([first.flatten().float() for first, _ in optimizer.moments.values()])


def _bound_rounding(terms: int) -> float:
    """Return the largest difference of two float32 sums, relative to the size of their terms."""
    return 2 * 8 * math.sqrt(terms) * 2**-24
